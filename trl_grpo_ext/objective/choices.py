"""A table of functions that says what the choices were when a name is not in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, TypeVar

Entry = TypeVar("Entry")


class Choices(dict[str, Entry]):
    """A `dict` from a setting's values to the functions that implement them.

    It exists for its error: `KeyError: 'drgrpo'` does not say which setting is wrong, nor what it could have been.

    Args:
        setting: Name of the setting the keys are values of, as the user wrote it.
        entries: The functions, by name.

    Raises:
        ValueError: On looking up a name that is not in the table.
    """

    def __init__(self, setting: str, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self.setting = setting

    def __missing__(self, name: str) -> NoReturn:
        raise ValueError(
            f"{self.setting}={name!r} is not known: it must be one of {', '.join(map(repr, self))}. Pass one of these."
        )
