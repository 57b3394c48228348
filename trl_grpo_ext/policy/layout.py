"""Attention over one packed row: shared prefixes, and blocks of completions that see their prefix and themselves.

The row is `prefix_1 | segments of group 1 | prefix_2 | segments of group 2 | ...` without padding. Two kinds of
attention calls cover it: the prefixes as `(groups, P_max)` rows, causal and without a mask (right padding is never seen
by a real query), and *blocks* of segments, each against the keys of its group's prefix followed by its own. A block
holds one or more segments of a group: one segment a block would copy the prefix's keys for each completion, a whole
group in one block would spend (sum C)^2; blocks of about the prefix's length waste neither copies nor products. Blocks
of similar length share a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Blocks shorter than this share of the longest in their call get a call of their own: less padding, more calls
_BUCKET_RATIO = 0.6


class _Gather(torch.autograd.Function):
    """Rows of `x` picked by `index`, for an index that is one-to-one apart from padding.

    Its inverse is a gather too, so the backward needs no scatter-add, which is slow on a CPU and not deterministic on a
    GPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """`x` (N, F), `index` (M,) into N, `inverse` (N,) into M, `padding` (N,): rows of `x` that get no gradient."""
        ctx.save_for_backward(inverse, padding)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inverse, padding = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad if padding is None else grad.masked_fill_(padding[:, None], 0), None, None, None


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Blocks of similar length, attended to in one call."""

    rows: int  # blocks in this call
    length: int  # query tokens per block, padded
    prefix_length: int  # prefix keys per block, padded
    groups: torch.Tensor  # (rows,) which prefix each block sees
    mask: torch.Tensor  # (rows, 1, length, prefix_length + length) additive
    _casts: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def mask_as(self, dtype: torch.dtype) -> torch.Tensor:
        """The mask in attention's dtype. One for all layers, because attention keeps it for its backward."""
        if dtype not in self._casts:
            self._casts[dtype] = self.mask.to(dtype)
        return self._casts[dtype]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Index tensors of one packed row of `N` tokens; built once per micro-batch by `build_layout`."""

    num_tokens: int
    prefix_rows: int
    prefix_length: int  # longest prefix, 0 if every prompt has one token
    buckets: tuple[_Bucket, ...]
    index: torch.Tensor  # (M,) padded slot -> position in the row (any, for padding)
    padding: torch.Tensor | None  # (M,) which slots are padding, None if none is
    inverse: torch.Tensor  # (N,) position in the row -> padded slot
    scored: torch.Tensor  # (T,) positions of the row whose next token is a completion token

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
        """Attention of the whole row, `(1, heads, N, D)` -> `(1, N, heads, D)`."""
        del layer_idx
        heads, kv_heads, depth = query.shape[1], key.shape[1], query.shape[3]
        dtype = _attention_dtype(query)
        q, k, v = (self._pad(x) for x in (query, key, value))  # (M, heads * D)

        def rows(x: torch.Tensor, start: int, count: int, length: int, num_heads: int) -> torch.Tensor:
            return x[start : start + count * length].view(count, length, num_heads, depth).transpose(1, 2)

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **mask: Any) -> torch.Tensor:
            if kv_heads != heads:
                k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
            out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, **mask)
            return out.transpose(1, 2).reshape(-1, heads * depth)

        outputs = []
        prefix_slots = self.prefix_rows * self.prefix_length
        prefix_k = rows(k, 0, self.prefix_rows, self.prefix_length, kv_heads)
        prefix_v = rows(v, 0, self.prefix_rows, self.prefix_length, kv_heads)
        if prefix_slots:
            prefix_q = rows(q, 0, self.prefix_rows, self.prefix_length, heads)
            outputs.append(sdpa(prefix_q, prefix_k, prefix_v, is_causal=True))
        start = prefix_slots
        for bucket in self.buckets:
            own_q = rows(q, start, bucket.rows, bucket.length, heads)
            own_k = rows(k, start, bucket.rows, bucket.length, kv_heads)
            own_v = rows(v, start, bucket.rows, bucket.length, kv_heads)
            seen_k = torch.cat([prefix_k[:, :, : bucket.prefix_length].index_select(0, bucket.groups), own_k], dim=2)
            seen_v = torch.cat([prefix_v[:, :, : bucket.prefix_length].index_select(0, bucket.groups), own_v], dim=2)
            outputs.append(sdpa(own_q, seen_k, seen_v, attn_mask=bucket.mask_as(dtype)))
            start += bucket.rows * bucket.length
        row = _Gather.apply(torch.cat(outputs), self.inverse, self.index, self.padding)  # (N, heads * D)
        return row.view(1, self.num_tokens, heads, depth)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """`(1, heads, N, D)` -> `(M, heads * D)`; padding repeats some real row, which masks keep from mattering."""
        flat = x[0].transpose(0, 1).reshape(self.num_tokens, -1)
        padded: torch.Tensor = _Gather.apply(flat, self.index, self.inverse, None)
        return padded


def _attention_dtype(query: torch.Tensor) -> torch.dtype:
    """What attention computes in: autocast casts its arguments, masks too, anew at every call."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return query.dtype


@dataclass(slots=True)
class _Block:
    group: int
    starts: list[int]  # row position of each segment's first token
    lengths: list[int]

    @property
    def length(self) -> int:
        return sum(self.lengths)


def _blocks(group: int, prefix: int, segments: Sequence[tuple[int, int]]) -> list[_Block]:
    """Consecutive segments `(start, length)` of one group, joined up to about the prefix's length."""
    limit = max(prefix, max((length for _, length in segments), default=0))
    blocks: list[_Block] = []
    for start, length in segments:
        if blocks and blocks[-1].length + length <= limit:
            blocks[-1].starts.append(start)
            blocks[-1].lengths.append(length)
        else:
            blocks.append(_Block(group, [start], [length]))
    return blocks


def _bucket_mask(blocks: Sequence[_Block], prefixes: Sequence[int], length: int, prefix_length: int) -> torch.Tensor:
    """Additive mask of one call: real prefix keys, and causally the keys of one's own segment."""
    if all(len(block.lengths) == 1 and prefixes[block.group] == prefix_length for block in blocks):
        # Right padding comes after everything real, so one causal mask serves all the rows
        return torch.full((1, 1, length, prefix_length + length), float("-inf")).triu_(prefix_length + 1)
    allowed = torch.zeros(len(blocks), 1, length, prefix_length + length, dtype=torch.bool)
    for row, block in enumerate(blocks):
        offset = 0
        for size in block.lengths:
            own = slice(offset, offset + size)
            allowed[row, 0, own, : prefixes[block.group]] = True
            keys = slice(prefix_length + offset, prefix_length + offset + size)
            allowed[row, 0, own, keys] = torch.ones(size, size, dtype=torch.bool).tril_()
            offset += size
        # Padded queries must see something, or their softmax is NaN; nobody reads them
        allowed[row, 0, offset:, prefix_length + offset :] = True
    return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))


def build_layout(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> PackedLayout:
    """Layout of a row from `(prefix length, [segment lengths])` of its groups, in row order.

    A prefix is the prompt without its last token; a segment is that last token followed by a completion without its
    last, so a segment is as long as its completion and every one of its positions is scored.
    """
    prefixes = [prefix for prefix, _ in groups]
    prefix_length = max(prefixes)
    padded: list[torch.Tensor] = []
    blocks: list[_Block] = []
    scored: list[torch.Tensor] = []
    position = 0
    for group, (prefix, lengths) in enumerate(groups):
        slots = torch.full((prefix_length,), -1, dtype=torch.long)
        slots[:prefix] = torch.arange(position, position + prefix)
        padded.append(slots)
        position += prefix
        segments = []
        for length in lengths:
            segments.append((position, length))
            scored.append(torch.arange(position, position + length))
            position += length
        blocks += _blocks(group, prefix, segments)
    buckets: list[_Bucket] = []
    blocks.sort(key=lambda block: -block.length)
    while blocks:
        longest = blocks[0].length
        count = next((i for i, b in enumerate(blocks) if b.length < _BUCKET_RATIO * longest), len(blocks))
        chosen, blocks = blocks[:count], blocks[count:]
        seen = max(prefixes[block.group] for block in chosen)
        for block in chosen:
            slots = torch.full((longest,), -1, dtype=torch.long)
            own = [torch.arange(s, s + n) for s, n in zip(block.starts, block.lengths, strict=True)]
            slots[: block.length] = torch.cat(own)
            padded.append(slots)
        buckets.append(
            _Bucket(
                rows=count,
                length=longest,
                prefix_length=seen,
                groups=torch.tensor([block.group for block in chosen], device=device),
                mask=_bucket_mask(chosen, prefixes, longest, seen).to(device),
            )
        )
    index = torch.cat(padded)
    inverse = torch.empty(position, dtype=torch.long)
    real = index >= 0
    inverse[index[real]] = real.nonzero().squeeze(1)
    return PackedLayout(
        num_tokens=position,
        prefix_rows=len(groups),
        prefix_length=prefix_length,
        buckets=tuple(buckets),
        index=index.clamp(min=0).to(device),
        padding=None if bool(real.all()) else ~real.to(device),
        inverse=inverse.to(device),
        scored=torch.cat(scored).to(device),
    )
