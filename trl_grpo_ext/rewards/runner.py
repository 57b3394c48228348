"""The firewall between reward functions and the training loop: whatever a function does, every completion is settled.

A function that can be pickled runs in worker processes that can be killed, any other in this process. Where a call on
the whole batch raises, hangs, ends its process or returns something that fits no batch, the function is called on one
completion after the other, so that only those it fails on are lost. A lost completion has no reward (None, never 0).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from trl.trainer.utils import is_async_callable

from trl_grpo_ext.rewards.arguments import readable_arguments
from trl_grpo_ext.rewards.awaiting import AsyncCaller
from trl_grpo_ext.rewards.batch import RewardBatch
from trl_grpo_ext.rewards.marks import is_in_process, is_quick, is_row_wise
from trl_grpo_ext.rewards.outcome import Outcome, call_reward
from trl_grpo_ext.rewards.pool import WorkerPool, pickled

logger = logging.getLogger(__name__)

_CACHED_ROWS = 20_000


@dataclass(slots=True)
class _Call:
    """Arguments of one call; pickled once, for the worker and for the cache."""

    kwargs: Mapping[str, Any]
    _packed: bytes | None = None

    def packed(self) -> bytes:
        if self._packed is None:
            self._packed = pickle.dumps(self.kwargs)
        return self._packed


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reward function may take before it is stopped.

    Raises:
        ValueError: a number out of its range.
    """

    timeout: float = 10.0  # seconds of wall time for a completion
    memory_mb: int = 1024  # that a worker may allocate
    workers: int | None = None  # processes; None: one per core, 8 at most; 0: everything in this process
    concurrency: int = 32  # calls of async functions under way at a time

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"reward_timeout={self.timeout!r} must be a number of seconds above 0: 10 is the default")
        for name, value, least in (
            ("memory_mb", self.memory_mb, 1),
            ("workers", self.workers, 0),
            ("concurrency", self.concurrency, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"reward_{name}={value!r} must be an integer of at least {least}")


class RewardRunner:
    """Calls K reward functions on batches.

    Args:
        functions: Sync or async, with the signature of TRL's reward functions.
        names: K names, for messages.
        limits: See `Limits`.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], names: Sequence[str], limits: Limits) -> None:
        self._functions, self._names, self._limits = list(functions), list(names), limits
        self._cache: OrderedDict[bytes, Outcome] = OrderedDict()
        self._awaiting = AsyncCaller(limits.timeout, limits.concurrency)
        self._in_pool: dict[int, int] = {}  # k -> which of the pool's functions it is
        self._pool: WorkerPool | None = None
        self._start_pool()
        self._reads = {k: readable_arguments(functions[k]) for k in self._in_pool}
        # In this process nothing is gained by it, as nothing can be interrupted
        self._by_row = {k for k in self._in_pool if is_row_wise(functions[k])}

    def run(self, batch: RewardBatch, trainer_state: Any) -> list[Outcome]:
        """K outcomes of B values each; what a completion has no value for stands in its `problems`."""
        awaited = [k for k, function in enumerate(self._functions) if is_async_callable(function)]
        outcomes: dict[int, Outcome] = {}
        with ThreadPoolExecutor(max(1, len(awaited))) as threads:
            futures = {k: threads.submit(self._settle, k, batch, trainer_state) for k in awaited}
            for k in range(len(self._functions)):
                outcomes[k] = futures[k].result() if k in futures else self._settle(k, batch, trainer_state)
        return [outcomes[k] for k in range(len(self._functions))]

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()

    def _start_pool(self) -> None:
        if self._limits.workers == 0 or not hasattr(os, "fork"):
            return
        blobs = {}
        for k, function in enumerate(self._functions):
            if not is_in_process(function) and not is_quick(function) and not is_async_callable(function):
                blob = pickled(function)
                if blob is None:
                    self._say_in_process(k, "it cannot be pickled, or is larger than 1 MB so")
                else:
                    blobs[k] = blob
        if blobs:
            self._in_pool = {k: position for position, k in enumerate(blobs)}
            self._pool = WorkerPool(
                list(blobs.values()),
                timeout=self._limits.timeout,
                memory_bytes=self._limits.memory_mb * 2**20,
                workers=self._limits.workers or min(os.cpu_count() or 1, 8),
            )

    def _say_in_process(self, k: int, why: str) -> None:
        logger.warning(
            "Reward '%s' runs in the training process, where nothing can stop it if it hangs: %s. A function defined "
            "at the top of a module can run in a worker process.",
            self._names[k],
            why,
        )

    def _settle(self, k: int, batch: RewardBatch, state: Any) -> Outcome:
        """One function on one batch: on the whole of it, and where that fails, on one completion after the other."""
        call = self._caller(k, state)
        failed = None
        if k not in self._by_row:
            (outcome,) = call([_Call(self._arguments(k, batch))])
            if outcome.failed is None:
                return outcome
            failed = outcome.failed
            if len(batch.completions) == 1:
                return Outcome(values=[None], problems={0: failed})
            if failed.kind == "timeout":
                self._by_row.add(k)  # the next batch would cost as much again
        outcome = self._settle_rows(k, batch, call)
        if failed is not None:
            logger.warning(
                "Reward '%s' on %d completions at step %d: %s. It was called on each of them alone, and failed on %d."
                "%s",
                self._names[k],
                len(batch.completions),
                batch.step,
                failed.message,
                len(outcome.problems),
                " From now on it always is." if k in self._by_row else "",
            )
        return outcome

    def _settle_rows(self, k: int, batch: RewardBatch, call: Callable[[Sequence[_Call]], list[Outcome]]) -> Outcome:
        """Each completion alone, equal ones once."""
        arguments = self._arguments(k, batch)
        rows = [_Call({name: [column[i]] for name, column in arguments.items()}) for i in range(len(batch.completions))]
        keys = [self._key(k, row) for row in rows]
        first: dict[Any, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(index if key is None else key, index)
        due = [index for key, index in first.items() if key not in self._cache]
        settled = dict(zip(due, call([rows[index] for index in due]), strict=True)) if due else {}
        merged = Outcome()
        for index, key in enumerate(keys):
            outcome = settled.get(first[index if key is None else key])
            if outcome is None:
                assert key is not None
                outcome = self._cache[key]
            problem = outcome.failed or outcome.problems.get(0)
            merged.values.append(None if problem else outcome.values[0])
            if problem is not None:
                merged.problems[index] = problem
            elif key is not None:
                self._remember(key, outcome)
            merged.extras += outcome.extras
            merged.metrics += outcome.metrics
        return merged

    def _caller(self, k: int, state: Any) -> Callable[[Sequence[_Call]], list[Outcome]]:
        function = self._functions[k]
        if is_async_callable(function):
            return lambda calls: self._awaiting.run(function, [call.kwargs for call in calls], {"trainer_state": state})
        if k in self._in_pool:
            return lambda calls: self._call_in_pool(k, calls, state)
        return lambda calls: [call_reward(function, call.kwargs, {"trainer_state": state}) for call in calls]

    def _call_in_pool(self, k: int, calls: Sequence[_Call], state: Any) -> list[Outcome]:
        assert self._pool is not None
        problem = self._pool.problems[self._in_pool[k]]
        if problem is None:
            try:
                packed, hooks = [call.packed() for call in calls], pickle.dumps({"trainer_state": _portable(state)})
            except Exception as error:  # a column's own pickling code may raise anything
                problem = f"the dataset's columns cannot be pickled ({error})"
            else:
                return self._pool.run(self._in_pool[k], packed, hooks)
        else:
            problem = f"it cannot be imported in a worker ({problem})"
        del self._in_pool[k]
        self._say_in_process(k, problem)
        return self._caller(k, state)(calls)

    def _arguments(self, k: int, batch: RewardBatch) -> dict[str, Any]:
        arguments: dict[str, Any] = batch.kwargs()
        if getattr(self._functions[k], "reward_reads_prefills", False):
            arguments["prefills"] = batch.prefills
        reads = self._reads[k] if k in self._in_pool else None
        if reads is None:
            return arguments
        return {name: values for name, values in arguments.items() if name in reads or name == "completions"}

    def _key(self, k: int, row: _Call) -> bytes | None:
        """All that a row-wise function's value depends on; None if it may depend on more, or nobody can tell."""
        if k not in self._in_pool or not is_row_wise(self._functions[k]):
            return None
        try:
            return hashlib.blake2b(row.packed(), digest_size=16, salt=str(k).encode()).digest()
        except Exception:  # a column's own pickling code
            return None

    def _remember(self, key: bytes, outcome: Outcome) -> None:
        # With what was logged: a mean over the batch is over its equal completions too
        self._cache[key] = outcome
        self._cache.move_to_end(key)
        while len(self._cache) > _CACHED_ROWS:
            self._cache.popitem(last=False)


def _portable(state: Any) -> Any:
    """The fields of the trainer's state, without what grows with the run and what belongs to the training process.

    Not the state itself: reading that would make every worker import transformers, for many seconds.
    """
    if state is None:
        return None
    return SimpleNamespace(**{**vars(state), "log_history": [], "stateful_callbacks": {}})
