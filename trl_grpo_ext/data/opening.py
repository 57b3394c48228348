"""A source's rows as they are: from the Hub, a local file, or made by code."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from .procedural import procedural_rows
from .reasoning_gym import reasoning_gym_rows
from .sources import PROCEDURAL, SOURCES, Location, Source, reader_of

Rows: TypeAlias = Dataset | IterableDataset


def open_rows(where: Location, split: str, config: str | None, seed: int, streaming: bool) -> Rows:
    """The rows of a source, with its own columns. A local file is one split, whatever that is called.

    Raises:
        ValueError: the source has no such split or configuration, or its file cannot be read.
    """
    if where.task is not None:
        kind, task = where.task
        make = procedural_rows if kind == PROCEDURAL else reasoning_gym_rows
        return make(where.name, task, split, _options(where.name, config), seed, streaming)
    if where.path is not None:
        return _of_config(where, _local(where, streaming), config)
    declared = where.declared
    if declared is not None and split not in declared.splits:
        raise ValueError(
            f"source={where.name!r} has no split {split!r}; it has {', '.join(declared.splits)}: "
            f"split={declared.evaluation_split!r}."
        )
    config = config if config is not None or declared is None else declared.config
    try:
        return load_dataset(where.hub, config, split=split, streaming=streaming)
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        known = next((name for name, entry in SOURCES.items() if entry is declared), None)
        copy = "by its path" if known is None else f"as '{known}:FILE'"
        raise ValueError(
            f"source={where.name!r}: {where.hub} (configuration {config!r}, split {split!r}) cannot be had from the "
            f"Hub: {error}. Check its id, configuration and split, the connection and, of a gated set, your login; a "
            f"copy on this machine is read {copy}."
        ) from error


def declaration(where: Location) -> Source:
    """What is known of a source's columns; of one that is not known, the plain names `problem` and `answer`."""
    if where.declared is not None:
        return where.declared
    if where.task == (PROCEDURAL, "countdown"):
        return Source("", "of this package", answer=(("target", "number"),), extra=_COUNTDOWN)
    if where.task is not None and where.task[0] != PROCEDURAL:
        return Source("", "Apache-2.0 (reasoning-gym)", answer=(("answer", "raw"),), extra=_REASONING_GYM)
    return Source("", "its owner's")


_COUNTDOWN = (("nums", ("ints", ("nums",))), ("target", ("int", ("target",))))
_REASONING_GYM = (("reasoning_gym", ("text", ("reasoning_gym",))),)


def _local(where: Location, streaming: bool) -> Rows:
    path = str(where.path)
    extra: Mapping[str, Any] = {"sep": "\t"} if path.removesuffix(".gz").endswith(".tsv") else {}
    try:
        if path.endswith(".parquet") and pq.read_metadata(path).num_rows == 0:
            raise ValueError("it holds no rows")  # which `datasets` takes for a batch size of 0
        rows = load_dataset(str(reader_of(path)), data_files=path, split="train", streaming=streaming, **extra)
        return rows._resolve_features() if streaming else rows  # reads the first rows
    except (DatasetsError, OSError, StopIteration, ValueError) as error:
        cause = str(error.__cause__ or error).strip().rstrip(".")
        if not cause or "corresponds to no data" in cause:
            cause = "it holds no rows"
        raise ValueError(
            f"source={where.name!r}: {path} cannot be read: {_broken_line(path) or cause}. Every row must have the "
            "same columns, each of one type; text is UTF-8."
        ) from error


def _broken_line(path: str) -> str:
    """The first line of a JSON Lines file that is no JSON object; "" where there is none, or it is no such file."""
    if not path.removesuffix(".gz").endswith(".jsonl"):
        return ""
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.endswith(".gz")
            else open(path, encoding="utf-8-sig") as lines
        ):
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return f"line {number} is no JSON object: {line.strip()[:60]!r}"
                except json.JSONDecodeError as error:
                    return f"line {number} is not JSON ({error.msg}, character {error.colno}): {line.strip()[:60]!r}"
    except (OSError, EOFError, UnicodeDecodeError):
        pass  # the reader's own words say it
    return ""


def _of_config(where: Location, rows: Rows, config: str | None) -> Rows:
    """Those rows of a local file that are of the configuration, where it holds several and one is asked for."""
    if config is None:
        return rows
    column = None if where.declared is None else where.declared.config_column
    if column is None or column not in (rows.column_names or ()):
        raise ValueError(f"config={config!r}: source={where.name!r} is a local file without configurations: drop it.")
    return rows.filter(_is_config, input_columns=column, fn_kwargs={"config": config})


def _is_config(value: Any, config: str) -> bool:
    return bool(value == config)


def _options(source: str, config: str | None) -> dict[str, str]:
    """`rows=500,max_operand=99` as a mapping.

    Raises:
        ValueError: a part of it is no `key=value`.
    """
    options = {}
    for part in (config or "").split(","):
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"config={config!r} of source={source!r}: write key=value,key=value, such as rows=500.")
        if key.strip() in options:
            raise ValueError(f"config={config!r} of source={source!r} has {key.strip()!r} twice: give it once.")
        options[key.strip()] = value.strip()
    return options
