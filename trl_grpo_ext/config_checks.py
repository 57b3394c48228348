"""Runs the rules of `config_rules.py`, and those that tie several fields together, over a `GRPOConfig`.

A problem is one line that names the field, its value, the rule and the remedy. Checks read the config and never change
it.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .config_curriculum import curriculum_problems
from .config_evaluation import evaluation_problems
from .config_reporting import reporting_problems
from .config_rules import CHOICES, DDP, GENERATION_KEYS, REFUSED, REFUSED_ENVIRONMENT, RULE_OF, RULES, integer, number

if TYPE_CHECKING:
    from .config import GRPOConfig


class InvalidConfigError(ValueError):
    """One or more fields of a config break a rule. `problems` holds one line for each."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "GRPOConfig cannot be used as given:" + "".join(f"\n  - {problem}" for problem in self.problems)


def refused_features(config: GRPOConfig) -> list[str]:
    """Features that are not supported. Run before `TrainingArguments` starts to set them up."""
    problems = [
        f"{field}={value!r} {remedy}." for field, remedy in REFUSED.items() if (value := getattr(config, field, None))
    ]
    for variable, name in REFUSED_ENVIRONMENT.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "t", "y"):
            problems.append(
                f"{name} is switched on by {variable}={os.environ[variable]}, which is not supported. {DDP}."
            )
    parallelism = config.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        problems.append(
            f"parallelism_config (cp_size={parallelism.cp_size}, sp_size={parallelism.sp_size}) must not split the "
            "sequence: model inputs are built after generation, inside the trainer. Set cp_size=1 and sp_size=1."
        )
    return problems


def value_problems(config: GRPOConfig) -> list[str]:
    """Fields whose value breaks a rule by itself, and pairs of fields that exclude each other."""
    problems = [problem for rule in RULES if (problem := rule.problem(getattr(config, rule.field))) is not None]
    for field, allowed in CHOICES.items():
        problems += _choice_problem(field, getattr(config, field), allowed)
    checks = (_reward_weights, _kl_in_reward, _living_reference, _estimator, _resampling, _both_generation_sizes)
    for check in (*checks, _adapter_source, curriculum_problems, evaluation_problems):
        problems += check(config)
    return problems


def settled_problems(config: GRPOConfig) -> list[str]:
    """Checks that need `TrainingArguments.__post_init__`: JSON strings are dicts, the processes are counted."""
    problems = [*_dicts(config), *_generation_kwargs(config), *_data_parallel(config), *_best_metric(config)]
    problems += reporting_problems(config)
    for fields, check in _BATCH_CHECKS:
        # A batch of -1, or a group of 0, is reported by its own rule; here it would only add noise.
        if all(RULE_OF[field].problem(getattr(config, field)) is None for field in fields):
            problems += check(config)
    return problems


def _choice_problem(field: str, value: Any, allowed: Sequence[str]) -> Iterator[str]:
    if isinstance(value, str) and value in allowed:
        return
    near = difflib.get_close_matches(str(value).lower(), allowed, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"The default is {_default(field)!r}."
    yield f"{field}={value!r} must be one of {', '.join(map(repr, allowed))}. {remedy}"


def _default(field: str) -> Any:
    from .config import GRPOConfig  # at run time config.py imports this module

    return GRPOConfig.__dataclass_fields__[field].default


def _reward_weights(config: GRPOConfig) -> Iterator[str]:
    weights = config.reward_weights
    if weights is None:
        return
    if not isinstance(weights, list | tuple) or not weights or not all(map(number(lambda v: True), weights)):
        yield (
            f"reward_weights={weights!r} must be a list of finite numbers, one per reward function. Leave it unset to "
            "weight all of them with 1.0."
        )


def _kl_in_reward(config: GRPOConfig) -> Iterator[str]:
    if not config.kl_in_reward:
        return
    if config.beta == 0:
        yield (
            "kl_in_reward=True must come with beta above 0, and beta=0.0 leaves nothing to subtract from the reward. "
            "Set beta, or kl_in_reward=False."
        )
    if config.kl_estimator in ("k2", "full"):
        yield (
            f"kl_in_reward=True must come with kl_estimator='k1' (or the default), as what a reward is charged is "
            f"always the log ratio of the sampled tokens, and kl_estimator={config.kl_estimator!r} would have no "
            "effect. Set kl_estimator='k1', or kl_in_reward=False."
        )
    if config.multi_objective_aggregation == "normalize_then_sum":
        yield (
            "kl_in_reward=True must come with multi_objective_aggregation='sum_then_normalize': normalized by itself, "
            "the KL would weigh the same whatever beta is. Set it, or kl_in_reward=False."
        )


def _living_reference(config: GRPOConfig) -> Iterator[str]:
    fields = ("ref_model_mixup_alpha", "ref_model_sync_steps", "reference_rounds")
    if any(RULE_OF[field].problem(getattr(config, field)) for field in fields):
        return
    rounds = config.reference_rounds
    wishes = ["sync_ref_model=True"] * bool(config.sync_ref_model)
    wishes += [f"reference_rounds={rounds}"] * (rounds != 1)
    if wishes and config.beta == 0:
        yield (
            f"{' and '.join(wishes)} must come with beta above 0: with beta=0.0 there is no reference. Set beta, or "
            "leave the field unset."
        )
    if len(wishes) == 2:
        yield (
            f"{' and '.join(wishes)} exclude each other: each says when the reference is set to the policy. Unset one."
        )
    if config.sync_ref_model:
        return
    for field in fields[:2]:
        if (value := getattr(config, field)) != _default(field):
            yield f"{field}={value!r} has an effect only with sync_ref_model=True. Set that, or leave the field unset."


def _estimator(config: GRPOConfig) -> Iterator[str]:
    estimator = config.advantage_estimator
    if estimator == "group" or estimator not in CHOICES["advantage_estimator"]:
        return
    ignored = {"scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"}
    for field, default in ignored.items():
        if getattr(config, field) != default:
            yield (
                f"{field}={getattr(config, field)!r} must be {default!r} (the default) with advantage_estimator="
                f"{estimator!r}, which does not scale rewards. Leave it, or set advantage_estimator='group'."
            )
    if estimator == "remax" and config.kl_in_reward:
        yield (
            "kl_in_reward=True must not come with advantage_estimator='remax': the greedy completion that is its "
            "baseline is not charged for its KL. Set kl_in_reward=False."
        )


def _resampling(config: GRPOConfig) -> Iterator[str]:
    most = config.num_generations_max
    fields = [RULE_OF[name].problem(getattr(config, name)) for name in ("num_generations", "num_generations_max")]
    if most is not None and fields == [None, None] and most < config.num_generations:
        yield (
            f"num_generations_max={most} must be at least num_generations={config.num_generations}: it is what a group "
            "may grow to. Raise it, or leave it unset."
        )
    asked = [f"num_generations_max={most}"] * (most is not None) + ["dynamic_sampling=True"] * config.dynamic_sampling
    if asked and config.advantage_estimator in ("remax", "reinforce"):
        yield (
            f"{' and '.join(asked)} must not come with advantage_estimator={config.advantage_estimator!r}: with its "
            "baseline a group of equal rewards has a gradient, and need not be drawn on. Leave them unset, or set "
            "advantage_estimator='group', 'rloo' or 'raft'."
        )


def _both_generation_sizes(config: GRPOConfig) -> Iterator[str]:
    if config.generation_batch_size is not None and config.steps_per_generation is not None:
        yield (
            f"generation_batch_size={config.generation_batch_size} and steps_per_generation="
            f"{config.steps_per_generation} must not both be set, as each follows from the other. Leave one unset."
        )


def _adapter_source(config: GRPOConfig) -> Iterator[str]:
    adapter, revision = config.adapter_name_or_path, config.adapter_revision
    for field, value in (("adapter_name_or_path", adapter), ("adapter_revision", revision)):
        if value is not None and (not isinstance(value, str) or not value):
            yield f"{field}={value!r} must be a string that is not empty. Leave it unset for none."
    if revision is not None and adapter is None:
        yield (
            f"adapter_revision={revision!r} must come with adapter_name_or_path, of which it is a revision. Set it, or "
            "leave both unset."
        )


def _dicts(config: GRPOConfig) -> Iterator[str]:
    for field in ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs"):
        value = getattr(config, field)
        if value is not None and not isinstance(value, dict):
            yield f"{field}={value!r} must be a dict, or its JSON on the command line. Leave it unset for none."


def _generation_kwargs(config: GRPOConfig) -> Iterator[str]:
    options = config.generation_kwargs
    if not isinstance(options, dict):
        return  # unset, or reported by `_dicts`
    for key, value in options.items():
        label = f"generation_kwargs[{key!r}]"
        if key not in GENERATION_KEYS:
            near = difflib.get_close_matches(str(key), GENERATION_KEYS, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else "Remove it."
            yield f"{label}={value!r} is not supported; the keys are {', '.join(GENERATION_KEYS)}. {remedy}"
        elif (field := GENERATION_KEYS[key]) is not None:
            problem = RULE_OF[field].problem(value, label)
            if problem is not None:
                yield problem
        elif value is not None and not (isinstance(value, list | tuple) and all(map(integer(0), value))):
            yield f"{label}={value!r} must be a list of token ids. Remove it to suppress none."


def _data_parallel(config: GRPOConfig) -> Iterator[str]:
    if config.n_gpu > 1:
        yield (
            f"n_gpu={config.n_gpu} devices in one process must not be: torch.nn.DataParallel would cut the packed rows "
            f"apart. Set CUDA_VISIBLE_DEVICES to one device. {DDP}."
        )


def _best_metric(config: GRPOConfig) -> Iterator[str]:
    # TrainingArguments fills "loss" in where one is needed; an evaluation here samples and scores, and has no loss
    if config.metric_for_best_model in ("loss", "eval_loss"):
        yield (
            f"metric_for_best_model={config.metric_for_best_model!r} (the default, where one is needed) must be a "
            "metric of an evaluation, and there is no loss among them. Set metric_for_best_model='eval_reward'."
        )


def _generation_batch(config: GRPOConfig) -> Iterator[str]:
    if config.generation_batch_size is not None and config.steps_per_generation is not None:
        return  # reported by `_both_generation_sizes`
    batch, processes, group = config.per_device_train_batch_size, config.world_size, config.num_generations
    step = batch * processes
    size = config.generation_batch_size or step * (config.steps_per_generation or config.gradient_accumulation_steps)
    # The smallest size, from here upwards, that gives every process whole micro-batches and whole groups.
    whole = math.lcm(batch, group) * processes
    fit = whole * math.ceil(size / whole)
    rules = (
        (size % step == 0, f"divisible by per_device_train_batch_size={batch} * {processes} processes"),
        (size % group == 0, f"divisible by num_generations={group}, as it holds whole groups"),
        (
            size // processes % group == 0,
            f"divisible by {processes} processes * num_generations={group}, as each holds whole groups",
        ),
    )
    for holds, rule in rules:
        if not holds:
            origin = (
                ""
                if config.generation_batch_size
                else (f" (per_device_train_batch_size={batch} * {processes} processes * {size // step} steps)")
            )
            yield (
                f"generation_batch_size={size}{origin} must be {rule}. Change num_generations, or use "
                f"steps_per_generation={fit // step}, which makes it {fit}."
            )
            return


def _eval_batch(config: GRPOConfig) -> Iterator[str]:
    if not config.do_eval or config.eval_strategy == "no":
        return
    group = config.num_generations_eval or config.num_generations
    size = config.per_device_eval_batch_size * config.world_size
    if size < 1 or size % group != 0:
        yield (
            f"per_device_eval_batch_size={config.per_device_eval_batch_size} * {config.world_size} processes = {size} "
            f"must be divisible by the {group} completions per prompt of an evaluation. Set num_generations_eval or "
            "per_device_eval_batch_size so that it is."
        )


_BATCH_CHECKS: tuple[tuple[tuple[str, ...], Callable[[GRPOConfig], Iterator[str]]], ...] = (
    (
        (
            "num_generations",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "steps_per_generation",
            "generation_batch_size",
        ),
        _generation_batch,
    ),
    (("num_generations", "num_generations_eval"), _eval_batch),
)
