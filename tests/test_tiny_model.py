"""The problems behind `recipes/tiny_*.yaml`."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from trl_grpo_ext.data import PromptReport, load_prompts
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


def test_a_worked_sum(recipe: ModuleType) -> None:
    assert recipe.worked_sum([7, 12, 4], [1, -1]) == "7+12=19 19-4=15 \\boxed{15}"


def test_sums_are_solved_by_their_worked_form_and_split_but_for_the_leak(recipe: ModuleType, tmp_path: Path) -> None:
    task = recipe.sums(0, warm_up=40, train=30, validation=20, test=60)
    parts = (task.warm_up, task.train, task.validation, task.test)
    assert [len(part) for part in parts] == [40, 30 + 25, 20, 60]
    assert len({row["problem"] for part in parts for row in part}) == 150
    tokenizer = recipe.make_tokenizer(task.characters, task.words)
    for row in task.warm_up:
        assert eval(row["problem"][:-1]) == int(row["answer"]) >= 0
        ids = tokenizer(row["completion"])["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row["completion"]
        assert tokenizer.convert_ids_to_tokens(ids)[-2 - len(row["answer"])] == "\\boxed{" and len(ids) <= 60
    assert task.right([row["completion"] for row in task.warm_up], task.warm_up) == [1.0] * 40
    assert {row["type"] for row in task.warm_up} == {"Addition", "Subtraction", "Mixed"}
    # As the recipe reads them
    for name, part in (("train", task.train), ("test", task.test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    test, report = f"math-500:{tmp_path / 'test.jsonl'}", PromptReport()
    train = f"math:{tmp_path / 'train.jsonl'}"
    rows = load_prompts(train, template="{{ problem }}", decontaminate=[test], report=report)
    assert len(rows) == 30 and report.of(train).dropped["contaminated"] == 25
    assert not {row["problem"] for row in task.test} & set(rows["problem"][:])
    assert set(rows["level"][:]) == {1, 2, 3} and set(rows["subject"][:]) == {"Addition", "Subtraction", "Mixed"}


def test_additions_are_the_quickstarts(recipe: ModuleType) -> None:
    task = recipe.additions(0)
    assert [len(part) for part in (task.warm_up, task.train, task.validation, task.test)] == [3000, 1500, 200, 400]
    row = task.train[0]
    assert task.right([f"<answer>{row['answer']}</answer>", "<answer>-1</answer>"], [row, row]) == [1.0, 0.0]
