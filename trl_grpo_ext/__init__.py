"""GRPO for LoRA and QLoRA policies on one GPU: a plugin for Hugging Face TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import GRPOConfig
    from .data import PromptReport, load_prompts
    from .evaluation import Evaluation, evaluate_policy
    from .policy import base_fingerprint
    from .rewards import RewardError, accuracy_reward, think_answer_format_reward
    from .rollout import GroupSampler, Rollouts
    from .trainer import GRPOTrainer

__version__ = "0.1.0"

# Imported on first use, so that a reward's worker process starts without torch, and `--help` in no time
_MODULE_OF = {
    "Evaluation": "evaluation",
    "GRPOConfig": "config",
    "GRPOTrainer": "trainer",
    "GroupSampler": "rollout",
    "PromptReport": "data",
    "RewardError": "rewards",
    "Rollouts": "rollout",
    "accuracy_reward": "rewards",
    "base_fingerprint": "policy",
    "evaluate_policy": "evaluation",
    "load_prompts": "data",
    "think_answer_format_reward": "rewards",
}

__all__ = [
    "Evaluation",
    "GRPOConfig",
    "GRPOTrainer",
    "GroupSampler",
    "PromptReport",
    "RewardError",
    "Rollouts",
    "__version__",
    "accuracy_reward",
    "base_fingerprint",
    "evaluate_policy",
    "load_prompts",
    "think_answer_format_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
