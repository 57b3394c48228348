"""Groups without a signal are drawn on (adaptive group size) or replaced (dynamic sampling)."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from datasets import Dataset

from trl_grpo_ext.config_checks import InvalidConfigError
from trl_grpo_ext.experience import Experience, StepBatch
from trl_grpo_ext.rewards import StepRewards, in_process, step_reward

G, MOST = 3, 8  # draws of 3, 3 and 2


@in_process
def rare(completion_ids, **kwargs):
    """1 for about one completion in nine."""
    return [float(sum((i + 1) * token for i, token in enumerate(ids)) % 9 == 0) for ids in completion_ids]


@in_process
def by_column(completion_ids, kind, **kwargs):
    """Completions of prompts of the kind "mixed" differ, others are all worth the same."""
    return [len(ids) % 2 + ids[0] / 100 if k == "mixed" else 0.5 for ids, k in zip(completion_ids, kind, strict=True)]


def made_by(trainer, prompts, generations=G, columns=None):
    """The experience of one generation of these prompts, and its log."""
    rows = [{"prompt": p, **{n: v[i] for n, v in (columns or {}).items()}} for i, p in enumerate(prompts)]
    rows = [row for row in rows for _ in range(generations)]
    made = trainer._maker.make(rows, trainer.state, 0, trainer._metrics, trainer._clock)
    trainer._clock.on_optimizer_step(trainer.args, trainer.state, trainer.control)
    return made, trainer._metrics.flush(trainer.accelerator)


@pytest.fixture
def wide(make_trainer, rows):
    """(prompts, completions and rewards of groups of 8 of each), which is what groups of 3 may grow to."""
    prompts = rows["prompt"][:10]
    trainer = make_trainer(reward_funcs=rare, num_generations=MOST, per_device_train_batch_size=80)
    made, _ = made_by(trainer, prompts, MOST)
    groups = [made.completion_ids[MOST * p : MOST * (p + 1)] for p in range(len(prompts))]
    return prompts, groups, [rare(ids) for ids in groups]


def grown(rewards):
    """How many of 8 a group of 3 that draws on until rewards differ has in the end."""
    return next((n for n in (3, 6) if len(set(rewards[:n])) > 1), 8)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_grow_until_rewards_differ(make_trainer, wide, scale):
    """They are the first completions of the larger groups, and advantages are those of unequal groups by hand."""
    prompts, groups, rewards = wide
    sizes = [grown(own) for own in rewards]
    given_up = [n == 8 and len(set(own)) == 1 for n, own in zip(sizes, rewards, strict=True)]
    assert (
        {3, 6, 8} <= set(sizes) and any(given_up) and not all(n == 8 <= g for n, g in zip(sizes, given_up, strict=True))
    )
    trainer = make_trainer(
        reward_funcs=rare, num_generations_max=MOST, per_device_train_batch_size=30, scale_rewards=scale
    )
    made, logs = made_by(trainer, prompts)
    found: dict[int, list[int]] = {}
    for b, prompt in enumerate(made.prompt_of):
        found.setdefault(prompt, []).append(b)
    assert made.prompt_of[:30] == [p for p in range(10) for _ in range(3)]
    kept = [own[:n] for own, n in zip(rewards, sizes, strict=True)]
    everything = [r for own in kept for r in own]
    mean = sum(everything) / len(everything)
    batch_std = math.sqrt(sum((r - mean) ** 2 for r in everything) / (len(everything) - 1))
    for p, own in enumerate(kept):
        assert [made.completion_ids[b] for b in found[p]] == groups[p][: len(own)]
        mean = sum(own) / len(own)
        std = math.sqrt(sum((r - mean) ** 2 for r in own) / (len(own) - 1))
        divisor = {"group": std + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
        expected = [(r - mean) / divisor if std else 0.0 for r in own]
        assert made.advantages[found[p]].tolist() == pytest.approx(expected, abs=1e-5)
    extra = sum(sizes) - 30
    silent_first = sum(len(set(own[:3])) == 1 for own in rewards)
    assert logs["adaptive/completions"] == extra
    assert logs["adaptive/tokens"] == sum(
        len(ids) for group, n in zip(groups, sizes, strict=True) for ids in group[3:n]
    )
    assert logs["adaptive/groups_gained"] == silent_first - sum(given_up)
    assert logs["resampling/frac_silent_before"] == pytest.approx(silent_first / 10)
    assert logs["resampling/frac_silent_after"] == pytest.approx(sum(given_up) / 10)
    if scale != "batch":
        assert logs["frac_reward_zero_std"] == pytest.approx(sum(given_up) / 10)
    # The log shows the first draw: the mean over what was drawn until it looked good would be another number
    assert logs["reward"] == pytest.approx(sum(sum(own[:3]) for own in rewards) / 30)
    drawn = [ids for group, n in zip(groups, sizes, strict=True) for ids in group[:n]]
    lengths = [len(trainer.processing_class(p)["input_ids"]) * n for p, n in zip(prompts, sizes, strict=True)]
    assert logs["num_tokens"] == sum(map(len, drawn)) + sum(lengths)
    assert logs["dynamic_sampling/completions"] == 0


def test_old_logps_are_those_of_their_completions(make_trainer, wide):
    prompts, *_ = wide
    trainer = make_trainer(reward_funcs=rare, num_generations_max=MOST, per_device_train_batch_size=30)
    made, _ = made_by(trainer, prompts)
    step = StepBatch(0)
    step.add(made, range(len(made.completion_ids)))
    (batch,) = step.micro_batches(range(len(made.completion_ids)), 1, 30, packed=True, device=torch.device("cpu"))
    with torch.no_grad():
        logps = trainer._scores(trainer.model, batch).logps
    for row, index in zip(logps, batch.indices, strict=True):
        n = len(made.completion_ids[index])
        torch.testing.assert_close(row[:n], made.old_logps[index, :n], rtol=1e-5, atol=1e-5)


def test_rloo_counts_the_whole_group(make_trainer, wide):
    prompts, _, rewards = wide
    trainer = make_trainer(
        reward_funcs=rare, num_generations_max=MOST, per_device_train_batch_size=30, advantage_estimator="rloo"
    )
    made, _ = made_by(trainer, prompts)
    for p, own in enumerate(rewards):
        own = own[: grown(own)]
        expected = [r - (sum(own) - r) / (len(own) - 1) for r in own]
        mine = [float(made.advantages[b]) for b, prompt in enumerate(made.prompt_of) if prompt == p]
        assert mine == pytest.approx(expected, abs=1e-6)


def test_slices_take_along_what_their_groups_have_grown():
    """P=3, G=4, micro-batches of 2: the last completion of prompt p is in micro-batch 2 p + 1."""
    extra = [2, 0, 2]
    made = Experience(
        prompt_ids=[[1], [2], [3]],
        prompt_of=[0] * 4 + [1] * 4 + [2] * 4 + extra,
        completion_ids=[[b] for b in range(15)],
        num_generations=4,
        old_logps=torch.zeros(15, 1),
        ref_logps=None,
        advantages=torch.arange(15.0),
        in_loss=torch.ones(15, dtype=torch.bool),
        slice_tokens=1.0,
        generated_at=0,
    )
    assert made.of_slices(range(0, 1), 2) == [0, 1]
    assert made.of_slices(range(1, 2), 2) == [2, 3, 13]
    assert made.of_slices(range(1, 4), 2) == [2, 3, 4, 5, 6, 7, 13]
    assert made.of_slices(range(5, 6), 2) == [10, 11, 12, 14]
    slices = [made.of_slices(range(i, i + 1), 2) for i in range(6)]
    assert sorted(b for own in slices for b in own) == list(range(15))
    step = StepBatch(0)
    step.add(made, slices[5])
    assert step.prompt_of == [2, 2, 2, 2] and step.completion_ids == [[10], [11], [12], [14]]


def silent_then_mixed(count):
    return Dataset.from_dict(
        {
            "prompt": [f"silent{i}" for i in range(count)] + ["mixed-one", "mix"],
            "kind": ["silent"] * count + ["mixed"] * 2,
        }
    )


def test_silent_prompts_are_replaced(make_trainer):
    data = silent_then_mixed(3)
    trainer = make_trainer(
        reward_funcs=by_column,
        train_dataset=data,
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=40,
        per_device_train_batch_size=9,
    )
    prompts = ["silent0", "mix", "silent2"]
    made, logs = made_by(trainer, prompts, columns={"kind": ["silent", "mixed", "silent"]})
    tokenizer = trainer.processing_class
    texts = tokenizer.batch_decode(made.prompt_ids)
    assert texts[1] == "mix" and {texts[0], texts[2]} <= {"mixed-one", "mix"}
    assert made.prompt_of == [0] * 3 + [1] * 3 + [2] * 3
    rewards = by_column(made.completion_ids, ["mixed"] * 9)
    for p in range(3):  # their own completions', and rewards of their own columns
        own = torch.tensor(rewards[3 * p : 3 * p + 3])
        expected = (own - own.mean()) / (own.std() + 1e-4)
        torch.testing.assert_close(made.advantages[3 * p : 3 * p + 3], expected, rtol=1e-4, atol=1e-4)
    # The place in the batch that kept its prompt is as it would have been
    plain, before = made_by(make_trainer(reward_funcs=by_column, per_device_train_batch_size=9), prompts,
                            columns={"kind": ["silent", "mixed", "silent"]})  # fmt: skip
    assert made.completion_ids[3:6] == plain.completion_ids[3:6]
    assert made.completion_ids[:3] != plain.completion_ids[:3]
    assert before["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert logs["resampling/frac_silent_before"] == pytest.approx(2 / 3)
    assert logs["resampling/frac_silent_after"] == logs["frac_reward_zero_std"] == 0
    assert logs["dynamic_sampling/groups_gained"] == 2
    assert logs["dynamic_sampling/prompts_replaced"] >= 2
    assert logs["dynamic_sampling/completions"] == 3 * logs["dynamic_sampling/prompts_replaced"]
    assert 1 <= logs["dynamic_sampling/rounds"] <= 40
    assert logs["reward"] == before["reward"]


def test_what_was_drawn_for_nothing_is_not_trained_on(make_trainer):
    """All prompts are silent: rounds are spent, and the last prompts stay, with advantages of 0."""
    calls = []

    @in_process
    def same(completions, **kwargs):
        calls.append(len(completions))
        return [0.25] * len(completions)

    trainer = make_trainer(
        reward_funcs=same, dynamic_sampling=True, dynamic_sampling_max_rounds=2, num_generations_max=5
    )
    made, logs = made_by(trainer, ["ab", "question"])
    # the first draw, 2 more for each; twice other prompts, and 2 more for each
    assert calls == [6, 4, 6, 4, 6, 4]
    assert Counter(made.prompt_of) == {0: 5, 1: 5}
    assert not made.advantages.any()
    assert logs["adaptive/completions"] == 12 and logs["dynamic_sampling/completions"] == 12
    assert logs["dynamic_sampling/rounds"] == 2 and logs["dynamic_sampling/prompts_replaced"] == 4
    assert logs["resampling/frac_silent_after"] == 1.0
    texts = trainer.processing_class.batch_decode(made.prompt_ids)
    assert texts != ["ab", "question"]


def test_runs_repeat_and_resume_inside_a_generation(make_trainer, rows, tmp_path):
    given = {
        "reward_funcs": rare,
        "num_generations_max": MOST,
        "dynamic_sampling": True,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "beta": 0.1,
        "max_steps": 4,
        "log_completions": False,
    }
    adapters = []
    for folder, resume in (("a", None), ("a", "checkpoint-3")):
        trainer = make_trainer(
            **given, output_dir=str(tmp_path / folder), save_strategy="steps", save_steps=1, learning_rate=0.02
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / folder / resume) if resume else None)
        assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
        adapters.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert any(entry.get("adaptive/completions") for entry in trainer.state.log_history)
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[1][name]), name


def test_off_is_as_before(make_trainer):
    """`num_generations_max` equal to `num_generations` leaves everything as it is, and logs nothing about itself."""
    runs = []
    for given in ({}, {"num_generations_max": G}):
        trainer = make_trainer(reward_funcs=rare, **given)
        trainer.train()
        runs.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        assert not any("resampling" in name for entry in trainer.state.log_history for name in entry)
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_logged_columns_belong_to_their_completions(make_trainer, tmp_path):
    @in_process
    def logging_reward(completion_ids, log_extra, log_metric, **kwargs):
        log_extra("first_id", [ids[0] for ids in completion_ids])
        log_metric("mean_first", sum(ids[0] for ids in completion_ids) / len(completion_ids))
        return rare(completion_ids)

    trainer = make_trainer(
        reward_funcs=logging_reward, num_generations_max=MOST, per_device_train_batch_size=30, log_completions=True
    )
    made, logs = made_by(trainer, trainer.train_dataset["prompt"][:10])
    assert len(made.completion_ids) > 30
    columns = trainer._completion_log._columns
    assert columns["first_id"] == [ids[0] for ids in made.completion_ids]
    assert len(columns["completion"]) == len(made.completion_ids)
    assert logs["mean_first"] == pytest.approx(sum(ids[0] for ids in made.completion_ids[:30]) / 30)


def test_a_few_failures_among_further_completions_do_not_stop_the_run(make_trainer):
    """2 of 2 further completions fail, which is more than half of that draw, and 2 of 5 of the group."""

    @in_process
    def fails_later(completions, **kwargs):
        if len(completions) == 3:
            return [0.5] * 3
        raise ValueError("no")

    trainer = make_trainer(reward_funcs=fails_later, num_generations_max=5, per_device_train_batch_size=3)
    made, logs = made_by(trainer, ["ab"])
    assert logs["rewards/fails_later/failed"] == 2 and not made.advantages.any()
    assert len(made.completion_ids) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_generations_max": 2}, "num_generations_max=2 must be at least num_generations=3"),
        ({"num_generations_max": 1}, "num_generations_max=1 must be an integer of at least 2"),
        ({"num_generations_max": 9, "advantage_estimator": "reinforce"}, "num_generations_max=9 must not come with"),
        ({"dynamic_sampling": True, "advantage_estimator": "remax"}, "dynamic_sampling=True must not come with"),
        ({"dynamic_sampling": True, "dynamic_sampling_max_rounds": 0}, "dynamic_sampling_max_rounds=0 must be"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_trainer, fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        make_trainer(**fields)


def test_streams_and_step_rewards_alone_are_refused(make_trainer, rows):
    with pytest.raises(ValueError, match="dynamic_sampling=True cannot be used without a train_dataset that can"):
        make_trainer(dynamic_sampling=True, train_dataset=rows.to_iterable_dataset())
    steps = step_reward(lambda completions, **kwargs: [StepRewards([1.0], [1])] * len(completions))
    with pytest.raises(ValueError, match="num_generations_max=5 cannot be used with step rewards alone"):
        make_trainer(reward_funcs=steps, num_generations_max=5)


def test_a_failed_outcome_reward_is_no_signal_beside_step_rewards(make_trainer):
    """Rewards 1, 1 and None differ from nothing, whatever the steps are worth; advantages of the outcome are 0."""

    @in_process
    def right_or_none(completion_ids, **kwargs):
        return [None if i % 3 == 2 else 1.0 for i in range(len(completion_ids))]

    steps = step_reward(
        in_process(lambda completions, **kwargs: [StepRewards([0.5], [max(1, len(c))]) for c in completions])
    )
    trainer = make_trainer(reward_funcs=[right_or_none, steps], num_generations_max=5, per_device_train_batch_size=3)
    made, logs = made_by(trainer, ["ab"])
    assert logs["resampling/frac_silent_before"] == 1.0 and len(made.completion_ids) == 5


def test_a_group_that_is_masked_altogether_is_silent(make_trainer):
    """All are cut off after 1 token, and would not be in the loss though their rewards differ."""
    given = {"max_completion_length": 1, "num_generations_max": 5, "per_device_train_batch_size": 3}

    @in_process
    def by_id(completion_ids, **kwargs):
        return [float(ids[0]) for ids in completion_ids]

    for masked, size in ((False, 3), (True, 5)):
        trainer = make_trainer(reward_funcs=by_id, mask_truncated_completions=masked, **given)
        made, _ = made_by(trainer, ["question"])
        assert all(ids[-1] not in trainer._sampler.eos_token_ids for ids in made.completion_ids)
        assert len(set(by_id(made.completion_ids[:3]))) > 1
        assert len(made.completion_ids) == size
