"""`trl-grpo eval`, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from saved_adapters import save_adapter, save_base
from transformers import PreTrainedModel

from trl_grpo_ext.cli.main import main

ROWS = [
    {"prompt": "2+3=", "solution": "5", "level": "Level 1"},
    {"prompt": "4+4=", "solution": "8", "level": "Level 2"},
    {"prompt": "what is 7?", "solution": "7", "level": "Level 1"},
]
REWARD = """
def has_even_length(completion_ids, **kwargs):
    return [float(len(ids) % 2 == 0) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any):
    place = tmp_path_factory.mktemp("eval")
    base = save_base(make_model(), tiny_tokenizer, place / "base")
    save_adapter(base, place / "adapter", spread=0.2)
    (place / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    (place / "reward.py").write_text(REWARD)
    return place


def test_base_and_adapter(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval.yaml").write_text(
        f"k: [1, 2]\nnum_generations: 4\nreward: {folder / 'reward.py'}:has_even_length\n"
    )
    out = tmp_path / "new" / "out"
    argv = ["eval", "--adapter", str(folder / "adapter"), "--dataset", str(folder / "rows.jsonl"), "--seed", "3"]
    argv += ["--config", str(tmp_path / "eval.yaml"), "--max-new-tokens", "7", "--num-generations", "2"]
    argv += ["--reward-workers", "0", "--resamples", "200", "--format-reward", "none", "--output", str(out)]
    assert main(argv) == 0
    summary = json.loads((out / "evaluation.json").read_text())
    assert summary["model"] == str(folder / "base") and summary["adapter"] == str(folder / "adapter")
    assert summary["settings"]["k"] == [1, 2] and summary["settings"]["num_generations"] == 2  # the command line wins
    assert summary["settings"]["seed"] == 3 and summary["settings"]["reward"] == "has_even_length"
    assert set(summary["results"]) == {"base", "adapter", "difference"}
    assert set(summary["by"]["level"]) == {"Level 1", "Level 2"}
    file = str(out / "completions.parquet")
    rows = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 2 * 3 * 2 and rows["solution"][:4] == ["5", "5", "8", "8"]
    for who in ("base", "adapter"):
        right = [row["tokens"] % 2 == 0 for row in rows if row["policy"] == who]
        assert summary["results"][who]["avg@2"]["mean"] == pytest.approx(sum(right) / 6)
    printed = capsys.readouterr().out
    assert "3 prompts, 2 completions each" in printed and "pass@2" in printed and "Written to" in printed


def test_an_interrupted_evaluation_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And comes to what one that was not interrupted does: of the base one prompt was drawn, of the adapter none."""
    stopping = "if prompts[0] != '2+3=': raise KeyboardInterrupt\n    return"
    (tmp_path / "stops.py").write_text(
        REWARD.replace("(completion", "(prompts, completion").replace("return", stopping)
    )
    argv = ["eval", "--adapter", str(folder / "adapter"), "--dataset", str(folder / "rows.jsonl"), "--k", "1", "2"]
    argv += ["--max-new-tokens", "7", "--num-generations", "2", "--reward-workers", "0", "--resamples", "200"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rewards = [f"{place / name}:has_even_length" for place, name in ((folder, "reward.py"), (tmp_path, "stops.py"))]
    assert main([*argv, "--output", str(whole), "--reward", rewards[0]]) == 0
    assert main([*argv, "--output", str(broken), "--reward", rewards[1], "--batch-size", "2"]) == 1
    partial = broken / "completions.partial.jsonl"
    assert f"interrupted; what was drawn is in {partial}" in capsys.readouterr().err
    head, *lines = partial.read_text().splitlines()
    assert len(lines) == 1 and not (broken / "evaluation.json").exists()
    # Of other options it is refused; and a mark shows that what is there is not drawn again
    assert main([*argv, "--output", str(broken), "--reward", rewards[0], "--top-k", "3"]) == 2
    assert "is of an evaluation with top_k=0 (now 3)" in capsys.readouterr().err
    batch = json.loads(lines[0])
    marked = batch["groups"][0][1]["completion"] = "not drawn again"
    partial.write_text(head + "\n" + json.dumps(batch) + '\n{"groups": [')
    assert main([*argv, "--output", str(broken), "--reward", rewards[0]]) == 0
    assert not partial.exists()
    rows = []
    for place in (whole, broken):
        file = str(place / "completions.parquet")
        rows.append(
            load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache")).to_list()
        )
    assert rows[1][1].pop("completion") == marked and rows[0][1].pop("completion") != marked
    for one, other in zip(*rows, strict=True):  # sums of other batches are rounded otherwise
        assert one.pop("logp") == pytest.approx(other.pop("logp"), abs=1e-4)
        assert one == other
    results = [json.loads((place / "evaluation.json").read_text()) for place in (whole, broken)]
    assert results[0]["results"] == results[1]["results"] and results[0]["counts"] == results[1]["counts"]


def test_a_mixture_and_columns_as_in_training(folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        rows = [{"q": f"{name}{n}", "final": str(n), "extra": name} for n in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    (tmp_path / "eval.yaml").write_text(
        f"dataset: {{{a}: 1, {b}: 3}}\ncolumns: {{problem: q, answer: final, which: extra}}\n"
        f"overrides: {{{a}: {{template: 'one {{{{ problem }}}}'}}}}\ntemplate: 'two {{{{ problem }}}}'\n"
    )
    argv = ["eval", "--model", str(folder / "base"), "--config", str(tmp_path / "eval.yaml"), "--max-new-tokens", "2"]
    argv += ["--num-generations", "1", "--resamples", "200", "--reward-workers", "0", "--breakdown", "which"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["data"]["sources"] == [a, b] and set(summary["by"]["which"]) == {"a", "b"}
    file = str(tmp_path / "out" / "completions.parquet")
    rows = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert {(row["prompt"].split()[0], row["which"]) for row in rows} == {("one", "a"), ("two", "b")}
    assert sum(row["which"] == "b" for row in rows) == 5  # the mixture ends with b, which is drawn three times as often


def test_accuracy_through_load_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = [{"question": row["prompt"], "final": row["solution"]} for row in ROWS]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in problems) + "\n")
    argv = ["eval", "--model", str(folder / "base"), "--dataset", str(tmp_path / "own.jsonl"), "--columns"]
    argv += ['{"problem": "question", "answer": "final"}', "--template", "{{ problem }}", "--dataset-take", "2"]
    argv += ["--temperature", "0", "--num-generations", "1", "--max-new-tokens", "4", "--resamples", "200"]
    argv += ["--reward-workers", "0", "--max-prompt-tokens", "250", "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text("an older one")
    assert main(argv) == 2 and (tmp_path / "out" / "evaluation.json").read_text() == "an older one"
    argv += ["--overwrite"]
    assert main(argv) == 0
    assert "2 kept" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["prompts"] == 2 and summary["settings"]["reward"] == "accuracy_reward"
    assert summary["adapter"] is None and list(summary["results"]) == ["base"]
    assert summary["data"]["sources"] == [str(tmp_path / "own.jsonl")]


def test_bad_input_is_one_line_and_comes_before_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, missing = str(folder / "rows.jsonl"), str(tmp_path / "no-model")
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "solution": "1"}\n{"prompt": "", "solution": "1"}\n')
    (tmp_path / "golds.jsonl").write_text('{"prompt": "a", "solution": "1"}\n{"prompt": "b", "solution": ""}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "text.txt").touch()
    (tmp_path / "nothing.jsonl").touch()
    (tmp_path / "judge.py").write_text("most = 3\n")
    for taken in ("evaluation.json", "completions.parquet"):
        (tmp_path / f"had-{taken}").mkdir()
        (tmp_path / f"had-{taken}" / taken).touch()
    (tmp_path / "odd" / "evaluation.json").mkdir(parents=True)
    base = str(folder / "base")
    for argv, message in (
        ([], "dataset is missing"),
        (["--dataset", rows, "--which", "both"], "--which both needs --adapter"),
        (["--dataset", rows, "--k", "1", "8"], "k=8 must be in 1..num_generations=4"),
        (["--dataset", rows, "--temperature", "0"], "temperature=0 draws the same completion"),
        (["--dataset", rows, "--output", str(tmp_path / "text.txt")], "is a file, and a folder is to be written"),
        (["--dataset", rows, "--output", str(tmp_path / "had-evaluation.json")], "has evaluation.json already"),
        (["--dataset", rows, "--output", str(tmp_path / "had-completions.parquet")], "or --overwrite"),
        (["--dataset", rows, "--output", str(tmp_path / "odd"), "--overwrite"], "is a folder, and a file is to be"),
        (["--dataset", rows, "--seed", "-1", "--temperature", "0", "--num-generations", "1"], "seed=-1 must be in 0.."),
        (["--dataset", rows, "--template", "plain"], "--template has no effect on"),
        (["--dataset", rows, "--dataset-skip", "3"], "leave nothing of the 3 rows"),
        (["--dataset", rows, "--breakdown", "subject"], "--breakdown subject is no column of the prompts"),
        (["--dataset", rows, "--reward", "acuracy"], "there is no such reward"),
        (["--dataset", rows, "--reward", f"{tmp_path / 'judge.py'}:most"], "is no function or class"),
        (["--dataset", rows, "--reward-workers", "-1"], "reward_workers=-1 must be an integer of at least 0"),
        (["--dataset", rows, "--reward-timeout", "0"], "reward_timeout=0.0 must be a number of seconds above 0"),
        (["--dataset", str(tmp_path / "nothing.jsonl")], "nothing.jsonl cannot be read: it holds no rows"),
        (["--dataset", rows, "--num-generation", "3"], "did you mean --num-generations?"),
        (["--dataset", str(tmp_path / "broken.jsonl")], "broken.jsonl cannot be read"),
        (
            ["--dataset", str(tmp_path / "golds.jsonl"), "--model", base],
            "golds.jsonl, row 1: no gold answer can be read",
        ),
        (["--dataset", str(tmp_path / "empty.jsonl"), "--model", base], "empty.jsonl, row 1: the prompt has no tokens"),
    ):
        assert main(["eval", "--model", missing, *argv]) == 2, argv
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("trl-grpo eval: error: ") and message in error[-1], argv
        assert not any("Traceback" in line for line in error)
