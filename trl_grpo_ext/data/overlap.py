"""Contamination: training problems that are, or hold, a problem of an evaluation set (n-gram overlap).

As in GPT-3 (arXiv:2005.14165, Appendix C: 13-grams of words, lower case, without punctuation), with one more condition:
the shared n-grams must make up at least `share` of the evaluation problem's own. Competition problems have stock
phrases of more than 13 words ("can be written in the form m/n where m and n are relatively prime positive integers"),
which are no leak.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .screens import composed, normalized
from .steps import Batch, Screen

# Where no spaces part words (Chinese and Japanese characters, Thai), each character counts as one
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class Contamination(Screen):
    """Problems that share n-grams of words with an evaluation problem.

    An evaluation problem of fewer than n words is compared as a whole, signs included, as a duplicate is.
    """

    rule = "contaminated"
    columns = ("problem",)

    def __init__(self, ngram: int, share: float) -> None:
        self.ngram, self.share = ngram, share
        self._problems: list[tuple[str, int, int]] = []  # source, row, number of its n-grams
        self._of_ngram: dict[tuple[str, ...], list[int]] = {}
        self._whole: dict[str, int] = {}
        self._digest = hashlib.sha256(f"{ngram} {share}".encode())

    def add(self, source: str, problems: Iterable[str]) -> None:
        """The problems of an evaluation set."""
        for row, problem in enumerate(problems):
            number = len(self._problems)
            grams = self._ngrams(problem)
            self._problems.append((source, row, len(grams)))
            self._whole.setdefault(normalized(problem), number)
            for gram in grams:
                self._of_ngram.setdefault(gram, []).append(number)
            self._digest.update(f"{source} {problem}\n".encode())

    @property
    def key(self) -> Any:
        return self._digest.hexdigest()

    def __call__(self, batch: Batch) -> list[str]:
        return [self._why(problem) for problem in batch["problem"]]

    def _why(self, problem: str) -> str:
        same = self._whole.get(normalized(problem))
        if same is not None:
            source, row, _ = self._problems[same]
            return f"the same as row {row} of {source}"
        shared: dict[int, int] = {}
        first: dict[int, tuple[str, ...]] = {}
        for gram in self._ngrams(problem):
            for known in self._of_ngram.get(gram, ()):
                shared[known] = shared.get(known, 0) + 1
                first.setdefault(known, gram)
        if not shared:
            return ""
        number = max(shared, key=lambda n: shared[n] / self._problems[n][2])
        if shared[number] < self.share * self._problems[number][2]:
            return ""
        source, row, total = self._problems[number]
        return (
            f"shares {shared[number]} of {total} {self.ngram}-grams with row {row} of {source}, the first: "
            f"{' '.join(first[number])!r}"
        )

    def _ngrams(self, problem: str) -> Sequence[tuple[str, ...]]:
        """The different n-grams of a problem's words, in order."""
        words = _WORD.findall(composed(problem).casefold())
        return list(dict.fromkeys(zip(*(words[i:] for i in range(self.ngram)), strict=False)))
