r"""Which characters of a completion each sampled token wrote; and so, which token a reasoning step ends at.

The characters are found through the sampled ids alone. Tokenizing the text again would give other tokens: a policy
samples "1" "2" where its tokenizer would write "12".

What a token writes depends on its neighbours in few ways: a character may be spread over several tokens (byte-level
BPE, byte fallback), and the first token may lose a leading space (SentencePiece). So a token is first taken by itself,
and where that does not continue the completion's text, it is decoded together with its neighbours.
`tokenizers.decoders.DecodeStream` would not do: it waits for as long as the decoded text ends in U+FFFD, and so gives
the characters of an invalid byte to the wrong token, never returns those of a completion that ends in one, and decodes
ever longer windows meanwhile (quadratic time for a policy that writes such bytes only).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_REPLACEMENT = "\ufffd"  # what bytes that are no character, or only a part of one, are decoded to
_PATIENCE = 8  # tokens; a character has four bytes at most
_CONTEXT = 8  # tokens
_ANCHORS = 16  # in a completion: each costs as much as decoding all of it


class Tokenizer(Protocol):
    """Any tokenizer of transformers, fast or slow, or of the tokenizers library."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> Any:
        """The text of these tokens."""


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """The text of C tokens, and what each of them wrote of it: `text[starts[t] : ends[t]]`.

    A character that is spread over several tokens is in the span of each. A token that writes nothing (a special token)
    has an empty span, where the text stood when it came. The starts never decrease.

    Args:
        text: what `decode(ids, skip_special_tokens=True)` gives.
        starts, ends: C character positions each.
        exact: False if some neighbouring tokens could not be told apart, because the tokenizer decodes them together to
            something else than one after the other. They share one span then; all other spans are right all the same.
            It speaks of characters only: which byte of an invalid sequence is which U+FFFD is not always known.
    """

    text: str
    starts: list[int]
    ends: list[int]
    exact: bool

    def end_tokens(self, ends: Sequence[int], prefill: int = 0) -> list[int]:
        """The positions of the tokens that steps end at.

        It is the token that completes the step's last character, even if it writes more than that (`.\\n\\n`). A step
        with nothing but white space after it ends at the last token: an EOS belongs to the last step, or no reward of a
        step would ever reach the decision to stop.

        Args:
            ends: for each step, the position after its last character, in prefill + text.
            prefill: how many characters the prompt wrote in front of the text (`<think>`); they belong to no token.

        Returns:
            One position in 0..C-1 per step, -1 for a step that ends within the prefill.

        Raises:
            ValueError: an end is outside the text.
        """
        content = len(self.text.rstrip())
        tokens = []
        for end in ends:
            position = end - prefill
            if end < 0 or position > len(self.text):
                raise ValueError(
                    f"a step ends at character {end}, but the text has {prefill + len(self.text)} ({prefill} of them "
                    "the prompt's): ends must be positions in the text that the reward function was given. Count "
                    "characters of that text, not bytes, tokens, or characters of a cleaned copy."
                )
            if position <= 0:
                tokens.append(-1)
            elif position >= content:
                tokens.append(len(self.starts) - 1)
            else:
                tokens.append(bisect_left(self.starts, position) - 1)
        return tokens


class SpanDecoder:
    """Finds the spans of tokens, in time linear in their number. Keeps what each token id decodes to.

    Args:
        tokenizer: the policy's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._written: dict[int, tuple[str, str]] = {}

    def spans(self, ids: Sequence[int]) -> TokenSpans:
        """The spans of a completion's sampled tokens."""
        alignment = _Alignment(self, list(ids))
        for position, token in enumerate(alignment.ids):
            alone, following = self.written(token)
            # Not every token that writes nothing by itself is special: there are decoders that drop a character's first
            # bytes until the last one comes
            if alone or following or token not in self._special:
                alignment.take(position, alone, following)
            else:
                alignment.skip(position)
        return alignment.finished()

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens, as the trainer hands it to the rewards."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def written(self, token: int) -> tuple[str, str]:
        """What a token writes at the very beginning, and after another token. Both are empty for a special token."""
        if token not in self._written:
            # After itself, as no other token is known to be harmless; a lone space writes nothing at the beginning
            alone, twice = self.decode([token]), self.decode([token, token])
            self._written[token] = alone, twice[len(alone) :] if twice.startswith(alone) else _REPLACEMENT
        return self._written[token]


class _Alignment:
    """The walk over a completion's tokens, with the count of characters they have written so far."""

    def __init__(self, decoder: SpanDecoder, ids: list[int]) -> None:
        self.ids, self._decoder = ids, decoder
        self._text = decoder.decode(ids)
        self._starts, self._ends = [0] * len(ids), [0] * len(ids)
        self._at = 0  # characters settled
        self._context: list[int] = []  # ids of the tokens that wrote the last of them
        self._waiting: list[int] = []  # positions of the tokens after those, in the middle of a character
        self._shown = 0  # characters that the waiting tokens have completed
        self._unclear: list[int] = []  # those of them that fit into the text in no way yet
        self._exact = True
        self._anchors = _ANCHORS

    def skip(self, position: int) -> None:
        """The next token, a special one."""
        self._starts[position] = self._ends[position] = self._at

    def take(self, position: int, alone: str, following: str) -> None:
        """The next token, and what it writes at the beginning of a text and elsewhere."""
        self._starts[position] = self._ends[position] = self._at
        written = following if self._context else alone
        if self._waiting or not written or _REPLACEMENT in written or not self._fits(written):
            self._take_with_neighbours(position)
            return
        self._at += len(written)
        self._ends[position] = self._at
        self._context = [self.ids[position]]

    def finished(self) -> TokenSpans:
        """The spans, when all tokens are taken."""
        if self._waiting or self._at < len(self._text):
            # The last tokens share what is left
            for position in self._waiting or range(max(len(self.ids) - 1, 0), len(self.ids)):
                self._ends[position] = len(self._text)
            self._exact = False
        return TokenSpans(self._text, self._starts, self._ends, self._exact)

    def _take_with_neighbours(self, position: int) -> None:
        """A token that is known by what the text of its neighbours gains through it."""
        self._waiting.append(position)
        count = len(self._waiting)
        if count > _PATIENCE and count & (count - 1):  # longer and longer windows, but not many of them
            self._unclear.append(position)
            return
        ids = [self.ids[waiting] for waiting in self._waiting]
        before, window = self._decoder.decode(self._context), self._decoder.decode(self._context + ids)
        gained = window[len(before) + self._shown :]
        complete = _common_beginning(gained, self._text[self._at : self._at + len(gained)])
        alone = self._decoder.decode(ids)[self._shown :]
        if window.startswith(before) and self._fits(gained):
            self._settle(position, gained)
        elif window.startswith(before) and not gained[len(complete) :].strip(_REPLACEMENT):
            # The rest is the beginning of the next character, which the tokens to come complete
            self._at += len(complete)
            self._shown += len(complete)
            self._ends[position] = min(self._at + 1, len(self._text))
        elif alone and self._fits(alone):  # these tokens change what those before them write
            self._settle(position, alone)
        else:
            self._unclear.append(position)
            if count > _PATIENCE and self._anchors:
                self._anchor(position)

    def _fits(self, written: str) -> bool:
        return self._text.startswith(written, self._at)

    def _anchor(self, position: int) -> None:
        """Where all tokens so far write the beginning of the text, the count can start afresh behind them."""
        self._anchors -= 1
        prefix = self._decoder.decode(self.ids[: position + 1])
        if len(prefix) >= self._at and self._text.startswith(prefix):
            self._settle(position, prefix[self._at :])

    def _settle(self, position: int, gained: str) -> None:
        """All that the waiting tokens write is there."""
        self._at += len(gained)
        for unclear in [*self._unclear, position]:
            self._ends[unclear] = self._at
        # Of several tokens and several characters it is not known whose is which, unless only the first is shared
        shared = self._unclear or (len(self._waiting) > 1 and gained.startswith(_REPLACEMENT))
        self._exact = self._exact and (not shared or len(gained) == 1)
        # Tokens that add nothing (the second byte of an invalid character) tell nothing without those before them
        kept = [] if gained else self._context
        self._context = (kept + [self.ids[waiting] for waiting in self._waiting])[-_CONTEXT:]
        self._waiting, self._unclear, self._shown = [], [], 0


def _common_beginning(one: str, other: str) -> str:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:position]
    return one[: len(other)]
