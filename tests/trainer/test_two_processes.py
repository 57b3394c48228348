"""Two processes (DDP over gloo) do what one does with the same global batch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import set_seed

SCRIPT = Path(__file__).with_name("two_processes.py")


def load_script():
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "history.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_model, tiny_tokenizer) -> tuple[Path, Path]:
    """Where two processes, and one, left every case's results."""
    folder = tmp_path_factory.mktemp("two_processes")
    make_model().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*launch, str(SCRIPT), str(folder / "model"), str(folder / "two"), "6"],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    load_script().main(str(folder / "model"), str(folder / "one"), "12")
    return folder / "two", folder / "one"


@pytest.mark.parametrize("case", load_script().CASES)
def test_two_processes_train_like_one(case, folders, make_model):
    (two, two_history), (one, one_history) = (results(folder / case) for folder in folders)
    set_seed(3)
    fresh = get_peft_model(make_model(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    start = {n.replace(".default", ""): p.detach() for n, p in fresh.named_parameters() if "lora_" in n}
    assert two.keys() == one.keys() == start.keys()
    changes = [torch.cat([(run[n] - start[n]).flatten().double() for n in start]) for run in (two, one)]
    assert changes[1].norm() > 1e-3
    assert (changes[0] - changes[1]).norm() / changes[1].norm() < 1e-5

    # Of all processes' completions, not of the first one's
    prefixes = ("reward", "completions/", "eval_reward", "eval_pass@", "kl", "num_", "mean_of", "only_of", "adaptive/")
    prefixes = (*prefixes, "resampling/", "curriculum/")
    names = {name for entry in one_history for name in entry if name.startswith(prefixes)}
    assert {"reward", "reward_std", "eval_reward", "eval_pass@2", "num_tokens", "mean_of_all"} <= names
    assert "completions/max_length" in names
    assert "only_of_x" in names or case == "curriculum"  # which need not choose that prompt in so few steps
    if case == "adaptive groups":
        assert all(entry["adaptive/groups_gained"] > 0 for entry in one_history if "loss" in entry)
    if case == "curriculum":
        assert "curriculum/signal_of_chosen" in names
    assert len(two_history) == len(one_history)
    for mine, other in zip(two_history, one_history, strict=True):
        for name in (names | {"loss"}) & other.keys():
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("case", load_script().RESUMED)
def test_resumed_processes_end_like_those_that_went_on(case, folders):
    """In a later epoch, too, whose order accelerate tells a sampler of one process only."""
    step = load_script().RESUMED[case]
    for folder in folders:
        (straight, history), (resumed, resumed_history) = results(folder / case), results(folder / f"{case}, resumed")
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
        names = ("step", "epoch", "loss", "reward", "num_tokens", "completions/mean_length", "eval_reward")
        logs = (history, resumed_history)
        rest = [[{n: e[n] for n in names if n in e} for e in log if e["step"] > step] for log in logs]
        assert rest[0] == rest[1]
        assert [entry["step"] for entry in rest[0] if "loss" in entry] == [step + 1, step + 2]


@pytest.mark.parametrize("case", load_script().RESUMED)
def test_no_process_goes_on_where_one_cannot(case, folders):
    for folder, processes in zip(folders, (2, 1), strict=True):
        errors = [(folder / f"{case}, resumed" / f"error_{rank}.txt").read_text() for rank in range(processes)]
        assert all(error == errors[0] for error in errors)
        assert f"grpo_state_{processes - 1}.pt is missing" in errors[0] and "ignore_data_skip" in errors[0]


def test_a_column_that_one_process_logs_is_empty_for_the_other(folders):
    files = sorted((folders[0] / "kl" / "completions").iterdir())
    tables = [pyarrow.parquet.read_table(file).to_pydict() for file in files]
    assert [len(table["prompt"]) for table in tables] == [12, 12]
    (table,) = [table for table in tables if "prompt_length" in table]  # the prompt "x" is in one of the two steps
    halves = [(table["prompt"][half], table["prompt_length"][half]) for half in (slice(0, 6), slice(6, 12))]
    halves.sort(key=lambda half: "x" not in half[0])
    assert "x" not in halves[1][0]
    assert [lengths for _, lengths in halves] == [[len(prompt) for prompt in halves[0][0]], [None] * 6]
