"""`trl-grpo sample`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_adapters import save_adapter, save_base
from transformers import PreTrainedModel

from trl_grpo_ext.cli.main import main
from trl_grpo_ext.rollout import SamplingParams
from trl_grpo_ext.side_by_side import load_policy, sample_side_by_side

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def adapter(tmp_path: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> Path:
    base = save_base(make_model(), tiny_tokenizer, tmp_path / "base")
    return save_adapter(base, tmp_path / "adapter", spread=0.2)[0]


def test_side_by_side(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.jsonl").write_text('{"prompt": "x [bold] y"}\n')
    file = tmp_path / "out" / "samples.json"
    argv = ["sample", "--adapter", str(adapter), "--prompt", "ab", "--prompts", str(tmp_path / "more.jsonl")]
    argv += ["--num-generations", "3", "--max-new-tokens", "9", "--seed", "5", "--top-k", "40", "--json", str(file)]
    assert main(argv) == 0
    written = json.loads(file.read_text())
    expected = sample_side_by_side(
        load_policy(None, str(adapter)),
        ["ab", "x [bold] y"],
        "both",
        SamplingParams(max_new_tokens=9, top_k=40),
        num_generations=3,
        seed=5,
    )
    assert [row["prompt"] for row in written["samples"]] == ["ab", "x [bold] y"]
    for row, right in zip(written["samples"], expected, strict=True):
        for who in ("base", "adapter"):
            assert [sample["text"] for sample in row[who]] == [sample.text for sample in right.samples[who]]
            assert [sample["tokens"] for sample in row[who]] == [sample.tokens for sample in right.samples[who]]
    assert written["model"] == str(tmp_path / "base") and written["adapter"] == str(adapter)
    assert written["settings"]["seed"] == 5
    out = capsys.readouterr().out
    assert "base" in out and "adapter" in out and "x [bold] y" in out and out.count("tokens, ") == 12


def test_temperature_0_is_greedy_and_base_alone(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    argv = ["sample", "--model", str(tmp_path / "base"), "--prompt", "ab", "--temperature", "0", "--json", str(file)]
    assert main([*argv, "--num-generations", "2", "--max-new-tokens", "5"]) == 0
    [row] = json.loads(file.read_text())["samples"]
    assert set(row) == {"prompt", "base"}
    assert row["base"][0] == row["base"][1]
    assert main([*argv, "--max-new-tokens", "3", "--overwrite"]) == 0
    assert json.loads(file.read_text())["samples"][0]["base"][0]["tokens"] <= 3


def test_bad_input_is_one_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    base = str(tmp_path / "base")
    holes = str(tmp_path / "holes.jsonl")
    Path(holes).write_text('{"prompt": "ab"}\n\n{"prompt": ""}\n')
    for argv, message in (
        (["--model", base], "nothing to complete"),
        (["--prompt", "ab"], "model and adapter are both missing"),
        (["--model", base, "--prompts", str(tmp_path / "empty.txt")], "it is empty"),
        (["--adapter", str(tmp_path / "none"), "--prompt", "ab"], "is not a folder"),
        (["--adapter", str(tmp_path / "folder"), "--prompt", "ab"], "has no adapter_config.json"),
        (["--model", base, "--which", "both", "--prompt", "ab"], "--which both needs --adapter"),
        (["--model", base, "--prompt", "x" * 300], "--prompt 1 has 300 tokens, and the model's context of 256"),
        (["--model", base, "--prompt", "ab", "--top-p", "0"], "top_p=0.0 must be in (0, 1]"),
        (["--model", base, "--prompt", "ab", "--num-generations", "0"], "num_generations=0 must be at least 1"),
        (["--model", base, "--prompt", "ab", "--seed", "-1"], "seed=-1 must be in 0..2^64-1"),
        (["--model", base, "--prompt", "ab", "--temperature", "-1"], "temperature=-1.0 must be above 0"),
        (["--model", base, "--prompt", "ab", ""], "--prompt 2 has no tokens (''): there is nothing to go on from"),
        (["--model", base, "--prompts", holes], "holes.jsonl, line 3 has no tokens"),
    ):
        assert main(["sample", *argv]) == 2, argv
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("trl-grpo sample: error: ") and message in error[-1]
        assert not any("Traceback" in line for line in error)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "is a folder, and a file is to be written"),
        ("text.txt/out.json", "text.txt is not a folder"),
        ("text.txt", "is there already: give another name, or --overwrite"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").touch()
    argv = ["sample", "--model", str(tmp_path / "no-model"), "--prompt", "ab", "--json", str(tmp_path / path)]
    assert main(argv) == 2
    assert message in capsys.readouterr().err  # and nothing of the model that is not there


def test_from_a_shell(adapter: Path) -> None:
    command = [sys.executable, "-m", "trl_grpo_ext.cli", "sample", "--adapter", str(adapter), "--prompt", "ab"]
    done = subprocess.run([*command, "--max-new-tokens", "3"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "adapter" in done.stdout
