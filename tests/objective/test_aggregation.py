import pytest
import torch

from trl_grpo_ext.objective import AGGREGATIONS, StepNormalizer

# B=3, C=4: lengths 4, 1, 2. All sizes differ, so that no wrong denominator gives the right number.
LOSS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [7.0, 99.0, 99.0, 99.0], [5.0, 6.0, 99.0, 99.0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
NORM = StepNormalizer(num_sequences=3, num_tokens=7, dapo_tokens=14, max_completion_length=10)
EXPECTED = {
    # (10 / 4 + 7 / 1 + 11 / 2) / 3 = 15 / 3
    "grpo": 5.0,
    # (10 + 7 + 11) / (3 * 10)
    "dr_grpo": 28 / 30,
    # 28 / 7
    "bnpo": 4.0,
    # 28 / 14
    "dapo": 2.0,
}


def test_the_table_is_covered():
    assert set(EXPECTED) == set(AGGREGATIONS)


@pytest.mark.parametrize("name", EXPECTED)
def test_values(name):
    torch.testing.assert_close(AGGREGATIONS[name](LOSS, MASK, NORM), torch.tensor(EXPECTED[name]))


@pytest.mark.parametrize("name", EXPECTED)
def test_micro_batches_add_up_however_they_are_dealt(name):
    aggregate = AGGREGATIONS[name]
    for deal in ([[0], [1, 2]], [[0, 1], [2]], [[0], [1], [2]], [[], [2, 0, 1]]):
        total = sum(aggregate(LOSS[rows], MASK[rows], NORM) for rows in deal)
        torch.testing.assert_close(total, torch.tensor(EXPECTED[name]))


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("grpo", [1 / 12, 1 / 3, 1 / 6]),  # 1 / (3 |o_i|)
        ("dr_grpo", [1 / 30] * 3),
        ("bnpo", [1 / 7] * 3),
        ("dapo", [1 / 14] * 3),
    ],
)
def test_gradient_is_the_weight_of_a_token(name, weights):
    loss = LOSS.clone().requires_grad_()
    AGGREGATIONS[name](loss, MASK, NORM).backward()
    torch.testing.assert_close(loss.grad, torch.tensor(weights).unsqueeze(1) * MASK)


@pytest.mark.parametrize("name", EXPECTED)
def test_one_value_per_completion_counts_for_each_of_its_tokens(name):
    per_completion = torch.tensor([[1.0], [2.0], [3.0]])
    repeated = per_completion.expand(3, 4)
    assert torch.equal(AGGREGATIONS[name](per_completion, MASK, NORM), AGGREGATIONS[name](repeated, MASK, NORM))


@pytest.mark.parametrize("name", EXPECTED)
def test_an_empty_completion_is_worth_nothing_and_divides_by_one(name):
    norm = StepNormalizer(num_sequences=3, num_tokens=0, dapo_tokens=0, max_completion_length=10)
    loss = LOSS.clone().requires_grad_()
    value = AGGREGATIONS[name](loss, torch.zeros_like(MASK), norm)
    value.backward()
    assert value.item() == 0.0
    assert loss.grad.eq(0).all()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_off_the_mask_does_not_matter(name):
    loss = torch.where(MASK.bool(), LOSS, torch.inf)
    torch.testing.assert_close(AGGREGATIONS[name](loss, MASK, NORM), torch.tensor(EXPECTED[name]))


def test_dapo_with_completions_of_several_generations():
    # One denominator for each completion, and at least 1: 10 / 5 + 7 / 2 + 11 / 1
    norm = StepNormalizer(3, 7, dapo_tokens=torch.tensor([5.0, 2.0, 0.0]), max_completion_length=10)
    torch.testing.assert_close(AGGREGATIONS["dapo"](LOSS, MASK, norm), torch.tensor(16.5))
