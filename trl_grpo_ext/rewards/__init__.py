"""Completions -> rewards: what a completion is worth, and the runner that asks every reward function."""

from .accuracy import accuracy_reward
from .firewall import RewardError
from .format import think_answer_format_reward
from .scoring import RewardScorer

__all__ = ["RewardError", "RewardScorer", "accuracy_reward", "think_answer_format_reward"]
