"""The format reward of DeepSeek-R1 (arXiv:2501.12948, §2.2.2): thinking and answer in their tags, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trl_grpo_ext.rewards.text import completion_text

_THINK_ANSWER = re.compile(r"\s*<think>(?P<think>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_answer_format_reward(
    completions: Sequence[Any], prompts: Sequence[Any] | None = None, **kwargs: Any
) -> list[float]:
    """1.0 for a completion that is exactly `<think>..</think><answer>..</answer>`, else 0.0.

    Strict: the two blocks are the whole text (white space around and between them is allowed), each of the four tags
    occurs exactly once, and neither block is blank.

    **A `<think>` that the chat template has already opened.** Templates of reasoning models end the prompt with
    `<think>`, so the model itself never writes that tag. `trl_grpo_ext.GRPOTrainer` hands such a prefix to the rewards
    as part of the completion's text, so nothing special happens here. `trl.GRPOTrainer` does not, and TRL's own
    `think_format_reward` scores every such completion 0. For use there, a plain-text prompt (see `prompts`) that ends
    in `<think>` counts as having opened the block. A conversational prompt does not show what its template appends, so
    with TRL's trainer and conversational prompts such completions score 0 here too.

    Args:
        completions: `B` completions, each a string or a list of messages (the last assistant message is judged).
        prompts: the `B` prompts they belong to; only plain strings are looked at.
        **kwargs: whatever else a trainer passes; ignored.

    Returns:
        `B` rewards, each 0.0 or 1.0.
    """
    texts = [completion_text(completion) for completion in completions]
    if prompts is not None:
        texts = [_with_opened_think(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
    return [1.0 if _is_well_formed(text) else 0.0 for text in texts]


def _with_opened_think(text: str, prompt: Any) -> str:
    opened = isinstance(prompt, str) and prompt.rstrip().endswith("<think>")
    return "<think>" + text if opened and not text.lstrip().startswith("<think>") else text


def _is_well_formed(text: str) -> bool:
    # Counting first keeps the pattern linear: with one tag of each kind its `.*` can end in one place only.
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _THINK_ANSWER.fullmatch(text)
    return match is not None and bool(match["think"].strip()) and bool(match["answer"].strip())
