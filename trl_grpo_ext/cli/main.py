"""`trl-grpo COMMAND ...`: finds the command's module, and turns refusals into one line on stderr.

A command is a module of this folder with a function `run(argv) -> exit code`, and a line in `COMMANDS`. It imports
torch and transformers inside of `run`, so that `--help` and mistakes on the command line take no time.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from .. import __version__

COMMANDS = {
    "difficulty": "measure how often a model solves each prompt, and filter prompts by it",
    "eval": "pass@k of base and adapter on held-out prompts, with intervals and a paired test",
    "merge": "merge an adapter into its base's original weights, and check the result",
    "push": "upload what a run has left on disk to the Hub",
    "sample": "generate from base, adapter, or both side by side",
    "train": "train with GRPO, from a YAML file or the command line; or show what that would be",
}

OK, FAILED, REFUSED = 0, 1, 2  # exit codes: done; a check or an upload failed; bad input

_USAGE = """\
usage: trl-grpo [--traceback] COMMAND [options]
       trl-grpo COMMAND --help
       trl-grpo --version

GRPO for LoRA and QLoRA policies: training, and what comes after it.

commands:
{commands}

options:
  --traceback  show where an error was raised, instead of one line
  --version    show the version
  -h, --help   show this

Options of a command can come from a YAML file: trl-grpo COMMAND --config FILE. Those on the command line win.
Exit code: 0 done, 1 a check or an upload failed, 2 bad input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = arguments[:1] == ["--traceback"]
    if traceback:
        arguments.pop(0)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return OK if arguments else REFUSED
    if arguments[0] == "--version":
        print(__version__)
        return OK
    command, *rest = arguments
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(COMMANDS)}"
        return _complain("trl-grpo", f"there is no command {command!r}: {hint}", REFUSED)
    try:
        code: int = import_module(f".{command}", __package__).run(rest)
        return code
    except SystemExit as end:  # argparse: after --help, or a mistake that it has printed
        return end.code if isinstance(end.code, int) else FAILED
    except (ValueError, OSError, MemoryError) as error:
        if traceback:
            raise
        return _complain(f"trl-grpo {command}", str(error) or type(error).__name__, REFUSED)
    except (FloatingPointError, CheckFailed) as error:
        if traceback:
            raise
        return _complain(f"trl-grpo {command}", str(error), FAILED)
    except KeyboardInterrupt:
        return _complain(f"trl-grpo {command}", "interrupted; nothing incomplete was left", 130)


@contextmanager
def as_refusals() -> Iterator[None]:
    """A wrong type in what was given is bad input, as a wrong value is."""
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error


class CheckFailed(Exception):
    """The command ran, and what came of it is not good enough: exit code 1."""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return _USAGE.format(commands="\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()))


def _complain(who: str, message: str, code: int) -> int:
    print(f"{who}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
