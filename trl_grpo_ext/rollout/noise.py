"""The randomness of rollouts: one counter-based stream of uniforms per completion.

Keyed by `(seed, step, prompt index, completion index)`, so dropping finished rows, splitting a batch or adding
processes never changes what noise a completion gets, and a step's rollouts can be drawn again exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def uniform_rows(
    seed: int, step: int, prompt_indices: Sequence[int], completion_indices: Sequence[int], length: int
) -> torch.Tensor:
    """`(B, length)` float64 uniforms in [0, 1), row b a stream of its own (Philox4x64, Salmon et al. 2011).

    Seed and step are the generator's key, prompt and completion the high words of its counter; the low word counts the
    draws, so streams never overlap.
    """
    rows = np.empty((len(prompt_indices), length))
    key = np.array([seed, step], dtype=np.uint64)
    for row, prompt, completion in zip(rows, prompt_indices, completion_indices, strict=True):
        counter = np.array([0, completion, prompt, 0], dtype=np.uint64)
        np.random.Generator(np.random.Philox(counter=counter, key=key)).random(out=row)
    return torch.from_numpy(rows)
