"""Finding the command, and reading its options from the command line and from YAML."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import tomllib

from trl_grpo_ext.cli.main import COMMANDS, main
from trl_grpo_ext.cli.parser import CommandParser, Gather

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class First:
    _argument_group_name: ClassVar[str] = "first things"

    name: str = field(metadata={"help": "who"})
    top_k: int = field(default=3, metadata={"help": "how many"})
    kind: Literal["a", "b"] | None = field(default=None, metadata={"help": "which"})


@dataclass
class Second:
    _argument_group_name: ClassVar[str] = "second things"

    rate: float = field(default=0.5, metadata={"help": "how fast"})
    words: list[str] | None = field(default=None, metadata={"help": "said", "action": Gather})
    chat: bool = field(default=True, metadata={"help": "talk"})


def read(*argv: str) -> tuple[First, Second]:
    first, second = CommandParser("try", "Try.", [First, Second]).read(argv)
    return first, second


# --- the command ---


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    light = [command for command in COMMANDS if command != "train"]  # whose options are those of transformers' config
    code = f"""
import sys
from trl_grpo_ext.cli.main import main

for argv in (["--help"], *([command, "--help"] for command in {light})):
    assert main(argv) == 0
heavy = {{"torch", "transformers", "peft", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command, what in COMMANDS.items():
        assert command in done.stdout and what in done.stdout
    assert "--tolerance" in done.stdout and "--num-generations" in done.stdout


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trl_grpo_ext.cli", "sampel"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "trl-grpo: error: there is no command 'sampel': did you mean sample?\n"


def test_the_console_command_is_declared() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["trl-grpo"].partition(":")
    assert getattr(import_module(module), name) is main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_grouped_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: trl-grpo {command}")
    assert len([line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]) >= 3
    assert "--config FILE" in out


def test_without_a_command_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"
    assert main(["no-such-thing"]) == 2
    assert f"choose one of {', '.join(COMMANDS)}" in capsys.readouterr().err


def test_a_refusal_is_one_line_and_a_traceback_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["merge", "--adapter", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("trl-grpo merge: error: adapter=") and "is not a folder" in err
    with pytest.raises(ValueError, match="is not a folder"):
        main(["--traceback", *argv])


# --- options ---


def test_options_of_the_command_line() -> None:
    first, second = read("--name", "x", "--top-k", "7", "--rate=1e-3", "--words", "a", "--words", "b", "c", "--no-chat")
    assert first == First("x", 7, None)
    assert second == Second(1e-3, ["a", "b", "c"], False)


def test_yaml_gives_defaults_that_the_command_line_overrides(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("name: from-yaml\ntop-k: 7\nkind: b\nrate: 1e-3\nwords: [a, 2]\nchat: false\n")
    assert read("--config", str(file)) == (First("from-yaml", 7, "b"), Second(1e-3, ["a", "2"], False))
    first, second = read(f"--config={file}", "--name", "x", "--words", "z", "--chat")
    assert (first.name, first.top_k, second.words, second.chat) == ("x", 7, ["z"], True)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("nmae: x\n", "unknown option 'nmae': did you mean name?"),
        ("name: x\ntopk: 3\n", "unknown option 'topk': did you mean top_k?"),
        ("name: x\nsomething_else_entirely: 3\n", "see --help"),
        ("name: x\nconfig: other.yaml\n", "unknown option 'config'"),
        ("name: x\ntop_k: many\n", "argument --top_k/--top-k: invalid"),
        ("name: x\nkind: c\n", "invalid choice: 'c'"),
        ("name: x\nchat: 7\n", "argument --chat"),
        ("- name\n", "must contain a YAML mapping"),
        ("name: [\n", "while parsing"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str, message: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(yaml)
    with pytest.raises(SystemExit) as end:
        read("--config", str(file))
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--name", "x", "--tpo-k", "3"], "unknown option '--tpo-k': did you mean --top-k?"),
        (["--nam", "x"], "unknown option '--nam': did you mean --name?"),
        (["--name", "x", "stray"], "unknown option 'stray'"),
        (["--top-k", "3"], "required: --name"),
        (["--name", "x", "--kind", "c"], "invalid choice: 'c'"),
        (["--config"], "--config needs one FILE"),
        (["--config", "no-such-file.yaml"], "No such file"),
    ],
)
def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        read(*argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and err.count("\n") == 1


def test_help_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "first things: --name NAME who --top_k TOP_K, --top-k TOP_K how many (default: 3)" in out
    assert "--kind {a,b} which second things:" in out  # no "(default: None)"
    assert "--no_chat, --no-chat turn --chat off" in out
