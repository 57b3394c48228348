r"""Language consistency (DeepSeek-R1, arXiv:2501.12948, §2.3.2): the share of the thinking in the right language.

Script decides where it can: Thai letters are Thai. Where languages share a script, sentences are identified by
py3langid, Japanese and Chinese by their kana. LaTeX, code, digits and single letters (variables) are nobody's language.
"""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trl_grpo_ext.rewards.marks import row_wise
from trl_grpo_ext.rewards.text import completion_text

_MAX_PASSAGE = 1_000  # characters
_MIN_KANA = 0.1  # of a Japanese passage's letters; ordinary prose has more than half
_SENTENCE_END = re.compile(r"[.!?…。！？]+")
_LONE_LETTER = re.compile(r"(?<![^\W\d_])[A-Za-zΑ-Ωα-ω](?![^\W\d_])")
_PUNCTUATION = frozenset("\n .,!?…。、！？'’-")
_COMMAND = re.compile(r"\\[A-Za-z]+\*?|https?://\S+")
_MATH_OR_CODE = re.compile(r"```|`|\$\$|\$|\\\(|\\\[|\\begin\{|\[asy\]")
_ENDS = {
    "```": "```",
    "`": "`",
    "$$": "$$",
    "$": "$",
    r"\(": r"\)",
    r"\[": r"\]",
    r"\begin{": r"\end{",
    "[asy]": "[/asy]",
}
_END_NAME = re.compile(r"[A-Za-z]*\*?\}")
_ON_ONE_LINE = frozenset("`$")
_SCOPES = ("thinking", "completion")


@dataclass(frozen=True)
class _Family:
    """Languages that share scripts, and how to tell them apart."""

    languages: frozenset[str]
    scripts: frozenset[str]  # the first word of their letters' Unicode names
    identify: Callable[[str, frozenset[str]], str] | None = None  # passage, languages -> language; None: there is one
    min_letters: int = 32  # of a passage to be identified: with fewer, names and loan words decide


@row_wise
class LanguageConsistencyReward:
    """Share of the chain of thought that is in the target language, in [0, 1], by letters.

        r = letters of passages in the target language / letters

    A passage is a sentence, or several where they are short. Languages mixed within a passage are told apart by script
    only. Names count as what they are written in: "iPhone" in a Chinese sentence is not Chinese. Time is linear in the
    text.

    Args:
        language: the target, as ISO 639-1 code (`"en"`; `"zh-CN"` counts as `"zh"`), for all rows.
        column: where there is no `language`, the dataset's column that holds each row's.
        scope: `"thinking"`, what stands between `<think>` and `</think>` (also where only one of the two is there), or
            the whole text where there is neither; or `"completion"`, always the whole text.
        require_thinking: None for a completion with neither tag.

    Returns None for a row whose language is None, and for a text without a letter.

    Languages that share their spelling count as one: Indonesian and Malay (id, ms); Bosnian, Croatian and Serbian in
    Latin letters (bs, hr); Norwegian (no, nb, nn).

    Raises:
        ValueError: a language that is not known, or a `scope` that is neither.
        ImportError: py3langid is not installed, and the language cannot be told by script alone.
    """

    __name__ = "language_consistency_reward"

    def __init__(
        self,
        language: str | None = None,
        *,
        column: str = "language",
        scope: str = "thinking",
        require_thinking: bool = False,
    ) -> None:
        if scope not in _SCOPES:
            raise ValueError(f"`scope` is {scope!r}: it must be one of {_SCOPES}.")
        self.language = None if language is None else _code(language, "language")
        self.column, self.scope, self.require_thinking = column, scope, require_thinking
        self._load()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _load(self) -> None:
        """Load py3langid before the first call: if it is missing we know at once, and worker processes share it."""
        if self.language is not None and _family(self.language).identify is _by_py3langid:
            _ranking()

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Judge `B` completions, each a string or a list of messages (the last assistant message is judged).

        Raises:
            ValueError: there is neither a `language` nor the column, or the column has a wrong number of values.
        """
        targets = self._targets(len(completions), columns)
        return [
            None if target is None else self._reward(completion_text(completion), target)
            for completion, target in zip(completions, targets, strict=True)
        ]

    def _targets(self, count: int, columns: dict[str, Any]) -> list[str | None]:
        if self.language is not None:
            return [self.language] * count
        if self.column not in columns:
            raise ValueError(
                f"the language reward found no column `{self.column}`: add it to the dataset, name another one by "
                f"`column`, or set one `language` for all rows."
            )
        values = list(columns[self.column])
        if len(values) != count:
            raise ValueError(f"`{self.column}` has {len(values)} values for {count} completions; need one for each.")
        return [None if value is None else _code(value, self.column) for value in values]

    def _reward(self, text: str, language: str) -> float | None:
        if self.scope == "thinking":
            start, end = text.find("<think>"), text.rfind("</think>")
            if start < 0 and end < 0 and self.require_thinking:
                return None
            inside = start + len("<think>") if start >= 0 else 0
            text = text[inside : end if end >= inside else len(text)]
        return language_share(text, language)


def language_share(text: str, language: str) -> float | None:
    """Share of a text's letters that stand in passages in the given language; None for a text without letters."""
    prose = _prose(text)
    by_script = _letters(prose)
    total = sum(by_script.values())
    if total == 0:
        return None
    family = _family(language)
    if not any(by_script[script] for script in family.scripts):
        return 0.0
    if family.identify is None:
        return sum(by_script[script] for script in family.scripts) / total
    own_scripts = _OWN_SCRIPTS.get(language, family.scripts)
    in_language = 0
    for passage in _passages(_only(prose, family.scripts), family.min_letters):
        if family.identify(passage, family.languages) == language:
            letters = _letters(passage)
            in_language += sum(letters[script] for script in own_scripts)
    return in_language / total


def _prose(text: str) -> str:
    """The text without LaTeX, code and links."""
    pieces, position, never = [], 0, set[str]()
    while (match := _MATH_OR_CODE.search(text, position)) is not None:
        end = _end_of(text, match, never)
        pieces += [text[position : match.start()], " "] if end else [text[position : match.end()]]
        position = end or match.end()
    pieces.append(text[position:])
    return _COMMAND.sub(" ", "".join(pieces))


def _end_of(text: str, opening: re.Match[str], never: set[str]) -> int:
    """Where what this opens is over; 0 if it opens nothing, such as the $ of a price.

    `never` collects the delimiters that are known not to occur any more, so that the text is not searched again.
    """
    closing = _ENDS[opening[0]]
    close = -1 if closing in never else text.find(closing, opening.end())
    if close < 0:
        never.add(closing)
        return 0
    if opening[0] in _ON_ONE_LINE and "\n" in text[opening.end() : close]:
        return 0
    end = close + len(closing)
    if opening[0] == "$":
        # Pandoc's rule, which "$2 and $3" and "2$ and 3$" do not pass
        inside, after = text[opening.end() : close], text[end : end + 1]
        return end if inside.strip() == inside != "" and not after.isdigit() else 0
    name = _END_NAME.match(text, end) if closing == r"\end{" else None
    return name.end() if name else end


def _letters(text: str) -> Counter[str]:
    """How many letters (and vowel signs) of each script."""
    scripts: Counter[str] = Counter()
    for character, count in Counter(_LONE_LETTER.sub(" ", text)).items():
        script = _script(character)
        if script is not None:
            scripts[script] += count
    return scripts


@functools.lru_cache(maxsize=65_536)
def _script(character: str) -> str | None:
    """The script of a letter or of a mark that belongs to one script; None for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    words = unicodedata.name(character, "").replace("-", " ").split()
    while words and words[0] in ("FULLWIDTH", "HALFWIDTH"):
        del words[0]
    script = words[0] if words else ""
    script = "CJK" if script == "IDEOGRAPHIC" else script  # the iteration mark 々
    return script if script in _SCRIPTS else None


def _only(text: str, scripts: frozenset[str]) -> str:
    """The text with all but the letters of these scripts, their marks, and what joins or ends words blanked out."""
    others = [c for c in set(text) if c not in _PUNCTUATION and not _belongs(c, scripts)]
    return text.translate(dict.fromkeys(map(ord, others), " "))


def _belongs(character: str, scripts: frozenset[str]) -> bool:
    script = _script(character)
    return script in scripts if script is not None else unicodedata.category(character)[0] == "M"


def _passages(text: str, min_letters: int) -> Iterator[str]:
    """Sentences, a short one joined to its neighbour in the line, and a line of too few letters to the next line."""
    passages: list[list[str]] = []
    pending: list[str] = []
    letters = 0
    for line in text.split("\n"):
        before = len(passages)
        for piece in _pieces(line):
            pending.append(piece)
            letters += sum(map(str.isalpha, piece))
            if letters >= min_letters:
                passages.append(pending)
                pending, letters = [], 0
        if pending and len(passages) > before:
            passages[-1] += pending
            pending, letters = [], 0
    if pending and passages:
        passages[-1] += pending
    elif pending:
        passages.append(pending)
    return (". ".join(passage) for passage in passages)


def _pieces(line: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(line):
        for start in range(0, len(sentence), _MAX_PASSAGE):
            piece = sentence[start : start + _MAX_PASSAGE]
            if any(map(str.isalpha, piece)):
                yield piece


def _by_py3langid(passage: str, languages: frozenset[str]) -> str:
    return next((language for language, _ in _ranking()(passage) if language in languages), "")


def _by_kana(passage: str, languages: frozenset[str]) -> str:
    letters = _letters(passage)
    kana = letters["HIRAGANA"] + letters["KATAKANA"]
    return "ja" if kana >= _MIN_KANA * sum(letters.values()) else "zh"


@functools.lru_cache(maxsize=1)
def _ranking() -> Callable[[str], list[tuple[str, float]]]:
    """py3langid's `rank`: all its languages, the likeliest first."""
    try:
        import py3langid
    except ImportError as error:
        raise ImportError(
            "the language reward needs py3langid to tell languages of one script apart: pip install py3langid"
        ) from error
    py3langid.rank("")  # reads the model, half a second
    return py3langid.rank


def _one(language: str, *scripts: str) -> _Family:
    return _Family(frozenset([language]), frozenset(scripts))


_LATIN = "af ca cs cy da de en es et eu fi fr ga gl hr hu id is it lt lv mt nl no pl pt ro sk sl sq sv sw tl tr vi"
_FAMILIES = [
    _Family(frozenset(_LATIN.split()), frozenset(["LATIN"]), _by_py3langid),
    _Family(frozenset("be bg kk ky mk mn ru sr uk".split()), frozenset(["CYRILLIC"]), _by_py3langid),
    _Family(frozenset("ar fa ps ug ur".split()), frozenset(["ARABIC"]), _by_py3langid),
    _Family(frozenset("hi mr ne".split()), frozenset(["DEVANAGARI"]), _by_py3langid),
    _Family(frozenset("ja zh".split()), frozenset(["CJK", "HIRAGANA", "KATAKANA"]), _by_kana, min_letters=4),
    _one("am", "ETHIOPIC"),
    _one("bn", "BENGALI"),
    _one("el", "GREEK"),
    _one("gu", "GUJARATI"),
    _one("he", "HEBREW"),
    _one("hy", "ARMENIAN"),
    _one("ka", "GEORGIAN"),
    _one("km", "KHMER"),
    _one("kn", "KANNADA"),
    _one("ko", "HANGUL"),
    _one("lo", "LAO"),
    _one("ml", "MALAYALAM"),
    _one("my", "MYANMAR"),
    _one("or", "ORIYA"),
    _one("pa", "GURMUKHI"),
    _one("si", "SINHALA"),
    _one("ta", "TAMIL"),
    _one("te", "TELUGU"),
    _one("th", "THAI"),
]
_SCRIPTS = frozenset(script for family in _FAMILIES for script in family.scripts)
_OWN_SCRIPTS = {"zh": frozenset(["CJK"])}  # kana in a Chinese passage are not Chinese
_SAME = {"bs": "hr", "ms": "id", "nb": "no", "nn": "no"}
_FAMILY_OF = {language: family for family in _FAMILIES for language in family.languages}


def _family(language: str) -> _Family:
    return _FAMILY_OF[language]


def _code(value: Any, field: str) -> str:
    """A language tag as one of the codes above."""
    if not isinstance(value, str):
        raise TypeError(f"`{field}` must be a language code such as 'en', got {type(value).__name__}: {value!r:.200}")
    code = re.split("[-_]", value.strip().lower())[0]
    code = _SAME.get(code, code)
    if code not in _FAMILY_OF:
        near = difflib.get_close_matches(code, _FAMILY_OF, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        known = " ".join(sorted({*_FAMILY_OF, *_SAME}))
        raise ValueError(f"`{field}` is {value!r}, which is not a known ISO 639-1 code{hint}; known are {known}.")
    return code
