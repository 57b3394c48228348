"""Scored rollouts, and the micro-batches they are trained in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .policy.packing import GroupPart, PackedRow, deal_rows, pack_row

# Tokens from which on a longer row is no faster: matrix products are at full speed, and memory only grows
ROW_FILL = 512


@dataclass(slots=True)
class Experience:
    """One generation: `B` completions with everything the update needs. Tensors are on the CPU.

    The first `P * G` are G completions of each prompt; groups that were drawn on have more behind those.
    """

    prompt_ids: list[list[int]]  # P
    prompt_of: list[int]  # B, which of the prompts
    completion_ids: list[list[int]]  # B
    num_generations: int  # G
    old_logps: torch.Tensor  # (B, C)
    ref_logps: torch.Tensor | None  # (B, C)
    advantages: torch.Tensor  # (B,), or (B, C) with process supervision
    in_loss: torch.Tensor  # (B,) bool; False for truncated completions that are masked
    slice_tokens: float  # tokens in the loss, all processes', per process and micro-step: of TRL's num_items_in_batch
    generated_at: int  # global step whose policy drew it

    def of_slices(self, slices: range, size: int) -> list[int]:
        """Completions that micro-batches `slices` of `size` completions serve.

        What a group has beyond its first G completions goes with the last one of those.
        """
        regular = len(self.prompt_ids) * self.num_generations
        own = list(range(slices.start * size, slices.stop * size))
        beyond = range(regular, len(self.completion_ids))
        return own + [i for i in beyond if ((self.prompt_of[i] + 1) * self.num_generations - 1) // size in slices]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for `torch.save` and `torch.load(weights_only=True)`."""
        return asdict(self)


@dataclass(slots=True)
class MicroBatch:
    """`S` completions for one forward and backward pass, and what the loss needs of each."""

    indices: list[int]  # S, which of the step's completions they are
    prompt_ids: list[list[int]]  # S, the prompt of each completion
    completion_ids: list[list[int]]  # S
    row: PackedRow | None  # None: score them as padded rows
    padded_tokens: int  # what a padded micro-batch of the step would hold
    advantages: torch.Tensor  # (S,), or (S, C) with process supervision
    old_logps: torch.Tensor  # (S, C)
    fresh: torch.Tensor  # (S,) bool: drawn by the policy as it is now, so that the ratio is 1
    ref_logps: torch.Tensor | None  # (S, C)
    in_loss: torch.Tensor  # (S,) bool
    dapo_tokens: torch.Tensor  # (S,) `slice_tokens` of its generation, times the step's micro-steps


@dataclass(slots=True)
class StepBatch:
    """The completions of one optimizer step, gathered from one or more generations."""

    global_step: int
    micro_steps: int = 0  # gradient accumulation steps, fewer in an epoch's last optimizer step
    prompt_ids: list[list[int]] = field(default_factory=list)
    parts: list[GroupPart] = field(default_factory=list)  # indices into prompt_ids and the lists below
    completion_ids: list[list[int]] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    in_loss: list[bool] = field(default_factory=list)
    advantages: list[torch.Tensor] = field(default_factory=list)  # scalars, or one value per token
    old_logps: list[torch.Tensor] = field(default_factory=list)
    ref_logps: list[torch.Tensor] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)
    slice_tokens: list[float] = field(default_factory=list)

    def add(self, experience: Experience, indices: Sequence[int]) -> None:
        """Add these completions of a generation."""
        first_prompt = len(self.prompt_ids)
        self.prompt_ids += experience.prompt_ids
        groups: dict[int, list[int]] = {}
        for i in indices:
            prompt = first_prompt + experience.prompt_of[i]
            groups.setdefault(prompt, []).append(len(self.completion_ids))
            self.prompt_of.append(prompt)
            length = len(experience.completion_ids[i])
            self.completion_ids.append(experience.completion_ids[i])
            self.in_loss.append(bool(experience.in_loss[i]))
            own = experience.advantages[i]
            self.advantages.append(own[:length] if own.dim() else own)
            self.old_logps.append(experience.old_logps[i, :length])
            if experience.ref_logps is not None:
                self.ref_logps.append(experience.ref_logps[i, :length])
            self.fresh.append(experience.generated_at == self.global_step)
            self.slice_tokens.append(experience.slice_tokens)
        self.parts += [GroupPart(prompt, tuple(members)) for prompt, members in groups.items()]

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are in the loss, those of zero advantage included."""
        return sum(len(ids) for ids, kept in zip(self.completion_ids, self.in_loss, strict=True) if kept)

    def trained(self, *, skip_zero_advantages: bool, at_least_one: bool) -> list[int]:
        """Completions that have a gradient: not masked, and with an advantage unless the KL pulls at them too."""
        chosen = [
            i
            for i, kept in enumerate(self.in_loss)
            if kept and not (skip_zero_advantages and not self.advantages[i].any())
        ]
        return chosen or ([0] if at_least_one and self.completion_ids else [])

    def micro_batches(
        self, chosen: Sequence[int], num: int, batch_size: int, *, packed: bool, device: torch.device
    ) -> list[MicroBatch | None]:
        """The `chosen` completions in exactly `num` micro-batches; None is an empty one, and those come first."""
        if not chosen:
            return [None] * num
        kept = set(chosen)
        parts = [GroupPart(part.prompt, tuple(i for i in part.completions if i in kept)) for part in self.parts]
        parts = [part for part in parts if part.completions]
        prompt_lengths = [len(ids) for ids in self.prompt_ids]
        lengths = [len(ids) for ids in self.completion_ids]
        longest = max(prompt_lengths[part.prompt] for part in parts) + max(lengths[i] for i in chosen)
        budget = batch_size * longest
        if not packed:
            size = -(-len(chosen) // num)
            pieces = [list(chosen[start : start + size]) for start in range(0, len(chosen), size)]
            batches: list[MicroBatch | None] = [self._micro_batch(piece, None, budget, device) for piece in pieces]
            return [None] * (num - len(batches)) + batches
        rows = deal_rows(parts, prompt_lengths, lengths, num, budget, min(budget, ROW_FILL))
        packed_rows = [pack_row(row, self.prompt_ids, self.completion_ids, device) if row else None for row in rows]
        return [None if row is None else self._micro_batch(row.completions, row, budget, device) for row in packed_rows]

    def _micro_batch(
        self, indices: Sequence[int], row: PackedRow | None, padded_tokens: int, device: torch.device
    ) -> MicroBatch:
        def padded(values: list[torch.Tensor]) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([values[i] for i in indices], batch_first=True).to(device)

        def tensor(values: list[Any]) -> torch.Tensor:
            return torch.tensor([values[i] for i in indices], device=device)

        return MicroBatch(
            indices=list(indices),
            prompt_ids=[self.prompt_ids[self.prompt_of[i]] for i in indices],
            completion_ids=[self.completion_ids[i] for i in indices],
            row=row,
            padded_tokens=padded_tokens,
            advantages=torch.stack([self.advantages[i] for i in indices]).to(device)
            if self.advantages[indices[0]].dim() == 0
            else padded(self.advantages),
            old_logps=padded(self.old_logps),
            fresh=tensor(self.fresh),
            ref_logps=padded(self.ref_logps) if self.ref_logps else None,
            in_loss=tensor(self.in_loss),
            dapo_tokens=tensor(self.slice_tokens) * self.micro_steps,
        )
