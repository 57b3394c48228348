"""GRPO for LoRA and QLoRA policies on one GPU: a plugin for Hugging Face TRL."""

from .config import GRPOConfig
from .rewards import RewardError, accuracy_reward, think_answer_format_reward
from .rollout import GroupSampler, Rollouts
from .trainer import GRPOTrainer

__version__ = "0.1.0"

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "GroupSampler",
    "RewardError",
    "Rollouts",
    "__version__",
    "accuracy_reward",
    "think_answer_format_reward",
]
