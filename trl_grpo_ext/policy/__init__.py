"""weights and log-probs: the policy, its reference, and the shared-prompt forward pass."""

from .adapter_dtype import keep_adapter_in_float32, trains_base
from .fingerprint import base_fingerprint
from .given_adapter import adapter_base, adapter_config, check_adapter_source, load_adapter, tokenizer_source
from .logps import CompletionScorer, TokenScores, exact_kl, head_spec
from .model import (
    add_adapter,
    base_model_of,
    context_limit,
    disable_dropout,
    load_model,
    no_gradient_loss,
)
from .packing import GroupPart, PackedRow, deal_rows, pack_row
from .probe import packing_problem
from .recompute import RecomputeBudget, is_default_checkpointing
from .reference import AdapterOff, LivingReference, Snapshot, make_reference
from .saving import active_adapter_only
from .update_lost import UpdateWatch

__all__ = [
    "AdapterOff",
    "CompletionScorer",
    "GroupPart",
    "LivingReference",
    "PackedRow",
    "RecomputeBudget",
    "Snapshot",
    "TokenScores",
    "UpdateWatch",
    "active_adapter_only",
    "adapter_base",
    "adapter_config",
    "add_adapter",
    "base_fingerprint",
    "base_model_of",
    "check_adapter_source",
    "context_limit",
    "deal_rows",
    "disable_dropout",
    "exact_kl",
    "head_spec",
    "is_default_checkpointing",
    "keep_adapter_in_float32",
    "load_adapter",
    "load_model",
    "make_reference",
    "no_gradient_loss",
    "pack_row",
    "packing_problem",
    "tokenizer_source",
    "trains_base",
]
