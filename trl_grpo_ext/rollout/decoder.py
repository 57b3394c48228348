"""Decoding with shared prompts: every prompt is read and kept once, whatever the number of its completions.

Prompts are prefilled as one packed row. Their keys and values stay where they are, `(P, kv_heads, P_max, D)`; what a
completion adds goes to a buffer of its own, `(B, kv_heads, capacity, D)`, which grows in chunks. At every step the live
completions of a group attend to their prompt together, as one matrix product, and each to its own tokens. A completion
that ended is replaced by the last live one, so the buffers stay dense without being copied.

Where all prompts are short, sharing costs more than it saves: each completion then gets a copy of its prompt at the
beginning of its own buffer, and a step is two matrix products instead of four.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ..attention import UnsupportedAttention, dummy_mask

_CHUNK = 64  # tokens by which the buffers grow
_COPIED_PROMPT = 32  # tokens of the longest prompt up to which prompts are copied
_PREFILL_TOKENS = 16_384  # tokens of prompts read in one forward pass


class _Prefill:
    """Layout of prompts in one packed row: causal attention within each, and its keys and values kept."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        longest = max(lengths)
        self.shape = (len(lengths), longest)
        slots = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]  # (P, L) real tokens
        self.padded = (slots.flatten().cumsum(0) - 1).clamp(min=0).to(device)  # (P * L,) -> row
        self.row = slots.flatten().nonzero()[:, 0].to(device)  # (N,) -> padded
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        layer_idx: int,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        """`(1, heads, N, D)` -> `(1, N, heads, D)`."""
        if layer_idx in self.keys:
            raise UnsupportedAttention(
                f"attention is called more than once with layer_idx={layer_idx}: there is no one set of keys and "
                "values to share. Pass shared_prompts=False (in the trainer: attention_packing='off')."
            )

        def rows(x: torch.Tensor) -> torch.Tensor:  # (1, h, N, D) -> (P, h, L, D)
            return x[0].index_select(1, self.padded).unflatten(1, self.shape).transpose(0, 1).contiguous()

        q, k, v = rows(query), rows(key), rows(value)
        self.keys[layer_idx], self.values[layer_idx] = k, v
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.row)[None]


class SharedPromptDecoder:
    """Prefill, then one token at a time for all the completions that are still alive.

    The model must use `group_attention` and every attention layer must have its own `layer_idx`.
    """

    def __init__(self, model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], num_generations: int) -> None:
        self._model = model
        self._device = model.device
        self._mask = dummy_mask(self._device)
        lengths = [len(ids) for ids in prompt_ids]
        self.first_logits = self._prefill(prompt_ids, lengths)  # (P, V)
        self.rows = torch.arange(len(prompt_ids) * num_generations)  # completion in each live slot
        self._group = self.rows // num_generations  # prompt slot of each live slot
        self._prompt_lengths = torch.tensor(lengths)  # of each prompt slot
        self._position = 0  # tokens of every live completion in the buffers
        self._own_keys: dict[int, torch.Tensor] = {}
        self._own_values: dict[int, torch.Tensor] = {}
        self._copied = self._longest if self._longest <= _COPIED_PROMPT else 0  # slots before a completion's own
        if self._copied:
            self._copy_prompts()
        self._arrange()

    def _prefill(self, prompt_ids: Sequence[Sequence[int]], lengths: Sequence[int]) -> torch.Tensor:
        longest = self._longest = max(lengths)
        self._prefix_keys: dict[int, torch.Tensor] = {}
        self._prefix_values: dict[int, torch.Tensor] = {}
        parts, logits = [], []
        start = 0
        while start < len(lengths):
            end, tokens = start, 0
            while end < len(lengths) and (end == start or tokens + lengths[end] <= _PREFILL_TOKENS):
                tokens += lengths[end]
                end += 1
            part = _Prefill(lengths[start:end], self._device)
            ids = [token for prompt in prompt_ids[start:end] for token in prompt]
            positions = [i for n in lengths[start:end] for i in range(n)]
            last = torch.tensor(lengths[start:end]).cumsum(0) - 1
            output = self._forward(
                torch.tensor([ids]), torch.tensor([positions]), group_layout=part, logits_to_keep=last.to(self._device)
            )
            logits.append(output[0])  # (P_part, V)
            parts.append(part)
            start = end
        for store, name in ((self._prefix_keys, "keys"), (self._prefix_values, "values")):
            for layer, tensor in getattr(parts[0], name).items():
                if len(parts) == 1:
                    store[layer] = tensor
                    continue
                store[layer] = tensor.new_zeros(len(lengths), tensor.shape[1], longest, tensor.shape[3])
                row = 0
                for part in parts:
                    piece = getattr(part, name).pop(layer) if part is not parts[0] else tensor
                    store[layer][row : row + piece.shape[0], :, : piece.shape[2]] = piece
                    row += piece.shape[0]
        return torch.cat(logits)

    def _copy_prompts(self) -> None:
        group = self._group.to(self._device)
        stores = ((self._prefix_keys, self._own_keys), (self._prefix_values, self._own_values))
        for prefix, own in stores:
            for layer, tensor in prefix.items():
                own[layer] = tensor.new_empty(len(group), tensor.shape[1], self._copied + _CHUNK, tensor.shape[3])
                own[layer][:, :, : self._copied] = tensor.index_select(0, group)
            prefix.clear()

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, **kwargs: object) -> torch.Tensor:
        output = self._model(
            input_ids=ids.to(self._device),
            position_ids=positions.to(self._device),
            attention_mask=self._mask,
            use_cache=False,
            **kwargs,
        )
        logits: torch.Tensor = output.logits
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed the live completions' newest tokens, `(b,)`; logits of their next, `(b, V)`."""
        positions = self._prompt_lengths[self._group] + self._position
        logits = self._forward(tokens[:, None], positions[:, None], group_layout=self)
        self._position += 1
        return logits[:, -1]

    def drop(self, finished: list[int]) -> None:
        """Forget the completions in these live slots; the last live slots move into the holes."""
        live = len(self.rows)
        order = list(range(live))
        for slot in sorted(finished, reverse=True):
            live -= 1
            order[slot] = order[live]
        self._move([self._own_keys, self._own_values], order, live)
        self.rows = self.rows[order[:live]]
        self._group = self._group[order[:live]]
        if live:
            self._drop_groups()
            self._arrange()

    def _drop_groups(self) -> None:
        alive = set(self._group.tolist())
        count = len(self._prompt_lengths)
        order = list(range(count))
        for slot in reversed(range(len(self._prompt_lengths))):
            if slot not in alive:
                count -= 1
                order[slot] = order[count]
        if count == len(self._prompt_lengths):
            return
        self._move([self._prefix_keys, self._prefix_values], order, count)
        self._prompt_lengths = self._prompt_lengths[order[:count]]
        renamed = {old: new for new, old in enumerate(order[:count])}
        self._group = torch.tensor([renamed[g] for g in self._group.tolist()])

    @staticmethod
    def _move(stores: list[dict[int, torch.Tensor]], order: list[int], count: int) -> None:
        for store in stores:
            for layer, buffer in store.items():
                for slot in range(count):
                    if order[slot] != slot:
                        buffer[slot].copy_(buffer[order[slot]])
                store[layer] = buffer[:count]

    def _arrange(self) -> None:
        """Index tensors between live slots and `(prompt slots, widest group)` rows; made anew after every drop."""
        self._prefix_mask: torch.Tensor | None = None
        if int(self._prompt_lengths.min()) < self._longest:
            hidden = torch.arange(self._longest)[None] >= self._prompt_lengths[:, None]
            self._prefix_mask = hidden[self._group][:, None].to(self._device)  # (b, 1, L)
        if self._copied:
            return
        prompts = len(self._prompt_lengths)
        counts = torch.bincount(self._group, minlength=prompts)
        width = int(counts.max())
        by_group = self._group.argsort(stable=True)
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(by_group)
        rank[by_group] = torch.arange(len(by_group)) - first[self._group[by_group]]
        place = self._group * width + rank
        rows = torch.zeros(prompts * width, dtype=torch.long)
        rows[place] = torch.arange(len(place))
        self._shape = (prompts, width)
        self._rows_of_groups = rows.view(prompts, 1, width)  # live slot (0 where there is none)
        self._place = (self._group, rank)  # of each live slot: its prompt slot, and where in the group's row
        self._index: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _group_index(self, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Index from `(b, kv)` to `(prompts, kv, width)` rows of queries, and back, both flattened."""
        if kv_heads not in self._index:
            width = self._shape[1]
            head = torch.arange(kv_heads)
            to_groups = self._rows_of_groups * kv_heads + head[None, :, None]
            group, rank = self._place
            to_slots = (group[:, None] * kv_heads + head) * width + rank[:, None]
            self._index[kv_heads] = (to_groups.flatten().to(self._device), to_slots.flatten().to(self._device))
        return self._index[kv_heads]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        layer_idx: int,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        """One decode step, `(b, heads, 1, D)` -> `(b, 1, heads, D)`."""
        del dropout
        count, heads, _, depth = query.shape
        kv_heads = key.shape[1]
        repeats = heads // kv_heads
        own_k, own_v = self._append(layer_idx, key, value)  # (b * kv, c, D)
        if self._copied:
            scores = torch.bmm((query * scaling).reshape(count * kv_heads, repeats, depth), own_k.transpose(1, 2))
            self._hide(scores[..., : self._longest], kv_heads)
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
            return torch.bmm(weights, own_v).view(count, 1, heads, depth)
        prompts, width = self._shape
        prefix_k = self._prefix_keys[layer_idx].flatten(0, 1)  # (prompts * kv, L, D)
        prefix_v = self._prefix_values[layer_idx].flatten(0, 1)
        to_groups, to_slots = self._group_index(kv_heads)
        q = (query * scaling).reshape(count * kv_heads, repeats, depth)

        grouped = q.index_select(0, to_groups).view(prompts * kv_heads, width * repeats, depth)
        prefix_scores = torch.bmm(grouped, prefix_k.transpose(1, 2))
        prefix_scores = prefix_scores.view(-1, repeats, self._longest).index_select(0, to_slots)  # (b * kv, r, L)
        self._hide(prefix_scores, kv_heads)
        scores = torch.cat([prefix_scores, torch.bmm(q, own_k.transpose(1, 2))], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)

        grouped = weights[..., : self._longest].index_select(0, to_groups)
        out = torch.bmm(grouped.view(prompts * kv_heads, width * repeats, self._longest), prefix_v)
        out = out.view(-1, repeats, depth).index_select(0, to_slots)
        return torch.baddbmm(out, weights[..., self._longest :], own_v).view(count, 1, heads, depth)

    def _hide(self, prefix_scores: torch.Tensor, kv_heads: int) -> None:
        """Scores of slots behind shorter prompts, `(b * kv, r, L)`, in place."""
        if self._prefix_mask is not None:
            hidden = self._prefix_mask if kv_heads == 1 else self._prefix_mask.repeat_interleave(kv_heads, 0)
            prefix_scores.masked_fill_(hidden, -torch.inf)

    def _append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new token, `(b, kv, 1, D)` each, and return all that the buffers hold, `(b * kv, c, D)`."""
        end = self._copied + self._position + 1
        views = []
        for store, new in ((self._own_keys, key), (self._own_values, value)):
            buffer = store.get(layer)
            if buffer is None or buffer.shape[2] < end:
                capacity = -(-end // _CHUNK) * _CHUNK
                grown = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
                if buffer is not None:
                    grown[:, :, : end - 1] = buffer[:, :, : end - 1]
                store[layer] = buffer = grown
            buffer.select(2, end - 1).copy_(new.select(2, 0))
            views.append(buffer.flatten(0, 1)[:, :end])
        return views[0], views[1]
