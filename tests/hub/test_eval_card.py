"""What `trl-grpo eval` writes, in the card that `trl-grpo push --eval` uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import ModelCard

from trl_grpo_ext.cli.main import main
from trl_grpo_ext.evaluation import Evaluation
from trl_grpo_ext.evaluation.report import FORMAT_VERSION
from trl_grpo_ext.evaluation.summary import summarise
from trl_grpo_ext.hub.card import model_card
from trl_grpo_ext.hub.evaluation import HeldOut, latest_results, results_of

RECORD: dict[str, Any] = {
    "model": {"id": "ada/base", "architecture": "Qwen2ForCausalLM"},
    "adapter": {"peft_type": "LORA", "r": 16},
    "training": {"learning_rate": 1e-6},
    "versions": {"trl": "1.16.0"},
}
GSM8K = HeldOut("eval", "openai/gsm8k", "openai/gsm8k", "main", "test", prompts=50, completions_per_prompt=1)
LOG = [{"step": 4, "eval_reward": 0.9, "eval_rewards/accuracy_reward/mean": 0.4}]


@pytest.fixture
def summary() -> dict[str, Any]:
    """As `evaluate_policy` makes it: 40 prompts, of which the base solves 10 and the adapter 30."""
    solved = np.arange(40)
    values = {
        who: {"pass@4": (solved < count).astype(float), "mean_length": np.full(40, 7.5)}
        for who, count in (("base", 10), ("adapter", 30))
    }
    return {
        "format_version": FORMAT_VERSION,
        "data": {"sources": ["data/gsm8k.jsonl"], "split": "test", "config": None},
        "settings": {"num_generations": 4, "confidence": 0.95},
        "prompts": 40,
        "results": summarise(values, resamples=2000),
    }


def test_results_take_the_place_of_those_of_training(
    hub: HubServer, summary: dict[str, Any], adapter_folder: Path, tmp_path: Path
) -> None:
    card = model_card(RECORD, repo_id="ada/run", results=latest_results(LOG, [GSM8K]), tags=["mine"], has_curves=True)
    card.save(adapter_folder / "README.md")
    evaluation = Evaluation(summary, Dataset.from_dict({"completion": ["a"]})).save(tmp_path / "evaluation")
    assert main(["push", str(adapter_folder), "--repo-id", "ada/run", "--eval", str(evaluation)]) == 0
    pushed = ModelCard(hub.files("ada/run")["README.md"].decode())
    pushed.validate()
    solved, length = pushed.data.eval_results
    assert (solved.metric_type, solved.metric_value, solved.dataset_type) == ("pass@k", 0.75, "custom")
    assert (length.metric_type, length.metric_value) == ("mean_length", 7.5)
    found = summary["results"]["adapter"]["pass@4"]
    assert solved.metric_args["confidence_interval_95"] == [round(found["low"], 6), round(found["high"], 6)]
    assert solved.metric_args["base"] == 0.25 and solved.metric_args["p_value"] < 0.001
    row = f"| gsm8k.jsonl | pass@4 | 0.75 | [{found['low']:.4g}, {found['high']:.4g}] | 0.25 |"
    assert row in pushed.text and "by `trl-grpo eval`" in pushed.text
    # Only the evaluation is another one
    assert "accuracy_reward | 0.4" in card.text and "accuracy_reward | 0.4" not in pushed.text
    for kept in ("## Load it", "![Rewards by optimizer step]", "| `learning_rate` | `1e-06` |", "| trl | 1.16.0 |"):
        assert kept in pushed.text
    assert pushed.text.count("## Evaluation") == 1 and pushed.data.tags == card.data.tags
    assert "accuracy_reward | 0.4" in (adapter_folder / "README.md").read_text()  # the folder's own is left alone


def test_a_card_without_an_evaluation_gets_one(hub: HubServer, summary: dict[str, Any], adapter_folder: Path) -> None:
    (adapter_folder / "evaluation").mkdir()
    Evaluation(summary, Dataset.from_dict({"completion": ["a"]})).save(adapter_folder / "evaluation")
    assert (
        main(["push", str(adapter_folder), "--repo-id", "ada/run", "--eval", str(adapter_folder / "evaluation")]) == 0
    )
    pushed = ModelCard(hub.files("ada/run")["README.md"].decode())
    assert "| pass@4 | 0.75 |" in pushed.text and len(pushed.data.eval_results) == 2
    assert "evaluation/evaluation.json" not in hub.files("ada/run")


def test_what_is_no_evaluation_is_refused(
    summary: dict[str, Any], adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(adapter_folder), "--repo-id", "ada/run", "--eval", str(tmp_path / "no.json")]) == 2
    assert "no.json' cannot be read" in capsys.readouterr().err
    summary["settings"]["confidence"] = 0.9
    with pytest.raises(ValueError, match=r"confidence=0\.9 of the evaluation must be 0\.95"):
        results_of(summary)


def test_pass_at_k_of_a_run_is_in_its_card() -> None:
    log = [{"step": 4, "eval_reward": 0.5, "eval_reward_std": 0.1, "eval_pass@4": 0.625}]
    reward, solved = latest_results(log, [GSM8K])
    assert reward.metric == "reward"
    assert (solved.metric, solved.mean, solved.interval, solved.step) == ("pass@4", 0.625, None, 4)
