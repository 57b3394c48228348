"""Posteriors by hand, and who is chosen how often."""

from __future__ import annotations

import numpy as np
import pytest

from trl_grpo_ext.data import PassRateCurriculum


def test_posteriors_by_hand() -> None:
    curriculum = PassRateCurriculum(3, decay=0.5)
    assert curriculum.mean_pass_rates.tolist() == [0.5, 0.5, 0.5]
    assert curriculum.expected_signal == pytest.approx([1 / 6] * 3)  # of a uniform p: 1/2 - 1/3
    curriculum.observe([1, 0, 1], [3, 0, 1], [4, 5, 1])
    # 0: Beta(1, 6); 1: 4 of 5 passed, Beta(5, 2); 2: untouched
    assert curriculum.mean_pass_rates == pytest.approx([1 / 7, 5 / 7, 1 / 2])
    assert curriculum.expected_signal == pytest.approx([6 / (7 * 8), 10 / (7 * 8), 1 / 6])
    curriculum.observe([0], [2], [4])
    # Everything before weighs half: 0 has 0/2 + 2 = 2 passes and 5/2 + 2 = 4.5 fails; 1 has 4/2 and 1/2
    assert [list(side) for side in curriculum.posterior] == [[3.0, 3.0, 1.0], [5.5, 1.5, 1.0]]
    assert curriculum.rollouts.tolist() == [9, 5, 0]
    assert curriculum.generations == 2
    # (9 + 5)^2 / (81 + 25)
    assert curriculum.effective_prompts == pytest.approx(196 / 106)
    metrics = curriculum.metrics()
    assert metrics["prompts_seen"] == pytest.approx(2 / 3)
    assert metrics["pass_rate"] == pytest.approx((3 / 8.5 + 3 / 4.5 + 1 / 2) / 3)
    assert metrics["signal_of_all"] == pytest.approx((16.5 / (8.5 * 9.5) + 4.5 / (4.5 * 5.5) + 1 / 6) / 3)


def test_evidence_from_before_is_a_start() -> None:
    curriculum = PassRateCurriculum(3, pass_rates=[0.25, float("nan"), 1.0], samples=[8, 8, 3])
    assert [list(side) for side in curriculum.posterior] == [[3.0, 1.0, 4.0], [7.0, 1.0, 1.0]]
    assert curriculum.rollouts.sum() == 0 and curriculum.effective_prompts == 0


def choices(curriculum: PassRateCurriculum, count: int, times: int) -> np.ndarray:
    """How often each prompt was chosen, per generation."""
    found = np.zeros(len(curriculum))
    for generation in range(times):
        curriculum.generations = generation
        found[curriculum.choose(count)] += 1
    return found / times


def test_prompts_are_sampled_by_their_signal() -> None:
    """With a million rollouts p is known: 0.5, 0.1 and 0.9 have weights 0.25, 0.09 and 0.09, of 0.43."""
    curriculum = PassRateCurriculum(3, floor=0.0, seed=3)
    curriculum.observe([0, 1, 2], [500_000, 100_000, 900_000], [1_000_000] * 3)
    # 3,000 draws: a standard error of 0.009
    assert choices(curriculum, 1, 3000) == pytest.approx([25 / 43, 9 / 43, 9 / 43], abs=0.03)
    # Two at a time: 0 is left out if 1 and 2 come first, 9/43 * 9/34 either way round
    assert choices(curriculum, 2, 3000)[0] == pytest.approx(1 - 2 * 9 / 43 * 9 / 34, abs=0.03)


def test_what_is_uncertain_is_drawn_from_its_posterior() -> None:
    """Beta(1, 1) against a p of 0.5: w / (w + 1/4) with w = p (1 - p) and u = 2 p - 1 is (1 - u^2) / (2 - u^2).

    Its mean over u in [0, 1] is 1 - int 1 / (2 - u^2) = 1 - artanh(1 / sqrt 2) / sqrt 2 = 0.3768; the mean of p alone,
    1/2, would make it 1/2, and the mean signal, 1/6, would make it 2/5.
    """
    curriculum = PassRateCurriculum(2, floor=0.0, seed=4)
    curriculum.observe([1], [500_000], [1_000_000])
    assert choices(curriculum, 1, 12_000)[0] == pytest.approx(0.3768, abs=0.012)


def test_hopeless_and_solved_prompts_are_left_to_the_floor() -> None:
    """Of 20 prompts, 2 are open and 18 are known, all solved or none: a place goes to those by the floor alone."""
    for floor in (0.0, 0.3):
        curriculum = PassRateCurriculum(20, floor=floor, seed=1)
        known = list(range(2, 20))
        curriculum.observe(known, [10**6 * (i % 2) for i in known], [10**6] * len(known))
        found = choices(curriculum, 1, 2000)
        assert found.sum() == pytest.approx(1)
        # The floor's place is any prompt's: 18 of 20 times one of the known
        assert found[2:].sum() == pytest.approx(floor * 18 / 20, abs=0.03)
        assert found[:2] == pytest.approx([(1 - floor * 18 / 20) / 2] * 2, abs=0.04)
    assert found[2:].min() > 0  # nobody is forgotten


def test_floor_of_one_is_uniform() -> None:
    curriculum = PassRateCurriculum(5, floor=1.0)
    curriculum.observe([0], [0], [1000])
    assert choices(curriculum, 3, 1500) == pytest.approx([3 / 5] * 5, abs=0.04)


def test_what_was_forgotten_is_looked_at_again() -> None:
    """Never a pass of 80: 500 generations later the evidence at 0.99 is 80 * 0.0066, and it is as if it were new."""
    curriculum = PassRateCurriculum(2, floor=0.0, decay=0.99)
    curriculum.observe([0], [0], [80])
    before = choices(curriculum, 1, 1000)[0]
    for _ in range(500):
        curriculum.observe([1], [4], [8])
    assert curriculum.posterior[1][0] == pytest.approx(1 + 80 * 0.99**500)
    # E[p (1 - p)] of Beta(1, 81) is 81 / (82 * 83) = 0.012, a fourteenth of the other's 1/6
    assert before < 0.12
    # Of Beta(1, 1.53) it is 1.53 / (2.53 * 3.53) = 0.17, and the other one's, which is well known, 1/4
    assert choices(curriculum, 1, 1000)[0] == pytest.approx(0.37, abs=0.06)


def test_choices_are_different_prompts_and_repeatable() -> None:
    curriculum = PassRateCurriculum(7, floor=0.4, seed=5)
    np.random.seed(0)
    first = curriculum.choose(5)
    np.random.seed(1)
    assert first.tolist() == curriculum.choose(5).tolist()  # nothing global, and choosing changes nothing
    assert len(set(first.tolist())) == 5
    assert set(curriculum.choose(4, exclude=[0, 2, 6], turn=3).tolist()) == {1, 3, 4, 5}
    others = {tuple(curriculum.choose(5, turn=turn).tolist()) for turn in range(6)}
    assert len(others) == 6
    curriculum.observe([0], [1], [1])
    assert curriculum.choose(5).tolist() != first.tolist()
    assert PassRateCurriculum(7, floor=0.4, seed=6).choose(5).tolist() != first.tolist()


def test_state_goes_on_to_the_last_bit() -> None:
    first, second = (PassRateCurriculum(6, decay=0.9, seed=2) for _ in range(2))
    for n in range(7):
        first.observe([n % 6, (n + 2) % 6], [n % 3, 1], [3, 2])
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        chosen = first.choose(4)
        assert chosen.tolist() == second.choose(4).tolist()
        for curriculum in (first, second):
            curriculum.observe(chosen.tolist(), [1, 0, 2, 1], [2] * 4)
    assert all(np.array_equal(a, b) for a, b in zip(first.posterior, second.posterior, strict=True))
    with pytest.raises(ValueError, match="6 prompts is not one of 5"):
        PassRateCurriculum(5).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PassRateCurriculum(0), "size=0"),
        (lambda: PassRateCurriculum(2, floor=1.5), r"floor=1.5 must be in \[0, 1\]"),
        (lambda: PassRateCurriculum(2, decay=0.0), r"decay=0.0 must be in \(0, 1\]"),
        (lambda: PassRateCurriculum(2, pass_rates=[0.5, 0.5]), "belong together"),
        (lambda: PassRateCurriculum(2, pass_rates=[0.5], samples=[1]), r"must both be \(2,\)"),
        (lambda: PassRateCurriculum(2, pass_rates=[0.5, 2.0], samples=[1, 1]), r"must be in \[0, 1\] or NaN"),
        (lambda: PassRateCurriculum(2).choose(3), "3 prompts are asked for, and there are 2"),
        (lambda: PassRateCurriculum(2).observe([0], [3], [2]), "must be between 0 and rollouts"),
    ],
)
def test_bad_arguments(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
