"""`eval_pass@k`: how often at least one of k completions of a held-out prompt is right, in evaluations of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object

from .config import GRPOConfig
from .evaluation.estimates import pass_at_k
from .metrics import MetricLog
from .scored import Scored

_DEFAULT_REWARD = "accuracy_reward"


@dataclass(frozen=True, slots=True)
class PassRates:
    """Which reward says what is right, and for which k.

    Raises:
        ValueError: `eval_pass_at_k_reward` is the name of none of the rewards.
    """

    ks: tuple[int, ...]
    column: int  # of the rewards, (B, K)

    @classmethod
    def of(cls, args: GRPOConfig, names: Sequence[str]) -> PassRates:
        """What the config asks for, of the rewards with these names."""
        wanted = args.eval_pass_at_k_reward
        if wanted is not None and wanted not in names:
            raise ValueError(
                f"eval_pass_at_k_reward={wanted!r} is none of the reward functions {list(names)}: name one of them, or "
                "leave it unset."
            )
        name = wanted or (_DEFAULT_REWARD if _DEFAULT_REWARD in names else names[0])
        return cls(tuple(args.eval_pass_at_k or ()), list(names).index(name))

    def record(self, batches: Sequence[Scored], num_generations: int, metrics: MetricLog) -> None:
        """Log `pass@k` over all processes' prompts; a process that has none takes part with an empty list.

        A completion without a reward is not counted, and a prompt with fewer than k that have one has no pass@k. Where
        no prompt has, nothing is logged.
        """
        if not self.ks:
            return
        own: list[tuple[int, int]] = []  # completions with a reward, and right ones, of each prompt
        for scored in batches:
            for group in scored.scores.rewards[:, self.column].split(num_generations):
                own.append((int((~group.isnan()).sum()), int((group == 1.0).sum())))
        counts = gather_object(own)
        for k in self.ks:
            enough = [(n, right) for n, right in counts if n >= k]
            estimates = pass_at_k([n for n, _ in enough], [right for _, right in enough], k) if enough else None
            metrics.record(f"pass@{k}", float("nan") if estimates is None else float(estimates.mean()))
