"""Two processes (DDP over gloo) do what one does with the same global batch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

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
    names = {n for e in one_history for n in e if n.startswith(("reward", "completions/", "eval_reward", "kl", "num_", "mean_of", "only_of"))}
    assert {"reward", "reward_std", "eval_reward", "num_tokens", "completions/max_length", "mean_of_all", "only_of_x"} <= names
    assert len(two_history) == len(one_history)
    for mine, other in zip(two_history, one_history, strict=True):
        for name in (names | {"loss"}) & other.keys():
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
