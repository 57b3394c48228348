"""Format rewards: does a completion have the tags that its prompt asks for? (DeepSeek-R1, arXiv:2501.12948, §2.2.2)

**A tag that the chat template has already opened.** Templates of reasoning models end the prompt with `<think>`, so the
model itself never writes that tag. `trl_grpo_ext.GRPOTrainer` hands such a prefix to the rewards as part of the
completion's text, so nothing special happens here. `trl.GRPOTrainer` does not, and TRL's own `think_format_reward`
scores every such completion 0. For use there, a plain-text prompt that ends in the first block's opening tag counts as
having opened it. A conversational prompt does not show what its template appends: say so by `opened=True`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from trl_grpo_ext.rewards.marks import quick, row_wise
from trl_grpo_ext.rewards.text import completion_text

Tag: TypeAlias = "str | Sequence[str]"  # a name, or the two delimiters themselves

_TAG_NAME = re.compile(r"[A-Za-z_][\w.-]*")


@quick
@row_wise
class FormatReward:
    """1.0 for a completion made of the given blocks, else 0.0.

    The blocks come in the given order, each delimiter exactly once, and none is blank. Time is linear in the text.

    Args:
        tags: the blocks, each the name of a tag (`"think"` for `<think>..</think>`) or, for what is not XML, the pair
            of its delimiters (`("<start_working_out>", "<end_working_out>")`).
        strict: nothing but white space stands before the first block and between blocks, nor after the last one
            unless `text_after` says so. Otherwise any text may.
        text_after: more than white space must follow the last block: an answer that has no tags of its own.
        opened: the chat template opens the first block, though the prompts do not show it (see the module). A
            completion that writes the tag itself is then read as it stands.

    Raises:
        TypeError: `tags` is a string, or holds something other than names and pairs.
        ValueError: no tags, a name that is none, or delimiters that cannot be told apart.
    """

    __name__ = "format_reward"

    def __init__(
        self,
        tags: Sequence[Tag] = ("think", "answer"),
        *,
        strict: bool = True,
        text_after: bool = False,
        opened: bool = False,
    ) -> None:
        self.blocks = _blocks(tags)
        self.strict, self.text_after, self.opened = strict, text_after, opened

    def __call__(self, completions: Sequence[Any], prompts: Sequence[Any] | None = None, **kwargs: Any) -> list[float]:
        """Judge `B` completions.

        Args:
            completions: each a string or a list of messages (the last assistant message is judged).
            prompts: the `B` prompts they belong to; only plain strings are looked at.
            **kwargs: whatever else a trainer passes; ignored.

        Returns:
            `B` rewards, each 0.0 or 1.0.
        """
        texts = _texts(completions, prompts, self.blocks[0][0], self.opened)
        return [1.0 if self._is_well_formed(text) else 0.0 for text in texts]

    def _is_well_formed(self, text: str) -> bool:
        # Each delimiter is known to occur once, so the first place found is the only one.
        if any(text.count(delimiter) != 1 for block in self.blocks for delimiter in block):
            return False
        end = 0
        for opening, closing in self.blocks:
            start = text.find(opening, end)
            close = text.find(closing, start + len(opening))
            if start < 0 or close < 0 or not text[start + len(opening) : close].strip():
                return False
            if self.strict and text[end:start].strip():
                return False
            end = close + len(closing)
        has_text_after = bool(text[end:].strip())
        return has_text_after if self.text_after else not (self.strict and has_text_after)


@quick
@row_wise
class TagCountReward:
    """Partial credit for a format that is still to be learnt: the share of the delimiters that occur exactly once.

        r = |{d : d occurs once}| / (2 * number of blocks)

    Neither order nor what stands between the delimiters counts, so this leads a model towards `FormatReward`'s layout
    but cannot take its place: `</answer></think><answer><think>` earns 1.0 here.

    Args:
        tags: the blocks, as in `FormatReward`.
        opened: the chat template opens the first block, as in `FormatReward`; that delimiter then always counts.

    Raises:
        TypeError, ValueError: as in `FormatReward`.
    """

    __name__ = "tag_count_reward"

    def __init__(self, tags: Sequence[Tag] = ("think", "answer"), *, opened: bool = False) -> None:
        self.blocks = _blocks(tags)
        self.opened = opened

    def __call__(self, completions: Sequence[Any], prompts: Sequence[Any] | None = None, **kwargs: Any) -> list[float]:
        """Judge `B` completions; arguments as in `FormatReward`.

        Returns:
            `B` rewards in [0, 1].
        """
        delimiters = [delimiter for block in self.blocks for delimiter in block]
        texts = _texts(completions, prompts, delimiters[0], self.opened)
        return [sum(text.count(delimiter) == 1 for delimiter in delimiters) / len(delimiters) for text in texts]


@quick
@row_wise
def think_answer_format_reward(
    completions: Sequence[Any], prompts: Sequence[Any] | None = None, **kwargs: Any
) -> list[float]:
    """1.0 for a completion that is exactly `<think>..</think><answer>..</answer>`, else 0.0.

    Strict: the two blocks are the whole text (white space around and between them is allowed), each of the four tags
    occurs exactly once, and neither block is blank. A `<think>` that ends a plain-text prompt counts as the
    completion's own; see the module for the rest of that story.

    Args:
        completions: `B` completions, each a string or a list of messages (the last assistant message is judged).
        prompts: the `B` prompts they belong to; only plain strings are looked at.
        **kwargs: whatever else a trainer passes; ignored.

    Returns:
        `B` rewards, each 0.0 or 1.0.
    """
    return FormatReward(("think", "answer"))(completions, prompts)


@quick
@row_wise
def think_format_reward(completions: Sequence[Any], prompts: Sequence[Any] | None = None, **kwargs: Any) -> list[float]:
    """1.0 for a completion that is `<think>..</think>` and an answer after it, else 0.0.

    The layout of TRL's function of that name, which counts a `<think>` opened by the prompt as missing, and accepts
    blank thinking and no answer. Arguments as in `think_answer_format_reward`.

    Returns:
        `B` rewards, each 0.0 or 1.0.
    """
    return FormatReward(("think",), text_after=True)(completions, prompts)


def _texts(completions: Sequence[Any], prompts: Sequence[Any] | None, opening: str, opened: bool) -> list[str]:
    """The texts to judge, with the opening delimiter where the prompt has written it and the completion has not."""
    texts = [completion_text(completion) for completion in completions]
    before: Sequence[Any] = [None] * len(texts) if prompts is None else prompts
    return [
        opening + text if (opened or _ends_in(prompt, opening)) and not text.lstrip().startswith(opening) else text
        for text, prompt in zip(texts, before, strict=True)
    ]


def _ends_in(prompt: Any, opening: str) -> bool:
    return isinstance(prompt, str) and prompt.rstrip().endswith(opening)


def _blocks(tags: Sequence[Tag]) -> list[tuple[str, str]]:
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise TypeError(f"`tags` must be a list of tags, got {tags!r}: write `tags=[{tags!r}]` for a single one.")
    if not tags:
        raise ValueError("`tags` is empty: name at least one, such as 'think'.")
    blocks = [_block(tag) for tag in tags]
    delimiters = [delimiter for block in blocks for delimiter in block]
    for index, delimiter in enumerate(delimiters):
        for other in delimiters[:index] + delimiters[index + 1 :]:
            if delimiter in other:
                raise ValueError(
                    f"`tags` has the delimiters {delimiter!r} and {other!r}, where one is found in the other, so that "
                    f"neither could be counted: use different ones."
                )
    return blocks


def _block(tag: Tag) -> tuple[str, str]:
    if isinstance(tag, str):
        if not _TAG_NAME.fullmatch(tag):
            raise ValueError(
                f"`tags` holds {tag!r}, which is not the name of a tag: write 'think' for <think>..</think>, or the "
                f"pair of delimiters, ['<start>', '<end>']."
            )
        return f"<{tag}>", f"</{tag}>"
    if isinstance(tag, Sequence) and len(tag) == 2 and all(isinstance(part, str) and part.strip() for part in tag):
        return tag[0], tag[1]
    raise TypeError(f"`tags` holds {tag!r}: each must be the name of a tag or a pair of delimiters.")
