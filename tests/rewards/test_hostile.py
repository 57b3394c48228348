"""Over 200 hostile completions: each is scored or fails within its time and memory, and nothing is left running."""

from __future__ import annotations

import math
import time
from typing import Any

import hostile
import psutil
import pytest

from trl_grpo_ext.rewards import Limits, RewardScorer, accuracy_reward, think_answer_format_reward

HOSTILE = hostile.hostile_completions()
TIMEOUT = 3.0
MEMORY_MB = 512


@pytest.fixture(scope="module")
def scorer() -> Any:
    limits = Limits(timeout=TIMEOUT, memory_mb=MEMORY_MB, workers=2)
    scorer = RewardScorer([accuracy_reward, think_answer_format_reward], limits=limits, max_failure_rate=1.0)
    yield scorer
    children = psutil.Process().children(recursive=True)
    scorer.close()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def score(scorer: RewardScorer, completions: list[str], gold: str = "42") -> Any:
    ids = [[i] for i in range(len(completions))]
    columns = {"solution": [gold] * len(completions)}
    return scorer.score(["p"] * len(completions), completions, ids, columns, step=0)


def test_there_are_two_hundred() -> None:
    assert len(set(HOSTILE)) == len(HOSTILE) >= 200


def test_each_is_scored_or_failed_in_time(scorer: RewardScorer) -> None:
    started = time.monotonic()
    scores = score(scorer, HOSTILE)
    elapsed = time.monotonic() - started
    # Without workers beside the hanging ones, those would take TIMEOUT each, two at a time
    assert elapsed < 60
    for k in range(2):
        for reward, failed in zip(scores.rewards[:, k].tolist(), scores.failed[:, k].tolist(), strict=True):
            assert failed or reward in (0.0, 1.0)
    assert not scores.failed[:, 1].any()  # the format is plain to see, whatever the text
    assert scores.failed[:, 0].float().mean() < 0.1  # the guard in front of math-verify stops nearly all of them


def test_memory_stays_under_the_cap(scorer: RewardScorer) -> None:
    score(scorer, [text for text in HOSTILE if len(text) > 50_000][:16])
    pool = scorer._runner._pool
    assert pool is not None
    start = psutil.Process(pool._template.pid).memory_info().vms
    for worker in pool.workers:
        assert psutil.Process(worker.pid).memory_info().vms <= start + (MEMORY_MB + 64) * 2**20


def test_honest_ones_keep_their_rewards(scorer: RewardScorer) -> None:
    """8 of a batch of 64 are hostile: the other 56 are judged as they are alone."""
    honest = [f"<think>6*{i}</think><answer>{6 * i}</answer>" for i in range(56)]
    bad = [text for text in HOSTILE if "9^{9^{9^{9}}}" in text or text.startswith("{")][:3] + HOSTILE[-5:]
    batch = [*honest[:20], *bad, *honest[20:]]
    rewards = score(scorer, batch).rewards[:, 0].tolist()
    judged = rewards[:20] + rewards[20 + len(bad) :]
    assert judged == [1.0 if 6 * i == 42 else 0.0 for i in range(56)]
    assert all(math.isnan(reward) or reward == 0.0 for reward in rewards[20 : 20 + len(bad)])
