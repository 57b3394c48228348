"""reasoning-gym's tasks and scorers, where the package is installed; and what is said where it is not."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from trl_grpo_ext import load_prompts
from trl_grpo_ext.rewards import ReasoningGymReward

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None


@pytest.mark.skipif(INSTALLED, reason="reasoning-gym is installed")
def test_absent_package_is_asked_for() -> None:
    with pytest.raises(
        ValueError, match=r"needs the package reasoning-gym .*pip install 'trl-grpo-ext\[reasoning-gym\]'"
    ):
        load_prompts("reasoning_gym:leg_counting")
    where = json.dumps({"task": "leg_counting", "rows": 1, "seed": 0, "options": {}, "index": 0})
    with pytest.raises(ValueError, match=r"pip install 'trl-grpo-ext\[reasoning-gym\]'"):
        ReasoningGymReward()(["<answer>4</answer>"], reasoning_gym=[where])


def test_reward_needs_its_column() -> None:
    with pytest.raises(ValueError, match="needs the column `reasoning_gym` with 1 values, got None"):
        ReasoningGymReward()(["4"])
    assert ReasoningGymReward()(["4"], reasoning_gym=[None]) == [None]


@pytest.mark.parametrize("task", ["leg_counting", "basic_arithmetic", "spell_backward"])
def test_answers_earn_what_the_task_s_scorer_says(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    data = load_prompts(f"reasoning_gym:{task}", config="rows=5", deduplicate="off")
    columns: dict[str, Any] = {"reasoning_gym": data["reasoning_gym"][:], "problem": data["problem"][:]}
    answers = [f"<think> {answer} </think><answer> {answer} </answer>" for answer in data["solution"]]
    assert ReasoningGymReward()(answers, **columns) == [1.0] * 5
    assert max(ReasoningGymReward()(["<answer>no</answer>"] * 5, **columns)) < 1.0  # type: ignore[type-var]
    assert ReasoningGymReward()(data["solution"][:], **columns) == [0.0] * 5
    assert ReasoningGymReward(whole=True)(data["solution"][:], **columns) == [1.0] * 5
    columns["problem"][3] = "another"
    with pytest.raises(ValueError, match="makes another problem of"):
        ReasoningGymReward()(answers, **columns)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("reasoning_gym:leg_count", {}, r"has no task 'leg_count' \(did you mean 'leg_counting'\?\)"),
        ("reasoning_gym:leg_counting", {"config": "rows=0"}, "rows='0' must be"),
        ("reasoning_gym:leg_counting", {"config": "rows=3,legs=5"}, r"reasoning-gym refuses \{'legs': 5\}"),
        ("reasoning_gym:leg_counting", {"split": "dev"}, "has no split 'dev'"),
        ("reasoning_gym:list_functions", {"config": "rows=2"}, "makes other problems of this task each time"),
    ],
)
def test_refusals(source: str, arguments: dict[str, Any], message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        load_prompts(source, **arguments)
