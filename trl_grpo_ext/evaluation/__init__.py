"""How good a policy is on held-out prompts, how sure that is, and whether an adapter makes a difference."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .estimates import avg_at_k, maj_at_k, pass_at_k
    from .evaluate import evaluate_policy
    from .intervals import Difference, Estimate, compare_paired, estimate_mean
    from .report import Evaluation, load_summary
    from .settings import Settings

# Imported on first use: comparing answers, in worker processes, takes neither torch nor transformers
_MODULE_OF = {
    "Difference": "intervals",
    "Estimate": "intervals",
    "Evaluation": "report",
    "Settings": "settings",
    "avg_at_k": "estimates",
    "compare_paired": "intervals",
    "estimate_mean": "intervals",
    "evaluate_policy": "evaluate",
    "load_summary": "report",
    "maj_at_k": "estimates",
    "pass_at_k": "estimates",
}

__all__ = [
    "Difference",
    "Estimate",
    "Evaluation",
    "Settings",
    "avg_at_k",
    "compare_paired",
    "estimate_mean",
    "evaluate_policy",
    "load_summary",
    "maj_at_k",
    "pass_at_k",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
