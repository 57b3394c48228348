"""Work in pieces, on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from trl_grpo_ext.partial_file import PartialFile, weights_hash


def test_what_is_done_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    first = PartialFile(path, {"seed": 3, "k": (1, 2)}, "a test")
    first.add([[1, "ä\u2028"], {"b": None}])
    with path.open("a") as out:
        out.write('[2, "cut o')
    again = PartialFile(path, {"seed": 3, "k": (1, 2)}, "a test")
    assert again.done == first.done == [[1, "ä\u2028"], {"b": None}]
    again.add(iter([5]))
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:-1]] == [*first.done, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 4, "old": 1}\n', r"file' is of a test with old=1 \(now None\), seed=4 \(now 3\). Set the options"),
        ("", "is not of a test"),
        ("[3]\n", "is not of a test"),
        ('{"seed": 3}\nnonsense\n', "is not of a test .* or remove '.*file' to start over"),
    ],
)
def test_other_work_is_refused_and_kept(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        PartialFile(path, {"seed": 3}, "a test")
    assert path.read_text() == text


def test_a_model_that_was_trained_further_is_another_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 1, dtype=torch.bfloat16))
    before = weights_hash(model)
    assert weights_hash(model) == before
    with torch.no_grad():
        model[1].weight += 0.5
    after = weights_hash(model)
    assert after != before and weights_hash(model.float()) not in (before, after)
