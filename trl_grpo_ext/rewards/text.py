"""The text of a completion, whichever of TRL's two dataset formats it came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text to be judged: a standard completion itself, or the last assistant message of a conversational one.

    A message without a `role` counts as the assistant's, as in TRL's own rewards. Content in blocks
    (`[{"type": "text", "text": ...}, ...]`) is joined; a message without text (a pure tool call) is the empty string.

    Raises:
        TypeError: the completion is neither a string nor a list of messages.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence) or not all(isinstance(message, Mapping) for message in completion):
        raise TypeError(
            f"a completion must be a string or a list of messages ({{'role': ..., 'content': ...}}), "
            f"got {type(completion).__name__}: {completion!r:.200}"
        )
    messages = cast("Sequence[Mapping[str, Any]]", completion)
    for message in reversed(messages):
        if message.get("role", "assistant") == "assistant":
            return _content_text(message.get("content"))
    return ""


def _content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(block.get("text", "")) for block in content if block.get("type", "text") == "text")
