"""Prompts from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_grpo_ext.data import read_prompts


def test_text_is_a_prompt_per_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('What is 2 + 3?\n\n  {"not": "read as JSON"}\nça va\n', encoding="utf-8")
    assert read_prompts(file) == ["What is 2 + 3?", '  {"not": "read as JSON"}', "ça va"]


def test_json_lines_hold_texts_and_messages(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "solution": "1"}\n"b"\n\n{"prompt": [{"role": "user", "content": "c"}]}\n')
    assert read_prompts(str(file)) == ["a", "b", [{"role": "user", "content": "c"}]]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_mark_that_windows_puts_in_front_is_no_part_of_a_prompt(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('"a"\r\n"b"\r\n', encoding="utf-8-sig")
    assert read_prompts(tmp_path / name) == (["a", "b"] if name.endswith("jsonl") else ['"a"', '"b"'])


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\u2028b"}\r\n"c\u0085d"\n', encoding="utf-8")
    assert read_prompts(file) == ["a\u2028b", "c\u0085d"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "has no prompts: it is empty"),
        ("p.jsonl", '"a"\n{"prompt": \n', "line 2 is not JSON"),
        ("p.jsonl", '{"question": "a"}\n', r"line 1 has no 'prompt' \(its keys: \['question'\]\)"),
        ("p.jsonl", '"a"\n\n{"prompt": 3}\n', "line 3: the prompt is 3; it must be a string or a list"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "binary.txt")
