import math

import pytest
import torch

from trl_grpo_ext.objective import StepNormalizer, grpo_loss

# B=2, C=3. Ratios 1.5, 1 (first completion, two tokens) and 0.5, 1, 2 (second, three tokens).
RATIOS = torch.tensor([[1.5, 1.0, 1.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
OLD = torch.full((2, 3), -1.0, dtype=torch.float64)
LOGPS = OLD + RATIOS.log()
REF = LOGPS + torch.tensor([[math.log(2), 0.0, 0.0], [0.0, math.log(3), 0.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
NORM = StepNormalizer(num_sequences=2, num_tokens=5, dapo_tokens=10, max_completion_length=4)
CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.3}

# l: -min(3, 2.6) = -2.6, -2 | -min(-0.5, -0.8) = 0.8, 1, 2
SURROGATE_BY_AGGREGATION = {
    "grpo": (-4.6 / 2 + 3.8 / 3) / 2,
    "dr_grpo": (-4.6 + 3.8) / (2 * 4),
    "bnpo": (-4.6 + 3.8) / 5,
    "dapo": (-4.6 + 3.8) / 10,
}


def loss(logps=LOGPS, **changes):
    return grpo_loss(logps, OLD, ADVANTAGES, MASK, norm=NORM, **(CLIP | changes))


@pytest.mark.parametrize(("aggregation", "expected"), SURROGATE_BY_AGGREGATION.items())
def test_surrogate_alone(aggregation, expected):
    terms = loss(aggregation=aggregation)
    assert terms.loss.item() == pytest.approx(expected)
    assert terms.per_token_kl is None
    torch.testing.assert_close(terms.ratio, torch.where(MASK.bool(), RATIOS, 1.0))
    assert terms.is_high_clipped.tolist() == [[True, False, False], [False, False, False]]
    assert terms.is_low_clipped.tolist() == [[False, False, False], [True, False, False]]


def test_delta():
    # The last token's ratio of 2 counts as 1.6: l = 1.6 instead of 2
    assert loss(aggregation="bnpo", delta=1.6).loss.item() == pytest.approx((-4.6 + 3.4) / 5)


K3_A, K3_B = 2 - math.log(2) - 1, 3 - math.log(3) - 1  # at ratios 1.5 and 1


@pytest.mark.parametrize(("corrected", "kl_sum"), [(False, K3_A + K3_B), (True, 1.5 * K3_A + 1.0 * K3_B)])
def test_kl_term(corrected, kl_sum):
    terms = loss(aggregation="bnpo", beta=0.1, ref_logps=REF, use_bias_correction_kl=corrected)
    assert terms.loss.item() == pytest.approx((-4.6 + 3.8 + 0.1 * kl_sum) / 5)
    assert terms.per_token_kl.sum().item() == pytest.approx(kl_sum)


def test_k1_and_k2():
    # k1 = -ln 2, -ln 3; k2 = (ln 2)^2 / 2, (ln 3)^2 / 2
    sums = {"k1": -math.log(2) - math.log(3), "k2": (math.log(2) ** 2 + math.log(3) ** 2) / 2}
    for name, kl_sum in sums.items():
        terms = loss(aggregation="bnpo", beta=0.1, ref_logps=REF, use_bias_correction_kl=False, kl_estimator=name)
        assert terms.loss.item() == pytest.approx((-4.6 + 3.8 + 0.1 * kl_sum) / 5)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_exact_kl_is_taken_as_it_is(corrected):
    per_token_kl = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 5.0]], dtype=torch.float64, requires_grad=True)
    terms = loss(
        aggregation="bnpo", beta=0.1, kl_estimator="full", per_token_kl=per_token_kl, use_bias_correction_kl=corrected
    )
    assert terms.loss.item() == pytest.approx((-4.6 + 3.8 + 0.1 * 15) / 5)
    terms.loss.backward()
    torch.testing.assert_close(per_token_kl.grad, 0.1 / 5 * MASK.double())


def test_sequence_level_broadcasts_over_the_tokens():
    # Mean log-ratios: ln(1.5) / 2 -> sqrt(1.5) = 1.2247 (A = 2, clipped at 1.1 -> -2.2);
    # (ln 0.5 + 0 + ln 2) / 3 = 0 -> 1 (A = -1 -> 1). The KL per token is times its completion's ratio.
    first = math.sqrt(1.5)
    terms = loss(level="sequence", epsilon_high=0.1, aggregation="grpo", beta=0.1, ref_logps=REF)
    expected = ((2 * -2.2 + 0.1 * first * K3_A) / 2 + (3 * 1.0 + 0.1 * 1.0 * K3_B) / 3) / 2
    assert terms.loss.item() == pytest.approx(expected)
    assert terms.ratio.shape == terms.is_high_clipped.shape == (2, 1)
    assert terms.is_high_clipped.tolist() == [[True], [False]]
    assert terms.per_token_kl.shape == (2, 3)


def test_gradient_on_policy_is_minus_the_advantage():
    # ratio 1: d l / d logp = -A r = -A; times 1 / 5 for bnpo
    logps = OLD.clone().requires_grad_()
    loss(logps, aggregation="bnpo").loss.backward()
    torch.testing.assert_close(logps.grad, -ADVANTAGES.unsqueeze(1) * MASK / 5)


@pytest.mark.parametrize(("corrected", "per_token"), [(False, 1 - 2.0), (True, 1 - 2.0 + K3_A)])
def test_gradient_of_the_kl_on_policy(corrected, per_token):
    # pi_ref / pi = 2: d k3 / d logp = 1 - 2; the differentiable ratio adds k3 although its value is 1.
    logps = OLD.clone().requires_grad_()
    ref = OLD + math.log(2)
    terms = grpo_loss(
        logps, OLD, torch.zeros(2), MASK, norm=NORM, beta=0.1, ref_logps=ref, aggregation="bnpo",
        use_bias_correction_kl=corrected,
    )  # fmt: skip
    terms.loss.backward()
    torch.testing.assert_close(logps.grad, 0.1 / 5 * per_token * MASK.double())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", SURROGATE_BY_AGGREGATION)
def test_gradcheck(level, aggregation):
    logps = LOGPS.clone().requires_grad_()
    settings = {"level": level, "aggregation": aggregation, "beta": 0.3, "ref_logps": REF, "delta": 1.7}
    assert torch.autograd.gradcheck(lambda x: loss(x, **settings).loss, (logps,))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("padding", [99.0, -torch.inf, torch.nan])
def test_padding_has_no_effect_on_loss_or_gradient(level, padding):
    def run(fill):
        logps, old, ref = (x.masked_fill(MASK == 0, f) for x, f in zip((LOGPS, OLD, REF), fill, strict=True))
        logps = logps.requires_grad_()
        terms = grpo_loss(logps, old, ADVANTAGES, MASK, norm=NORM, **CLIP, level=level, beta=0.3, ref_logps=ref)
        terms.loss.backward()
        return terms.loss.detach(), logps.grad

    for actual, expected in zip(run((padding, -padding, padding)), run((0.0, 0.0, 0.0)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", SURROGATE_BY_AGGREGATION)
def test_all_masked(level, aggregation):
    logps = LOGPS.clone().requires_grad_()
    terms = grpo_loss(
        logps, OLD, ADVANTAGES, torch.zeros_like(MASK), norm=NORM, level=level, aggregation=aggregation, beta=0.3,
        ref_logps=REF,
    )  # fmt: skip
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert logps.grad.eq(0).all()


def test_one_token():
    # ratio 0.5, A = 2: -1; one sequence of one token
    one = torch.ones(1, 1)
    norm = StepNormalizer(num_sequences=1, num_tokens=1, dapo_tokens=1, max_completion_length=1)
    for aggregation in SURROGATE_BY_AGGREGATION:
        terms = grpo_loss(one * math.log(0.5), one * 0.0, torch.tensor([2.0]), one, norm=norm, aggregation=aggregation)
        assert terms.loss.item() == pytest.approx(-1.0)


def test_an_empty_micro_batch_is_worth_nothing():
    empty = torch.zeros(0, 3, requires_grad=True)
    terms = grpo_loss(empty, empty.detach(), torch.zeros(0), torch.zeros(0, 3), norm=NORM)
    terms.loss.backward()
    assert terms.loss.item() == 0.0


def test_everything_but_the_loss_is_detached():
    terms = loss(LOGPS.clone().requires_grad_(), beta=0.1, ref_logps=REF)
    assert terms.loss.requires_grad
    assert not terms.ratio.requires_grad
    assert not terms.per_token_kl.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"ref_logps is missing with kl_estimator='k3'.*set beta=0"),
        ({"kl_estimator": "full"}, r"per_token_kl is missing with kl_estimator='full'"),
        ({"ref_logps": REF, "per_token_kl": REF}, r"per_token_kl is given with kl_estimator='k3'"),
        ({"ref_logps": REF, "kl_estimator": "k4"}, r"kl_estimator='k4' is not known"),
        ({"ref_logps": REF, "aggregation": "mean"}, r"loss_type='mean' is not known"),
    ],
)
def test_bad_input_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        loss(beta=0.1, **settings)
