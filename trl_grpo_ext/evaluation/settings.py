"""How an evaluation is made."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from ..rollout import SamplingParams


@dataclass(frozen=True, slots=True)
class Settings:
    """How an evaluation is made.

    Attributes:
        num_generations: G, completions per prompt and policy.
        k: for pass@k and maj@k, each in 1..G; empty: 1 and G.
        max_new_tokens, temperature, top_p, top_k: as in `SamplingParams`; temperature 0 takes the likeliest tokens.
        seed: of the noise, which is the same for base and adapter, and of the resampling.
        batch_size: completions drawn at a time; changes speed and memory, not results.
        confidence: of the intervals.
        resamples: bootstrap samples, and permutations of the paired test.

    Raises:
        TypeError: a number that is no integer where one is needed, a `k` that is no list.
        ValueError: a value that cannot be; greedy decoding of several completions, which are all the same.
    """

    num_generations: int = 4
    k: tuple[int, ...] = ()
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 64
    confidence: float = 0.95
    resamples: int = 10_000

    def __post_init__(self) -> None:
        for name in ("num_generations", "max_new_tokens", "top_k", "seed", "batch_size", "resamples"):
            if not _whole(value := getattr(self, name)):
                raise TypeError(f"{name}={value!r} must be an integer")
        if not isinstance(self.k, tuple) or not all(map(_whole, self.k)):
            raise TypeError(f"k={self.k!r} must be a list of integers, such as [1, {self.num_generations}]")
        for name, least in (("num_generations", 1), ("batch_size", 1), ("resamples", 100)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least {least}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed!r} must be in 0..2^64-1: it is part of the key of the random numbers")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence!r} must be in (0, 1): 0.95 is usual")
        if self.temperature == 0 and self.num_generations > 1:
            raise ValueError(
                f"temperature=0 draws the same completion each time, and num_generations={self.num_generations} of "
                "them say no more than one: set num_generations=1, or a temperature above 0"
            )
        wrong = [k for k in self.k if not 1 <= k <= self.num_generations]
        if wrong:
            raise ValueError(
                f"k={wrong[0]} must be in 1..num_generations={self.num_generations}: pass@k needs k completions of "
                "each prompt. Raise num_generations, or lower k"
            )
        self.sampling()

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k, sorted, each once."""
        return tuple(sorted(set(self.k or (1, self.num_generations))))

    def sampling(self) -> SamplingParams:
        """The parameters that completions are drawn with."""
        greedy = self.temperature == 0
        temperature = 1.0 if greedy else self.temperature
        return SamplingParams(self.max_new_tokens, temperature, self.top_p, self.top_k, greedy=greedy)


def _whole(value: object) -> bool:
    return type(value) is not bool and isinstance(value, Integral)
