"""Rewards -> advantages, log-probs -> loss: pure functions, tensors in and tensors out; torch is the only import."""

from .advantages import (
    AGGREGATORS,
    REWARD_SCALES,
    Advantages,
    combine_rewards,
    group_advantages,
    normalize_then_sum_advantages,
)
from .aggregation import AGGREGATIONS, StepNormalizer
from .choices import Choices
from .estimators import (
    ADVANTAGE_ESTIMATORS,
    raft_advantages,
    reinforce_advantages,
    remax_advantages,
    rloo_advantages,
)
from .kl import KL_ESTIMATORS, full_kl, kl_penalised_rewards
from .loss import LossTerms, grpo_loss
from .process import mix_advantages, process_advantages, stack_steps
from .ratio import IMPORTANCE_LEVELS, importance_ratio
from .signal import groups_with_signal
from .surrogate import ClipIndicators, clip_indicators, clipped_surrogate

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "AGGREGATIONS",
    "AGGREGATORS",
    "IMPORTANCE_LEVELS",
    "KL_ESTIMATORS",
    "REWARD_SCALES",
    "Advantages",
    "Choices",
    "ClipIndicators",
    "LossTerms",
    "StepNormalizer",
    "clip_indicators",
    "clipped_surrogate",
    "combine_rewards",
    "full_kl",
    "group_advantages",
    "groups_with_signal",
    "grpo_loss",
    "importance_ratio",
    "kl_penalised_rewards",
    "mix_advantages",
    "normalize_then_sum_advantages",
    "process_advantages",
    "raft_advantages",
    "reinforce_advantages",
    "remax_advantages",
    "rloo_advantages",
    "stack_steps",
]
