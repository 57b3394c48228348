"""What the firewall around rewards costs: completions per second with it, and by calling the reward directly.

    python benchmarks/firewall.py                    # every reward, 1 worker on 1 core and the default number, 3 rounds
    python benchmarks/firewall.py --rounds 2 --rewards accuracy

512 ordinary completions a round, real ones where the data is (`--data`), else generated. Both sides call the same
function on the same rows, one after the other, and take turns in going first. All completions are different and every
round has new ones, as in training: neither the firewall's cache of rows, which is on like the time-out and the cap on
memory, nor what a reward and the libraries below it remember of a text that they have seen, helps one side. Workers are
started and have run once before the clock does; what starting takes is a figure of its own. With 1 worker the whole
comparison is on one core, training process and worker together. Prints a table, medians over the rounds, and keeps it
in `results/firewall.json` and `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from firewall_report import print_table
from report import REWARD_PACKAGES, describe_machine, write_markdown

from trl_grpo_ext.rewards import Limits, RewardScorer, accuracy_reward, think_answer_format_reward
from trl_grpo_ext.rewards.repetition import repetition_reward

HERE = Path(__file__).parent
FILES = ("completions_qwen25math/math_cot_100.jsonl.gz", "processbench/math.jsonl.gz", "processbench/gsm8k.jsonl")
CHARS_PER_ID = 4  # of mathematics in English, by the tokenizers of today


def distinct_words_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """A user's own function, unmarked: it is called once with the whole batch, by one worker."""
    scores = []
    for completion in completions:
        words = completion.lower().split()
        pairs = set(itertools.pairwise(words))
        scores.append((len(set(words)) + len(pairs)) / max(1, 2 * len(words)))
    return scores


REWARDS: dict[str, Callable[..., Any]] = {
    "accuracy": accuracy_reward,
    "repetition": repetition_reward(),
    "own, unmarked": distinct_words_reward,
    "format": think_answer_format_reward,
}


@dataclass(frozen=True)
class Rows:
    """What is scored: prompts, completions, their tokens' ids and the gold answers, N each."""

    prompts: list[str]
    completions: list[str]
    ids: list[list[int]]
    gold: list[str]
    source: str

    def call(self, function: Callable[..., Any]) -> list[float | None]:
        return function(prompts=self.prompts, completions=self.completions, completion_ids=self.ids, solution=self.gold)

    def score(self, scorer: RewardScorer, step: int) -> list[float | None]:
        scores = scorer.score(self.prompts, self.completions, self.ids, {"solution": self.gold}, step=step)
        return [None if reward != reward else reward for reward in scores.rewards[:, 0].tolist()]


def read_rounds(data: Path, count: int, rounds: int) -> list[Rows]:
    """`count` rows for each round, a mix of the files; generated where a file is missing."""
    distinct: dict[str, dict[str, Any]] = {}
    for name in FILES:
        path = data / name
        if not path.exists():
            return [generated_rows(number * count, count) for number in range(rounds)]
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                distinct.setdefault(row.get("completion") or "\n\n".join(row["steps"]), row)
    if len(distinct) < count * rounds:
        raise SystemExit(
            f"--count {count} --rounds {rounds} takes {count * rounds} different completions: there are "
            f"{len(distinct)} in {data}; choose smaller numbers."
        )
    shuffled = random.Random(0).sample(list(distinct.items()), count * rounds)
    return [_rows(shuffled[start : start + count]) for start in range(0, len(shuffled), count)]


def _rows(chosen: list[tuple[str, dict[str, Any]]]) -> Rows:
    completions = [text for text, _ in chosen]
    ids = [_ids(text) for text in completions]
    prompts, gold = [row["problem"] for _, row in chosen], [str(row["gold"]) for _, row in chosen]
    return Rows(
        prompts, completions, ids, gold, "completions of models for MATH and GSM8K (Qwen2.5-Math, ProcessBench)"
    )


def generated_rows(first: int, count: int) -> Rows:
    """Arithmetic, step by step."""
    prompts, completions, gold = [], [], []
    for i in range(first, first + count):
        a, b, c = 12 + i, 7 + i % 13, 3 + i % 29
        prompts.append(f"A shop has {a} boxes of {b} pens and sells {c} pens. How many are left?")
        lines = [f"There are {a} boxes with {b} pens each, which makes {a} \\times {b} = {a * b} pens."] * 2
        lines += [f"After {c} are sold, {a * b} - {c} = {a * b - c} are left.", f"\\boxed{{{a * b - c + i % 2}}}"]
        completions.append("\n\n".join(lines))
        gold.append(str(a * b - c))
    return Rows(prompts, completions, [_ids(text) for text in completions], gold, "generated arithmetic")


def _ids(text: str) -> list[int]:
    """As many as a tokenizer would give, of the size that they have."""
    return [crc32(text[i : i + CHARS_PER_ID].encode()) % 150_000 for i in range(0, len(text), CHARS_PER_ID)]


def measure(name: str, rounds: list[Rows], workers: int | None) -> dict[str, Any]:
    """Seconds of every round of both sides."""
    function = REWARDS[name]
    started = time.perf_counter()
    scorer = RewardScorer([function], limits=Limits(workers=workers), max_failure_rate=1.0)
    scorer.score(["warm up"], ["1"], [[1]], {"solution": ["1"]}, step=0)
    seconds: dict[str, list[float]] = {"direct": [], "firewall": []}
    result: dict[str, Any] = {"start_up_seconds": round(time.perf_counter() - started, 3), "seconds": seconds}
    try:
        for number, rows in enumerate(rounds, 1):
            sides: dict[str, Callable[[], list[float | None]]] = {
                "direct": partial(rows.call, function),
                "firewall": partial(rows.score, scorer, number),
            }
            rewards = {}
            for side in sorted(sides, reverse=number % 2 == 0):
                started = time.perf_counter()
                rewards[side] = sides[side]()
                seconds[side].append(round(time.perf_counter() - started, 5))
            if rewards["firewall"] != [None if value is None else as_float32(value) for value in rewards["direct"]]:
                raise SystemExit(f"the firewall changed a reward of {scorer.names[0]}")
    finally:
        scorer.close()
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    result["completions_per_second"] = {side: round(len(rounds[0].gold) / s, 1) for side, s in medians.items()}
    # The sides of a round are neighbours in time, so that a busy moment of the machine hits both
    ratios = [d / f for d, f in zip(seconds["direct"], seconds["firewall"], strict=True)]
    return {**result, "ratio": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios]}


def as_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the files")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=512, help="completions")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md and results/")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify logs what it cannot parse
    machine, rounds = describe_machine(REWARD_PACKAGES), read_rounds(options.data, options.count, options.rounds)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    measured = []
    for workers in (1, None):
        for name in options.rewards:
            print(f"{name}, {workers or 'default'} workers ...", file=sys.stderr, flush=True)
            if cores:  # workers inherit it
                os.sched_setaffinity(0, {min(cores)} if workers == 1 else cores)
            with get_context("fork").Pool(1) as fresh:  # or this process would know the texts from the last time
                entry = fresh.apply(measure, (name, rounds, workers))
            used = workers or min(os.cpu_count() or 1, 8)
            entry = {"reward": name, "workers": used, "one_core": bool(cores) and workers == 1, **entry}
            measured.append(entry)
    mean_chars = round(statistics.mean(len(text) for rows in rounds for text in rows.completions))
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "rounds": options.rounds,
        "completions": {"count": options.count, "mean_characters": mean_chars, "source": rounds[0].source},
        "rows": measured,
    }
    print_table(report)
    (options.results / "results").mkdir(parents=True, exist_ok=True)
    (options.results / "results" / "firewall.json").write_text(json.dumps(report, indent=1) + "\n")
    write_markdown(options.results)


if __name__ == "__main__":
    main()
