"""R1's pipeline in miniature: its task by hand, and a smoke run of every stage as a user starts it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = [
    "1 cold-start SFT",
    "2 reasoning-oriented GRPO",
    "3 rejection sampling and SFT",
    "4 GRPO for all scenarios",
    "from 1: GRPO, fixed reference",
    "from 1: iterative GRPO, 3 rounds",
]


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """The recipe as `python recipes/...` has it, beside the others."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "recipes"))
    yield import_module("r1_pipeline")
    patch.undo()


def test_a_worked_addition_has_a_word_behind_each_column(recipe: ModuleType) -> None:
    """5+6 = 11 and 7+8+1 = 16 carry, 4+3+1 = 8 does not."""
    texts = {recipe.worked(475, 386, random.Random(seed)) for seed in range(40)}
    assert len(texts) == 8  # two languages for each of three columns
    assert "<think>5+6+0=11 올림 7+8+1=16 carry 4+3+1=8 다음</think><answer>861</answer>" in texts
    assert max(recipe.korean_reward(sorted(texts))) == 1.0
    assert min(recipe.korean_reward(sorted(texts))) == 0.0


def test_the_general_reward_is_for_prompts_without_a_number(recipe: ModuleType) -> None:
    texts = ["<think>다음</think><answer>?</answer>", "<think></think><answer>12</answer>", "<answer>861</answer>"]
    assert recipe.honest_reward(texts, [True, True, False]) == [1.0, 0.0, None]


def test_splits_share_no_prompt(recipe: ModuleType) -> None:
    data = recipe.make_data(0)
    splits = [{row["prompt"] for row in getattr(data, name)} for name in data.__slots__]
    assert sum(map(len, splits)) == len(set().union(*splits))
    assert all(row["solution"] is None and row["missing"] for row in data.practice_missing)
    tokenizer = recipe.make_tokenizer("0123456789+= ?", [word for pair in recipe.WORDS.values() for word in pair])
    longest = 0
    for row in data.cold_start + data.demonstrations:
        ids = tokenizer(row["completion"])["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row["completion"]
        longest = max(longest, len(ids))
    assert longest < recipe.MAX_COMPLETION_LENGTH


def test_rejection_sampling_keeps_the_first_good_completion(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = "<think>1+2+0=3 다음</think><answer>{}</answer>"
    texts = [
        good.format(4),  # wrong
        good.format(3),
        good.format(3).replace("다음", "다음 다음"),  # also good, but second
        good.format(7).replace("다음", "next"),  # right, in English
        good.format(8),  # wrong
        "7",  # right, out of form
    ]
    monkeypatch.setattr(recipe, "complete", lambda *args, **kwargs: texts)
    rows = [{"prompt": "1+2=", "solution": "3"}, {"prompt": "3+4=", "solution": "7"}]
    kept: list[dict[str, Any]] = recipe.rejection_sample(None, None, rows, 3, keep_all=False)
    assert kept == [rows[0] | {"completion": texts[1]}]
    texts[1] = texts[2] = "7"
    with pytest.raises(RuntimeError, match="kept none of 6"):
        recipe.rejection_sample(None, None, rows, 3, keep_all=False)


def test_smoke_run(tmp_path: Path) -> None:
    command = [sys.executable, "recipes/r1_pipeline.py", "--smoke", "--output-dir", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    docs = tmp_path / "docs"  # not the repository's: figures of a smoke run say nothing
    kept = json.loads((docs / "r1-pipeline.json").read_text(encoding="utf-8"))
    assert [row["stage"] for row in kept["stages"]] == STAGES
    assert all(0 <= row[name] <= 1 for row in kept["stages"] for name in ("accuracy", "format_rate", "language"))
    report = (docs / "r1-pipeline.md").read_text(encoding="utf-8")
    assert all(f"| {stage} |" in report for stage in STAGES)
    for stage in (1, 2, 3, 4):
        assert (tmp_path / f"stage-{stage}" / "model.safetensors").stat().st_size > 0
