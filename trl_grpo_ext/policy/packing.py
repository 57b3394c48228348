"""Completions -> packed rows: every prompt once, no padding.

    prompt[:-1] | p_last c1[:-1] | p_last c2[:-1] | ... | next group's prompt[:-1] | ...

Every completion's segment starts with its own copy of the prompt's last token, so inputs and targets align: segment i
predicts exactly `c_i`; no position is scored twice and none of the prompt's is scored at all. Position ids run `0..P-2`
for the prompt and from `P-1` for every segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .layout import PackedLayout, build_layout


@dataclass(frozen=True, slots=True)
class GroupPart:
    """Some completions of one prompt: what a row holds of a group."""

    prompt: int  # index into the prompts
    completions: tuple[int, ...]  # indices into the completions


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One micro-batch: `S` completions of one or more prompts in a row of `N` tokens, `T` of them scored."""

    input_ids: torch.Tensor  # (1, N)
    position_ids: torch.Tensor  # (1, N)
    labels: torch.Tensor  # (1, T) the token that each scored position predicts
    layout: PackedLayout
    completions: tuple[int, ...]  # (S,) which completion each segment is, in row order
    lengths: torch.Tensor  # (S,)


def packed_length(prompt_length: int, completion_lengths: Sequence[int]) -> int:
    """Tokens a group takes in a row: the prompt without its last token, and every completion."""
    return prompt_length - 1 + sum(completion_lengths)


def deal_rows(
    groups: Sequence[GroupPart],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    num_rows: int,
    row_budget: int,
    row_fill: int | None = None,
) -> list[list[GroupPart]]:
    """Deal groups into exactly `num_rows` rows; empty rows, if any, come first.

    No more rows are used than it takes for each to hold about `row_fill` tokens (default: `row_budget`), balanced
    among each other: a full row is faster than two halves. A group is split, its prefix repeated, only where its packed
    length is over `row_budget`; a budget that cannot hold what there is is stretched evenly, since the number of rows
    is the caller's.
    """

    def size(part: GroupPart) -> int:
        return packed_length(prompt_lengths[part.prompt], [completion_lengths[i] for i in part.completions])

    parts = [piece for group in groups for piece in _split(group, size, row_budget)]
    parts.sort(key=size, reverse=True)
    total = sum(size(part) for part in parts)
    used = max(1, min(num_rows, len(parts), -(-total // max(1, row_fill or row_budget))))
    while True:
        rows: list[list[GroupPart]] = [[] for _ in range(used)]
        loads = [0] * used
        for part in parts:  # longest first, onto the least loaded row
            lightest = loads.index(min(loads))
            rows[lightest].append(part)
            loads[lightest] += size(part)
        if max(loads) <= row_budget or used >= min(num_rows, len(parts)):
            break
        used += 1
    filled = [row for row in rows if row]
    return [[] for _ in range(num_rows - len(filled))] + filled


def _split(group: GroupPart, size: Callable[[GroupPart], int], budget: int) -> list[GroupPart]:
    pieces: list[GroupPart] = []
    for completion in group.completions:
        joined = GroupPart(group.prompt, (*pieces[-1].completions, completion)) if pieces else None
        if joined is not None and size(joined) <= budget:
            pieces[-1] = joined
        else:
            pieces.append(GroupPart(group.prompt, (completion,)))
    return pieces


def pack_row(
    parts: Sequence[GroupPart],
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    device: torch.device,
) -> PackedRow:
    """Build the row of `parts`.

    Raises:
        ValueError: for an empty prompt or completion: there would be nothing to predict, or nothing to predict it from.
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    groups: list[tuple[int, list[int]]] = []
    order: list[int] = []
    for part in parts:
        prompt = prompt_ids[part.prompt]
        if not prompt:
            raise ValueError(f"prompt {part.prompt} has no tokens; a prompt needs at least one (a BOS token will do)")
        ids += prompt[:-1]
        positions += range(len(prompt) - 1)
        lengths = []
        for i in part.completions:
            completion = completion_ids[i]
            if not completion:
                raise ValueError(f"completion {i} has no tokens; every completion needs at least its EOS")
            ids += [prompt[-1], *completion[:-1]]
            positions += range(len(prompt) - 1, len(prompt) - 1 + len(completion))
            labels += completion
            lengths.append(len(completion))
            order.append(i)
        groups.append((len(prompt) - 1, lengths))

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.long).to(device)

    return PackedRow(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        labels=tensor(labels),
        layout=build_layout(groups, device),
        completions=tuple(order),
        lengths=tensor([n for _, lengths in groups for n in lengths])[0],
    )
