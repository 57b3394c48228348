"""The quickstart: its embedded task, in parts, and the whole recipe as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.embedded_task import (
    DIGITS,
    MAX_COMPLETION_LENGTH,
    TAGS,
    make_model,
    make_splits,
    make_tokenizer,
    operands,
    right_columns,
    worked_addition,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("a", "b", "completion"),
    [
        # 5+6 = 11, carry 1; 7+8+1 = 16, carry 1; 4+3+1 = 8: 861
        (475, 386, "<think>5+6+0=11 7+8+1=16 4+3+1=8</think><answer>861</answer>"),
        # the last column keeps both digits: 4+3 = 7, 2+1 = 3, 9+8 = 17: 1737
        (924, 813, "<think>4+3+0=7 2+1+0=3 9+8+0=17</think><answer>1737</answer>"),
        # as many columns as digits: 0+5 = 5, 1+9 = 10: 105
        (10, 95, "<think>0+5+0=5 1+9+0=10</think><answer>105</answer>"),
    ],
)
def test_worked_addition(a: int, b: int, completion: str) -> None:
    assert worked_addition(a, b) == completion


def test_tags_survive_decoding_and_special_tokens_do_not() -> None:
    tokenizer = make_tokenizer()
    text = worked_addition(475, 386)
    ids = tokenizer(text)["input_ids"]
    # 8+1+8+1+7 characters in the columns, 3 in the answer, and 4 tags
    assert len(ids) == 25 + 3 + 4
    assert tokenizer.unk_token_id not in ids
    padded = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(padded, skip_special_tokens=True) == text
    assert not set(TAGS) & set(tokenizer.all_special_tokens)


def test_the_longest_working_fits() -> None:
    # 3 columns of 8 characters (9+9+1=19), 2 spaces, 4 tags, 1998, EOS: 24 + 2 + 4 + 4 + 1 = 35
    assert max(DIGITS) == 3
    assert len(make_tokenizer()(worked_addition(999, 999))["input_ids"]) + 1 == 35 <= MAX_COMPLETION_LENGTH


def test_splits_share_no_problem_and_depend_on_the_seed_alone() -> None:
    sizes = {"warm_up": 500, "practice": 40, "validation": 30, "held_out": 20}
    splits = make_splits(3, **sizes)
    parts = [getattr(splits, name) for name in sizes]
    assert [len(part) for part in parts] == list(sizes.values())
    rows = [row for part in parts for row in part]
    assert len({tuple(sorted(operands(row["prompt"]))) for row in rows}) == sum(sizes.values())
    assert all(sum(operands(row["prompt"])) == int(row["solution"]) for row in rows)
    assert make_splits(3, **sizes) == splits != make_splits(4, **sizes)


def test_warm_up_shows_right_additions_only() -> None:
    rows = make_splits(0, warm_up=200, practice=1, validation=1, held_out=1).warm_up
    for row in rows:
        assert row["completion"] == worked_addition(*operands(row["prompt"]))
        assert row["completion"].endswith(f"<answer>{row['solution']}</answer>")


def test_columns_are_judged_in_their_places() -> None:
    steps = "<think>5+6+0=11 7+8+1=16 4+3+1=8</think><answer>861</answer>".split()
    wrong_carry = ["<think>5+6+0=11", "7+8+0=15", "4+3+1=8</think><answer>851</answer>", "more"]
    judged = right_columns(["475+386=", "475+386=", "75+72="], [steps, wrong_carry, ["<think>5+2+0=7"]])
    assert judged == [[1, 1, 1], [1, 0, 0, 0], [1]]


def test_model_has_about_a_million_parameters_and_a_seed() -> None:
    tokenizer = make_tokenizer()
    first, again, other = (make_model(tokenizer, seed) for seed in (0, 0, 1))
    assert 0.8e6 < first.num_parameters() < 1.2e6
    weights = [model.lm_head.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Output folder, metrics and printed text of `python recipes/quickstart.py --seed 0`, two thirds of its length."""
    output_dir = tmp_path_factory.mktemp("quickstart")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    process = subprocess.run(
        [sys.executable, ROOT / "recipes" / "quickstart.py", "--steps", "200", "--output-dir", output_dir],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    return output_dir, metrics, process.stdout


def test_quickstart_gains_thirty_points(finished_run: tuple[Path, dict[str, Any], str]) -> None:
    _, metrics, _ = finished_run
    assert 0.2 <= metrics["accuracy_before"] <= 0.5
    assert metrics["accuracy_after"] - metrics["accuracy_before"] >= 0.3
    assert metrics["format_rate_after"] > 0.9
    assert 0 < metrics["seconds_grpo"] < metrics["seconds_total"]


def test_quickstart_shows_what_happened(finished_run: tuple[Path, dict[str, Any], str]) -> None:
    _, metrics, printed = finished_run
    for expected in ("SFT step", "GRPO step", "greedy accuracy", f"{metrics['accuracy_after']:.1%}", "from_pretrained"):
        assert expected in printed
    assert printed.count("  before ") == printed.count("  after ") == 3


def test_quickstart_adapter_loads_with_plain_peft(finished_run: tuple[Path, dict[str, Any], str]) -> None:
    output_dir, metrics, _ = finished_run
    base = AutoModelForCausalLM.from_pretrained(output_dir / "warm_model")
    model = PeftModel.from_pretrained(base, output_dir / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "warm_model")
    rows = make_splits(0).held_out
    prompts = [row["prompt"] for row in rows]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    prompt_length = batch["input_ids"].shape[1]
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=MAX_COMPLETION_LENGTH,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    right = [text.endswith(f"<answer>{row['solution']}</answer>") for text, row in zip(texts, rows, strict=True)]
    # transformers' own decoding rounds differently: one problem in 400 may be a near tie
    assert sum(right) / len(right) == pytest.approx(metrics["accuracy_after"], abs=2 / 400)


def test_quickstart_trains_on_process_rewards(finished_run: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    """From the same warmed-up model; what a whole run of it learns is in the recipe's docstring."""
    output_dir, outcome, _ = finished_run
    command = [sys.executable, ROOT / "recipes" / "quickstart.py", "--rewards", "process", "--steps", "10"]
    command += ["--output-dir", tmp_path, "--warm-model", output_dir / "warm_model"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    assert not (tmp_path / "reward_failures.jsonl").exists()
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["rewards"] == "process" and metrics["accuracy_before"] == outcome["accuracy_before"]
    first_line = next(line for line in process.stdout.splitlines() if "GRPO step" in line)
    right = int(re.search(r"right (\d+)%", first_line)[1])
    assert 30 <= right <= 70  # of columns; of answers it is a fifth


def test_quickstart_trains_on_a_4_bit_base(finished_run: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    """From the same warmed-up model; what a whole run of it learns is in the recipe's docstring."""
    output_dir, outcome, _ = finished_run
    command = [sys.executable, ROOT / "recipes" / "quickstart.py", "--quantize", "nf4", "--steps", "10"]
    command += ["--output-dir", tmp_path, "--warm-model", output_dir / "warm_model"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    assert 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"' in process.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["quantize"] == "nf4" and metrics["accuracy_before"] != outcome["accuracy_before"]
    assert abs(metrics["accuracy_before"] - outcome["accuracy_before"]) < 0.2


def test_quickstart_has_no_process_rewards_for_trl() -> None:
    command = [sys.executable, ROOT / "recipes" / "quickstart.py", "--rewards", "process", "--trainer", "trl"]
    process = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 2 and "needs --trainer ours" in process.stderr
