"""The firewall: whatever a reward does, every other completion keeps its value, and nothing is left running."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import misbehaving
import psutil
import pytest
import torch

from trl_grpo_ext.rewards import Limits, RewardError, RewardScorer

TIMEOUT = 2.0


@pytest.fixture
def make_scorer() -> Iterator[Any]:
    scorers: list[RewardScorer] = []

    def make(*functions: Any, **kwargs: Any) -> RewardScorer:
        limits = Limits(**{"timeout": TIMEOUT, "memory_mb": 256, "workers": 2} | kwargs.pop("limits", {}))
        scorers.append(RewardScorer(list(functions), limits=limits, **kwargs))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def score(scorer: RewardScorer, *completions: str, step: int = 4, **columns: list[Any]) -> Any:
    ids = [[ord(character) for character in completion] for completion in completions]
    prompts = [f"p{i}" for i in range(len(completions))]
    state = SimpleNamespace(global_step=step, log_history=[1], stateful_callbacks={"a": 1})
    return scorer.score(prompts, list(completions), ids, columns, step=step, trainer_state=state)


def values(scores: Any, k: int = 0) -> list[float | None]:
    return [None if math.isnan(value) else value for value in scores.rewards[:, k].tolist()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timeout": 0}, "reward_timeout=0 must be a number of seconds above 0"),
        ({"timeout": math.inf}, "reward_timeout=inf must be"),
        ({"workers": -1}, "reward_workers=-1 must be an integer of at least 0"),
        ({"memory_mb": 0}, "reward_memory_mb=0 must be an integer of at least 1"),
        ({"concurrency": 0}, "reward_concurrency=0 must be"),
    ],
)
def test_limits_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**given)


# What a completion makes the reward do, and how the failure is called
FAILURES = {
    "raise:x": "raised",
    "hang": "timeout",
    "memory:4096": "raised",  # MemoryError
    "exit": "raised",  # SystemExit
    "die": "died",
    "nan": "value",
    "inf": "value",
    "huge": "value",  # finite, but not in float32
    "text": "value",
}


@pytest.mark.parametrize("function", [misbehaving.by_row, misbehaving.whole_batch])
def test_only_what_fails_is_lost(make_scorer: Any, tmp_path: Path, function: Any) -> None:
    scorer = make_scorer(function, failures_file=tmp_path / "f.jsonl", max_failure_rate=0.9)
    completions = ["ok", *FAILURES, "none", "four", "memory:1"]
    scores = score(scorer, *completions)
    # "ok" is worth its 2 characters, "none" is the function's own None, "memory:1" one MiB
    assert values(scores) == [2.0, *[None] * len(FAILURES), None, 4.0, 2.0**20]
    assert scores.failed[:, 0].tolist() == [False, *[True] * len(FAILURES), False, False, False]
    kept = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [(row["completion"], row["kind"]) for row in kept] == list(FAILURES.items())
    assert kept[0] == {
        "step": 4,
        "reward": function.__name__,
        "kind": "raised",
        "message": "raised ValueError: cannot judge x",
        "prompt": "p1",
        "completion": "raise:x",
    }


def test_hostile_ones_wait_beside_each_other(make_scorer: Any) -> None:
    """8 of 64 hang: one time-out in all, and the honest ones do not wait for it. Counted in work, not in seconds."""
    scorer = make_scorer(misbehaving.by_row)
    score(scorer, "warm up")
    completions = ["sleep:600" if i % 8 == 3 else f"c{i}" for i in range(64)]
    started = time.monotonic()
    scores = score(scorer, *completions)
    elapsed = time.monotonic() - started
    assert [i for i, value in enumerate(values(scores)) if value is None] == list(range(3, 64, 8))
    assert scores.failed.sum() == 8
    # One after the other on two workers they would take four time-outs
    assert elapsed < 3 * TIMEOUT


def test_nothing_is_left_running(make_scorer: Any, tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    scorer = make_scorer(misbehaving.by_row, max_failure_rate=1.0)
    scores = score(scorer, f"child:{tmp_path / 'pid'}", "ok")
    assert values(scores) == [None, 2.0]
    _wait_until_gone({int((tmp_path / "pid").read_text())})  # what the reward had started went with it
    started = {process.pid for process in psutil.Process().children(recursive=True)} - before
    assert started  # the template, and a worker for the next batch
    scorer.close()
    _wait_until_gone(started)


def test_workers_end_with_the_process_that_uses_them(tmp_path: Path) -> None:
    """Even if that is killed in the middle of a call that hangs."""
    import signal
    import subprocess
    import sys

    script = tmp_path / "train.py"
    script.write_text(
        "import pickle, misbehaving\n"
        "from trl_grpo_ext.rewards.pool import WorkerPool, pickled\n"
        "pool = WorkerPool([pickled(misbehaving.by_row)], timeout=600, memory_bytes=2**28, workers=2)\n"
        "pool.run(0, [pickle.dumps({'completions': ['hang']})] * 2, pickle.dumps({}))\n"
    )
    path = os.pathsep.join([str(Path(misbehaving.__file__).parent), str(Path(__file__).parents[2])])
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while len(children := psutil.Process(process.pid).children(recursive=True)) < 3:  # the template and both workers
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_gone({child.pid for child in children})


def _wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 20
    while alive := {pid for pid in pids if psutil.pid_exists(pid) and not _is_zombie(pid)}:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_equal_completions_are_scored_once(make_scorer: Any, tmp_path: Path) -> None:
    scorer = make_scorer(misbehaving.counted)
    log = tmp_path / "log"

    def run(prompts: list[str], completions: list[str]) -> list[float | None]:
        ids = [[ord(character) for character in completion] for completion in completions]
        columns = {"count_file": [str(log)] * len(prompts)}
        return values(scorer.score(prompts, completions, ids, columns, step=0))

    assert run(["p", "p", "p", "q"], ["a", "bb", "a", "a"]) == [1.0, 2.0, 1.0, 1.0]
    assert sorted(log.read_text().split()) == ["a", "a", "bb"]  # `a` once for each prompt: it could read that
    assert run(["p", "q"], ["bb", "ccc"]) == [2.0, 3.0]
    assert sorted(log.read_text().split()) == ["a", "a", "bb", "ccc"]


def test_equal_completions_are_logged_as_often_as_they_occur(make_scorer: Any) -> None:
    """Means over a batch do not depend on what was scored before."""
    scorer = make_scorer(misbehaving.logs_each_row)

    def run(*completions: str) -> Any:
        ids = [[ord(character) for character in completion] for completion in completions]
        scores = scorer.score(["p"] * len(completions), list(completions), ids, {}, step=0)
        assert values(scores) == [float(len(completion)) for completion in completions]
        return scorer.pop_logged()

    once = ({"shout": ["AA", "BBBB", "AA"]}, {"length": [2.0, 4.0, 2.0]})
    assert run("aa", "bbbb", "aa") == once
    assert run("aa", "bbbb", "aa") == once  # all of them from the cache
    assert run("bbbb", "c") == ({"shout": ["BBBB", "C"]}, {"length": [4.0, 1.0]})


def test_what_is_logged_and_cannot_be_sent_fails_alone(make_scorer: Any, caplog: pytest.LogCaptureFixture) -> None:
    scorer = make_scorer(misbehaving.logs_each_row, max_failure_rate=0.5)
    scores = score(scorer, "ok", "lock", "class", "four")
    assert values(scores) == [2.0, None, None, 4.0]
    assert scores.failed[:, 0].tolist() == [False, True, True, False]
    assert scorer.pop_logged() == ({"shout": ["OK", "FOUR"]}, {"length": [2.0, 4.0]})


def test_columns_that_cannot_be_pickled_keep_the_reward_here(
    make_scorer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = make_scorer(misbehaving.reads_thing)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scores = score(scorer, "ok", "raise:x", "four", thing=[misbehaving.Unpicklable() for _ in range(3)])
            assert values(scores) == [2.0, None, 4.0]
    assert caplog.text.count("the dataset's columns cannot be pickled (no pickling)") == 1


def test_what_a_function_cannot_read_is_not_sent(make_scorer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Here a column that no process could be sent."""
    scorer = make_scorer(misbehaving.by_row, misbehaving.whole_batch)
    with caplog.at_level(logging.WARNING):
        scores = score(scorer, "ok", "four", thing=[misbehaving.Unpicklable() for _ in range(2)])
    assert values(scores, 0) == values(scores, 1) == [2.0, 4.0]
    assert "pickled" not in caplog.text


def test_a_function_that_looks_across_the_batch_is_called_on_all_of_it(make_scorer: Any) -> None:
    scorer = make_scorer(misbehaving.relative)
    assert values(score(scorer, "bb", "a", "bb", "cccc")) == [1.0, 0.0, 2.0, 3.0]


def test_wrong_count(make_scorer: Any, caplog: pytest.LogCaptureFixture) -> None:
    scorer = make_scorer(misbehaving.wrong_count)
    with caplog.at_level(logging.WARNING):
        scores = score(scorer, "good", "bad", "fine")
    assert values(scores) == [1.0, None, 1.0]
    assert "returned 2 values, expected 3 values" in caplog.text
    assert "failed on 1" in caplog.text


def test_too_many_failures_stop_the_run(make_scorer: Any, tmp_path: Path) -> None:
    scorer = make_scorer(misbehaving.by_row, failures_file=tmp_path / "f.jsonl")
    half = score(scorer, "raise:1", "raise:2", "ok", "four")
    assert values(half) == [None, None, 2.0, 4.0]  # half of the batch is not more than half
    with pytest.raises(RewardError) as caught:
        score(scorer, "raise:1", "ok", "raise:2", "nan", "raise:4", step=9)
    message = str(caught.value)
    for part in ("'by_row' failed on 4 of 5 completions at step 9", "reward_max_failure_rate=0.5", "f.jsonl",
                 "completion 0 of 5: raised ValueError: cannot judge 1", "prompt: 'p0'", "completion: 'raise:1'",
                 "completion 2 of 5", "completion 3 of 5: returned nan (float)", "in _act"):  # fmt: skip
        assert part in message
    assert "completion 4 of 5" not in message  # three examples


def test_hooks_and_state_reach_a_worker(make_scorer: Any) -> None:
    scorer = make_scorer(misbehaving.talkative, misbehaving.process_id)
    scores = score(scorer, "a", "bbb", step=6)
    assert values(scores) == [6.0, 6.0]
    assert os.getpid() not in values(scores, 1)
    assert scorer.pop_logged() == ({"double": ["aa", "bbbbbb"]}, {"longest": [3.0]})


def test_what_cannot_be_pickled_runs_here_and_says_so_once(make_scorer: Any, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def local(completions: list[str], **kwargs: Any) -> list[Any]:
        seen.extend(completions)
        return [misbehaving._act(completion) for completion in completions]

    with caplog.at_level(logging.WARNING):
        scorer = make_scorer(local, misbehaving.process_id)
        scores = score(scorer, "ok", "raise:x", "exit", "four")
        score(scorer, "ok")
    assert values(scores) == [2.0, None, None, 4.0]
    four = ["ok", "raise:x", "exit", "four"]
    assert seen == [*four, *four, "ok"]  # all at once, then each alone; and the second batch
    assert caplog.text.count("runs in the training process") == 1


def test_no_workers(make_scorer: Any) -> None:
    scorer = make_scorer(misbehaving.process_id, limits={"workers": 0})
    assert values(score(scorer, "a")) == [torch.tensor(float(os.getpid())).item()]


@pytest.mark.parametrize("make", [lambda: misbehaving.Picklable(0.5), lambda: functools.partial(misbehaving.by_row)])
def test_objects_and_partials_run_in_workers(make_scorer: Any, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    scorer = make_scorer(make(), names=["it"])
    assert values(score(scorer, "abcd")) in ([2.0], [4.0])
    assert "training process" not in caplog.text


def test_functions_of_the_script_being_run_go_by_value(tmp_path: Path) -> None:
    """Without importing the script a second time: most scripts would train again."""
    import subprocess
    import sys

    script = tmp_path / "train.py"
    script.write_text(
        "import os, pickle\n"
        "from trl_grpo_ext.rewards.pool import WorkerPool, pickled\n"
        "print('started')\n"
        "FACTOR = 3\n"
        "def helper(text): return FACTOR * len(text)\n"
        "def reward(completions, **kwargs):\n"
        "    return [helper(text) if os.getpid() != PARENT else -1 for text in completions]\n"
        "PARENT = os.getpid()\n"
        "pool = WorkerPool([pickled(reward)], timeout=10, memory_bytes=2**28, workers=1)\n"
        "print(pool.run(0, [pickle.dumps({'completions': ['a', 'bb']})], pickle.dumps({}))[0].values)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["started", "[3.0, 6.0]"], done.stderr


def test_async_rewards(make_scorer: Any) -> None:
    scorer = make_scorer(misbehaving.awaited, limits={"timeout": 1.0, "concurrency": 3}, max_failure_rate=1.0)
    assert values(score(scorer, "ok", "four")) == [2.0, 4.0]
    scores = score(scorer, "ok", "hang", "raise:x", "four", "nan")
    assert values(scores) == [2.0, None, None, 4.0, None]
    assert scores.failed[:, 0].tolist() == [False, True, True, False, True]


def test_async_reward_that_blocks_its_loop_does_not_block_the_run(make_scorer: Any) -> None:
    scorer = make_scorer(misbehaving.awaited, limits={"timeout": 0.5}, max_failure_rate=1.0)
    assert values(score(scorer, "block")) == [None]
    assert values(score(scorer, "ok")) == [2.0]  # in a new loop


def test_a_worker_that_died_between_batches_is_replaced(make_scorer: Any) -> None:
    scorer = make_scorer(misbehaving.process_id, limits={"workers": 1})
    score(scorer, "a")
    pool = scorer._runner._pool
    assert pool is not None
    (worker,) = pool.workers
    os.kill(worker.pid, 9)
    _wait_until_gone({worker.pid})
    scores = score(scorer, "a")
    assert not scores.failed.any()
    assert pool.workers[0].pid != worker.pid
