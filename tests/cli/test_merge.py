"""`trl-grpo merge`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_adapters import save_adapter, save_base
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_grpo_ext.cli.main import main


@pytest.fixture
def adapter(tmp_path: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> Path:
    base = save_base(make_model().bfloat16(), tiny_tokenizer, tmp_path / "base")
    return save_adapter(base, tmp_path / "adapter")[0]


def test_merge(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 2 + 3?\nab\n")
    output = tmp_path / "merged"
    config = tmp_path / "merge.yaml"
    config.write_text(f"adapter: {adapter}\noutput: elsewhere\ndtype: float32\nprompts: {prompts}\ncontinuation: 4\n")
    assert main(["merge", "--config", str(config), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    report = json.loads((output / "merge_report.json").read_text())
    assert (report["dtype"], report["base_dtype"], report["prompts"]) == ("float32", "float32", 2)
    assert report["difference"]["max"] < 1e-4
    assert f"{report['difference']['max']:.2e}" in out and f"{report['difference']['mean']:.2e}" in out
    assert f"Written to {output}" in out
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.float32


def test_a_failed_check_is_exit_code_1(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "merged"
    assert main(["merge", "--adapter", str(adapter), "--output", str(output), "--tolerance", "1e-9"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("trl-grpo merge: error: the merged model's log-probabilities differ")
    assert not output.exists()


def test_bad_input_is_exit_code_2(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").touch()
    for changed, message in (
        ({"--adapter": str(tmp_path / "base")}, "has no adapter_config.json"),
        ({"--prompts": str(tmp_path / "empty.txt")}, "it is empty"),
        ({"--output": str(tmp_path)}, "exists already"),
        ({"--base": str(tmp_path / "none")}, "cannot be found"),
        ({"--device": "warp"}, "warp"),
    ):
        options = {"--adapter": str(adapter), "--output": str(tmp_path / "merged")} | changed
        assert main(["merge", *(word for option in options.items() for word in option)]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("trl-grpo merge: error: ") and message in error[-1]
        assert not any("Traceback" in line for line in error)
