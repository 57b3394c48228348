"""What a reward function may say about itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Reward = TypeVar("Reward", bound=Callable[..., Any])


def row_wise(reward: Reward) -> Reward:
    """Say that each completion's reward depends on its own row alone.

    Such a function may be called on any part of a batch, by several workers at once, and not at all for a row that it
    has scored before. All rewards of this package and of `trl.rewards` are row-wise; of any other function nothing is
    assumed, and it is called once with the whole batch, as TRL does.
    """
    reward.reward_is_row_wise = True  # type: ignore[attr-defined]
    return reward


def in_process(reward: Reward) -> Reward:
    """Say that a function must run in the training process: it needs the GPU, or state that is kept there.

    Nothing can interrupt it there: a call that hangs, hangs the run.
    """
    reward.reward_runs_in_process = True  # type: ignore[attr-defined]
    return reward


def quick(reward: Reward) -> Reward:
    """Say that a function is linear in the text and takes less time than telling a worker would.

    It is called in the training process. As a part of something else (see `combine`) it goes where that goes.
    """
    reward.reward_is_quick = True  # type: ignore[attr-defined]
    return reward


def is_quick(reward: Any) -> bool:
    """Whether it was marked so."""
    return bool(getattr(reward, "reward_is_quick", False))


def is_row_wise(reward: Any) -> bool:
    """Whether it was marked so, or is one of TRL's own."""
    module = getattr(reward, "__module__", "") or ""
    return bool(getattr(reward, "reward_is_row_wise", False)) or module.startswith("trl.rewards.")


def is_in_process(reward: Any) -> bool:
    """Whether it was marked so."""
    return bool(getattr(reward, "reward_runs_in_process", False))
