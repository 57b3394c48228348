"""Rows -> prompts as token ids, checked before any training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

Prompt = str | list[dict[str, Any]]

# A reasoning block that was opened last thing: the model's completion starts inside it. Instructions speak of `<think>`
# too, so it counts only at the very end, except in a message that is continued: all of that is the model's own.
_OPENED_AT_END = re.compile(r"<think>\s*\Z")
_OPENED_IN_MESSAGE = re.compile(r"<think>(?:(?!</think>).)*\Z", re.DOTALL)
# Room for what a chat template writes around the messages, when prompts are screened by their length in bytes
_TEMPLATE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt as the model reads it."""

    ids: list[int]
    prefill: str  # what the prompt already wrote of the completion: "<think>\n" where a template opens the reasoning


class EmptyPrompt(ValueError):
    """A prompt without a single token."""


class PromptEncoder:
    """Applies the chat template to conversational prompts and tokenizes.

    A conversation that ends with an assistant message is continued; any other gets the template's generation prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self._template_kwargs = dict(chat_template_kwargs or {})

    def text(self, prompt: Prompt) -> str:
        """The prompt as the model reads it, before tokenization.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        if isinstance(prompt, str):
            return prompt
        continued = prompt[-1]["role"] == "assistant"
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    prompt,
                    tokenize=False,
                    add_generation_prompt=not continued,
                    continue_final_message=continued,
                    **self._template_kwargs,
                )
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in prompt)
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}. If it knows no "
                "system message, say what that says in the user's: system_prompt='', template={'user': '... {{ problem "
                "}}'}."
            ) from error

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Token ids of one prompt. Special tokens are added to plain text only: a chat template writes its own.

        Raises:
            ValueError: if the prompt is neither text nor messages, or (`EmptyPrompt`) has no tokens.
        """
        if problem := form_problem(prompt):
            raise ValueError(f"a prompt {problem}")
        text = self.text(prompt)
        ids = self.tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        if not ids:
            raise EmptyPrompt(f"a prompt has no tokens: {prompt!r:.80}. Leave such rows out with dataset.filter.")
        opened = _OPENED_AT_END.search(text)
        if opened is None and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            opened = _OPENED_IN_MESSAGE.search(_texts(prompt[-1:])[0])
        return EncodedPrompt(list(ids), opened.group() if opened else "")

    def completions(
        self, prompts: Sequence[Prompt], prefills: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Any]:
        """What rewards are given: text, or one assistant message where the prompt is conversational.

        A `<think>` that the prompt opened is put in front, so that the completion reads as the model meant it.
        """
        texts = self.tokenizer.batch_decode([list(ids) for ids in completion_ids], skip_special_tokens=True)
        texts = [prefill + text for prefill, text in zip(prefills, texts, strict=True)]
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]


def batched(dataset: Dataset | IterableDataset, size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of `size`, the last one shorter if need be."""
    rows: list[dict[str, Any]] = []
    for row in dataset:
        rows.append(row)
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows


def form_problem(prompt: Any) -> str:
    """What is wrong with the form of a prompt; "" if it is text or a list of messages."""
    if isinstance(prompt, str) or (prompt and is_conversational({"prompt": prompt})):
        return ""
    return (
        f"is {json.dumps(prompt, default=str)[:80]}; it must be a string or a list of messages "
        '[{"role": "user", "content": "..."}]'
    )


def check_columns(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    """The columns, after refusing an empty dataset, one without prompts, and a first prompt nobody can read.

    Raises:
        ValueError: says which, and what to do.
        TypeError: for something that is not a `datasets` dataset.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"{name} must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} is empty: it has no rows. Check the split and the filters.")
    if "prompt" not in first:
        raise ValueError(
            f"{name} has no 'prompt' column (its columns: {sorted(first)}). Rename the column that holds the prompts: "
            "dataset.rename_column('question', 'prompt')."
        )
    if problem := form_problem(first["prompt"]):
        raise ValueError(f"{name}: 'prompt' of the first row {problem}")
    return list(first)


def check_prompts(dataset: Dataset, name: str, encoder: PromptEncoder, limit: int | None, why: str) -> None:
    """Refuse prompts that are neither text nor messages, have no tokens, or more than `limit` tokens (None: unknown).

    A token takes at least one byte of text, so only prompts of more bytes than the limit are tokenized, and the first
    one, which shows whether the tokenizer can read such prompts at all.

    Raises:
        ValueError: names the first such row, and for long ones its length and how many there are.
    """
    long = []
    # Of a million rows it takes half a minute
    rows = tqdm(_prompts(dataset), desc=f"checking {name}", total=len(dataset), delay=2, leave=False)
    for row, prompt in enumerate(rows):
        if problem := form_problem(prompt):
            raise ValueError(f"{name}: 'prompt' of row {row} {problem}")
        size = sum(len(text.encode()) for text in _texts(prompt))
        too_long = limit is not None and size + _TEMPLATE_BYTES > limit
        if row and size and not too_long:
            continue
        try:
            tokens = len(encoder.encode(prompt).ids)
        except ValueError as error:
            raise ValueError(f"{name}, row {row}: {error}") from error
        if limit is not None and tokens > limit:
            long.append((row, tokens))
    if long:
        row, tokens = long[0]
        raise ValueError(
            f"{name}: the prompt of row {row} has {tokens} tokens, more than the {limit} {why}; {len(long)} of "
            f"{len(dataset)} prompts are too long. Drop them with dataset.filter, or use a model with a longer context."
        )


def _prompts(dataset: Dataset) -> Iterable[Prompt]:
    return (row["prompt"] for row in dataset.select_columns("prompt"))


def _texts(prompt: Prompt) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [str(message.get("content", "")) for message in prompt]
