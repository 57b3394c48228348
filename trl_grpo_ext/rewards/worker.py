"""The processes that rewards run in: a template that has imported them, and the workers forked from it.

Started as `python -m trl_grpo_ext.rewards.worker FD`. The template imports the reward functions once; a worker is then
a fork of it, a matter of milliseconds, so that one that hangs can be killed and replaced. Nothing here touches torch or
the training process's memory. A worker dies with the template, the template with the training process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, NoReturn

import dill

from trl_grpo_ext.rewards.outcome import call_reward
from trl_grpo_ext.rewards.pool import STOP

_PR_SET_PDEATHSIG = 1
_TELL_SECONDS = 0.005  # every message wakes the training process up


def main(control: Connection) -> None:
    """The template: import the rewards, say which of them could be imported, then fork workers on demand."""
    setup = pickle.loads(control.recv_bytes())
    sys.path[:] = setup["path"]
    os.environ.clear()
    os.environ.update(setup["environ"])
    functions: list[Any] = []
    problems: list[str | None] = []
    for blob in setup["functions"]:
        try:
            function = dill.loads(blob)
            functions.append(function)
            problems.append(None)
        except BaseException as error:  # whatever importing somebody's module does, the answer is: not in a worker
            functions.append(None)
            problems.append(f"{type(error).__name__}: {error}")
    _warm_up()
    control.send(problems)
    workers: set[int] = set()
    try:
        while control.recv_bytes():  # a byte asks for a worker, its socket follows
            handle, progress = recv_handle(control), recv_handle(control)
            pid = os.fork()
            if pid == 0:
                control.close()
                _become_worker()
                _serve(Connection(handle), progress, functions, setup["memory_bytes"])
            os.close(handle)
            os.close(progress)
            _own_group(pid)
            workers.add(pid)
            control.send(pid)
            workers -= {pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0]}
    except (EOFError, OSError):
        pass  # the training process is gone, or done with us
    for pid in workers:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def _warm_up() -> None:
    """Let modules of rewards load what they would load at their first use, or every worker does so by itself."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trl_grpo_ext.rewards."):
            getattr(module, "warm_up", lambda: None)()


def _become_worker() -> None:
    _own_group(0)  # so that whatever a reward starts can be killed along with it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _own_group(pid: int) -> None:
    # Both sides do it, so that neither has to wait for the other; the later one may find it done, or the child gone
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)


def _serve(calls: Connection, progress: int, functions: Sequence[Callable[..., Any]], memory_bytes: int) -> NoReturn:
    """Lists of calls in, outcomes out, a few at a time; a byte to `progress` as each call begins."""
    _limit_memory(memory_bytes)
    interrupts = select.poll()  # `Connection.poll` sets one up for every call, which costs more than a small reward
    interrupts.register(calls.fileno(), select.POLLIN)
    try:
        while True:
            message = calls.recv_bytes()
            if message == STOP:
                continue  # it came too late: the list it was for is done
            which, rows, encoded_hooks = pickle.loads(message)
            hooks = pickle.loads(encoded_hooks)
            done: list[list[float | None] | bytes] = []
            told = time.monotonic()
            for position, row in enumerate(rows):
                if done and time.monotonic() - told > _TELL_SECONDS:
                    calls.send_bytes(pickle.dumps(done))
                    done, told = [], time.monotonic()
                if position and interrupts.poll(0) and calls.recv_bytes() == STOP:
                    if done:
                        calls.send_bytes(pickle.dumps(done))
                    calls.send_bytes(b"")  # the rest is left
                    break
                os.write(progress, b".")
                done.append(call_reward(functions[which], pickle.loads(row), hooks).packed())
            else:
                calls.send_bytes(pickle.dumps(done))
    except (EOFError, OSError):
        os._exit(0)


def _limit_memory(allowance: int) -> None:
    """At most so many bytes more than now. Where the system does not enforce it (macOS), there is no cap."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as file:
            in_use = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = in_use + allowance
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
