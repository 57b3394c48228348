"""The rules that leave rows out: length, pass rate, duplicates. (Contamination: `overlap.py`.)"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .prompts import PromptEncoder
from .steps import Batch, Screen

DEDUPLICATE = ("normalized", "exact", "off")
# A stream's memory of the problems it has seen: 2^29 bits (64 MiB) and 12 of them per problem. After 10 million
# problems, a new one is taken for a known one with probability (1 - exp(-12 * 10^7 / 2^29))^12, about 4e-9.
_BITS, _HASHES = 29, 12
STREAM_CAPACITY = 10_000_000

_MARKUP = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,;:! ]|\$|\\[()\[\]]")
_RAISED = re.compile("[\u2070-\u207f\u00b2\u00b3\u00b9]+")
_LOWERED = re.compile("[\u2080-\u208e]+")
_GAP = re.compile(r"\s+")
_OUTER_GAP = re.compile(r"(?<!\w) | (?!\w)")


class Unreadable(Screen):
    """Rows without a problem, or whose answer cannot be parsed."""

    rule = "unreadable"
    columns = ("_unreadable",)

    def __call__(self, batch: Batch) -> list[str]:
        return batch["_unreadable"]


class TokenLimit(Screen):
    """Prompts of more tokens than `limit`, as the trainer counts them: after the chat template."""

    rule = "too long"
    columns = ("prompt", "source", "_row")

    def __init__(
        self, limit: int, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None
    ) -> None:
        self.limit, self.template_kwargs = limit, dict(chat_template_kwargs or {})
        self.encoder = PromptEncoder(tokenizer, self.template_kwargs)

    @property
    def key(self) -> Any:
        """The tokenizer by what it does: its own pickle changes once it has been used."""
        tokenizer = self.encoder.tokenizer
        return [self.limit, tokenizer_digest(tokenizer), json.dumps(self.template_kwargs, sort_keys=True, default=str)]

    def __call__(self, batch: Batch) -> list[str]:
        lengths = []
        for prompt, source, row in zip(batch["prompt"], batch["source"], batch["_row"], strict=True):
            try:
                lengths.append(len(self.encoder.encode(prompt).ids))
            except ValueError as error:
                raise ValueError(f"source={source!r}, row {row}: {error}") from error
        return ["" if n <= self.limit else f"{n} tokens, more than {self.limit}" for n in lengths]


class PassRateBand(Screen):
    """Prompts that the base model solves too rarely or too often to learn from."""

    rule = "outside of the pass-rate band"
    columns = ("pass_rate",)

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    @property
    def key(self) -> Any:
        return [self.low, self.high]

    def __call__(self, batch: Batch) -> list[str]:
        return [
            "it has no pass rate"
            if rate is None
            else ""
            if self.low <= rate <= self.high
            else f"pass rate {rate:g}, not within {self.low:g}..{self.high:g}"
            for rate in batch["pass_rate"]
        ]


def normalized(problem: str) -> str:
    """A problem without what does not change it: case, white space, dollar signs, spacing commands of LaTeX."""
    text = _MARKUP.sub(" ", composed(problem).casefold())
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _OUTER_GAP.sub("", _GAP.sub(" ", text).strip()).rstrip(".?:")


def composed(problem: str) -> str:
    """One form of each character (NFKC); 5\u00b2 is 5^2 then, and not 52."""
    text = _RAISED.sub(lambda found: f"^{found.group()}", problem)
    return unicodedata.normalize("NFKC", _LOWERED.sub(lambda found: f"_{found.group()}", text))


def problem_key(problem: str, deduplicate: str) -> int:
    """64 bits that equal problems share; a signed integer."""
    text = normalized(problem) if deduplicate == "normalized" else problem
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def first_of_each(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each row the index of the first row with its key: (rows,) -> (rows,)."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


class SeenBefore(Screen):
    """Duplicates in a stream, in memory that does not grow: a Bloom filter of the problems' keys (Bloom 1970).

    Args:
        again: a mixture reads its sources again until all are used up: a row that was kept once is kept each time, by
            an entry of its own (half as many problems can be told then).
    """

    rule = "duplicates"
    columns = ("_key",)

    def __init__(self, again: bool = False) -> None:
        self.again = again
        self.restart()

    def restart(self) -> None:
        """As new."""
        self.words = np.zeros(1 << (_BITS - 6), dtype=np.uint64)
        self.count = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"again": self.again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def key(self) -> Any:
        raise TypeError("a stream is not cached")

    def __call__(self, batch: Batch) -> list[str]:
        keys = np.asarray(batch["_key"], dtype=np.int64).astype(np.uint64)
        known = self._holds(keys) | (first_of_each(keys) != np.arange(len(keys)))
        added, dropped = keys[~known], known
        if self.again:
            rows = np.asarray(batch["_row"], dtype=np.int64).astype(np.uint64)
            names = np.asarray([problem_key(name, "exact") for name in batch["source"]], dtype=np.int64)
            places = keys ^ names.astype(np.uint64) ^ (rows * np.uint64(0x9E3779B97F4A7C15))
            dropped = (known & ~self._holds(places))[first_of_each(places)]
            added = np.concatenate([added, places[~known]])
        self._add(added)
        if self.count > STREAM_CAPACITY:
            problems = STREAM_CAPACITY // 2 if self.again else STREAM_CAPACITY
            raise ValueError(
                f"deduplicate: this stream has more than {problems:,} different problems, more than duplicates "
                "can be told among in constant memory. Set streaming=False, or deduplicate='off'."
            )
        return ["a problem like it came before" if seen else "" for seen in dropped]

    def _holds(self, keys: np.ndarray[Any, Any]) -> Any:
        places, masks = _bits(keys)
        return ((self.words[places] & masks) != 0).all(axis=1)

    def _add(self, keys: np.ndarray[Any, Any]) -> None:
        places, masks = _bits(keys)
        np.bitwise_or.at(self.words, places, masks)
        self.count += len(keys)


def _bits(keys: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Words of the filter and bits in them, (keys, hashes); double hashing (Kirsch and Mitzenmacher 2006): the i-th bit
    is low + i * high."""
    low, high = keys & np.uint64(0xFFFFFFFF), (keys >> np.uint64(32)) | np.uint64(1)
    bits = (low[:, None] + np.arange(_HASHES, dtype=np.uint64) * high[:, None]) % np.uint64(1 << _BITS)
    return bits >> np.uint64(6), np.uint64(1) << (bits & np.uint64(63))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, as a digest: vocabulary, rules and chat template, without its state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.update(truncation=None, padding=None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    what = [rules, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
