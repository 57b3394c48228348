"""The problems behind `recipes/tiny_*.yaml`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from trl_grpo_ext.rewards import countdown_reward, think_answer_format_reward

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return import_module("tiny_model")


def test_a_worked_countdown(recipe: ModuleType) -> None:
    text = recipe.worked_countdown([7, 12, 4], [1, -1])
    assert text == "<think>7+12=19 19-4=15</think><answer>7+12-4</answer>"


def test_countdowns_are_solved_by_their_worked_form_and_split_without_overlap(recipe: ModuleType) -> None:
    task = recipe.countdowns(0, warm_up=40, train=30, validation=20, test=10)
    parts = (task.warm_up, task.train, task.validation, task.test)
    assert [len(part) for part in parts] == [40, 30, 20, 10]
    assert all(("completion" in row) == (part is task.warm_up) for part in parts for row in part)
    identities = {(*sorted(row["nums"]), row["target"]) for part in parts for row in part}
    assert len(identities) == 100
    worked = [row["completion"] for row in task.warm_up]
    columns = {name: [row[name] for row in task.warm_up] for name in ("nums", "target")}
    assert countdown_reward(worked, **columns) == [1.0] * 40
    assert think_answer_format_reward(worked) == [1.0] * 40
    assert set("".join(worked).replace("think", "").replace("answer", "")) - set("<>/") <= set(task.characters)


def test_additions_are_the_quickstarts(recipe: ModuleType) -> None:
    task = recipe.additions(0)
    assert [len(part) for part in (task.warm_up, task.train, task.validation, task.test)] == [3000, 1500, 200, 400]
    row = task.train[0]
    assert task.right([f"<answer>{row['answer']}</answer>", "<answer>-1</answer>"], [row, row]) == [1.0, 0.0]
