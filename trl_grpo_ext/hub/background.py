"""Uploads beside training: one at a time, none of which can stop or delay it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from ..credentials import known_tokens, redacted
from .push import UploadError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BackgroundUploads:
    """A thread that runs uploads in order, and warns of the first one that fails.

    The warning ends with `remedy`, the command that makes the upload later. Later failures are not repeated: a
    checkpoint every few minutes on a dead network would fill the log with one message.
    """

    def __init__(self, remedy: str, token: str | None = None) -> None:
        self._remedy = remedy
        self._tokens = known_tokens(token)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-upload")
        self._jobs: list[Future[object]] = []
        self._has_warned = False

    def submit(self, upload: Callable[[], T]) -> Future[T]:
        """Run `upload` after those before it. Its exception is warned of, and kept in the future."""
        self._jobs = [job for job in self._jobs if not job.done()]
        job = self._thread.submit(upload)
        job.add_done_callback(self._report)
        self._jobs.append(job)  # type: ignore[arg-type]  # Future is invariant, and only waited for
        return job

    def is_done(self) -> bool:
        """Whether nothing is under way or waiting (the name is that of transformers' `PushInProgress`)."""
        return all(job.done() for job in self._jobs)

    def finish(self, timeout: float) -> None:
        """Wait for what is under way, but not longer than `timeout` seconds: the Hub's client itself waits forever."""
        unfinished = wait(self._jobs, timeout).not_done
        for job in unfinished:
            job.cancel()  # those that have not begun
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

    def _report(self, job: Future[T]) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            self.warn(str(error) if isinstance(error, UploadError) else f"An upload to the Hub failed: {error}.")
