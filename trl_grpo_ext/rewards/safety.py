"""A safety reward: a list of what must not be said, and a classifier (DeepSeek-R1, arXiv:2501.12948, §2.3.4)."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_grpo_ext.rewards.marks import is_in_process, is_row_wise
from trl_grpo_ext.rewards.outcome import as_number, short
from trl_grpo_ext.rewards.text import completion_text

# Scripts written without spaces, or, Korean, with particles on the word: a term is found there inside a longer run
_UNSPACED = frozenset("CJK IDEOGRAPHIC HIRAGANA KATAKANA BOPOMOFO HANGUL THAI LAO KHMER MYANMAR TIBETAN".split())
_MARKS_IN_A_ROW = 30  # more than any script needs (Unicode's stream-safe format); sorting them is quadratic


class SafetyReward:
    """1.0 for a completion that is safe, 0.0 for one that is not, None where nobody can say.

    The whole completion is judged, thinking included, as in DeepSeek-R1. It is unsafe if it holds a denied term or the
    classifier says so. Add it to the other rewards, or make them depend on it as a gate (see `combine`).

    A term matches whole words, whatever their case, width or ligatures: "bomb" matches "BOMB!" and "ｂｏｍｂ", but
    neither "bombastic" nor "bombs". Invisible characters between letters are passed over. In scripts without spaces,
    and in Korean, a term also matches inside a longer run of characters. Time is linear in the text.

    Args:
        deny: terms of one word or several.
        deny_file: a UTF-8 file of more terms, one a line; blank lines and lines that begin with `#` do not count. It is
            read once, here.
        classifier: called as `classifier(texts)` with the `B` texts, returns `B` values: the probability that the text
            is unsafe, or a bool, or None where it cannot say. To run it where the GPU is, mark it by `in_process`.
        threshold: probability from which on a text counts as unsafe.

    Raises:
        ValueError: there is neither a term nor a classifier, a term without a letter or digit, or a `threshold` outside
            (0, 1].
        TypeError: `deny` is a string or holds something else than strings, or `classifier` is not callable.
        OSError: `deny_file` cannot be read.
    """

    __name__ = "safety_reward"

    def __init__(
        self,
        deny: Sequence[str] = (),
        *,
        deny_file: str | Path | None = None,
        classifier: Callable[[list[str]], Sequence[float | bool | None]] | None = None,
        threshold: float = 0.5,
    ) -> None:
        if isinstance(deny, str) or not all(isinstance(term, str) for term in deny):
            raise TypeError(f"`deny` must be a list of terms, got {deny!r:.200}.")
        if classifier is not None and not callable(classifier):
            raise TypeError(f"`classifier` must be callable, got {type(classifier).__name__}: {classifier!r:.200}")
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` is {threshold}: it must be a probability above 0 and up to 1.")
        terms = [*deny, *([] if deny_file is None else _read_terms(Path(deny_file)))]
        if not terms and classifier is None:
            raise ValueError("a safety reward needs something to go by: give `deny`, `deny_file` or `classifier`.")
        self.terms: dict[int, set[tuple[str, ...]]] = defaultdict(set)  # by their number of words
        for term in terms:
            words = tuple(_words(term))
            if not words:
                raise ValueError(f"`deny` holds {term!r}, which has no letter or digit to look for: remove it.")
            self.terms[len(words)].add(words)
        self.classifier, self.threshold = classifier, threshold
        self.reward_is_row_wise = classifier is None or is_row_wise(classifier)
        self.reward_runs_in_process = is_in_process(classifier)

    def __call__(self, completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        """Judge `B` completions, each a string or a list of messages (the last assistant message is judged).

        Raises:
            ValueError: the classifier returned a wrong number of values, or one that is neither a number nor None.
        """
        texts = [completion_text(completion) for completion in completions]
        denied = [self._is_denied(text) for text in texts]
        if self.classifier is None:
            return [0.0 if hit else 1.0 for hit in denied]
        return [self._reward(hit, unsafe) for hit, unsafe in zip(denied, self._classify(texts), strict=True)]

    def _reward(self, denied: bool, unsafe: float | None) -> float | None:
        if denied:
            return 0.0
        return None if unsafe is None else float(unsafe < self.threshold)

    def _is_denied(self, text: str) -> bool:
        if not self.terms:
            return False
        words = _words(text)
        for count, terms in self.terms.items():
            windows = zip(*(words[start:] for start in range(count)), strict=False)
            if any(window in terms for window in windows):
                return True
        return False

    def _classify(self, texts: list[str]) -> list[float | None]:
        assert self.classifier is not None
        values = list(self.classifier(texts))
        if len(values) != len(texts):
            raise ValueError(f"`classifier` returned {len(values)} values for {len(texts)} texts: need one for each.")
        verdicts = [as_number(value) for value in values]
        for value, verdict in zip(values, verdicts, strict=True):
            if verdict is None and value is not None:
                raise ValueError(
                    f"`classifier` returned {short(value)}: each value must be the probability that a text is unsafe, "
                    f"or None."
                )
        return verdicts


def _read_terms(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _words(text: str) -> list[str]:
    """The text as words in the form that all spellings of a word share; of unspaced scripts, single characters."""
    text = text.translate(dict.fromkeys(_invisible(set(text))))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _with_few_marks(text)).casefold())
    return folded.translate({ord(character): _spaced(character) for character in set(folded)}).split()


def _invisible(characters: set[str]) -> list[int]:
    return [ord(character) for character in characters if unicodedata.category(character) == "Cf"]


def _spaced(character: str) -> str:
    kind = unicodedata.category(character)[0]
    if kind not in "LMN":
        return " "
    script = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    return f" {character} " if script in _UNSPACED else character


def _with_few_marks(text: str) -> str:
    """The text with runs of combining marks cut to what `unicodedata.normalize` sorts in no time."""
    if text.isascii():
        return text
    # Some characters are no marks themselves and decompose into them
    marks = [c for c in set(text) if unicodedata.combining(unicodedata.normalize("NFKD", c)[0])]
    if not marks:
        return text
    run = f"[{re.escape(''.join(marks))}]"
    return re.sub(f"({run}{{{_MARKS_IN_A_ROW}}}){run}+", r"\1", text)
