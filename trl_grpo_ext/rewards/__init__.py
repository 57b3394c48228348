"""Completions -> rewards: what a completion is worth, and the firewall around whoever says so."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accuracy import AccuracyReward, accuracy_reward
    from .countdown import CountdownReward, countdown_reward
    from .failures import RewardError
    from .format import think_answer_format_reward
    from .marks import in_process, row_wise
    from .multiple_choice import MultipleChoiceReward, multiple_choice_reward
    from .runner import Limits
    from .scoring import RewardScorer, Scores
    from .step_rewards import StepReward, StepRewards, step_reward
    from .token_spans import SpanDecoder

# Imported on first use: the worker processes that rewards run in need neither torch nor TRL for most of them
_MODULE_OF = {
    "AccuracyReward": "accuracy",
    "CountdownReward": "countdown",
    "Limits": "runner",
    "MultipleChoiceReward": "multiple_choice",
    "RewardError": "failures",
    "RewardScorer": "scoring",
    "Scores": "scoring",
    "SpanDecoder": "token_spans",
    "StepReward": "step_rewards",
    "StepRewards": "step_rewards",
    "step_reward": "step_rewards",
    "accuracy_reward": "accuracy",
    "countdown_reward": "countdown",
    "in_process": "marks",
    "multiple_choice_reward": "multiple_choice",
    "row_wise": "marks",
    "think_answer_format_reward": "format",
}

__all__ = [
    "AccuracyReward",
    "CountdownReward",
    "Limits",
    "MultipleChoiceReward",
    "RewardError",
    "RewardScorer",
    "Scores",
    "SpanDecoder",
    "StepReward",
    "StepRewards",
    "accuracy_reward",
    "countdown_reward",
    "in_process",
    "multiple_choice_reward",
    "row_wise",
    "step_reward",
    "think_answer_format_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
