"""Calls of reward functions spread over killable worker processes."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from typing import Any, cast

import dill

from trl_grpo_ext.rewards.outcome import Outcome, Problem

STOP = b"stop"  # sent to a worker in the middle of a list of calls: leave the rest
_MAX_PICKLED_BYTES = 1_000_000  # of a function: what is larger drags a model or a table along
_MAX_CALLS_AT_ONCE = 32  # handed to a worker in one message
_STUCK_SECONDS = 0.2  # a call that takes longer no longer keeps the others waiting
_MAX_STUCK = 64  # workers beyond the regular ones, each busy with a call that hangs


def pickled(function: Callable[..., Any]) -> bytes | None:
    """The function for a worker, or None if it must stay in this process.

    By reference (module and name), so lambdas and functions defined in functions stay: they may share state with the
    code around them. What is defined in the script being run goes by value, as that cannot be imported.
    """
    try:
        by_reference = pickle.dumps(function)
        in_script = (
            getattr(function, "__module__", type(function).__module__) == "__main__" or b"__main__" in by_reference
        )
        blob = dill.dumps(function, recurse=True) if in_script else by_reference
    except Exception:  # pickling runs the object's own code, which may raise anything
        return None
    return blob if len(blob) <= _MAX_PICKLED_BYTES else None


@dataclass(eq=False, slots=True)
class _Worker:
    connection: Connection
    progress: int  # a pipe that gets a byte whenever a call begins, so that it is known which one is running
    pid: int
    calls: list[int] = field(default_factory=list)  # which calls it was handed
    begun: int = 0  # how many of these it has begun, as far as was looked
    answered: int = 0  # how many of these it has answered; answers come a few at a time
    since: float = 0.0  # when it was last heard of
    stopping: bool = False  # its remaining calls were given to others

    def hand(self, calls: list[int]) -> None:
        """Note what it is about to be sent."""
        self.look()  # what is left in the pipe is of the list before
        self.calls, self.begun, self.answered, self.stopping, self.since = calls, 0, 0, False, time.monotonic()

    def look(self) -> int:
        """How many calls of its list it has begun by now."""
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self.progress, 4096):
                self.begun += len(block)
        return self.begun

    def running(self) -> int | None:
        """Which of its calls it is working on; None if it has not begun, or is done."""
        begun = self.look()
        return begun - 1 if begun > self.answered else None

    def kill(self) -> None:
        """End it and whatever it has started."""
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                kill(self.pid, signal.SIGKILL)
        self.connection.close()
        os.close(self.progress)


class WorkerPool:
    """Runs calls of picklable functions, each under a limit of wall time and memory.

    Args:
        functions: Results of `pickled`.
        timeout: Seconds of wall time per call.
        memory_bytes: What a worker may allocate beyond what it starts with.
        workers: How many run at once; calls that hang do not count.

    `problems` says of each function why it could not be imported in a worker, None for the others; only those may be
    called. Starting takes as long as importing them does and happens in the background until the first use.
    """

    def __init__(self, functions: Sequence[bytes], *, timeout: float, memory_bytes: int, workers: int) -> None:
        self.timeout, self.regular = timeout, workers
        self.workers: list[_Worker] = []
        # A worker's sums are small, and the GPU's memory is for the policy
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ours, theirs = socket.socketpair()
        with theirs:
            self._template = subprocess.Popen(
                [sys.executable, "-m", "trl_grpo_ext.rewards.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C is the training process's business
                stdin=subprocess.DEVNULL,
                # To find this package where the training process found it, and nothing else in its place
                env={**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"},
            )
        self._control = Connection(ours.detach())
        setup = {"path": sys.path, "environ": environ, "functions": list(functions), "memory_bytes": memory_bytes}
        self._control.send_bytes(pickle.dumps(setup))
        self._problems: list[str | None] | None = None
        self._closed = weakref.finalize(self, _close, os.getpid(), self._control, self._template, self.workers)

    @property
    def problems(self) -> list[str | None]:
        """Per function: why it could not be imported, or None. Waits until that is known."""
        if self._problems is None:
            try:
                self._problems = self._control.recv()
            except (EOFError, OSError):
                raise RuntimeError(
                    f"the reward workers could not be started (exit code {self._template.poll()}); see their output "
                    "above, or set reward_workers=0 to run rewards in this process"
                ) from None
        return self._problems

    def close(self) -> None:
        """Kill everything that was started. Also done when the pool is collected, and at exit."""
        self._closed()

    def run(self, which: int, calls: Sequence[bytes], hooks: bytes) -> list[Outcome]:
        """Outcome of each call of function `which`. Keyword arguments are pickled dictionaries.

        A call over its time, or that ends its worker, has an outcome that `failed` as "timeout" or "died".
        """
        assert self.problems[which] is None
        return _Run(self, which, calls, hooks).outcomes()

    def start_worker(self) -> _Worker:
        """One more worker, forked from the template."""
        ours, theirs = socket.socketpair()
        progress, begun = os.pipe()
        os.set_blocking(progress, False)
        with theirs:
            self._control.send_bytes(b"+")
            for handle in (theirs.fileno(), begun):
                send_handle(self._control, handle, self._template.pid)
            worker = _Worker(Connection(ours.detach()), progress, self._control.recv())
        os.close(begun)
        self.workers.append(worker)
        return worker

    def discard(self, worker: _Worker) -> None:
        """Kill a worker and forget it."""
        worker.kill()
        self.workers.remove(worker)


def _close(owner: int, control: Connection, template: subprocess.Popen[bytes], workers: list[_Worker]) -> None:
    if os.getpid() != owner:
        return  # a fork of the training process ends: the workers are not its own
    for worker in workers:
        worker.kill()
    control.close()  # the template ends by itself, and kills what is left
    try:
        template.wait(timeout=1)
    except subprocess.TimeoutExpired:  # busy importing
        template.kill()
        template.wait()


class _Run:
    """One list of calls: which worker has which, and what is to happen next."""

    def __init__(self, pool: WorkerPool, which: int, rows: Sequence[bytes], hooks: bytes) -> None:
        self._pool, self._which, self._rows, self._hooks = pool, which, rows, hooks
        self._outcomes: list[Outcome | None] = [None] * len(rows)
        self._waiting = deque(range(len(rows)))
        self._left = len(rows)

    def outcomes(self) -> list[Outcome]:
        """Work until every call has an outcome."""
        try:
            while self._left:
                self._hand_out()
                self._listen()
        finally:
            # Whoever is not idle now is on a call that somebody else has answered, or the run was interrupted
            for worker in [w for w in self._pool.workers if w.calls]:
                self._pool.discard(worker)
            for worker in self._pool.workers[self._pool.regular :]:
                self._pool.discard(worker)
        return cast("list[Outcome]", self._outcomes)

    def _hand_out(self) -> None:
        """Give waiting calls to idle workers, starting new ones for those that are stuck."""
        now = time.monotonic()
        busy = [worker for worker in self._pool.workers if worker.calls]
        stuck = sum(now - worker.since >= _STUCK_SECONDS for worker in busy)
        free = self._pool.regular - (len(busy) - min(stuck, _MAX_STUCK))
        while free > 0 and self._waiting:
            calls = self._next_calls()
            if not calls:
                return  # all that was waiting had been answered meanwhile
            idle = [worker for worker in self._pool.workers if not worker.calls]
            worker = idle[0] if idle else self._pool.start_worker()
            worker.hand(calls)
            message = pickle.dumps((self._which, [self._rows[call] for call in calls], self._hooks))
            try:
                worker.connection.send_bytes(message)
            except OSError:  # it died while idle: not these calls' fault
                self._pool.discard(worker)
                self._waiting.extendleft(reversed(calls))
                continue
            free -= 1

    def _next_calls(self) -> list[int]:
        """As many calls as keep all workers equally busy, without those that have been answered meanwhile."""
        share = -(-len(self._waiting) // (4 * self._pool.regular))
        calls: list[int] = []
        while self._waiting and len(calls) < min(share, _MAX_CALLS_AT_ONCE):
            call = self._waiting.popleft()
            if self._outcomes[call] is None:
                calls.append(call)
        return calls

    def _listen(self) -> None:
        """Wait for an answer, a death, or a deadline."""
        busy = {worker.connection: worker for worker in self._pool.workers if worker.calls}
        if not busy:
            return
        now = time.monotonic()
        deadlines = [worker.since + self._pool.timeout for worker in busy.values()]
        if self._waiting or any(self._remaining(worker) for worker in busy.values()):
            deadlines += [w.since + _STUCK_SECONDS for w in busy.values() if now - w.since < _STUCK_SECONDS]
        for connection in wait(list(busy), max(0.0, min(deadlines) - now)):
            self._receive(busy[cast(Connection, connection)])
        now = time.monotonic()
        for worker in busy.values():
            if not worker.calls or worker not in self._pool.workers:
                continue
            if now - worker.since >= self._pool.timeout:
                self._give_up(worker, "timeout", f"no answer within {self._pool.timeout:g} s")
            elif now - worker.since >= _STUCK_SECONDS and (remaining := self._remaining(worker)):
                # They must not wait behind this one
                worker.stopping = True
                self._waiting.extendleft(reversed(remaining))
                with contextlib.suppress(OSError):
                    worker.connection.send_bytes(STOP)

    def _remaining(self, worker: _Worker) -> list[int]:
        """Calls it was handed and has neither answered nor begun."""
        return [] if worker.stopping else worker.calls[max(worker.look(), worker.answered) :]

    def _receive(self, worker: _Worker) -> None:
        try:
            while worker.calls and worker.connection.poll():
                message = worker.connection.recv_bytes()
                worker.since = time.monotonic()
                for packed in pickle.loads(message) if message else ():
                    self._answer(worker.calls[worker.answered], Outcome.unpacked(packed))
                    worker.answered += 1
                if not message or worker.answered == len(worker.calls):
                    worker.calls = []
        except (EOFError, OSError):
            self._give_up(worker, "died", "its process ended: a crash, or an exit")

    def _give_up(self, worker: _Worker, kind: str, message: str) -> None:
        """Kill it: its running call has failed, the calls after that one go back to the others."""
        remaining, running = self._remaining(worker), worker.running()
        if running is not None:
            # It may have finished some before that one, and not said so yet: those are done again
            self._waiting.extendleft(reversed([*worker.calls[worker.answered : running], *remaining]))
            self._answer(worker.calls[running], Outcome(failed=Problem(kind, message)))
        else:
            self._waiting.extendleft(reversed(remaining))
        self._pool.discard(worker)

    def _answer(self, call: int, outcome: Outcome) -> None:
        if self._outcomes[call] is None:  # a call that was given to somebody else may be answered twice
            self._outcomes[call] = outcome
            self._left -= 1
