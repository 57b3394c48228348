"""rows -> prompts: templates, checks, and the order that keeps groups together."""

from .feed import GenerationFeed, Take
from .order import EpochOrder, GroupOrder, repeat_stream
from .prompts import EncodedPrompt, PromptEncoder, batched, check_columns, check_prompts

__all__ = [
    "EncodedPrompt",
    "EpochOrder",
    "GenerationFeed",
    "GroupOrder",
    "PromptEncoder",
    "Take",
    "batched",
    "check_columns",
    "check_prompts",
    "repeat_stream",
]
