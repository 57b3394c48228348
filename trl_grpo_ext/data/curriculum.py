"""Which prompts to train on next, by what is known of their pass rates: a Beta posterior each, Thompson sampling.

With binary rewards of pass rate `p` the variance of a reward is `p (1 - p)`, and so is the square of the policy
gradient's scale: a prompt that is never solved, or always, teaches nothing. `p` is not known, so it is drawn from its
posterior (Thompson sampling, Thompson 1933; Russo et al., arXiv:1707.02038, §3), and prompts are sampled with weights
`p (1 - p)` of these draws. A prompt about which little is known is tried now and then, one that is known to be hopeless
or solved hardly ever. (To take the highest draws instead was tried, and trained worse: `benchmarks/README.md`.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

PASS = 1.0  # a completion passes whose reward is at least that

_STATE = ("passes", "fails", "rollouts", "generations")


class PassRateCurriculum:
    """Beta posteriors of the pass rates of `N` prompts, and the choice of a generation's prompts by them.

    The posterior of prompt `i` is `Beta(1 + passes_i, 1 + fails_i)`, a uniform prior with the evidence so far. After
    every generation all evidence is multiplied by `decay`, for the policy that gave it is no more: what has not been
    looked at for long becomes uncertain again, and so is looked at again.

    Args:
        size: N.
        floor: Share of the places of a generation that are given to prompts drawn uniformly, in [0, 1].
        decay: In (0, 1]. Evidence of a generation weighs half after `log(1/2) / log(decay)` more.
        seed: With the number of the generation, the key of every random choice; the global random state is not used.
        pass_rates: `(N,)` known beforehand; NaN where nothing is.
        samples: `(N,)` completions that each of `pass_rates` was measured on: it is evidence like any other.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        size: int,
        *,
        floor: float = 0.1,
        decay: float = 0.99,
        seed: int = 0,
        pass_rates: Sequence[float] | Floats | None = None,
        samples: Sequence[float] | Floats | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1: there are no prompts to choose from")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor={floor} must be in [0, 1]")
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay} must be in (0, 1]")
        if (pass_rates is None) != (samples is None):
            raise ValueError("pass_rates and samples belong together: pass both, or neither")
        self.floor, self.decay, self.seed = floor, decay, seed
        self.passes: Floats = np.zeros(size)
        self.fails: Floats = np.zeros(size)
        self.rollouts: Indices = np.zeros(size, dtype=np.int64)  # seen in training, all of them
        self.generations = 0  # observed so far
        if pass_rates is not None and samples is not None:
            rates, counts = np.asarray(pass_rates, dtype=np.float64), np.asarray(samples, dtype=np.float64)
            if rates.shape != (size,) or counts.shape != (size,):
                raise ValueError(f"pass_rates {rates.shape} and samples {counts.shape} must both be ({size},)")
            known = ~np.isnan(rates)
            if ((rates[known] < 0) | (rates[known] > 1)).any() or not (counts[known] >= 0).all():
                raise ValueError("pass_rates must be in [0, 1] or NaN, and samples at least 0")
            self.passes[known] = (rates * counts)[known]
            self.fails[known] = ((1 - rates) * counts)[known]

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def posterior(self) -> tuple[Floats, Floats]:
        """`(N,)` a and b of each prompt's Beta distribution."""
        return 1 + self.passes, 1 + self.fails

    @property
    def mean_pass_rates(self) -> Floats:
        """`(N,)` posterior means, `a / (a + b)`."""
        a, b = self.posterior
        return a / (a + b)

    @property
    def expected_signal(self) -> Floats:
        """`(N,)` posterior means of `p (1 - p)`: `a b / ((a + b) (a + b + 1))`."""
        a, b = self.posterior
        return a * b / ((a + b) * (a + b + 1))

    @property
    def effective_prompts(self) -> float:
        """As many prompts, drawn equally often, would be as diverse: `(sum n_i)^2 / sum n_i^2` of rollouts so far."""
        counts = self.rollouts.astype(np.float64)
        return float(counts.sum() ** 2 / np.square(counts).sum()) if counts.any() else 0.0

    def choose(self, count: int, *, exclude: Collection[int] = (), turn: int = 0) -> Indices:
        """`(count,)` different prompts for the next generation, in random order.

        The same for the same state, seed and arguments, wherever it is asked. Every prompt is among them with a
        probability of at least about `floor * count / N`.

        Args:
            exclude: Prompts that are not to be among them.
            turn: Tells choices for the same generation apart.

        Raises:
            ValueError: if there are fewer than `count` to choose from.
        """
        rng = np.random.default_rng([self.seed, self.generations, turn])
        drawn = rng.beta(*self.posterior)
        signal = drawn * (1 - drawn)
        left = np.ones(len(self), dtype=bool)
        left[list(exclude)] = False
        if count > left.sum():
            raise ValueError(f"{count} prompts are asked for, and there are {left.sum()} to choose from")
        uniform = rng.choice(np.flatnonzero(left), size=rng.binomial(count, self.floor), replace=False)
        left[uniform] = False
        others = np.flatnonzero(left)
        # Weighted, without replacement: the smallest of e_i / w_i, e_i exponential (Efraimidis and Spirakis 2006)
        waiting = rng.exponential(size=len(self))[others] / np.maximum(signal[others], np.finfo(np.float64).tiny)
        by_signal = others[np.argsort(waiting, kind="stable")[: count - len(uniform)]]
        return rng.permutation(np.concatenate([uniform, by_signal])).astype(np.int64)

    def observe(self, indices: Sequence[int], passes: Sequence[int], rollouts: Sequence[int]) -> None:
        """Take in a generation: `passes` of `rollouts` completions of each prompt; a prompt may come several times.

        Raises:
            ValueError: unless `0 <= passes <= rollouts` everywhere.
        """
        at = np.asarray(indices, dtype=np.int64)
        passed, all_of_them = np.asarray(passes, dtype=np.int64), np.asarray(rollouts, dtype=np.int64)
        if not (at.shape == passed.shape == all_of_them.shape) or ((passed < 0) | (passed > all_of_them)).any():
            raise ValueError(f"passes={passes} must be between 0 and rollouts={rollouts}, one of each per prompt")
        # In whole numbers first, so that the order in which processes report does not matter
        sums = np.zeros((2, len(self)), dtype=np.int64)
        np.add.at(sums[0], at, passed)
        np.add.at(sums[1], at, all_of_them)
        self.passes = self.passes * self.decay + sums[0]
        self.fails = self.fails * self.decay + (sums[1] - sums[0])
        self.rollouts = self.rollouts + sums[1]
        self.generations += 1

    def metrics(self) -> dict[str, float]:
        """What is known by now, over all prompts."""
        return {
            "pass_rate": float(self.mean_pass_rates.mean()),
            "signal_of_all": float(self.expected_signal.mean()),
            "prompts_seen": float((self.rollouts > 0).mean()),
            "effective_prompts": self.effective_prompts,
        }

    def state_dict(self) -> dict[str, Any]:
        """The evidence, as arrays and an int; not the options."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: if it is of another number of prompts.
        """
        if len(state["passes"]) != len(self):
            raise ValueError(f"the curriculum of {len(state['passes'])} prompts is not one of {len(self)}")
        self.passes = np.array(state["passes"], dtype=np.float64)
        self.fails = np.array(state["fails"], dtype=np.float64)
        self.rollouts = np.array(state["rollouts"], dtype=np.int64)
        self.generations = int(state["generations"])
