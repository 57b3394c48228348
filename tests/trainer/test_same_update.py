"""The same update as `trl.GRPOTrainer`: a real one and ours, given the same completions, move the weights alike.

Both are real trainers from the constructor to `train()`. Only the drawing of tokens is replaced, in both, by
completions that depend on the prompt, its place in the group and the number of the generation alone. What is compared
is the change of the weights, not the weights: an adapter that did not move would agree to many digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from trl.trainer import grpo_trainer as trl_module
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLGRPOTrainer

from trl_grpo_ext import GRPOConfig, GRPOTrainer, Rollouts

CAP = 7
EOS = 2


def fixed_completion(prompt_ids: list[int], member: int, generation: int) -> list[int]:
    """A completion of 1 to `CAP` tokens that ends with EOS, or of `CAP` tokens without one."""
    key = (sum(prompt_ids) * 31 + member * 17 + generation * 101 + len(prompt_ids)) % 10_007
    generator = torch.Generator().manual_seed(key)
    length = int(torch.randint(1, CAP + 4, (1,), generator=generator))  # 3 in 10 are cut off
    tokens = torch.randint(3, 259, (CAP,), generator=generator).tolist()
    return [*tokens[: length - 1], EOS] if length <= CAP else tokens


class FixedTRLTrainer(TRLGRPOTrainer):
    """TRL's trainer, which is handed its completions."""

    generations = 0

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        ids = [fixed_completion(p, i % num_generations, self.generations) for i, p in enumerate(prompt_ids)]
        self.generations += 1
        return ids, None


def replace_sampler(trainer: GRPOTrainer) -> None:
    """The same for ours; log-probs by a plain forward pass of the policy as it is when the completions are drawn."""
    generations = 0

    def generate(prompt_ids: list[list[int]], num_generations: int, **key: Any) -> Rollouts:
        nonlocal generations
        ids = [fixed_completion(p, g, generations) for p in prompt_ids for g in range(num_generations)]
        generations += 1
        logps = torch.zeros(len(ids), max(map(len, ids)))
        with torch.no_grad():
            for i, completion in enumerate(ids):
                prompt = prompt_ids[i // num_generations]
                logits = trainer.model(input_ids=torch.tensor([prompt + completion])).logits[0]
                targets = torch.tensor(completion)
                rows = (logits / trainer.args.temperature).log_softmax(-1)[len(prompt) - 1 : -1]
                logps[i, : len(completion)] = rows[torch.arange(len(completion)), targets]
        reasons = ["eos" if completion[-1] == EOS else "length" for completion in ids]
        return Rollouts([list(p) for p in prompt_ids], ids, logps, reasons, num_generations)

    trainer._sampler.generate = generate  # type: ignore[method-assign]


def half_scored(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Has no opinion about some completions."""
    return [None if ids[0] % 3 == 0 else len(ids) / 2 for ids in completion_ids]


def never_about_shorts(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if len(ids) < 4 else ids[1] / 100 for ids in completion_ids]


def even_prompts_only(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The same reward for all completions of a prompt of odd length: a group of zero variance.

    0.5, because its mean is exact: with 0.1, TRL's advantages are rounding errors divided by 1e-4, which is not 0.
    """
    return [ids[0] / 50 if len(p) % 2 == 0 else 0.5 for p, ids in zip(prompts, completion_ids, strict=True)]


@dataclass
class Case:
    """Config fields of a case, and what it needs besides."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    rewards: list[Callable[..., Any]] | None = None
    adapter: bool = True
    trl_shuffles: bool = True
    clips: bool = False  # whether the case is about ratios that leave the clip
    skips: bool = False  # whether some completions are not computed at all here


ACCUMULATE = {"gradient_accumulation_steps": 3}
CASES = [
    *(Case(name, {"loss_type": name, **ACCUMULATE}) for name in ("grpo", "dr_grpo", "dapo")),
    Case("bnpo", {"loss_type": "bnpo"}),
    Case("no accumulation", {"beta": 0.04}),
    *(Case(f"{name} with kl", {"loss_type": name, "beta": 0.5, **ACCUMULATE}) for name in ("grpo", "dr_grpo", "dapo")),
    Case("bnpo with kl", {"loss_type": "bnpo", "beta": 0.04}),
    Case("kl without bias correction", {"beta": 0.04, "use_bias_correction_kl": False, **ACCUMULATE}),
    Case("adamw", {"optim": "adamw_torch", "learning_rate": 1e-3, "beta": 0.04, "weight_decay": 0.1, "max_steps": 3}),
    Case("clipped gradient norm", {"max_grad_norm": 0.05}),
    Case("two iterations", {"num_iterations": 2, "learning_rate": 0.5, "max_steps": 4, **ACCUMULATE}, clips=True),
    Case(
        "two iterations, two-sided clip, kl",
        {"num_iterations": 2, "learning_rate": 0.5, "max_steps": 4, "delta": 1.3, "epsilon_high": 0.28, "beta": 0.04},
        clips=True,
    ),
    # TRL deals the completions of a generation to its optimizer steps at random, ours takes them as they come. Only
    # here can that matter, and only here its shuffle is switched off.
    *(
        Case(
            f"{name} with a generation of two steps",
            {"loss_type": name, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.5}
            | {"max_steps": 3, "beta": 0.04},
            trl_shuffles=False,
            clips=True,
        )
        for name in ("grpo", "dapo")
    ),
    # One accumulation window over three generations: "fresh" and TRL's choice of old log-probs must still agree
    Case("three generations a step", {"steps_per_generation": 1, **ACCUMULATE, "beta": 0.04}),
    # An epoch has six micro-steps: one optimizer step of four, and a last one of two
    *(
        Case(
            f"{name} with a short last step",
            {"loss_type": name, "steps_per_generation": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
            | {"beta": 0.04},
        )
        for name in ("grpo", "dr_grpo", "dapo")
    ),
    Case(
        "micro-batch smaller than a group",
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6, "loss_type": "grpo", "beta": 0.04},
    ),
    Case(
        "sequence level",
        {"importance_sampling_level": "sequence", "num_iterations": 2, "learning_rate": 0.5, "max_steps": 4}
        | {"epsilon": 0.01, "beta": 0.04},
        clips=True,
    ),
    *(
        Case(f"truncated masked, {name}", {"mask_truncated_completions": True, "loss_type": name, **ACCUMULATE})
        for name in ("grpo", "dapo", "dr_grpo")
    ),
    Case("truncated masked, bnpo", {"mask_truncated_completions": True, "loss_type": "bnpo"}),
    Case("truncated masked, kl", {"mask_truncated_completions": True, "beta": 0.04}),
    Case("scaled by the batch", {"scale_rewards": "batch", **ACCUMULATE}),
    Case("not scaled", {"scale_rewards": "none", **ACCUMULATE}),
    Case("temperature", {"temperature": 0.7, "beta": 0.04}),
    Case(
        "several rewards",
        {"reward_weights": [1.0, 0.5, -2.0], **ACCUMULATE},
        rewards=[half_scored, never_about_shorts, even_prompts_only],
    ),
    Case("unscored completions", {**ACCUMULATE}, rewards=[half_scored]),
    Case(
        "normalised, then summed",
        {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5], **ACCUMULATE},
        rewards=[half_scored, even_prompts_only],
    ),
    Case("zero variance", ACCUMULATE | {"loss_type": "grpo"}, rewards=[even_prompts_only], skips=True),
    Case(
        # Weight decay and momentum move what has no gradient. The epsilon keeps Adam from dividing rounding errors,
        # where a gradient is nearly 0, by their own size.
        "zero variance, moments",
        {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-3, "max_steps": 3}
        | ACCUMULATE,
        rewards=[even_prompts_only],
        skips=True,
    ),
    Case("full fine-tuning", ACCUMULATE, adapter=False),
    Case("full fine-tuning with kl", {"beta": 0.5, "max_steps": 3}, adapter=False),
    *(
        Case(
            f"full fine-tuning with a reference that follows, alpha {alpha}",
            {"beta": 0.5, "max_steps": 5, "sync_ref_model": True, "ref_model_sync_steps": 2}
            | {"ref_model_mixup_alpha": alpha},
            adapter=False,
        )
        for alpha in (0.25, 1.0)
    ),
    # Reference log-probs of an unfinished generation stay as they are in both
    Case(
        "a reference that follows inside a generation",
        {"beta": 0.5, "max_steps": 5, "num_iterations": 2, "sync_ref_model": True, "ref_model_sync_steps": 1}
        | {"ref_model_mixup_alpha": 0.3},
        adapter=False,
    ),
    Case("padded rows", {"attention_packing": "off", "beta": 0.04, "loss_type": "grpo", **ACCUMULATE}),
    Case(
        "padded rows, two iterations",
        {"attention_packing": "off", "num_iterations": 2, "learning_rate": 0.5, "max_steps": 4},
        clips=True,
    ),
]


@dataclass
class Run:
    """What a trainer did."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    moments: list[torch.Tensor]
    history: list[dict[str, float]]


def run(trainer: Any) -> Run:
    def trainable() -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    before = trainable()
    trainer.train()
    states = trainer.optimizer.state
    order = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    moments = [states[p][k] for p in order for k in ("exp_avg", "exp_avg_sq") if k in states[p]]
    return Run(before, trainable(), moments, [entry for entry in trainer.state.log_history if "loss" in entry])


def relative(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    mine, other = (torch.cat([t.flatten().double() for t in side]) for side in (ours, theirs))
    assert other.norm() > 0
    return float((mine - other).norm() / other.norm())


@pytest.fixture
def runs(tmp_path, make_model, tiny_tokenizer, rows, settings, reward, lora, monkeypatch):
    """A case's runs: ours and TRL's."""

    def both(case: Case) -> tuple[Run, Run]:
        if not case.trl_shuffles:
            monkeypatch.setattr(trl_module, "shuffle_sequence_dict", lambda batch: batch)
        if case.adapter:
            models = [make_model(), make_model()]
        else:  # TRL loads the reference of a full fine-tuning from where the policy came from
            make_model().save_pretrained(tmp_path / "model")
            models = [str(tmp_path / "model")] * 2
        fields = settings | {"shuffle_dataset": False, "max_completion_length": CAP, **case.fields}
        trainers = []
        for trainer, config, model in zip(
            (GRPOTrainer, FixedTRLTrainer), (GRPOConfig, TRLGRPOConfig), models, strict=True
        ):
            if config is TRLGRPOConfig:
                fields.pop("attention_packing", None)
            args = config(output_dir=str(tmp_path / trainer.__name__), **fields)
            trainers.append(
                trainer(
                    model,
                    case.rewards or reward,
                    args=args,
                    train_dataset=rows,
                    processing_class=tiny_tokenizer,
                    peft_config=lora() if case.adapter else None,
                )
            )
        ours, theirs = trainers
        replace_sampler(ours)
        assert ours._packed == (case.fields.get("attention_packing") != "off")
        return run(ours), run(theirs)

    return both


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_update_is_that_of_trl(case, runs):
    ours, theirs = runs(case)

    assert ours.before.keys() == theirs.before.keys()
    assert all(torch.equal(ours.before[n], theirs.before[n]) for n in ours.before)  # the same random adapter
    changes = [[run.after[n] - run.before[n] for n in ours.before] for run in (ours, theirs)]
    assert relative(*changes) < 1e-5
    assert len(ours.moments) == len(theirs.moments)
    if theirs.moments:
        assert relative(ours.moments, theirs.moments) < 1e-5
    for name in ("loss", "reward", "reward_std", "num_tokens", "completions/mean_terminated_length"):
        mine, other = [[entry[name] for entry in r.history if name in entry] for r in (ours, theirs)]
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6), name
    if case.clips:  # else the case does not test what it is for
        assert max(entry["clip_ratio/region_mean"] for entry in theirs.history) > 0
    skipped = max(entry["frac_completions_skipped"] for entry in ours.history)
    assert skipped > 0 if case.skips else True


def test_fixed_completions_are_unequal_and_some_are_cut_off():
    completions = [fixed_completion([3, 4, 5], member, 0) for member in range(40)]
    lengths = {len(c) for c in completions}
    assert lengths == set(range(1, CAP + 1))
    assert 0 < sum(c[-1] != EOS for c in completions) < 20
