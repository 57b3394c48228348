"""Uploads beside training: one at a time, none of which can stop or delay it."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from ..credentials import known_tokens, redacted
from .push import UploadError

logger = logging.getLogger(__name__)

T = TypeVar("T")
LONGEST_WAIT = 600.0  # seconds that the end of training, or of the program, waits for uploads under way


class BackgroundUploads:
    """A thread that runs uploads in order, and warns of the first one that fails.

    It is no thread of a pool: those are waited for without end when the program ends, and the Hub's client itself
    waits without end for an answer.

    The warning ends with `remedy`, the command that makes the upload later. Later failures are not repeated: a
    checkpoint every few minutes on a dead network would fill the log with one message.
    """

    def __init__(self, remedy: str, token: str | None = None) -> None:
        self._remedy = remedy
        self._tokens = known_tokens(token)
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._jobs: list[Future[Any]] = []
        self._has_warned = False
        self._has_started = False

    def submit(self, upload: Callable[[], T]) -> Future[T]:
        """Run `upload` after those before it. Its exception is warned of, and kept in the future."""
        job: Future[T] = Future()
        self._jobs = [*(other for other in self._jobs if not other.done()), job]
        self._queue.put((job, upload))
        if not self._has_started:
            self._has_started = True
            Thread(target=self._run, name="hub-upload", daemon=True).start()
            atexit.register(self.finish)
        return job

    def _run(self) -> None:
        while True:
            job, upload = self._queue.get()
            if not job.set_running_or_notify_cancel():
                continue
            try:
                result = upload()
            except BaseException as error:
                said = str(error) if isinstance(error, UploadError) else f"An upload to the Hub failed: {error}."
                self.warn(said)  # first, so that whoever waits for the job finds it said
                job.set_exception(error)
            else:
                job.set_result(result)

    def is_done(self) -> bool:
        """Whether nothing is under way or waiting (the name is that of transformers' `PushInProgress`)."""
        return all(job.done() for job in self._jobs)

    def finish(self, timeout: float = LONGEST_WAIT) -> None:
        """Wait for what is under way, but not longer than `timeout` seconds; what has not begun then, never will."""
        unfinished = wait(self._jobs, timeout).not_done
        self._jobs = []
        for job in unfinished:
            job.cancel()
        if unfinished:
            self.warn(f"An upload to the Hub has not ended within {timeout:.0f} seconds and is no longer waited for.")

    def warn(self, problem: str) -> None:
        """Say what failed and how to make up for it, once."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s Training is not affected, and everything is on disk. Push it later with\n    %s\n"
                "Further uploads are tried, and not warned of.",
                redacted(problem, self._tokens),
                self._remedy,
            )
