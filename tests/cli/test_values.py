"""Mappings and lists as options: from YAML, and as JSON on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from trl_grpo_ext.cli.parser import CommandParser
from trl_grpo_ext.cli.values import Shape, misfit, shape_of


@dataclass
class Nested:
    _argument_group_name: ClassVar[str] = "nested"

    columns: dict[str, str] | None = field(default=None, metadata={"help": "a mapping"})
    source: dict[str, float] | list[str] | str | None = field(default=None, metadata={"help": "any of three"})
    rewards: list[dict[str, Any] | str] | None = field(default=None, metadata={"help": "mappings or names"})
    report_to: str | list[str] | None = field(default=None, metadata={"help": "one or more"})
    rate: float = field(default=0.5, metadata={"help": "a number"})
    keep: Literal["all", "off"] = field(default="all", metadata={"help": "a word that YAML 1.1 reads as false"})


def read(*argv: str) -> Nested:
    (nested,) = CommandParser("try", "Try.", [Nested]).read(argv)
    return nested


def from_yaml(tmp_path: Path, text: str, *argv: str) -> Nested:
    (tmp_path / "options.yaml").write_text(text)
    return read("--config", str(tmp_path / "options.yaml"), *argv)


@pytest.mark.parametrize(
    ("annotation", "shape"),
    [
        (int, Shape(none=False, single=True, mapping=False, list=False, list_of_mappings=False)),
        (dict[str, Any] | str | None, Shape(True, True, True, False, False, text=True)),
        (list[float] | None, Shape(True, False, False, True, False)),
        (list[dict[str, Any] | str], Shape(False, False, False, True, True, text=True)),
        (dict[str, float] | list[int] | None, Shape(True, False, True, True, False)),
        (None | str | list[str], Shape(True, True, False, True, False, text=True)),
    ],
)
def test_shape_of(annotation: Any, shape: Shape) -> None:
    assert shape_of(annotation) == shape


def test_misfit_says_what_there_is_and_what_there_must_be() -> None:
    mapping = shape_of(dict[str, Any] | None)
    assert misfit({"a": 1}, mapping) is None
    assert misfit(None, mapping) is None
    assert misfit([1], mapping) == "[1] must be a mapping, not a list"
    assert misfit(3, shape_of(list[str] | dict[str, float])) == "3 must be a list or a mapping, not a value (int)"
    wrong = "item 1 of the list, {'b': 1}, must be one value, not a mapping"
    assert misfit(["a", {"b": 1}], shape_of(list[str])) == wrong


def test_yaml_holds_them_as_they_are(tmp_path: Path) -> None:
    text = """
columns: {problem: question, answer: final}
source: {gsm8k: 7e-1, math: 0.3}
rewards:
  - accuracy
  - {name: length, weight: 1e-1, max_chars: 4000}
report_to: [wandb, tensorboard]
"""
    nested = from_yaml(tmp_path, text)
    assert nested.columns == {"problem": "question", "answer": "final"}
    assert nested.source == {"gsm8k": 0.7, "math": 0.3}  # YAML 1.1 takes 7e-1 for text
    assert nested.rewards == ["accuracy", {"name": "length", "weight": 0.1, "max_chars": 4000}]
    assert nested.report_to == ["wandb", "tensorboard"]
    assert from_yaml(tmp_path, "keep: off").keep == "off"


def test_the_command_line_holds_them_as_json(tmp_path: Path) -> None:
    nested = read(
        *("--columns", '{"problem": "question"}', "--source", '{"gsm8k": 1}'),
        *("--rewards", "accuracy:1.0", '{"name": "length", "max_chars": 40}', "--report-to", "none"),
    )
    assert nested.columns == {"problem": "question"}
    assert nested.source == {"gsm8k": 1}
    assert nested.rewards == ["accuracy:1.0", {"name": "length", "max_chars": 40}]
    assert read("--rewards", '[{"name": "a"}, {"name": "b"}]').rewards == [{"name": "a"}, {"name": "b"}]
    assert read("--source", "gsm8k").source == "gsm8k"
    assert read("--source", "gsm8k", "math").source == ["gsm8k", "math"]
    assert read("--source", "a", "--source", "b", "c", "--source", '["d"]').source == ["a", "b", "c", "d"]
    assert from_yaml(tmp_path, "source: a", "--source", "b", "--source", "c").source == ["b", "c"]
    yaml = "columns: {problem: x}\nsource: [a, b]\n"
    assert from_yaml(tmp_path, yaml, "--columns", '{"answer": "y"}').columns == {"answer": "y"}  # replaced whole
    assert from_yaml(tmp_path, yaml, "--source", "c").source == "c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns: question", "options.yaml: columns: 'question' must be a mapping, not a value (str)"),
        ("columns: [a]", "options.yaml: columns: ['a'] must be a mapping, not a list"),
        ("rewards: {name: a}", "options.yaml: rewards: {'name': 'a'} must be"),
        ("rate: [1, 2]", "options.yaml: rate: [1, 2] must be one value, not a list"),
        ("rate: {a: 1}", "options.yaml: rate: {'a': 1} must be one value, not a mapping"),
        ("rate:", "options.yaml: rate: None must be one value, not nothing"),
        ("rewards: 3", "options.yaml: rewards: 3 must be text or a list of mappings, not a value (int)"),
        ("rewards: [accuracy, 3]", "rewards: item 1 of the list, 3, must be text or a mapping, not a value (int)"),
        ("rewards: [null]", "rewards: item 0 of the list, None, must be text or a mapping, not nothing"),
        ("source: 2026-01-01", "must be text, a list or a mapping, not a value (date)"),
        ("report_to: no", "options.yaml: report_to: False must be text or a list, not a value (bool)"),
        ("rate: fast", "options.yaml: argument --rate: invalid float value: 'fast'"),
        ("rate: true", "options.yaml: argument --rate: invalid float value: 'True'"),
        ("report_to: [{a: 1}]", "options.yaml: report_to: item 0 of the list"),
        ("report-to: a\nreport_to: b", "report_to is set twice"),
        ("rate: 1\n\nreport_to: b\nrate: 2", "options.yaml: rate is set in line 1 and again in line 4: keep one of"),
        ("rewards:\n- {name: a, weight: 1, name: b}", "options.yaml: name is set in line 2 and again in line 2: keep"),
        ("", "options.yaml must contain a YAML mapping"),
        ("- rate: 1", "options.yaml must contain a YAML mapping"),
        ("rate: [1", "options.yaml"),
        ("colums: {}", "options.yaml: unknown option 'colums': did you mean columns?"),
        ("1: x", "keywords must be strings"),
    ],
)
def test_yaml_of_a_wrong_type_is_refused_by_file_key_and_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        from_yaml(tmp_path, text)
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--columns", "question"], "argument --columns: 'question' must be a mapping, in JSON"),
        (["--columns", "{problem: question}"], "begins like JSON and is none"),
        (["--columns", "[1]"], "[1] must be a mapping, not a list"),
        (["--rewards", "[[1]]"], "item 0 of the list, [1], must be text or a mapping, not a list"),
    ],
)
def test_json_of_a_wrong_type_is_refused(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        read(*argv)
    assert message in capsys.readouterr().err
