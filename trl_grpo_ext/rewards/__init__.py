"""Completions -> rewards: what a completion is worth, and the firewall around whoever says so."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accuracy import AccuracyReward, accuracy_reward
    from .combine import combine
    from .countdown import CountdownReward, countdown_reward
    from .failures import RewardError
    from .format import FormatReward, TagCountReward, think_answer_format_reward, think_format_reward
    from .language import LanguageConsistencyReward
    from .length import CosineLengthReward, LengthReward, soft_overlong_reward
    from .marks import in_process, row_wise
    from .multiple_choice import MultipleChoiceReward, multiple_choice_reward
    from .process_reward_model import ProcessRewardModel
    from .reasoning_gym import ReasoningGymReward
    from .registry import load_rewards
    from .repetition import repetition_reward
    from .runner import Limits
    from .safety import SafetyReward
    from .scoring import RewardScorer, Scores
    from .step_rewards import ArithmeticSteps, JudgedSteps, StepReward, StepRewards, step_reward
    from .steps import SplitAt
    from .token_spans import SpanDecoder

# Imported on first use: the worker processes that rewards run in need neither torch nor TRL for most of them
_MODULE_OF = {
    "AccuracyReward": "accuracy",
    "ArithmeticSteps": "step_rewards",
    "CosineLengthReward": "length",
    "CountdownReward": "countdown",
    "FormatReward": "format",
    "JudgedSteps": "step_rewards",
    "LanguageConsistencyReward": "language",
    "LengthReward": "length",
    "Limits": "runner",
    "MultipleChoiceReward": "multiple_choice",
    "ProcessRewardModel": "process_reward_model",
    "ReasoningGymReward": "reasoning_gym",
    "RewardError": "failures",
    "RewardScorer": "scoring",
    "SafetyReward": "safety",
    "Scores": "scoring",
    "SpanDecoder": "token_spans",
    "SplitAt": "steps",
    "StepReward": "step_rewards",
    "StepRewards": "step_rewards",
    "TagCountReward": "format",
    "accuracy_reward": "accuracy",
    "combine": "combine",
    "countdown_reward": "countdown",
    "in_process": "marks",
    "load_rewards": "registry",
    "multiple_choice_reward": "multiple_choice",
    "repetition_reward": "repetition",
    "row_wise": "marks",
    "soft_overlong_reward": "length",
    "step_reward": "step_rewards",
    "think_answer_format_reward": "format",
    "think_format_reward": "format",
}

__all__ = [
    "AccuracyReward",
    "ArithmeticSteps",
    "CosineLengthReward",
    "CountdownReward",
    "FormatReward",
    "JudgedSteps",
    "LanguageConsistencyReward",
    "LengthReward",
    "Limits",
    "MultipleChoiceReward",
    "ProcessRewardModel",
    "ReasoningGymReward",
    "RewardError",
    "RewardScorer",
    "SafetyReward",
    "Scores",
    "SpanDecoder",
    "SplitAt",
    "StepReward",
    "StepRewards",
    "TagCountReward",
    "accuracy_reward",
    "combine",
    "countdown_reward",
    "in_process",
    "load_rewards",
    "multiple_choice_reward",
    "repetition_reward",
    "row_wise",
    "soft_overlong_reward",
    "step_reward",
    "think_answer_format_reward",
    "think_format_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
