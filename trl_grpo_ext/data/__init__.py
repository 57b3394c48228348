"""rows -> prompts: templates, checks, and the order that keeps groups together."""

from .curriculum import PASS, PassRateCurriculum
from .feed import GenerationFeed, Take
from .load import load_prompts
from .order import EpochOrder, GroupOrder, repeat_stream
from .prompt_file import numbered_prompts, read_prompts
from .prompts import EmptyPrompt, EncodedPrompt, Prompt, PromptEncoder, batched, check_columns, check_prompts
from .report import DroppedPrompt, PromptReport, SourceReport

__all__ = [
    "PASS",
    "DroppedPrompt",
    "EmptyPrompt",
    "EncodedPrompt",
    "EpochOrder",
    "GenerationFeed",
    "GroupOrder",
    "PassRateCurriculum",
    "Prompt",
    "PromptEncoder",
    "PromptReport",
    "SourceReport",
    "Take",
    "batched",
    "check_columns",
    "check_prompts",
    "load_prompts",
    "numbered_prompts",
    "read_prompts",
    "repeat_stream",
]
