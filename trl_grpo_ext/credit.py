"""Rewards -> advantages of one generation: of whole completions, of the tokens of their steps, or of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from .config import GRPOConfig
from .objective import (
    ADVANTAGE_ESTIMATORS,
    AGGREGATORS,
    Advantages,
    combine_rewards,
    mix_advantages,
    process_advantages,
    stack_steps,
)
from .rewards import Scores, SpanDecoder


@dataclass(frozen=True, slots=True)
class _Places:
    """Where B completions stand in P rows of equal width, one row for each group."""

    index: torch.Tensor  # (B,)
    size: int  # P * width

    def spread(self, values: torch.Tensor, filling: float) -> torch.Tensor:
        """`(B, ...)` -> `(P * width, ...)`."""
        out = values.new_full((self.size, *values.shape[1:]), filling)
        out[self.index] = values
        return out


def _places(prompt_of: Sequence[int], width: int) -> _Places:
    counts = [0] * (max(prompt_of) + 1)
    index = []
    for prompt in prompt_of:
        index.append(prompt * width + counts[prompt])
        counts[prompt] += 1
    return _Places(torch.tensor(index), len(counts) * width)


@dataclass
class CreditAssigner:
    """Turns the rewards of a process's completions into their advantages."""

    args: GRPOConfig
    accelerator: Accelerator
    names: list[str]  # K
    weights: torch.Tensor  # (K,)
    judges_steps: torch.Tensor  # (K,) bool: which of the rewards are of steps
    decoder: SpanDecoder

    def assign(
        self,
        scores: Scores,
        completion_ids: list[list[int]],
        prompt_of: list[int],
        prefills: list[str],
        *,
        penalty: torch.Tensor | None = None,
        greedy: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float, dict[str, float]]:
        """Advantages, the share of groups without spread, and metrics.

        Args:
            scores: of this process's B completions.
            completion_ids: B.
            prompt_of: B, which of the process's P prompts each belongs to.
            prefills: B, what each prompt wrote of the completion's text.
            penalty: `(B, 1)`, one more reward, of weight 1.
            greedy: `(P, K)` rewards of one greedy completion for each prompt, for `advantage_estimator="remax"`.

        Returns:
            `(B,)`, or `(B, C)` if there are step rewards.
        """
        places = _places(prompt_of, self._width)
        outcome = self._outcome(scores.rewards, places, penalty, greedy)
        zero_std = float(outcome.zero_std[:: self._width].float().mean())  # every group has a first completion
        first = self.accelerator.process_index * places.size
        values = outcome.values[first : first + places.size][places.index]
        if not scores.steps:
            return values, zero_std, {}
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        process = torch.zeros(len(completion_ids), int(lengths.max()))
        metrics: dict[str, float] = {}
        for k in scores.steps:
            one, own = self._process(scores, k, completion_ids, places, prefills, process.shape[1])
            process += float(self.weights[k]) * one
            prefix = "process" if len(scores.steps) == 1 else f"process/{self.names[k]}"
            metrics |= {f"{prefix}/{name}": value for name, value in own.items()}
        return mix_advantages(values, process, lengths), zero_std, metrics

    @property
    def _width(self) -> int:
        """Completions that a group may have, the same on all processes."""
        return max(self.args.num_generations, self.args.num_generations_max or 0)

    def _outcome(
        self, rewards: torch.Tensor, places: _Places, penalty: torch.Tensor | None, greedy: torch.Tensor | None
    ) -> Advantages:
        """Of all processes' completions, by the rewards that judge whole completions; groups filled up with NaN."""
        kept = ~self.judges_steps
        columns, weights = rewards[:, kept], self.weights[kept]
        if penalty is not None:
            columns, weights = torch.cat([columns, penalty], dim=1), torch.cat([weights, torch.ones(1)])
        everywhere = self._gathered(places.spread(columns, torch.nan))
        if not len(weights):  # step rewards alone
            nothing = torch.zeros(len(everywhere))
            return Advantages(values=nothing, std=nothing, zero_std=torch.zeros(len(everywhere), dtype=torch.bool))
        if self.args.advantage_estimator == "group":
            aggregate = AGGREGATORS[self.args.multi_objective_aggregation]
            return aggregate(everywhere, weights, self._width, scale=self.args.scale_rewards)
        total = combine_rewards(everywhere, weights)
        baseline = None if greedy is None else combine_rewards(self._gathered(greedy[:, kept]), weights)
        return ADVANTAGE_ESTIMATORS[self.args.advantage_estimator](total, self._width, greedy_rewards=baseline)

    def _process(
        self,
        scores: Scores,
        k: int,
        completion_ids: list[list[int]],
        places: _Places,
        prefills: list[str],
        length: int,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """`(B, C)` advantages of tokens by step reward k. Groups are whole on a process, so nothing is gathered."""
        rewards: list[list[float | None]] = []
        ends: list[list[int]] = []
        for steps, ids, prefill in zip(scores.steps[k], completion_ids, prefills, strict=True):
            rewards.append([] if steps is None else steps.rewards)
            ends.append([] if steps is None else self.decoder.spans(ids).end_tokens(steps.ends, len(prefill)))
        step_rewards, step_ends = stack_steps(rewards, ends)
        result = process_advantages(
            places.spread(step_rewards, torch.nan), places.spread(step_ends, -1), self._width, length
        )
        judged = step_rewards[~step_rewards.isnan()]
        metrics = {
            "steps_mean": sum(map(len, rewards)) / len(rewards),
            "steps_judged": len(judged) / max(1, sum(map(len, rewards))),
            "reward_mean": float(judged.mean()) if len(judged) else float("nan"),
            "reward_std": float(judged.std()) if len(judged) > 1 else float("nan"),
            "frac_zero_std": float(result.zero_std[:: self._width].float().mean()),
        }
        return result.values[places.index], metrics

    def _gathered(self, rewards: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(rewards.to(self.args.device)).cpu()
