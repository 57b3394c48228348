"""Rules of the firewall: what is called again, what is kept, where functions run, and when a run is stopped."""

from __future__ import annotations

import asyncio
import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import misbehaving
import pytest
import torch

from trl_grpo_ext.rewards import Limits, RewardError, RewardScorer, runner
from trl_grpo_ext.rewards.batch import RewardBatch
from trl_grpo_ext.rewards.failures import FailureLog
from trl_grpo_ext.rewards.outcome import Problem


@pytest.fixture
def scorer_of() -> Any:
    """Scorers with one worker, closed in the end."""
    scorers: list[RewardScorer] = []

    def make(*functions: Any, **limits: Any) -> RewardScorer:
        chosen = Limits(**{"timeout": 2.0, "memory_mb": 256, "workers": 1} | limits)
        scorers.append(RewardScorer(list(functions), limits=chosen, max_failure_rate=1.0))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def rewards(scorer: RewardScorer, completions: list[str], state: Any = None, **columns: list[Any]) -> list[list[float]]:
    """Of each function, -1 for nothing."""
    count = len(completions)
    scores = scorer.score(["p"] * count, completions, [[1]] * count, columns, step=0, trainer_state=state)
    return torch.nan_to_num(scores.rewards, nan=-1.0).T.tolist()


def test_a_cached_reward_is_of_the_same_columns_and_function(scorer_of: Any) -> None:
    scorer = scorer_of(misbehaving.worth, misbehaving.by_row)
    # Equal prompts and completions; what differs is the gold answer's column, and the function
    assert rewards(scorer, ["abc", "abc", "abc"], points=[5.0, 7.0, 5.0]) == [[5.0, 7.0, 5.0], [3.0, 3.0, 3.0]]
    assert rewards(scorer, ["abc", "abc"], points=[7.0, 9.0]) == [[7.0, 9.0], [3.0, 3.0]]


def test_the_cache_forgets_what_was_not_used_for_longest(
    scorer_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_CACHED_ROWS", 2)
    scorer = scorer_of(misbehaving.counted)
    for completion in ("a", "bb", "a", "ccc", "a", "bb"):  # `ccc` takes the place of `bb`, as `a` had been used since
        rewards(scorer, [completion], count_file=[str(tmp_path / "log")])
    assert (tmp_path / "log").read_text().split() == ["a", "bb", "ccc", "bb"]


def test_an_unmarked_function_is_called_on_every_batch(scorer_of: Any, tmp_path: Path) -> None:
    scorer = scorer_of(misbehaving.noted)
    for _ in range(2):
        assert rewards(scorer, ["a"], count_file=[str(tmp_path / "log")]) == [[1.0]]
        assert rewards(scorer, ["a", "a", "bb"], count_file=[str(tmp_path / "log")] * 3) == [[1.0, 1.0, 2.0]]
    assert (tmp_path / "log").read_text() == "1 3 1 3 "


def test_failures_are_not_kept(scorer_of: Any, tmp_path: Path) -> None:
    """The next time a judge on the other side of a network may answer."""
    scorer = scorer_of(misbehaving.counted)
    missing = str(tmp_path / "folder" / "log")
    assert rewards(scorer, ["a"], count_file=[missing]) == [[-1.0]]
    (tmp_path / "folder").mkdir()
    assert rewards(scorer, ["a"], count_file=[missing]) == [[1.0]]


def test_a_batch_that_hung_is_not_tried_as_a_whole_again(scorer_of: Any, tmp_path: Path) -> None:
    scorer = scorer_of(misbehaving.noted, timeout=0.5)
    log = str(tmp_path / "log")
    assert rewards(scorer, ["ok", "hang", "four"], count_file=[log] * 3) == [[2.0, -1.0, 4.0]]
    assert sorted((tmp_path / "log").read_text().split()) == ["1", "1", "1", "3"]
    assert rewards(scorer, ["ok", "four"], count_file=[log] * 2) == [[2.0, 4.0]]
    assert (tmp_path / "log").read_text().split()[4:] == ["1", "1"]


def test_one_that_raised_is(scorer_of: Any, tmp_path: Path) -> None:
    scorer = scorer_of(misbehaving.noted)
    log = str(tmp_path / "log")
    assert rewards(scorer, ["ok", "raise:x"], count_file=[log] * 2) == [[2.0, -1.0]]
    assert rewards(scorer, ["ok", "four"], count_file=[log] * 2) == [[2.0, 4.0]]
    assert (tmp_path / "log").read_text() == "2 1 1 2 "


def test_async_calls_are_bounded_in_number(scorer_of: Any) -> None:
    running, most = 0, 0

    async def one_at_a_time(completions: list[str], **kwargs: Any) -> list[float]:
        nonlocal running, most
        if len(completions) > 1:
            raise ValueError("one at a time")
        running += 1
        most = max(most, running)
        for _ in range(20):  # turns of the loop in which others begin
            await asyncio.sleep(0)
        running -= 1
        return [1.0]

    assert rewards(scorer_of(one_at_a_time, concurrency=3), list("abcdefg")) == [[1.0] * 7]
    assert most == 3


@pytest.mark.parametrize("mark", ["reward_is_quick", "reward_runs_in_process"])
def test_marked_functions_run_in_this_process(scorer_of: Any, mark: str) -> None:
    here, there = functools.partial(misbehaving.process_id), functools.partial(misbehaving.process_id)
    setattr(here, mark, True)
    ((mine,), (other,)) = rewards(scorer_of(here, there), ["a"])
    assert mine == torch.tensor(float(os.getpid())).item() != other


def test_the_log_of_the_run_stays_here(scorer_of: Any) -> None:
    """It grows with the run, and would be sent with every batch."""
    state = SimpleNamespace(global_step=1, log_history=[{"loss": 1.0}] * 3, stateful_callbacks={})
    assert rewards(scorer_of(misbehaving.history_length), ["a"], state) == [[0.0]]


def batch_of(count: int, step: int = 2) -> RewardBatch:
    names = [f"c{i}" for i in range(count)]
    return RewardBatch(["p"] * count, names, [[1]] * count, {}, step, [""] * count)


@pytest.mark.parametrize(("rate", "most"), [(0.5, 2), (0.6, 3), (0.0, 0), (1.0, 5)])
def test_the_run_stops_above_the_rate_and_not_at_it(rate: float, most: int) -> None:
    """Of 5 completions: 0.5 * 5 = 2.5 allows 2, 0.6 * 5 = 3 allows 3."""
    log, problem = FailureLog(None, rate), Problem("raised", "raised ValueError: no")
    log.report("r", dict.fromkeys(range(most), problem), batch_of(5))
    if most < 5:
        with pytest.raises(RewardError, match=f"failed on {most + 1} of 5"):
            log.report("r", dict.fromkeys(range(most + 1), problem), batch_of(5))


def test_failures_are_appended_those_that_stop_the_run_too(tmp_path: Path) -> None:
    log, problem = FailureLog(tmp_path / "f.jsonl", 0.5), Problem("value", "returned nan (float)")
    log.report("r", {1: problem}, batch_of(3, step=2))
    with pytest.raises(RewardError):
        log.report("s", {2: problem, 0: problem}, batch_of(3, step=7))
    kept = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [(row["step"], row["reward"], row["completion"]) for row in kept] == [
        (2, "r", "c1"),
        (7, "s", "c0"),
        (7, "s", "c2"),
    ]
