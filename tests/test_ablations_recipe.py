"""The ablations: their PPO and their arithmetic by hand, and a smoke run of every method as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def recipes() -> Iterator[dict[str, ModuleType]]:
    """The recipes as `python recipes/...` has them, beside each other."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "recipes"))
    yield {name: import_module(name) for name in ("ablations", "ppo_baseline", "ppo_trl", "embedded_task")}
    patch.undo()


def test_generalised_advantages_by_hand(recipes: dict[str, ModuleType]) -> None:
    """lambda = 1/2, a completion of three tokens and one of two, whose third column is padding.

    Row 1: delta = (0 + 0.25 - 0.5, 0 + 0.75 - 0.25, 1 - 0.75) = (-0.25, 0.5, 0.25);
           A_2 = 0.25, A_1 = 0.5 + 0.125 = 0.625, A_0 = -0.25 + 0.3125 = 0.0625.
    Row 2: delta = (0 + 0.5 - 1, -1 - 0.5) = (-0.5, -1.5); A_1 = -1.5, A_0 = -0.5 - 0.75 = -1.25.
    """
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 0.75], [1.0, 0.5, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    advantages, returns = recipes["ppo_baseline"].generalised_advantages(rewards, values, mask, 0.5)
    assert advantages.tolist() == [[0.0625, 0.625, 0.25], [-1.25, -1.5, 0.0]]
    assert returns.tolist() == [[0.5625, 0.875, 1.0], [-0.25, -1.0, 0.0]]


def test_padded_rows_give_each_completion_its_own_log_probs(recipes: dict[str, ModuleType], make_model: Any) -> None:
    model = make_model("llama").eval()
    prompts, completions = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]
    batch = recipes["ppo_baseline"].Batch.of(prompts, completions, pad=0)
    with torch.no_grad():
        found = batch.logps(model)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(found[row, : len(completion)], expected, rtol=1e-5, atol=1e-5)
            assert found[row, len(completion) :].eq(0).all()


def test_an_untrained_critic_says_zero_and_learns(recipes: dict[str, ModuleType], make_model: Any) -> None:
    ppo, ablations = recipes["ppo_baseline"], recipes["ablations"]
    critic = ppo.Critic(make_model("llama"), ablations.lora())
    batch = ppo.Batch.of([[5, 6], [7]], [[8], [9, 10, 11]], pad=0)
    values = batch.values(critic)
    assert values.shape == (2, 3) and values.eq(0).all()
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = ((batch.values(critic) - batch.mask) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] == 4.0 and losses[-1] < losses[0]  # four tokens, each one off by 1


def test_rules_as_the_reward_model_that_trl_asks(recipes: dict[str, ModuleType]) -> None:
    from trl.experimental.utils import get_reward

    tokenizer = recipes["embedded_task"].make_tokenizer()
    rows = [{"prompt": "12+3=", "solution": "15"}, {"prompt": "4+5=", "solution": "9"}]
    asked: list[tuple[str, str]] = []

    def reward(given: Sequence[dict[str, Any]], texts: list[str]) -> list[float]:
        asked.extend(zip((row["solution"] for row in given), texts, strict=True))
        return [float(len(text)) for text in texts]

    model = recipes["ppo_trl"].RulesAsModel(rows, tokenizer, reward)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = [tokenizer(text)["input_ids"] for text in ("4+5=", "<answer>9</answer>", "12+3=", "<answer>")]
    longest = max(len(ids[0]), len(ids[2]))
    left = [[pad] * (longest - len(one)) + one for one in (ids[0], ids[2])]
    width = len(ids[1]) + 1  # with its end; the other completion has none, and padding behind it
    right = [[*ids[1], end], ids[3] + [pad] * (width - len(ids[3]))]
    batch = torch.tensor([a + b for a, b in zip(left, right, strict=True)])
    _, found, _ = get_reward(model, batch, pad, longest)
    assert asked == [("9", "<answer>9</answer>"), ("15", "<answer>")]
    assert found.tolist() == [18.0, 8.0]


def test_trl_without_ppo_is_named(recipes: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.experimental

    monkeypatch.setattr(trl.experimental, "__path__", list(trl.experimental.__path__))
    monkeypatch.setenv("TRL_WITH_PPO", "no/such/folder")
    with pytest.raises(ImportError, match=r"has no PPO .*ppo_trl\.py has a remedy"):
        recipes["ppo_trl"].classes()


def test_the_table_by_hand(recipes: dict[str, ModuleType]) -> None:
    """(0.5, 0.7): mean 0.6, standard deviation sqrt(0.02) = 0.1414; 0.55 on seed 1 is 15 points below 0.7 there."""
    run = {"memory_bytes": 3 * 2**20, "seconds": 10.0, "cpu_seconds": 8.0}
    results = [
        {"method": "g2", "seed": 1, "accuracy": 0.55} | run,
        {"method": "grpo", "seed": 0, "accuracy": 0.5} | run,
        {"method": "grpo", "seed": 1, "accuracy": 0.7} | run | {"memory_bytes": 5 * 2**20, "seconds": 20.0},
    ]
    ablations = recipes["ablations"]
    rows = ablations.summarise(results)
    assert [row["method"] for row in rows] == ["grpo", "g2"]
    assert rows[0]["deviation"] == pytest.approx(0.02**0.5) and rows[1]["deviation"] is None
    assert ablations.table(rows).splitlines()[2:] == [
        "| full GRPO (G = 8) | 60.0 | 14.1 | 50.0, 70.0 |  | 4 | 15 | 8 |",
        "| G = 2 (seeds 1) | 55.0 |  | 55.0 | -15.0 | 3 | 10 | 8 |",
    ]


def test_smoke_run(recipes: dict[str, ModuleType], tmp_path: Path) -> None:
    methods = list(recipes["ablations"].UNASKED)
    command = [sys.executable, "recipes/ablations.py", "--smoke", "--output-dir", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    docs = tmp_path / "docs"  # not the repository's: figures of a smoke run say nothing
    kept = json.loads((docs / "ablations" / "results.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in kept["summary"]] == methods
    assert all(run["completions"] == 32 and run["seconds"] > 0 for run in kept["runs"])
    report = (docs / "ablations.md").read_text(encoding="utf-8")
    assert all(recipes["ablations"].METHODS[method][0] in report for method in methods)
    assert ElementTree.parse(docs / "ablations" / "ablations.svg").getroot().tag.endswith("svg")
    assert (docs / "ablations" / "ablations.png").read_bytes().startswith(b"\x89PNG")
