"""What an option may hold, by its annotation: one value, a list, a mapping, or a list of mappings.

In YAML these are written as they are; on the command line a mapping, or a list of them, is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Union, get_args, get_origin

import yaml

# PyYAML reads YAML 1.1, where 1e-5 is text: a number needs a dot there
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True, slots=True)
class Shape:
    """What an annotation admits."""

    none: bool
    single: bool  # text, a number, ...
    mapping: bool
    list: bool
    list_of_mappings: bool  # the items of a list may be mappings
    text: bool = False  # what is single, alone or in the list, is text only

    @property
    def structured(self) -> bool:
        """Whether TRL's parser has no type for it: mappings, for which the command line needs JSON, and one or more."""
        return self.mapping or self.list_of_mappings or (self.list and self.single)

    @property
    def item(self) -> str:
        """What a single value is called."""
        return "text" if self.text else "one value"

    @property
    def words(self) -> str:
        """ "text, a list or a mapping"."""
        forms = [
            *([self.item] if self.single else []),
            *(["a list of mappings" if self.list_of_mappings else "a list"] if self.list else []),
            *(["a mapping"] if self.mapping else []),
        ]
        return " or ".join([", ".join(forms[:-1]), forms[-1]] if len(forms) > 1 else forms)


def shape_of(annotation: Any) -> Shape:
    """The shape of `dict[str, Any] | str | None` and the like."""
    parts = _alternatives(annotation)
    origins = [get_origin(part) or part for part in parts]
    items = [
        shape_of(argument)
        for part, origin in zip(parts, origins, strict=True)
        if origin is list
        for argument in get_args(part)
    ]
    shape = Shape(
        none=type(None) in origins,
        single=any(origin not in (dict, list, type(None)) for origin in origins),
        mapping=dict in origins,
        list=list in origins,
        list_of_mappings=any(item.mapping for item in items),
    )
    # Other options read the text of whatever is given, these take it as it is
    return replace(shape, text=shape.structured and _singles(annotation) <= {str})


def _singles(annotation: Any) -> set[Any]:
    """The types of single values, alone or in a list."""
    found: set[Any] = set()
    for part in _alternatives(annotation):
        origin = get_origin(part) or part
        if origin is list:
            found |= {single for argument in get_args(part) for single in _singles(argument)}
        elif origin not in (dict, type(None)):
            found.add(origin)
    return found


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for alternative in get_args(annotation) for part in _alternatives(alternative)]
    return [annotation]


def misfit(value: Any, shape: Shape) -> str | None:
    """Why a value of a YAML file, or of JSON, is not of that shape; None if it is."""
    if isinstance(value, dict):
        fits = shape.mapping
    elif isinstance(value, list):
        fits = shape.list
        for index, item in enumerate(value):
            one = not isinstance(item, dict | list) and (isinstance(item, str) or not shape.text)
            if fits and not one and not (isinstance(item, dict) and shape.list_of_mappings):
                kinds = [shape.item] + ["a mapping"] * shape.list_of_mappings
                return f"item {index} of the list, {_short(item)}, must be {' or '.join(kinds)}, not {_kind(item)}"
    elif value is None:
        fits = shape.none
    else:
        fits = shape.single and (isinstance(value, str) or not shape.text)
    return None if fits else f"{_short(value)} must be {shape.words}, not {_kind(value)}"


def key_set_twice(text: str) -> str | None:
    """Where a YAML text sets a key twice, of which PyYAML silently keeps the last; None if it does not.

    Raises:
        yaml.YAMLError: if it is no YAML.
    """
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                nodes.append(value)
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in lines:
                    return f"{key.value} is set in line {lines[key.value]} and again in line {line}: keep one of them"
                lines[key.value] = line
    return None


def with_numbers(value: Any) -> Any:
    """A mapping or list of YAML with numbers like 1e-5, which PyYAML takes for text, as numbers."""
    if isinstance(value, dict):
        return {key: with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def reader(shape: Shape) -> Callable[[str], Any]:
    """`type=` of an option with such a shape: JSON where the text begins like it, else the text itself."""
    # A list is read item by item, where each word is one; or as JSON, whole
    mapping, single = shape.mapping or shape.list_of_mappings, shape.single or shape.list
    whole = replace(shape, single=single, mapping=mapping)

    def read(text: str) -> Any:
        # Jinja begins with a brace too, and with another one
        if not text.lstrip().startswith(("{", "[")) or text.lstrip().startswith(("{{", "{%", "{#")):
            if not shape.single and not shape.list:
                raise argparse.ArgumentTypeError(f"{text!r} must be {shape.words}, in JSON")
            return text
        try:
            value = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{_short(text)} begins like JSON and is none: {error}") from error
        if problem := misfit(value, whole):
            raise argparse.ArgumentTypeError(problem)
        return value

    return read


class Structured(argparse.Action):
    """One word is one value; several are a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Replaces what a YAML file says, and adds to what the command line gave so far."""
        given = getattr(namespace, self.dest)
        if self.nargs == "+":
            before = [] if given is None or given is self.default else [given]
            values = [item for part in (*before, *values) for item in (part if isinstance(part, list) else [part])]
        alone = isinstance(values, list) and len(values) == 1
        setattr(namespace, self.dest, values[0] if alone else values)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value), f"a value ({type(value).__name__})")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
