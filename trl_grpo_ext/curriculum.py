"""`curriculum="pass_rate"` in training: a generation's rows are exchanged for those that the curriculum chooses.

The dataloader reads ahead of the step, and with several processes its batches are dealt out in turn, so what its
sampler yields are places: their number and the epochs are as ever. Which rows come into them is decided when the
generation is made, by the outcomes of all generations before it. Every process keeps all posteriors, from the outcomes
of all processes, and chooses the whole generation, of which it takes its part: nothing but outcomes is exchanged.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from .config import GRPOConfig
from .data import PASS, PassRateCurriculum
from .metrics import MetricLog
from .scored import Scored

_DEFAULT_REWARD = "accuracy_reward"


class IndexedRow(dict[str, Any]):
    """A row of the dataset that knows its number."""

    def __init__(self, row: dict[str, Any], index: int) -> None:
        super().__init__(row)
        self.index = index


class CurriculumRows:
    """Chooses rows of `data`, and learns from what is drawn for them.

    Args:
        data: All prompts; `pass_rate` and `samples` are columns that are read if they are there.
        reward: Which of the rewards decides whether a completion passes.
        args: `curriculum_floor`, `curriculum_decay`, `seed`, `num_generations`.
    """

    def __init__(self, data: Dataset, reward: int, args: GRPOConfig, accelerator: Accelerator) -> None:
        rates, samples = known_pass_rates(data, args.num_generations)
        self.posteriors = PassRateCurriculum(
            len(data),
            floor=args.curriculum_floor,
            decay=args.curriculum_decay,
            seed=args.seed,
            pass_rates=rates,
            samples=samples,
        )
        self._data, self._reward, self._accelerator = data, reward, accelerator
        self._taken: set[int] = set()  # in the generation that is being made
        self._outcomes: list[tuple[int, int, int]] = []  # of this process: prompt, passes, rollouts
        self._signal_of_chosen = 0.0

    def rows(self, count: int) -> list[dict[str, Any]]:
        """This process's `count` prompts of the next generation."""
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        chosen = self.posteriors.choose(count * processes)
        self._taken = set(chosen.tolist())
        self._signal_of_chosen = float(self.posteriors.expected_signal[chosen].mean())
        return [self._row(index) for index in chosen[rank * count : (rank + 1) * count].tolist()]

    def another(self, chooser: random.Random) -> dict[str, Any]:
        """One more prompt for this process alone, in the place of one whose group has no signal."""
        taken = self._taken if len(self._taken) < len(self._data) else set()
        (index,) = self.posteriors.choose(1, exclude=taken, turn=1 + chooser.getrandbits(62)).tolist()
        self._taken.add(index)
        return self._row(index)

    def _row(self, index: int) -> dict[str, Any]:
        return IndexedRow(self._data[index], index)

    def watching(self, draw: Callable[..., Scored]) -> Callable[..., Scored]:
        """`draw(rows, ...)`, whose outcomes are remembered until `learn`."""

        def watched(rows: Sequence[IndexedRow], *args: Any, **kwargs: Any) -> Scored:
            scored = draw(rows, *args, **kwargs)
            rewards = scored.scores.rewards[:, self._reward]
            prompt_of = torch.tensor(scored.prompt_of)
            for p, row in enumerate(rows):
                own = rewards[prompt_of == p]
                # A completion without a reward has neither passed nor failed
                self._outcomes.append((row.index, int((own >= PASS).sum()), int((~own.isnan()).sum())))
            return scored

        return watched

    def learn(self, metrics: MetricLog) -> None:
        """Take in what all processes have drawn of the generation, and record `curriculum/*`."""
        outcomes = gather_object(self._outcomes)
        self._outcomes = []
        self.posteriors.observe(*zip(*outcomes, strict=True))
        metrics.record("curriculum/signal_of_chosen", self._signal_of_chosen)
        for name, value in self.posteriors.metrics().items():
            metrics.record(f"curriculum/{name}", value)

    def state_dict(self) -> dict[str, Any]:
        """For `torch.save`, and `torch.load(weights_only=True)`."""
        state = self.posteriors.state_dict()
        return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        values = {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in state.items()}
        self.posteriors.load_state_dict(values)


def start_curriculum(
    args: GRPOConfig, data: Dataset | IterableDataset | None, reward_names: Sequence[str], accelerator: Accelerator
) -> CurriculumRows | None:
    """What `args.curriculum` asks for; None if that is nothing."""
    if args.curriculum is None or not isinstance(data, Dataset):
        return None
    return CurriculumRows(data, pass_reward(args.curriculum_reward, reward_names), args, accelerator)


def pass_reward(name: str | None, names: Sequence[str]) -> int:
    """Which reward function says whether a completion passes.

    Raises:
        ValueError: if there is none of that name, or several rewards and no name.
    """
    if name is None:
        if _DEFAULT_REWARD not in names and len(names) > 1:
            raise ValueError(
                f"curriculum='pass_rate' needs curriculum_reward: which of the reward functions {list(names)} gives "
                "1.0 to a completion that passes? (Unset, it is accuracy_reward, and that is not among them.)"
            )
        name = _DEFAULT_REWARD if _DEFAULT_REWARD in names else names[0]
    if list(names).count(name) != 1:
        raise ValueError(
            f"curriculum_reward={name!r} must be the name of one of the reward functions {list(names)}: set it to that "
            "of the one that gives 1.0 to a completion that passes."
        )
    return list(names).index(name)


def known_pass_rates(data: Dataset, num_generations: int) -> tuple[list[float] | None, list[float] | None]:
    """Columns `pass_rate` and `samples`, NaN where they are empty; without `samples`, `num_generations` each.

    Raises:
        ValueError: names the first row whose value cannot be used.
    """
    if "pass_rate" not in data.column_names:
        return None, None
    rates = _numbers(data, "pass_rate", 1.0)
    if "samples" in data.column_names:
        samples = _numbers(data, "samples", math.inf)
        return rates, [0.0 if math.isnan(value) else value for value in samples]
    return rates, [float(num_generations)] * len(rates)


def _numbers(data: Dataset, column: str, most: float) -> list[float]:
    values = []
    for row, value in enumerate(data[column]):
        if value is None:
            value = math.nan
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or value > most:
            raise ValueError(
                f"train_dataset, row {row}: {column}={value!r} must be a number "
                f"{'in [0, 1]' if most == 1 else 'of at least 0'}, or empty, for curriculum='pass_rate'. Correct or "
                "remove the column."
            )
        values.append(float(value))
    return values
