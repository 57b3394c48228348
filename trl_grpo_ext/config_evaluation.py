"""Fields of `GRPOConfig` about what an evaluation during training logs, and their rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config_rules import integer

_PASS_METRIC = re.compile(r"(?:.*_)?pass@(\d+)")


@dataclass
class EvaluationFields:
    """`eval_pass@k`, beside the rewards and lengths that are always logged."""

    eval_pass_at_k: list[int] | None = field(
        default=None,
        metadata={
            "help": "Log `eval_pass@k` for each of these k: the probability that of k completions of a held-out prompt "
            "at least one is right, estimated without bias from its `num_generations_eval` (Chen et al. 2021, "
            "arXiv:2107.03374 §2.1). `metric_for_best_model='pass@k'` chooses the best checkpoint by it."
        },
    )
    eval_pass_at_k_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function by which a completion is right: where it gives 1.0. If unset, "
            "`accuracy_reward` where it is among them, else the first."
        },
    )


def evaluation_problems(config: Any) -> Iterator[str]:
    """One line for every field of `EvaluationFields`, and every wish for a best model, that cannot be used as given."""
    ks, name = config.eval_pass_at_k, config.eval_pass_at_k_reward
    is_list = isinstance(ks, list | tuple) and bool(ks) and all(map(integer(1), ks)) and len(set(ks)) == len(ks)
    if ks is not None and not is_list:
        yield f"eval_pass_at_k={ks!r} must be a list of different integers of at least 1. Leave it unset for none."
    group = config.num_generations_eval or config.num_generations
    if is_list and integer(1)(group) and max(ks) > group:
        yield (
            f"eval_pass_at_k={ks!r} must be at most {group}, the completions per prompt of an evaluation: pass@k needs "
            f"k of them. Set num_generations_eval={max(ks)}, or lower k."
        )
    if name is not None and (not isinstance(name, str) or not name):
        yield f"eval_pass_at_k_reward={name!r} must be the name of a reward function. Leave it unset for the first."
    elif name is not None and ks is None:
        yield (f"eval_pass_at_k_reward={name!r} has an effect only with eval_pass_at_k. Set that, or leave it unset.")
    wish = _PASS_METRIC.fullmatch(str(config.metric_for_best_model))
    if wish and int(wish[1]) not in (ks if is_list else ()):
        yield (
            f"metric_for_best_model={config.metric_for_best_model!r} must be a metric of an evaluation, and "
            f"eval_pass_at_k={ks!r} does not ask for it. Add {wish[1]} to eval_pass_at_k."
        )


def best_metric_problem(metric: str | None, sets: Sequence[str], rewards: Sequence[str]) -> str | None:
    """Why `metric_for_best_model` cannot be a metric of these evaluations; None if it may be.

    What rewards log of their own is not known before they are called, so that only its beginning can be wrong.

    Args:
        metric: As given, with or without `eval_`.
        sets: Names of the held-out sets where there are several.
        rewards: Names of the reward functions.
    """
    if metric is None:
        return None
    said = f"metric_for_best_model={metric!r} must be a metric of an evaluation"
    own = metric.removeprefix("eval_")
    if sets:
        parts = [own.removeprefix(f"{name}_") for name in sets if own.startswith(f"{name}_")]
        if not parts:
            wanted = ", ".join(f"eval_{name}_{own}" for name in sets)
            return f"{said}, and with several held-out sets each has the name of its set. Set one of {wanted}."
        own = min(parts, key=len)
    root, _, rest = own.partition("/")
    if root == "rewards" and rest.rpartition("/")[0] not in rewards:
        near = difflib.get_close_matches(rest.rpartition("/")[0], rewards, n=1) or rewards[:1]
        metrics = f"{metric.removesuffix(own)}rewards/{near[0]}/mean"
        return f"{said}, and the reward functions are {', '.join(rewards)}. Set {metrics!r}, for example."
    return None
