"""Calls of async reward functions: many at a time, bounded in number and time."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl.trainer.utils import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

from trl_grpo_ext.rewards.outcome import Outcome, Problem, converter_of, judge, logging_hooks, raised

_GRACE_SECONDS = 2.0  # for a loop that is blocked by a call that does not await


class AsyncCaller:
    """Runs calls in the event loop of a background thread that lives from step to step, so that HTTP clients may too.

    Args:
        timeout: Seconds of wall time per call.
        concurrency: Calls under way at a time, per function.
    """

    def __init__(self, timeout: float, concurrency: int) -> None:
        self._timeout, self._concurrency = timeout, concurrency
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def run(
        self, function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], hooks: Mapping[str, Any]
    ) -> list[Outcome]:
        """Outcome of each call. May be called from several threads."""
        late = Problem("timeout", f"no answer within {self._timeout:g} s")
        outcomes = [Outcome(failed=late) for _ in calls]
        convert = converter_of(function)
        slots = asyncio.Semaphore(self._concurrency)

        async def one(position: int, kwargs: Mapping[str, Any]) -> None:
            async with slots:
                outcome = Outcome()
                try:
                    # Called in here, so that a wrong signature is that function's error too
                    awaitable = function(**kwargs, **hooks, **logging_hooks(outcome))
                    output = await asyncio.wait_for(awaitable, self._timeout)
                except (asyncio.TimeoutError, asyncio.CancelledError):
                    return
                except BaseException as error:  # SystemExit too: a reward must not end the run
                    outcomes[position] = Outcome(failed=raised(error))
                else:
                    outcomes[position] = judge(output, len(kwargs["completions"]), outcome, convert)

        async def everything() -> None:
            await asyncio.gather(*(one(position, kwargs) for position, kwargs in enumerate(calls)))

        rounds = math.ceil(len(calls) / self._concurrency)
        future = asyncio.run_coroutine_threadsafe(everything(), self._running_loop())
        try:
            future.result(rounds * self._timeout + _GRACE_SECONDS)
        except concurrent.futures.TimeoutError:
            # Something blocks the loop, or does not let itself be cancelled: leave the thread behind
            future.cancel()
            with self._starting:
                self._loop = None
        return list(outcomes)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        # In a thread of its own: `asyncio.run` cannot be called where a loop is running already (a notebook), and a new
        # loop for every step would break clients that are tied to the loop they were first used in.
        with self._starting:
            if self._loop is None:
                thread, self._loop, ready = start_event_loop_in_daemon(name="trl_grpo_ext-rewards")
                ready.wait()
                atexit.register(shutdown_event_loop_in_daemon, thread, self._loop)
            return self._loop
