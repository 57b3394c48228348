"""Groups without a signal: draw more of their completions (adaptive group size), or other prompts (dynamic sampling).

A group whose rewards are all equal has no policy gradient. Adaptive group size draws on from the same prompt, up to
`num_generations_max` completions, as Reinforce-Ada does (arXiv:2510.04996), and keeps all of them in the group.
A prompt's completions have numbered streams of noise, so these are what a larger `num_generations` would have drawn.
Dynamic sampling (DAPO, arXiv:2503.14476 §3.2) puts another prompt in the place of one whose group has stayed silent,
until all groups have a signal or `dynamic_sampling_max_rounds` are spent.

Both stop where a signal is found, so what is trained on is no longer a plain sample of the policy's completions. Each
process looks after its own prompts; nothing is gathered, so one may take more rounds than another.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from .config import GRPOConfig
from .objective import groups_with_signal
from .scored import Group, Scored, groups_of, put_together

_ROUND = 2**32  # noise of the prompts of a round is that of prompt `_ROUND * round + i`: never of one in the batch

Draw = Callable[..., Scored]
Further = Callable[[random.Random], dict[str, Any]]


def uniformly(data: Dataset) -> Further:
    """Any of the dataset's rows."""
    return lambda chooser: data[chooser.randrange(len(data))]


@dataclass(slots=True)
class Resampled:
    """What became of one process's draw."""

    scored: Scored  # what is trained on
    further: list[Scored]  # what was drawn beyond the first draw, kept or not
    counts: dict[str, float] = field(default_factory=dict)  # to be summed over processes


@dataclass
class Resampler:
    """Draws on where a group has no signal.

    Args:
        args: `num_generations`, `num_generations_max`, `dynamic_sampling` and `dynamic_sampling_max_rounds`.
        weights: `(K,)` weights of the rewards.
        judges_steps: `(K,)` bool. Step rewards say nothing about a group's spread.
        further: Gives another prompt, at random; None without `dynamic_sampling`.
        process_index: Processes draw different ones.
    """

    args: GRPOConfig
    weights: torch.Tensor
    judges_steps: torch.Tensor
    further: Further | None
    process_index: int

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do."""
        return self.args.dynamic_sampling or (self.args.num_generations_max or 0) > self.args.num_generations

    def resample(
        self, scored: Scored, rows: list[dict[str, Any]], indices: list[int], step: int, draw: Draw
    ) -> Resampled:
        """Draw until every group has a signal, or the limits are reached.

        Args:
            scored: `num_generations` completions for each of `rows`.
            rows: P, one for each prompt.
            indices: P, the prompts' numbers in the noise.
            step: Key of the choice of further prompts.
            draw: `(rows, num_generations, prompt_indices=, first_completion_index=) -> Scored`.
        """
        search = _Search(self, draw, groups_of(scored), list(rows), list(indices))
        silent = before = search.silent(range(len(rows)))
        silent = search.extend(silent)
        chooser = random.Random(f"{self.args.seed}-{step}-{self.process_index}-{indices[0]}")
        rounds = self.args.dynamic_sampling_max_rounds if self.args.dynamic_sampling else 0
        for number in range(1, rounds + 1):
            if not silent:
                break
            silent = search.extend(search.replace(silent, number, chooser))
        search.counts |= {"groups": len(rows), "silent_before": len(before), "silent_after": len(silent)}
        final = put_together(search.groups, self.args.num_generations, like=scored)
        return Resampled(final, search.further, search.counts)


@dataclass(slots=True)
class _Search:
    """The groups of one generation while some of them are drawn on."""

    of: Resampler
    draw: Draw
    groups: list[Group]
    rows: list[dict[str, Any]]
    indices: list[int]
    further: list[Scored] = field(default_factory=list)
    counts: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            (
                "adaptive/completions", "adaptive/tokens", "adaptive/groups_gained",
                "dynamic_sampling/completions", "dynamic_sampling/tokens", "dynamic_sampling/groups_gained",
                "dynamic_sampling/prompts_replaced", "dynamic_sampling/rounds",
            ),
            0.0,
        )
    )  # fmt: skip

    def silent(self, which: Any) -> list[int]:
        """Those of the groups whose rewards do not differ, or of which nothing would be in the loss."""
        return [p for p in which if not self._has_signal(self.groups[p])]

    def _has_signal(self, group: Group) -> bool:
        if self.of.args.mask_truncated_completions and not group.any_ended:
            return False
        kept = ~self.of.judges_steps
        rewards = group.rewards[:, kept]
        separately = self.of.args.multi_objective_aggregation == "normalize_then_sum"
        return bool(groups_with_signal(rewards, self.of.weights[kept], len(rewards), separately=separately))

    def extend(self, silent: list[int]) -> list[int]:
        """More completions for these groups; which of them are still silent."""
        size, most = self.of.args.num_generations, self.of.args.num_generations_max or 0
        while silent and size < most:
            count = min(self.of.args.num_generations, most - size)
            drawn = self._drawn("adaptive", silent, count, size)
            for p, group in zip(silent, groups_of(drawn), strict=True):
                self.groups[p].members += group.members
            size += count
            silent = self._still("adaptive", silent)
        return silent

    def replace(self, silent: list[int], number: int, chooser: random.Random) -> list[int]:
        """Other prompts in the place of these; which of those are silent."""
        assert self.of.further is not None  # the trainer refuses a stream
        for p in silent:
            self.rows[p] = self.of.further(chooser)
            self.indices[p] = self.indices[p] % _ROUND + _ROUND * number
        drawn = self._drawn("dynamic_sampling", silent, self.of.args.num_generations, 0)
        for p, group in zip(silent, groups_of(drawn), strict=True):
            self.groups[p] = group
        self.counts["dynamic_sampling/prompts_replaced"] += len(silent)
        self.counts["dynamic_sampling/rounds"] += 1
        return self._still("dynamic_sampling", silent)

    def _drawn(self, why: str, which: list[int], count: int, first: int) -> Scored:
        rows, indices = [self.rows[p] for p in which], [self.indices[p] for p in which]
        drawn = self.draw(rows, count, prompt_indices=indices, first_completion_index=first)
        self.further.append(drawn)
        self.counts[f"{why}/completions"] += len(drawn.completion_ids)
        self.counts[f"{why}/tokens"] += sum(map(len, drawn.completion_ids))
        return drawn

    def _still(self, why: str, silent: list[int]) -> list[int]:
        left = self.silent(silent)
        self.counts[f"{why}/groups_gained"] += len(silent) - len(left)
        return left
