"""What a `GRPOConfig` may hold, as tables: a new field needs a row here, and no code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any


@dataclass(frozen=True, slots=True)
class Rule:
    """What one number must be. `rule` completes "<field>=<value> must be ..."."""

    field: str
    holds: Callable[[Any], bool]
    rule: str
    remedy: str
    optional: bool = False  # None is fine: the feature is off, or the value is derived

    def problem(self, value: Any, label: str | None = None) -> str | None:
        if (value is None and self.optional) or self.holds(value):
            return None
        return f"{label or self.field}={value!r} must be {self.rule}. {self.remedy}."


def integer(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def number(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    # NaN fails every comparison, but infinity would pass `value > 0`.
    return lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and holds(float(value))
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "num_generations",
        integer(2),
        "an integer of at least 2, because an advantage compares a completion with the others of its group",
        "Set it to 2 or more (the default is 8)",
    ),
    Rule(
        "num_generations_eval",
        integer(1),
        "an integer of at least 1",
        "Leave it unset to use num_generations",
        optional=True,
    ),
    Rule(
        "num_generations_max",
        integer(2),
        "an integer of at least 2",
        "Leave it unset for groups of num_generations",
        optional=True,
    ),
    Rule("dynamic_sampling_max_rounds", integer(1), "an integer of at least 1", "The default is 5"),
    Rule("max_completion_length", integer(1), "an integer of at least 1", "Set the longest completion to sample"),
    Rule("num_iterations", integer(1), "an integer of at least 1", "Set 1 to use each batch of completions once"),
    Rule("per_device_train_batch_size", integer(1), "an integer of at least 1", "Set the completions per micro-batch"),
    Rule("gradient_accumulation_steps", integer(1), "an integer of at least 1", "Set 1 for no accumulation"),
    Rule(
        "steps_per_generation",
        integer(1),
        "an integer of at least 1",
        "Leave it unset to use gradient_accumulation_steps",
        optional=True,
    ),
    Rule(
        "generation_batch_size",
        integer(1),
        "an integer of at least 1",
        "Leave it unset to use per_device_train_batch_size * processes * steps_per_generation",
        optional=True,
    ),
    Rule("temperature", number(lambda v: v > 0), "a number above 0", "Set 1.0 to sample from the model's distribution"),
    Rule("top_p", number(lambda v: 0 < v <= 1), "a number in (0, 1]", "Set 1.0 to turn nucleus sampling off"),
    Rule("top_k", integer(0), "an integer of at least 0", "Set 0 to turn top-k off"),
    Rule("min_p", number(lambda v: 0 <= v <= 1), "a number in [0, 1]", "Leave it unset to turn it off", optional=True),
    Rule("repetition_penalty", number(lambda v: v > 0), "a number above 0", "Set 1.0 to turn it off"),
    Rule("beta", number(lambda v: v >= 0), "a number of at least 0", "Set 0.0 to train without a KL term"),
    Rule(
        "ref_model_mixup_alpha",
        number(lambda v: 0 < v <= 1),
        "a number in (0, 1]",
        "Set 1.0 to set the reference to the policy; the default is 0.6",
    ),
    Rule("ref_model_sync_steps", integer(1), "an integer of at least 1", "The default is 512"),
    Rule("reference_rounds", integer(1), "an integer of at least 1", "Set 1 for a reference that stays"),
    Rule("epsilon", number(lambda v: 0 <= v < 1), "a number in [0, 1)", "The default is 0.2"),
    Rule(
        "epsilon_high",
        number(lambda v: v >= 0),
        "a number of at least 0",
        "Leave it unset to use epsilon; DAPO recommends 0.28",
        optional=True,
    ),
    Rule(
        "delta",
        number(lambda v: v > 0),
        "a number above 0, and should be above 1 + epsilon_high",
        "Leave it unset for one-sided clipping",
        optional=True,
    ),
    Rule("reward_timeout", number(lambda v: v > 0), "a number of seconds above 0", "The default is 10"),
    Rule("reward_memory_mb", integer(1), "an integer of at least 1", "The default is 1024"),
    Rule(
        "reward_workers",
        integer(0),
        "an integer of at least 0",
        "Leave it unset for one per core; 0 runs rewards in the training process",
        optional=True,
    ),
    Rule("reward_concurrency", integer(1), "an integer of at least 1", "The default is 32"),
    Rule(
        "reward_max_failure_rate",
        number(lambda v: 0 <= v <= 1),
        "a number in [0, 1]",
        "0 stops at the first failure, 1 never; the default is 0.5",
    ),
    # transformers', which torch and numpy refuse only when the weights are loaded
    Rule("learning_rate", number(lambda v: v >= 0), "a number of at least 0", "The default is 1e-6"),
    Rule("weight_decay", number(lambda v: v >= 0), "a number of at least 0", "Set 0.0 for none"),
    Rule(
        "seed",
        lambda value: isinstance(value, Integral) and value is not True and 0 <= int(value) < 2**32,
        "an integer from 0 to 4294967295",
        "The default is 42",
    ),
)
RULE_OF = {rule.field: rule for rule in RULES}

CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "dr_grpo", "bnpo", "dapo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "advantage_estimator": ("group", "rloo", "remax", "raft", "reinforce"),
    "kl_estimator": ("k1", "k2", "k3", "full"),
    "attention_packing": ("auto", "on", "off"),
    "rollout_dequantize": ("layer", "resident"),
}

# Keys of generation_kwargs, and the field whose value each replaces while sampling (suppress_tokens has no field).
GENERATION_KEYS: dict[str, str | None] = {
    "max_new_tokens": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "suppress_tokens": None,
}

DDP = "More than one device is used through `accelerate launch` with plain data parallelism (DDP)"
# Fields that switch something on which this trainer does not do, and what to do instead.
REFUSED: dict[str, str] = {
    "use_liger_kernel": "is not supported: the log-probs come from TRL's fused LM head. Set it to False",
    "torch_compile": "is not supported: every packed row has another shape. Set it to False",
    "torch_compile_backend": "is not supported: every packed row has another shape. Leave it unset",
    "torch_compile_mode": "is not supported: every packed row has another shape. Leave it unset",
    "deepspeed": f"is not supported. {DDP}; leave it unset",
    "fsdp": f"is not supported. {DDP}; leave it unset",
    "fsdp_config": f"is not supported. {DDP}; leave it unset",
    "auto_find_batch_size": (
        "is not supported: a batch halved after an out-of-memory error no longer holds whole groups. Set it to False "
        "and lower per_device_train_batch_size"
    ),
    "remove_unused_columns": (
        "is not supported: reward functions receive the dataset's columns. Set it to False and remove columns from the "
        "dataset itself"
    ),
}
# `accelerate launch` can switch these on behind the config's back.
REFUSED_ENVIRONMENT = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}
