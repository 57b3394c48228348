"""TRL's argument parser, stricter: nothing unknown, nothing of the wrong type, from the command line or from YAML."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import yaml
from trl.scripts.utils import TrlParser


class CommandParser(TrlParser):
    """Options of one command, as dataclasses, a group of `--help` each (`_argument_group_name`).

    Args:
        command: Name of the subcommand.
        description: First thing in `--help`.
        groups: Dataclasses of the options.
    """

    def __init__(self, command: str, description: str, groups: Sequence[Any]) -> None:
        super().__init__(
            list(groups),
            prog=f"trl-grpo {command}",
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
        try:
            *groups, unknown = self.parse_args_and_config(arguments, return_remaining_strings=True)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(str(error))
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
        for key, value in config.items():
            name = str(key).replace("-", "_")
            if name not in actions:
                self._refuse(str(key))
            checked[name] = self._checked(actions[name], value)
        remaining: list[str] = super().set_defaults_with_config(**checked)
        return remaining

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        if value is None:
            return None
        if action.nargs == "+":
            return [self._one(action, item) for item in (value if isinstance(value, list) else [value])]
        return self._one(action, value)

    def _one(self, action: argparse.Action, value: Any) -> Any:
        try:
            converted = self._get_value(action, str(value))
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            self.error(str(error))
        return converted

    def _refuse(self, name: str) -> NoReturn:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        nearest = difflib.get_close_matches("--" + name.lstrip("-").replace("_", "-"), known, n=1)
        if not name.startswith("-") and nearest:
            nearest = [nearest[0].lstrip("-").replace("-", "_")]
        hint = f"did you mean {nearest[0]}?" if nearest else "see --help for what there is"
        self.error(f"unknown option {name!r}: {hint}")

    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


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
