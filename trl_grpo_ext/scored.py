"""Scored rollouts: completions with their rewards, and groups of them put together anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .rewards import Scores


@dataclass(slots=True)
class Scored:
    """`B` completions of `P` prompts with their rewards, and prompts and completions as rewards saw them."""

    prompt_ids: list[list[int]]  # P
    prompt_of: list[int]  # B, which of the P prompts a completion belongs to
    completion_ids: list[list[int]]  # B
    logps: torch.Tensor  # (B, C)
    finish_reasons: list[str]  # B
    scores: Scores
    prompts: list[Any]  # B
    completions: list[Any]  # B
    prefills: list[str]  # B
    extras: dict[str, list[Any]]  # columns that rewards logged
    logged: dict[str, list[float]]  # metrics that rewards logged
    seconds: dict[str, float]  # "rollout", "reward"

    @property
    def num_tokens(self) -> int:
        """Of prompts, once for each completion as TRL counts them, and completions."""
        return sum(len(self.prompt_ids[p]) for p in self.prompt_of) + sum(map(len, self.completion_ids))


@dataclass(slots=True)
class Group:
    """One prompt's completions, wherever they were drawn."""

    prompt_ids: list[int]
    members: list[tuple[Scored, int]]  # where each completion is to be found

    @property
    def rewards(self) -> torch.Tensor:
        """`(n, K)`."""
        return torch.stack([scored.scores.rewards[b] for scored, b in self.members])

    @property
    def any_ended(self) -> bool:
        """Whether one of the completions was not cut off."""
        return any(scored.finish_reasons[b] == "eos" for scored, b in self.members)


def groups_of(scored: Scored) -> list[Group]:
    """The P groups of one draw."""
    groups = [Group(ids, []) for ids in scored.prompt_ids]
    for b, prompt in enumerate(scored.prompt_of):
        groups[prompt].members.append((scored, b))
    return groups


def put_together(groups: Sequence[Group], num_generations: int, like: Scored) -> Scored:
    """Groups as one draw: `num_generations` completions of each prompt, then what some have beyond that.

    Metrics and seconds are those of `like`.
    """
    order = [(p, *member) for p, group in enumerate(groups) for member in group.members[:num_generations]]
    order += [(p, *member) for p, group in enumerate(groups) for member in group.members[num_generations:]]
    members = [(scored, b) for _, scored, b in order]
    completion_ids = [scored.completion_ids[b] for scored, b in members]
    rows = [scored.logps[b, : len(scored.completion_ids[b])] for scored, b in members]
    scores = Scores(
        rewards=torch.stack([scored.scores.rewards[b] for scored, b in members]),
        failed=torch.stack([scored.scores.failed[b] for scored, b in members]),
        steps={k: [scored.scores.steps[k][b] for scored, b in members] for k in like.scores.steps},
    )
    return Scored(
        prompt_ids=[group.prompt_ids for group in groups],
        prompt_of=[prompt for prompt, _, _ in order],
        completion_ids=completion_ids,
        logps=pad_sequence(rows, batch_first=True),
        finish_reasons=[scored.finish_reasons[b] for scored, b in members],
        scores=scores,
        prompts=[scored.prompts[b] for scored, b in members],
        completions=[scored.completions[b] for scored, b in members],
        prefills=[scored.prefills[b] for scored, b in members],
        extras={name: [_extra(scored, name, b) for scored, b in members] for name in like.extras},
        logged=like.logged,
        seconds=like.seconds,
    )


def _extra(scored: Scored, name: str, b: int) -> Any:
    """A logged column's value; None where a reward has not logged one value for each completion."""
    column = scored.extras.get(name, [])
    return column[b] if len(column) == len(scored.prompt_of) else None
