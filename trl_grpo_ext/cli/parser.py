"""TRL's argument parser, stricter: nothing unknown, nothing of the wrong type, from the command line or from YAML."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from trl.scripts.utils import TrlParser

from .values import Shape, Structured, key_set_twice, misfit, reader, shape_of, with_numbers


class CommandParser(TrlParser):
    """Options of one command, as dataclasses, a group of `--help` each (`_argument_group_name`).

    Args:
        command: Name of the subcommand.
        description: First thing in `--help`.
        groups: Dataclasses of the options.
        sections: For dataclasses that are too long for one group: each one's titles, and the fields under them.
        translate: Rewrites what a YAML file holds, where files of another layout are read too.
        usage: First line of `--help`, where all options would be too many.
    """

    def __init__(
        self,
        command: str,
        description: str,
        groups: Sequence[Any],
        *,
        sections: Mapping[Any, Mapping[str, Sequence[str]]] | None = None,
        translate: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        usage: str | None = None,
    ) -> None:
        self._sections = sections or {}
        self._translate = translate
        self._shapes: dict[str, Shape] = {}
        self._file = ""  # given by --config
        super().__init__(
            list(groups),
            prog=f"trl-grpo {command}",
            usage=usage,
            description=description,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):  # which has the help and default of what it turns off
                action.help = f"turn --{action.dest} off"
        self.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML file with any of the options; those on the command line win",
        )

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        hints = get_type_hints(dtype)
        known = {f.name: f for f in fields(dtype) if f.init}
        sections = self._sections.get(dtype) or {dtype._argument_group_name: list(known)}
        for title, names in sections.items():
            group = self.add_argument_group(title)
            for name in names:
                known[name].type = hints[name]  # as text until here
                self._shapes[name] = shape_of(hints[name])
                if self._shapes[name].structured:
                    self._add_structured(group, known[name])
                else:
                    self._parse_dataclass_field(group, known[name])  # type: ignore[arg-type]  # has add_argument too

    def _add_structured(self, group: argparse._ArgumentGroup, f: Field[Any]) -> None:
        """An option that may hold a mapping, or one value or several."""
        shape = self._shapes[f.name]
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        group.add_argument(
            *names,
            type=reader(shape),
            nargs="+" if shape.list else None,
            action=Structured,
            default=default,
            **{"metavar": _metavar(shape), **f.metadata},
        )

    def read(self, argv: Iterable[str]) -> tuple[Any, ...]:
        """One object per group.

        Raises:
            SystemExit: after `--help` (0), or one line that names the mistake (2).
        """
        arguments: list[str] = []
        for argument in argv:  # TRL knows `--config FILE` only
            arguments += argument.split("=", 1) if argument.startswith("--config=") else [argument]
        if arguments.count("--config") > 1 or arguments[-1:] == ["--config"]:
            self.error("--config needs one FILE")
        for argument in arguments:  # before argparse says that something else is missing
            if argument.startswith("--") and argument.split("=", 1)[0] not in {"--", *self._option_string_actions}:
                self._refuse(argument.split("=", 1)[0])
        if "--config" in arguments:
            self._file = arguments[arguments.index("--config") + 1]
        try:
            if self._file and (problem := key_set_twice(Path(self._file).read_text(encoding="utf-8"))):
                self.error(f"{self._file}: {problem}")
            *groups, unknown = self.parse_args_and_config(arguments, return_remaining_strings=True)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:  # TypeError: keys that are no text
            known = not self._file or self._file in str(error)
            self.error(str(error) if known else f"{self._file}: {error}")
        if unknown:
            self._refuse(unknown[0])
        return tuple(groups)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take the YAML file's values, checked as those of the command line are."""
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in ("help", "config"):
                actions.setdefault(action.dest, action)
        checked = {}
        for key, value in (self._translate(config) if self._translate else config).items():
            name = str(key).replace("-", "_")
            if name not in actions:
                self._refuse(str(key))
            if name in checked:
                self.error(f"{self._file}: {name} is set twice, also as {key}: keep one of them")
            checked[name] = self._checked(actions[name], value)
        remaining: list[str] = super().set_defaults_with_config(**checked)
        return remaining

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        shape = self._shapes[action.dest]
        if value is False and not shape.structured:  # what YAML 1.1 makes of no and off
            value = next((word for word in ("no", "off") if word in (action.choices or ())), value)
        if problem := misfit(value, shape if action.nargs != "+" else _one_or_more(shape)):
            self.error(f"{self._file}: {action.dest}: {problem}")
        if value is None:
            return None
        if shape.structured:
            return with_numbers(value)
        if action.nargs == "+" or isinstance(value, list):
            return [self._one(action, item) for item in (value if isinstance(value, list) else [value])]
        return self._one(action, value)

    def _one(self, action: argparse.Action, value: Any) -> Any:
        try:
            converted = self._get_value(action, str(value))
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            self.error(f"{self._file}: {error}")
        return converted

    def _refuse(self, name: str) -> NoReturn:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        nearest = difflib.get_close_matches("--" + name.lstrip("-").replace("_", "-"), known, n=1)
        where = ""
        if not name.startswith("-"):
            where = f"{self._file}: " if self._file else ""
            nearest = [option.lstrip("-").replace("-", "_") for option in nearest]
        hint = f"did you mean {nearest[0]}?" if nearest else "see --help for what there is"
        self.error(f"{where}unknown option {name!r}: {hint}")

    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _metavar(shape: Shape) -> str:
    mappings = shape.mapping or shape.list_of_mappings
    return "|".join(["TEXT"] * (shape.single or shape.list) + ["JSON"] * mappings)


def _one_or_more(shape: Shape) -> Shape:
    """A list of one may be written without brackets."""
    return replace(shape, single=True)


class Gather(argparse.Action):
    """`--x a --x b c` is [a, b, c], and replaces what a YAML file says."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add to what the command line gave so far."""
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is None or given is self.default else [*given, *values])


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS) or isinstance(action, argparse._StoreFalseAction):
            return action.help
        return super()._get_help_string(action)
