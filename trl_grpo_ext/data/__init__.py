"""rows -> prompts: templates, checks, and the order that keeps groups together."""

from .feed import GenerationFeed, Take
from .load import load_prompts
from .order import EpochOrder, GroupOrder, repeat_stream
from .prompt_file import read_prompts
from .prompts import EncodedPrompt, Prompt, PromptEncoder, batched, check_columns, check_prompts
from .report import DroppedPrompt, PromptReport, SourceReport

__all__ = [
    "DroppedPrompt",
    "EncodedPrompt",
    "EpochOrder",
    "GenerationFeed",
    "GroupOrder",
    "Prompt",
    "PromptEncoder",
    "PromptReport",
    "SourceReport",
    "Take",
    "batched",
    "check_columns",
    "check_prompts",
    "load_prompts",
    "read_prompts",
    "repeat_stream",
]
