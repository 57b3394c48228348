"""`curriculum="pass_rate"` in real trainings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from trl_grpo_ext.rewards import in_process

NUMBERS = Dataset.from_dict({"prompt": [f"p{'+' * (n % 4)}{n}" for n in range(17)]})


class Passing:
    """1 for a prompt's first `passes[prompt]` completions; remembers whom it has seen."""

    __name__ = "accuracy_reward"

    def __init__(self, passes: dict[str, int]) -> None:
        self.passes, self.seen = passes, []

    def __call__(self, prompts: list[str], **kwargs: Any) -> list[float]:
        groups = [prompts[start : start + 3] for start in range(0, len(prompts), 3)]
        assert all(len(set(group)) == 1 for group in groups)
        self.seen += [group[0] for group in groups]
        return [float(i % 3 < self.passes.get(prompt, 0)) for i, prompt in enumerate(prompts)]


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_trains_on_what_is_within_reach(make_trainer):
    """Two of 17 prompts are solved by some of their completions, the others never: they come twice as often."""
    reward = in_process(Passing({"p0": 1, "p++6": 2}))
    trainer = make_trainer(
        reward_funcs=reward, train_dataset=NUMBERS, curriculum="pass_rate", curriculum_floor=0.0, max_steps=40
    )
    trainer.train()
    assert len(reward.seen) == 80  # two prompts a step
    late = reward.seen[40:]
    assert sum(prompt in ("p0", "p++6") for prompt in late) / len(late) >= 0.225  # 2 / 17 when sampled uniformly
    posteriors = trainer._maker.curriculum.posteriors
    counts = [3 * reward.seen.count(prompt) for prompt in NUMBERS["prompt"]]
    assert posteriors.rollouts.tolist() == counts
    assert posteriors.generations == 40
    # What the last generation left is there undiscounted: the evidence adds up to at least its 6 completions
    assert posteriors.passes.sum() + posteriors.fails.sum() == pytest.approx(sum(6 * 0.99**n for n in range(40)))
    assert logged(trainer, "curriculum/prompts_seen")[-1] == sum(map(bool, counts)) / 17
    assert logged(trainer, "curriculum/effective_prompts")[-1] == pytest.approx(
        sum(counts) ** 2 / sum(n * n for n in counts)
    )
    assert logged(trainer, "curriculum/pass_rate")[-1] == pytest.approx(posteriors.mean_pass_rates.mean())
    chosen, everything = (logged(trainer, f"curriculum/signal_of_{who}")[-1] for who in ("chosen", "all"))
    assert chosen > everything == pytest.approx(posteriors.expected_signal.mean())
    assert logged(trainer, "curriculum/signal_of_chosen")[0] == pytest.approx(1 / 6)  # nothing is known yet


def test_columns_of_a_measurement_are_where_it_starts(make_trainer):
    data = NUMBERS.select(range(4)).add_column("pass_rate", [0.0, 0.5, None, 1.0])
    for more, count in (({}, 3), ({"samples": [10, 10, None, 10]}, 10)):
        for name, values in more.items():
            data = data.add_column(name, values)
        posteriors = make_trainer(train_dataset=data, curriculum="pass_rate")._maker.curriculum.posteriors
        assert posteriors.passes.tolist() == [0, count / 2, 0, count]
        assert posteriors.fails.tolist() == [count, count / 2, 0, 0]


def test_a_completion_without_a_reward_is_no_evidence_and_the_named_reward_counts(make_trainer):
    @in_process
    def graded(completion_ids, **kwargs):
        return [[None, 1.0, 0.99][i % 3] for i in range(len(completion_ids))]

    @in_process
    def form(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    trainer = make_trainer(reward_funcs=[form, graded], curriculum="pass_rate", curriculum_reward="graded", max_steps=1)
    trainer.train()
    posteriors = trainer._maker.curriculum.posteriors
    assert (posteriors.passes.sum(), posteriors.fails.sum(), posteriors.rollouts.sum()) == (2, 2, 4)


def test_further_draws_are_evidence_and_further_prompts_the_curriculum_s(make_trainer):
    """No completion ever passes, so both groups draw on to 5, and then make room for other prompts twice."""
    trainer = make_trainer(
        reward_funcs=lambda prompts, **kwargs: [0.0] * len(prompts),
        train_dataset=NUMBERS,
        curriculum="pass_rate",
        curriculum_floor=0.0,
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=2,
        num_generations_max=5,
        max_steps=1,
    )
    trainer.train()
    posteriors = trainer._maker.curriculum.posteriors
    # The two first prompts and four others, 5 completions of each; none of them twice
    assert sorted(posteriors.rollouts.tolist()) == [0] * 11 + [5] * 6
    assert posteriors.fails.sum() == 30 and posteriors.generations == 1


CASES = {
    "one generation a step": (2, {"max_steps": 4, "beta": 0.04}),
    "inside a generation": (
        3,
        {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 7},
    ),
    "second epoch": (9, {"max_steps": 10}),
    "further prompts": (2, {"max_steps": 3, "dynamic_sampling": True, "num_generations_max": 5}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_goes_on_with_what_was_known(make_trainer, tmp_path, case):
    step, fields = CASES[case]
    passes = {prompt: n % 4 for n, prompt in enumerate(NUMBERS["prompt"])}
    given = {"train_dataset": NUMBERS, "curriculum": "pass_rate", "optim": "adamw_torch", "learning_rate": 0.02}
    given |= {"save_strategy": "steps", "save_steps": step} | fields

    def train(checkpoint: str | None = None) -> tuple[Any, list[str]]:
        reward = in_process(Passing(passes))
        trainer = make_trainer(reward_funcs=reward, **given)
        torch.manual_seed(99)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, reward.seen

    straight, seen = train()
    kept = tmp_path / "kept" / f"checkpoint-{step}"
    shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", kept)
    resumed, seen_later = train(str(kept))
    assert seen_later == seen[-len(seen_later) :] and 0 < len(seen_later) < len(seen)
    states = [trainer._maker.curriculum.state_dict() for trainer in (straight, resumed)]
    assert all(
        torch.equal(value, states[1][name]) if isinstance(value, torch.Tensor) else value == states[1][name]
        for name, value in states[0].items()
    )
    policies = [dict(trainer.model.named_parameters()) for trainer in (straight, resumed)]
    assert all(torch.equal(value, policies[1][name]) for name, value in policies[0].items())
    logs = [
        [{k: v for k, v in e.items() if k in ("step", "loss", "reward") or k.startswith("curriculum/")} for e in log]
        for log in ([e for e in t.state.log_history if "loss" in e and e["step"] > step] for t in (straight, resumed))
    ]
    assert logs[0] == logs[1] and len(logs[0]) == fields["max_steps"] - step


def test_a_checkpoint_of_other_data_is_refused(make_trainer, tmp_path, caplog):
    make_trainer(curriculum="pass_rate", save_strategy="steps", save_steps=1, max_steps=1).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match="the pass rates of 12 prompts, and train_dataset has 17 rows"):
        make_trainer(train_dataset=NUMBERS, curriculum="pass_rate").train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(max_steps=2)  # ceasing to have one is no problem
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 2
    (Path(checkpoint) / "grpo_state_0.pt").unlink()
    trainer = make_trainer(curriculum="pass_rate", max_steps=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer._maker.curriculum.posteriors.generations == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": NUMBERS.to_iterable_dataset()}, "curriculum='pass_rate' .* is an IterableDataset"),
        ({"curriculum_reward": "right"}, r"curriculum_reward='right' must be the name of one of .*'token_sum'"),
        ({"train_dataset": NUMBERS.add_column("pass_rate", [1.5] * 17)}, r"row 0: pass_rate=1.5 .* in \[0, 1\]"),
        ({"train_dataset": NUMBERS.add_column("pass_rate", ["?"] * 17)}, "row 0: pass_rate='[?]'"),
    ],
)
def test_what_cannot_be_used_is_refused(make_trainer, given, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(curriculum="pass_rate", **given)


def test_several_rewards_need_a_name(make_trainer, reward):
    def other(completion_ids, **kwargs):
        return [0.0] * len(completion_ids)

    with pytest.raises(ValueError, match=r"needs curriculum_reward: which of .*'token_sum', 'other'"):
        make_trainer(reward_funcs=[reward, other], curriculum="pass_rate")
