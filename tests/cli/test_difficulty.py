"""`trl-grpo difficulty`: pass rates as columns, in one go or in several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from saved_adapters import save_adapter, save_base
from transformers import PreTrainedModel

from trl_grpo_ext import GroupSampler, load_prompts
from trl_grpo_ext.cli.main import main
from trl_grpo_ext.data import EncodedPrompt
from trl_grpo_ext.difficulty import Measurement, histogram, measure_pass_rates
from trl_grpo_ext.partial_file import rows_hash
from trl_grpo_ext.rollout import SamplingParams
from trl_grpo_ext.side_by_side import load_policy

PROBLEMS = ["ab", "why not?", "x", "forty two", "hi", "a longer one", "seven"]
# Passes where the first token's number is below a bound that the gold answer says; never judged where that is "none"
REWARD = """
def below(completion_ids, solution, **kwargs):
    return [None if s == "none" else float(ids[0] < int(s)) for ids, s in zip(completion_ids, solution)]
"""
BOUNDS = ["130", "0", "300", "90", "none", "200", "130"]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> Path:
    """A folder with a model, problems and a reward."""
    folder = tmp_path_factory.mktemp("difficulty")
    save_base(make_model(), tiny_tokenizer, folder / "base")
    rows = [{"question": p, "bound": b} for p, b in zip(PROBLEMS, BOUNDS, strict=True)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def arguments(place: Path, output: Path, *more: str) -> list[str]:
    argv = ["difficulty", "--model", str(place / "base"), "--dataset", str(place / "problems.jsonl")]
    argv += ["--columns", '{"problem": "question", "answer": "bound"}', "--template", "{{ problem }}"]
    argv += ["--reward", f"{place / 'rewards.py'}:below", "--reward-workers", "0"]
    return [*argv, "--samples", "5", "--max-new-tokens", "3", "--seed", "4", "--output", str(output), *more]


@pytest.fixture(scope="module")
def expected(place: Path) -> list[tuple[float | None, int, int]]:
    """Each prompt alone, drawn by the sampler itself."""
    policy = load_policy(str(place / "base"))
    sampler = GroupSampler(policy.model, policy.tokenizer)
    found: list[tuple[float | None, int, int]] = []
    for number, (problem, bound) in enumerate(zip(PROBLEMS, BOUNDS, strict=True)):
        ids = policy.tokenizer([problem])["input_ids"]
        drawn = sampler.generate(ids, 5, seed=4, first_prompt_index=number, max_new_tokens=3)
        passed = 0 if bound == "none" else sum(one[0] < int(bound) for one in drawn.completion_ids)
        judged = 0 if bound == "none" else 5
        found.append((passed / judged if judged else None, passed, judged))
    return found


def test_pass_rates_are_columns_and_the_band_is_kept(
    place: Path, expected: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "rated.jsonl"
    assert main(arguments(place, output, "--min-pass-rate", "0.2", "--max-pass-rate", "0.8", "--batch-size", "12")) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["problem"] for row in rows] == PROBLEMS
    assert [(row["pass_rate"], row["pass_count"], row["samples"]) for row in rows] == expected
    assert expected[1][0] == 0 and expected[2][0] == 1  # none below 0, all below 300
    kept = [p for p, (rate, _, _) in zip(PROBLEMS, expected, strict=True) if rate is not None and 0.2 <= rate <= 0.8]
    assert 0 < len(kept) < 5
    filtered = tmp_path / "out" / "rated-filtered.jsonl"
    assert [json.loads(line)["problem"] for line in filtered.read_text().splitlines()] == kept
    assert sorted(file.name for file in output.parent.iterdir()) == ["rated-filtered.jsonl", "rated.jsonl"]
    said = capsys.readouterr().out
    assert (
        "never" in said
        and "always" in said
        and "5 of 35 completions were not judged" in said
        and f"{len(kept)} of 7 prompts" in said
    )
    # What was written is a source of prompts again, with the same band
    columns = {"problem": "problem", "answer": "solution"}
    again = load_prompts(str(output), columns=columns, template="{{ problem }}", pass_rate=(0.2, 0.8))
    assert again["problem"][:] == kept and again["prompt"][:] == kept


def test_an_interrupted_measurement_goes_on(
    place: Path, expected: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, partial = tmp_path / "rated.parquet", tmp_path / "rated.parquet.partial"
    broken = place / "broken.py"
    broken.write_text(REWARD.replace("return", "if 'hi' in kwargs['prompts']: raise KeyboardInterrupt\n    return"))
    argv = arguments(place, output, "--batch-size", "10")  # two prompts at a time, "hi" in the third batch
    at = argv.index(f"{place / 'rewards.py'}:below")
    assert main([*argv[:at], f"{broken}:below", *argv[at + 1 :]]) == 1
    assert f"interrupted; rows that were done are in {partial}" in capsys.readouterr().err
    lines = partial.read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == [
        [number, passed, judged] for number, (_, passed, judged) in enumerate(expected[:4])
    ]
    # One count is changed by hand, to see that it is not drawn again; and the last line is one that was cut off
    partial.write_text("\n".join([lines[0], "[0, 4, 5]", *lines[2:4], "[3, 1"]))
    assert main(argv) == 0
    rows = Dataset.from_parquet(str(output)).to_list()
    found = [(row["pass_rate"], row["pass_count"], row["samples"]) for row in rows]
    assert found == [(0.8, 4, 5), *expected[1:]] and not partial.exists()
    # Of other options: refused
    partial.write_text(lines[0] + "\n")
    assert main([*argv, "--overwrite", "--temperature", "0.7"]) == 2
    assert "temperature=1.0 (now 0.7)" in capsys.readouterr().err


def test_bad_input_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rated.jsonl"
    there = tmp_path / "there.jsonl"
    there.touch()
    for argv, message in (
        (["difficulty", "--model", "x", "--output", str(output)], "dataset is missing"),
        (arguments(place, output)[:-2], "output is missing"),
        (arguments(place, tmp_path / "rated.csv"), "must end in .jsonl or .parquet"),
        (arguments(place, there), "is there already"),
        (arguments(place, output, "--min-pass-rate", "0.9", "--max-pass-rate", "0.1"), "the lower one first"),
        (arguments(place, output, "--filtered", str(output)), "are the same file"),
        (arguments(place, output, "--samples", "0"), "samples=0 must be at least 1"),
        (arguments(place, output, "--seed", "-1"), "seed=-1 must be in 0..2^64-1"),
        (arguments(place, output, "--which", "both"), "--which both cannot be measured"),
        (arguments(place, output, "--which", "adapter"), "--which adapter needs --adapter"),
        (arguments(place, output, "--reward-workers", "-1"), "reward_workers=-1 must be an integer of at least 0"),
        (arguments(place, output, "--reward", f"{place / 'rewards.py'}:__name__"), "is no function or class"),
        (arguments(place, output, "--dataset-tak", "3"), "did you mean --dataset-take?"),
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err.splitlines()
        assert message in error[-1] and not any("Traceback" in line for line in error), error
    assert main(arguments(place, output, "--min-pass-rate", "0.01", "--max-pass-rate", "0.02")) == 1
    assert "no prompt has a pass rate in [0.01, 0.02], of 7" in capsys.readouterr().err
    assert output.exists()  # what was measured is not lost


def test_the_base_that_an_adapter_names(place: Path, expected: list[Any], tmp_path: Path) -> None:
    adapter, _ = save_adapter(place / "base", tmp_path / "adapter", spread=0.5)
    argv = [word for word in arguments(place, tmp_path / "rated.jsonl") if word not in ("--model", str(place / "base"))]
    assert main([*argv, "--adapter", str(adapter), "--which", "base"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    assert [(row["pass_rate"], row["pass_count"], row["samples"]) for row in rows] == expected
    assert main([*argv[:-2], "--output", str(tmp_path / "own.jsonl"), "--adapter", str(adapter)]) == 0
    own = [json.loads(line)["pass_count"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert own != [row["pass_count"] for row in rows]


def test_histogram_by_hand() -> None:
    rates = [0.0, 0.0, 0.1, 0.3, 0.5, 0.7, 0.75, 0.999, 1.0, None]
    assert histogram(rates, bins=4) == [
        ("never", 2),
        ("0 - 25 %", 1),
        ("25 - 50 %", 1),
        ("50 - 75 %", 2),
        ("75 - 100 %", 2),
        ("always", 1),
        ("not judged", 1),
    ]
    assert histogram([0.3, 0.7], bins=10)[4] == ("30 - 40 %", 1)  # 0.3 * 10 is below 3 in floating point


def test_columns_of_an_earlier_measurement_are_replaced(place: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["ab"], "solution": ["1"], "pass_rate": [0.9], "samples": [100]})

    def never(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.99] * len(completions)  # 1.0 passes, nothing less

    how = Measurement(2, SamplingParams(max_new_tokens=2))
    policy = load_policy(str(place / "base"))
    found = measure_pass_rates(policy, rows, how, reward=never, partial=tmp_path / "partial", progress=False)
    assert found.to_list() == [{"prompt": "ab", "solution": "1", "pass_rate": 0.0, "pass_count": 0, "samples": 2}]


def test_a_measurement_of_other_columns_is_another_one() -> None:
    """A reward may read any of them: counts of then are not those of the rows of now."""
    encoded = [EncodedPrompt([1, 2], "")]
    rows = [Dataset.from_list([{"prompt": "a", "answer": answer}]) for answer in ("1", "2", "1")]
    first, other, same = (rows_hash(one, encoded) for one in rows)
    assert first == same != other
