"""The data sets known by name: a declaration each, no code.

A source says where its rows are, which columns hold the problem and the gold answer, how the gold is written, and what
else of a row is kept for rewards and evaluations. Where copies of a set differ (the Hub's and a repository's), a source
names every form it knows; the first whose columns are there is taken.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROCEDURAL = "procedural"
REASONING_GYM = "reasoning_gym"
# File ending (".gz" aside) -> the builder of `datasets` that reads it
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        hub: its id on the Hub; "" where it has none (made by code, or a local file).
        licence: under what it is given out, with a note where the texts have an owner of their own.
        problem: forms of the problem, each a tuple of columns that are joined by a space.
        answer: forms of the gold answer, as (column, parser of `golds.PARSERS`).
        config: configuration on the Hub; of a local file that holds several, see `config_column`.
        splits: what there is on the Hub.
        extra: kept column -> (kind, the columns it may come from). Kinds: "text", "int", "float", "ints".
        statement: the problem written from columns, as `str.format` takes it; instead of the columns' own text.
        config_column: the column of a local file whose value is the configuration (MGSM's language).
    """

    hub: str
    licence: str
    problem: tuple[tuple[str, ...], ...] = (("problem",),)
    answer: tuple[tuple[str, str], ...] = (("answer", "text"),)
    config: str | None = None
    splits: tuple[str, ...] = ("train", "test")
    extra: tuple[tuple[str, tuple[str, tuple[str, ...]]], ...] = ()
    statement: str | None = None
    config_column: str | None = None

    @property
    def evaluation_split(self) -> str:
        """What others are decontaminated against."""
        return next((split for split in ("test", "validation") if split in self.splits), self.splits[0])


# The words of TinyZero's instruction (github.com/Jiayi-Pan/TinyZero), without its tags, which are the template's
COUNTDOWN_STATEMENT = (
    "Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once."
)
_LEVEL = ("level", ("int", ("level",)))
_SUBJECT = ("subject", ("text", ("subject", "type")))

SOURCES: dict[str, Source] = {
    "gsm8k": Source("openai/gsm8k", "MIT", (("question",),), (("answer", "gsm8k"),), "main"),
    "math": Source(
        "DigitalLearningGmbH/MATH-lighteval",
        "MIT",
        answer=(("solution", "boxed"), ("answer", "text")),
        extra=(_LEVEL, _SUBJECT),
    ),
    "math-500": Source("HuggingFaceH4/MATH-500", "MIT", splits=("test",), extra=(_LEVEL, _SUBJECT)),
    "svamp": Source(
        "ChilleD/SVAMP",
        "MIT",
        (("question_concat",), ("Body", "Question"), ("body", "question")),
        (("Answer", "number"), ("answer", "number")),
        extra=(("subject", ("text", ("Type", "type"))),),
    ),
    "aime": Source(
        "AI-MO/aimo-validation-aime",
        "Apache-2.0; the problems' texts are the MAA's",
        answer=(("answer", "number"),),
        splits=("train",),
    ),
    "mgsm": Source(
        "juletxara/mgsm",
        "CC-BY-SA-4.0",
        (("question",),),
        (("answer_number", "number"), ("answer", "number")),
        "en",
        extra=(("language", ("text", ("lang",))),),
        config_column="lang",
    ),
    "deepmath-103k": Source(
        "zwhe99/DeepMath-103K",
        "MIT",
        (("question",),),
        (("final_answer", "text"),),
        splits=("train",),
        extra=(("difficulty", ("float", ("difficulty",))), ("subject", ("text", ("topic",)))),
    ),
    "countdown": Source(
        "Jiayi-Pan/Countdown-Tasks-3to4",
        "not stated by its authors",
        (("nums", "target"),),
        (("target", "number"),),
        splits=("train",),
        extra=(("nums", ("ints", ("nums",))), ("target", ("int", ("target",)))),
        statement=COUNTDOWN_STATEMENT,
    ),
}


@dataclass(frozen=True)
class Location:
    """What a user's `source` means.

    Attributes:
        name: as the user gave it, and as the column `source` and every error call it.
        declared: its declaration; None for a set that only `columns` can explain.
        path: of a local file.
        hub: id on the Hub.
        task: of a procedural source: ("procedural", "arithmetic") or ("reasoning_gym", "leg_counting").
    """

    name: str
    declared: Source | None = None
    path: str | None = None
    hub: str | None = None
    task: tuple[str, str] | None = None


def locate(source: str | os.PathLike[str]) -> Location:
    """What a source is: `gsm8k`, `openai/gsm8k`, `path/to/file.jsonl`, `gsm8k:path/to/file.jsonl.gz`,
    `procedural:arithmetic`, `reasoning_gym:leg_counting`.

    Raises:
        ValueError: there is no such name, file, or kind of file.
    """
    name = os.fspath(source)
    head, colon, rest = name.partition(":")
    if colon and head in (PROCEDURAL, REASONING_GYM):
        return Location(name, task=(head, rest))
    if colon and head in SOURCES:
        return Location(name, SOURCES[head], path=_existing(name, rest))
    if name in SOURCES:
        return Location(name, SOURCES[name], hub=SOURCES[name].hub)
    if reader_of(name) is not None or Path(name).expanduser().exists():
        return Location(name, path=_existing(name, name))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Location(name, next((known for known in SOURCES.values() if known.hub == name), None), hub=name)
    known = [*SOURCES, f"{PROCEDURAL}:arithmetic", f"{PROCEDURAL}:countdown", f"{REASONING_GYM}:<task>"]
    raise ValueError(
        f"source={name!r} is not known{_nearest(name, known)}; known are {', '.join(known)}, the id of a data set on "
        f"the Hub (user/name), a local file ({', '.join(_READERS)}, each also as .gz), and NAME:FILE, a local copy of "
        "a known set."
    )


def reader_of(path: str) -> str | None:
    """The builder of `datasets` for a file, None where its ending is not one that we read."""
    return _READERS.get(Path(path.removesuffix(".gz")).suffix)


def _existing(source: str, path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"source={source!r}: there is no file {path!r}. Check the path, from the folder you are in.")
    if reader_of(path) is None:
        raise ValueError(f"source={source!r}: a file must end in one of {', '.join(_READERS)}, or one of these + .gz.")
    return str(file)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
