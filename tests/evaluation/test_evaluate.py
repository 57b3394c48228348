"""Base and adapter on the same prompts: what is drawn, judged, counted, compared and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from saved_adapters import save_adapter, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_grpo_ext import Evaluation, Rollouts, accuracy_reward, evaluate_policy, think_answer_format_reward
from trl_grpo_ext.data import PromptEncoder
from trl_grpo_ext.evaluation import Settings, load_summary
from trl_grpo_ext.evaluation.judging import Judge
from trl_grpo_ext.evaluation.summary import per_prompt
from trl_grpo_ext.rewards import AccuracyReward, Limits, RewardError, in_process
from trl_grpo_ext.rollout import SamplingParams
from trl_grpo_ext.side_by_side import load_policy, sample_side_by_side

SETTINGS: dict[str, Any] = {"num_generations": 3, "k": [1, 2, 3], "max_new_tokens": 6, "seed": 5, "progress": False}
SETTINGS["resamples"] = 500


@in_process
def even(completion_ids: list[list[int]], fails: list[bool], **kwargs: Any) -> list[float | None]:
    """Right where the tokens' sum is even; partly right (which is not right) where it ends in 1; silent on a column."""
    sums = [sum(ids) for ids in completion_ids]
    return [
        None if fail else 1.0 if total % 2 == 0 else 0.5 * (total % 10 == 1)
        for total, fail in zip(sums, fails, strict=True)
    ]


@in_process
def short(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids) < 6) for ids in completion_ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any):
    place = tmp_path_factory.mktemp("evaluate")
    base = save_base(make_model(), tiny_tokenizer, place / "base")
    save_adapter(base, place / "adapter", spread=0.2)
    return place


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": ["ab", "question", "x", "forty-two", "hi-you", "why", "0"],
            "level": [2, 10, 2, 10, 2, 2, 10],
            "answer": list("abcdefg"),
            "fails": [False] * 6 + [True],
        }
    )


@pytest.fixture(scope="module")
def both(folder: Path, rows: Dataset) -> Evaluation:
    return evaluate_policy(
        None, rows, adapter=str(folder / "adapter"), reward=even, format_reward=short, batch_size=6, **SETTINGS
    )


def test_completions_are_those_of_trl_grpo_sample(both: Evaluation, folder: Path, rows: Dataset) -> None:
    """The same noise for base and adapter, whatever the batches: 2 prompts at a time here, all at once there."""
    policy = load_policy(None, str(folder / "adapter"))
    expected = sample_side_by_side(
        policy, rows["prompt"][:], "both", SamplingParams(max_new_tokens=6), num_generations=3, seed=5, chat=False
    )
    for who in ("base", "adapter"):
        found = [row for row in both.completions if row["policy"] == who]
        assert [row["completion"] for row in found] == [s.text for row in expected for s in row.samples[who]]
        assert [row["tokens"] for row in found] == [s.tokens for row in expected for s in row.samples[who]]
        assert [row["logp"] for row in found] == pytest.approx([s.logp for row in expected for s in row.samples[who]])
        assert [(row["prompt_index"], row["completion_index"]) for row in found] == [
            (p, g) for p in range(7) for g in range(3)
        ]


def test_numbers_are_those_of_the_completions(both: Evaluation) -> None:
    """Every mean again, from the rows of the Parquet file, by going through all subsets."""
    for who in ("base", "adapter"):
        results = both.summary["results"][who]
        groups = [
            [r for r in both.completions if r["policy"] == who and r["prompt_index"] == p] for p in range(6)
        ]  # the 7th prompt has no reward
        for k in (1, 2, 3):
            solved = [
                sum(any(r["reward"] == 1.0 for r in subset) for subset in combinations(group, k))
                / len(list(combinations(group, k)))
                for group in groups
            ]
            assert results[f"pass@{k}"]["mean"] == pytest.approx(sum(solved) / 6)
            assert results[f"pass@{k}"]["prompts"] == 6
            assert results[f"pass@{k}"]["low"] <= results[f"pass@{k}"]["mean"] <= results[f"pass@{k}"]["high"]
        everything = [r for r in both.completions if r["policy"] == who]
        assert results["avg@3"]["mean"] == pytest.approx(results["pass@1"]["mean"])
        assert results["mean_length"]["mean"] == pytest.approx(sum(r["tokens"] for r in everything) / 21)
        assert results["truncated"]["mean"] == pytest.approx(
            sum(r["finish_reason"] == "length" for r in everything) / 21
        )
        assert results["format"]["mean"] == pytest.approx(sum(r["tokens"] < 6 for r in everything) / 21)
        assert results["no_answer"]["mean"] == pytest.approx(sum(r["answer"] is None for r in everything) / 21)
        assert both.summary["counts"][who] == {
            "completions": 21,
            "without_reward": 3,
            "reward_failed": 0,
            "comparisons_failed": 0,
        }
    results = both.summary["results"]
    for name, found in results["difference"].items():
        assert found["mean"] == pytest.approx(results["adapter"][name]["mean"] - results["base"][name]["mean"])
        assert 0 < found["p_value"] <= 1
    assert results["base"]["pass@1"]["mean"] != results["adapter"]["pass@1"]["mean"]
    assert 0 < results["base"]["pass@1"]["mean"] < 1
    assert both.mean("pass@2") == results["adapter"]["pass@2"]["mean"]


def test_breakdown_by_level(both: Evaluation) -> None:
    by_level = both.summary["by"]["level"]
    assert list(by_level) == ["2", "10"]  # by size, not as text
    assert (by_level["2"]["prompts"], by_level["10"]["prompts"]) == (4, 3)
    for who in ("base", "adapter"):
        parts = [(found[who]["pass@1"]["mean"], found[who]["pass@1"]["prompts"]) for found in by_level.values()]
        assert [count for _, count in parts] == [4, 2]
        whole = both.summary["results"][who]["pass@1"]["mean"]
        assert sum(mean * count for mean, count in parts) / 6 == pytest.approx(whole)
    assert list(both.summary["by"]) == ["level"]  # there is no subject


def test_json_and_parquet_are_written_and_read(both: Evaluation, tmp_path: Path) -> None:
    both.save(tmp_path / "new" / "folder")
    summary = load_summary(tmp_path / "new" / "folder")
    assert summary == json.loads(json.dumps(both.summary))
    file = str(tmp_path / "new" / "folder" / "completions.parquet")
    read = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert read.num_rows == 2 * 7 * 3
    assert read.to_list() == both.completions.to_list()
    assert read[0]["data_answer"] == "a"  # the dataset's, beside the one that was extracted
    assert {"prompt", "completion", "reward", "right", "format_reward", "answer", "vote", "level"} <= set(read[0])
    console = Console(file=StringIO(), width=200)
    both.print(console)
    text = console.file.getvalue()
    assert "pass@2" in text and "adapter - base" in text and "by level" in text
    assert "base: 3 of 21 completions have no reward" in text
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an evaluation"):
        load_summary(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot be read"):
        load_summary(tmp_path / "none")


def test_an_adapter_in_memory_and_one_policy_alone(both: Evaluation, folder: Path, rows: Dataset) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    alone = evaluate_policy(model, rows, tokenizer=tokenizer, reward=even, format_reward=None, **SETTINGS)
    assert list(alone.summary["results"]) == ["base"]
    assert alone.summary["results"]["base"]["pass@2"] == both.summary["results"]["base"]["pass@2"]
    assert "format" not in alone.summary["results"]["base"]
    in_memory = evaluate_policy(
        load_policy(None, str(folder / "adapter")).model,
        rows.to_iterable_dataset(),
        tokenizer=tokenizer,
        which="adapter",
        reward=even,
        format_reward=short,
        **SETTINGS,
    )
    assert in_memory.summary["results"] == {"adapter": both.summary["results"]["adapter"]}


def test_majority_of_extracted_answers(folder: Path) -> None:
    """`1/2` and `0.5` are one answer with two votes; the completion without an answer has none."""
    from trl_grpo_ext.evaluation.votes import SameAnswer, undecided_pairs, vote

    answers = ["0.5", "3", "1/2", None, " 3", "7"]
    pairs = undecided_pairs(answers)
    assert pairs == [("0.5", "3"), ("0.5", "1/2"), ("0.5", "7"), ("3", "1/2"), ("3", "7"), ("1/2", "7")]
    verdicts = SameAnswer()([b for _, b in pairs], [a for a, _ in pairs])
    assert verdicts == [0, 1, 0, 0, 0, 0]
    same = {pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict}
    assert vote(answers, same) == [0, 1, 0, None, 1, 2]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"k": 2}, TypeError, r"k=2 must be a list of integers, such as \[1, 3\]"),
        ({"k": ["1"]}, TypeError, r"k=\('1',\) must be a list of integers"),
        ({"num_generations": 1.5}, TypeError, "num_generations=1.5 must be an integer"),
        ({"seed": True}, TypeError, "seed=True must be an integer"),
        ({"which": "bas"}, ValueError, "which='bas' must be one of base, adapter, both"),
        ({"breakdown": "kind"}, ValueError, r"breakdown='kind' must be a list of columns: \['kind'\]"),
        ({"breakdown": ["level", "kid"]}, ValueError, r"breakdown: 'kid' is no column of data \(its columns: "),
    ],
)
def test_options_of_a_wrong_type(rows: Dataset, given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        evaluate_policy("no/model", rows, **{"reward": even, **SETTINGS, **given})


def test_what_cannot_be_evaluated_is_refused(folder: Path, rows: Dataset) -> None:
    base = str(folder / "base")
    plain = {**SETTINGS, "k": []}
    with pytest.raises(ValueError, match=r"data has none of the columns \['solution'\]"):
        evaluate_policy(base, rows, reward=AccuracyReward(gold_columns=["solution"]), **plain)
    golds = rows.add_column("solution", ["1", "2", None, "4", "", "6", "7"])
    with pytest.raises(ValueError, match=r"data, row 2: no gold answer can be read from .*; 2 of 7 rows"):
        evaluate_policy(base, golds, reward=AccuracyReward(gold_columns=["solution"]), **plain)
    with pytest.raises(ValueError, match=r"k=4 must be in 1\.\.num_generations=3"):
        evaluate_policy(base, rows, reward=even, **{**SETTINGS, "k": [1, 4]})
    with pytest.raises(ValueError, match="temperature=0 draws the same completion"):
        evaluate_policy(base, rows, reward=even, temperature=0, **plain)
    with pytest.raises(ValueError, match="'num_generation' is no setting"):
        evaluate_policy(base, rows, reward=even, num_generation=3)
    with pytest.raises(ValueError, match="which='both' needs an adapter"):
        evaluate_policy(base, rows, reward=even, which="both", **plain)
    long = Dataset.from_dict({"prompt": ["ab", "x" * 300], "fails": [False, False]})
    with pytest.raises(ValueError, match="data, row 1: the prompt has 300 tokens"):
        evaluate_policy(base, long, reward=even, **plain)
    with pytest.raises(ValueError, match="data, row 0: the prompt has no tokens"):
        evaluate_policy(base, Dataset.from_dict({"prompt": [""], "fails": [False]}), reward=even, **plain)

    @in_process
    def broken(completions: list[str], **kwargs: Any) -> list[float]:
        raise RuntimeError("no")

    with pytest.raises(RewardError, match="reward 'broken' failed on 9 of 9"):
        evaluate_policy(base, rows.select(range(3)), reward=broken, format_reward=None, **plain)


class Written:
    """In a sampler's place: completions as they are written here, so that their answers are known."""

    def __init__(self, tokenizer: Any, texts: list[list[str]]) -> None:
        self.ids = [[tokenizer(text)["input_ids"] for text in group] for group in texts]

    def generate(self, prompt_ids: Any, num_generations: int, *, seed: int, prompt_indices: Any) -> Rollouts:
        groups = [self.ids[number] for number in prompt_indices]
        ids = [one for group in groups for one in group]
        return Rollouts(prompt_ids, ids, torch.zeros(len(ids), 1), ["eos"] * len(ids), num_generations)


def test_accuracy_format_and_majority_of_known_completions(folder: Path) -> None:
    """Judged by the package's rewards, in worker processes."""
    policy = load_policy(str(folder / "base"))
    rows = Dataset.from_dict({"prompt": ["half of 1?", "2+2?"], "solution": ["0.5", "4"]})
    texts = [
        ["<think>so</think><answer>1/2</answer>", "The answer is 3.", "It is 0.5", "3", "nothing to say"],
        ["4", "5", "The answer is 5", "\\boxed{5.0}", "<think>a</think><answer>4</answer>"],
    ]
    how = Settings(num_generations=5, k=(1, 3, 5), resamples=200, batch_size=5)
    encoder = PromptEncoder(policy.tokenizer)
    encoded = [encoder.encode(prompt) for prompt in rows["prompt"]]
    limits = Limits(workers=2)
    judge = Judge(rows, encoder, encoded, how, accuracy_reward, think_answer_format_reward, limits, None)
    try:
        groups = judge.sample(Written(policy.tokenizer, texts), policy, "base", progress=False)
    finally:
        judge.close()
    assert [[one.right for one in group] for group in groups] == [
        [True, False, True, False, False],
        [True, False, False, False, True],
    ]
    assert [[one.answer for one in group] for group in groups] == [
        ["1/2", "3", "0.5", "3", None],
        ["4", "5", "5", "5.0", "4"],
    ]
    assert [[one.vote for one in group] for group in groups] == [[0, 1, 0, 1, None], [0, 1, 1, 1, 0]]
    values = per_prompt(groups, how.ks)
    assert values["avg@5"].tolist() == pytest.approx([0.4, 0.4])
    # maj@5: two against two is 1/2; two against three is 0
    assert values["maj@5"].tolist() == pytest.approx([0.5, 0.0])
    # 1 - C(3,3)/C(5,3)
    assert values["pass@3"].tolist() == pytest.approx([0.9, 0.9])
    assert values["format"].tolist() == pytest.approx([0.2, 0.2])
    assert values["no_answer"].tolist() == pytest.approx([0.2, 0.0])
    assert judge.counts(groups) == {
        "completions": 10,
        "without_reward": 0,
        "reward_failed": 0,
        "comparisons_failed": 0,
    }
