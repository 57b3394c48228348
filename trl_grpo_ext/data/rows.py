"""A source's rows -> problem, prompt, solution: columns found, golds parsed, templates applied."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datasets import ClassLabel, Features, List, Value

from .golds import PARSERS
from .prompts import Prompt
from .report import PromptReport
from .screens import problem_key
from .sources import Source
from .steps import Batch
from .templates import Prompter

INTERNAL = ("_row", "_key", "_unreadable")
_KINDS: dict[str, Any] = {
    "text": Value("string"),
    "int": Value("int64"),
    "float": Value("float64"),
    "ints": List(Value("int64")),
}
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Columns:
    """Where a source's rows have what.

    Attributes:
        problem: columns that make the problem, joined by a space.
        answer: the column of the gold answer, and its parser.
        extra: kept column -> (its column, its feature or the kind it is turned into).
        labels: of an answer that is a class label, their names.
        stated: the problem is written from kept columns, by the source's `statement`.
    """

    problem: tuple[str, ...]
    answer: tuple[str, str]
    extra: tuple[tuple[str, str, Any], ...]
    stated: bool = False
    labels: tuple[str, ...] = ()


def find_columns(
    name: str,
    declared: Source,
    features: Features,
    columns: Mapping[str, str] | None,
    answer: str | None,
) -> Columns:
    """The columns of a source, by its declaration and by what the user says of them.

    Args:
        features: of the rows as they are.
        columns: `problem` and `answer` -> their columns; any other name is a column to keep -> its column.
        answer: name of the parser, in place of the declared one.

    Raises:
        ValueError: a column is missing, or there is no such parser.
    """
    if answer is not None and answer not in PARSERS:
        raise ValueError(f"answer={answer!r} is no parser of gold answers: give one of {', '.join(PARSERS)}.")
    given = _given_columns(name, features, columns)
    problem = _problem_columns(name, declared, features, given)
    golds = tuple((given.get(column, column), parser) for column, parser in declared.answer)
    if "answer" in given:
        parsers = {parser for _, parser in declared.answer}
        other = parsers.pop() if len(parsers) == 1 else "text"  # of a column under another name
        parser = next((parser for column, parser in declared.answer if column == given["answer"]), other)
        golds = ((given["answer"], parser),)
    gold = next(((column, parser) for column, parser in golds if column in features), None)
    if gold is None:
        raise _no_column(name, "answer", [column for column, _ in golds], features)
    extra = _declared_extra(declared, features, given)
    taken = {"problem", "answer", *(key for key, _, _ in extra)}
    extra += [(key, column, features[column]) for key, column in given.items() if key not in taken]
    if "pass_rate" in features and all(key != "pass_rate" for key, _, _ in extra):
        extra.append(("pass_rate", "pass_rate", "float"))
    stated = declared.statement is not None and "problem" not in given
    labels = tuple(features[gold[0]].names) if isinstance(features[gold[0]], ClassLabel) else ()
    return Columns(problem, (gold[0], answer or gold[1]), tuple(extra), stated, labels)


def problem_columns(name: str, declared: Source, features: Features, columns: Mapping[str, str] | None) -> Columns:
    """The columns of a source's problems alone, for decontamination: there may be no gold answer.

    Raises:
        ValueError: a column is missing.
    """
    given = _given_columns(name, features, columns)
    problem = _problem_columns(name, declared, features, given)
    stated = declared.statement is not None and "problem" not in given
    extra = _declared_extra(declared, features, given) if stated else []
    return Columns(problem, (problem[0], "raw"), tuple(extra), stated)


def _given_columns(name: str, features: Features, columns: Mapping[str, str] | None) -> dict[str, str]:
    """What the user says of the columns, checked against those that are there."""
    if not isinstance(columns or {}, Mapping):
        raise TypeError(f"columns={columns!r:.80} must be a mapping: {{'problem': column, 'answer': column}}.")
    given = dict(columns or {})
    for key, column in given.items():
        if not isinstance(column, str):
            raise TypeError(f"columns[{key!r}]={column!r:.80} must be the name of one column.")
        if column not in features:
            near = difflib.get_close_matches(str(column), list(features), n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"columns[{key!r}]={column!r}: source={name!r} has no such column{hint}; it has {', '.join(features)}."
            )
    wrong = [key for key in given if key in ("prompt", "solution", "source") or key.startswith("_")]
    if wrong:
        raise ValueError(f"columns has {wrong}: these names are made by load_prompts. Keep the column under another.")
    return given


def _problem_columns(name: str, declared: Source, features: Features, given: Mapping[str, str]) -> tuple[str, ...]:
    problems = ((given["problem"],),) if "problem" in given else declared.problem
    renamed = [tuple(given.get(column, column) for column in form) for form in problems]
    problem = next((form for form in renamed if all(column in features for column in form)), None)
    if problem is None:
        raise _no_column(name, "problem", [" + ".join(form) for form in renamed], features)
    return problem


def _declared_extra(declared: Source, features: Features, given: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """Columns that the declaration keeps, turned into its kinds, under the names that the user says they have."""
    extra: list[tuple[str, str, Any]] = []
    for key, (kind, candidates) in declared.extra:
        found = given.get(key) or next((column for column in candidates if column in features), None)
        if found is not None:
            extra.append((key, found, kind))
    return extra


def _no_column(name: str, what: str, expected: list[str], features: Features) -> ValueError:
    return ValueError(
        f"source={name!r} has no column for the {what}: expected {' or '.join(map(repr, expected))}, it has "
        f"{', '.join(features)}. Say which it is: columns={{{what!r}: 'its column'}}."
    )


def features_of(columns: Columns, conversational: bool) -> dict[str, Any]:
    """The features of the rows once prepared, by name."""
    made = {
        "problem": Value("string"),
        "prompt": _MESSAGES if conversational else Value("string"),
        "solution": Value("string"),
        "source": Value("string"),
        "_row": Value("int64"),
        "_key": Value("int64"),
        "_unreadable": Value("string"),
    }
    return made | {key: _KINDS[kind] if isinstance(kind, str) else kind for key, _, kind in columns.extra}


class UnreadableRow(ValueError):
    """A row without a problem or a gold answer: `what` is wrong is all that the report of dropped rows says."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}. {remedy}" if remedy else what)  # a data loader's worker sends it on as one text
        self.what = what


class Preparation:
    """Batches of a source's rows -> `problem`, `prompt`, `solution`, `source`, kept columns, row number and key."""

    def __init__(
        self,
        name: str,
        declared: Source,
        columns: Columns,
        prompter: Prompter,
        names: tuple[str, ...],
        deduplicate: str,
        drop_unreadable: bool,
        report: PromptReport | None,
    ) -> None:
        self.name, self.declared, self.columns, self.prompter = name, declared, columns, prompter
        self.names = names  # of all columns to write: those that other sources have alone are None
        self.deduplicate, self.drop_unreadable = deduplicate, drop_unreadable
        self.report = report  # of a stream, which is counted as it is read

    def __deepcopy__(self, memo: Any) -> Preparation:
        """Streams are copied to be mixed; what they count goes into the one report that was asked for."""
        return copy.copy(self)

    @property
    def key(self) -> Any:
        """All that the rows depend on."""
        parts = [self.name, asdict(self.declared), repr(self.columns), asdict(self.prompter), self.names]
        return json.dumps([*parts, self.deduplicate, self.drop_unreadable], sort_keys=True, default=str)

    def __call__(self, batch: Batch, indices: list[int]) -> dict[str, list[Any]]:
        if self.report is not None:
            if indices and indices[0] == 0:  # a new pass over the stream
                self.report.of(self.name).read = 0
            self.report.of(self.name).read += len(indices)
        made: dict[str, list[Any]] = {name: [] for name in self.names}
        for offset, index in enumerate(indices):
            row = {name: values[offset] for name, values in batch.items()}
            try:
                values = self._row(row, index)
            except ValueError as error:
                if not self.drop_unreadable:
                    raise
                nothing: Prompt = [] if self.prompter.conversational else ""
                values = {
                    "problem": str(row[self.columns.problem[0]]),
                    "prompt": nothing,
                    "_unreadable": getattr(error, "what", str(error)),
                }
            values |= {"source": self.name, "_row": index}
            for name, column in made.items():
                column.append(values.get(name))
        return made

    def _row(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        kept = {key: self._kept(key, row[column], kind, index) for key, column, kind in self.columns.extra}
        problem, solution = self._problem(row, kept, index), self._solution(row, index)
        try:
            prompt = self.prompter(problem, {**row, **kept})
        except ValueError as error:
            raise ValueError(f"source={self.name!r}, row {index}: {error}") from error
        key = problem_key(problem, self.deduplicate)
        return {
            **kept,
            "problem": problem,
            "prompt": prompt,
            "solution": solution,
            "_key": key,
            "_unreadable": "",
        }

    def _problem(self, row: Mapping[str, Any], kept: Mapping[str, Any], index: int) -> str:
        if self.columns.stated and self.declared.statement is not None:
            for key, value in kept.items():
                if value is None and f"{{{key}}}" in self.declared.statement:
                    raise UnreadableRow(
                        f"source={self.name!r}, row {index}: {key!r} is None, and the problem is written from it",
                        "Correct the row, or leave such rows out, counted: unreadable='drop'.",
                    )
            return self.declared.statement.format(**kept)
        parts = []
        for column in self.columns.problem:
            value = row[column]
            if not isinstance(value, str) or not value.strip():
                raise UnreadableRow(
                    f"source={self.name!r}, row {index}: {column!r} is {value!r:.80}; a problem must be text",
                    "Name the right column, columns={'problem': ...}, or leave such rows out, counted: unreadable="
                    "'drop'.",
                )
            parts.append(value.strip())
        return " ".join(parts)

    def _solution(self, row: Mapping[str, Any], index: int) -> str:
        column, parser = self.columns.answer
        value = row[column]
        if self.columns.labels and isinstance(value, int):  # datasets gives a label's number; below 0 is none
            value = self.columns.labels[value] if value >= 0 else None
        try:
            return PARSERS[parser](value)
        except ValueError as error:
            shown = str(value)
            raise UnreadableRow(
                f"source={self.name!r}, row {index}: {column!r} {error}, it is {shown[-80:]!r}",
                f"Correct the row, or say how the answers are written: answer= one of {', '.join(PARSERS)} (now "
                f"{parser!r}), or leave such rows out, counted: unreadable='drop'.",
            ) from error

    def _kept(self, key: str, value: Any, kind: Any, index: int) -> Any:
        if value is None or not isinstance(kind, str):
            return value
        try:
            return _CONVERT[kind](value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"source={self.name!r}, row {index}: {key!r} is {value!r:.80}, which is no {kind}. Correct the row."
            ) from error


def _integer(value: Any) -> int | None:
    """MATH's levels are "Level 3", MATH-500's 3; "Level ?" is none."""
    if isinstance(value, str):
        found = _INTEGER.search(value)
        return int(found.group()) if found else None
    return _whole(value)


def _whole(value: Any) -> int:
    """
    Raises:
        ValueError: the number has a fraction.
    """
    if int(value) != (float(value) if isinstance(value, str) else value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "text": str,
    "int": _integer,
    "float": float,
    "ints": lambda values: [_whole(value) for value in values],
}
