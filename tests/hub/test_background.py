"""Uploads beside training: in order, warned of once, and not waited for without end."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable

import pytest
from hub_server import TOKEN, HubServer

from trl_grpo_ext.hub import UploadError
from trl_grpo_ext.hub.background import BackgroundUploads


def fail(message: str) -> Callable[[], None]:
    def upload() -> None:
        raise UploadError(message)

    return upload


def test_in_order_and_with_results() -> None:
    uploads, done = BackgroundUploads("trl-grpo push out"), []
    jobs = [uploads.submit(lambda i=i: done.append(i) or i) for i in range(5)]  # type: ignore[func-returns-value,misc]
    uploads.finish(10)
    assert done == [0, 1, 2, 3, 4]
    assert [job.result() for job in jobs] == done
    assert uploads.is_done()


def test_failures_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    uploads = BackgroundUploads("trl-grpo push out --repo-id ada/run", token="a-token-of-no-form")
    first = uploads.submit(fail(f"No network for {TOKEN} nor a-token-of-no-form."))
    second = uploads.submit(fail("Again."))
    third = uploads.submit(lambda: 3)
    uploads.finish(10)
    assert isinstance(first.exception(), UploadError)
    assert isinstance(second.exception(), UploadError)
    assert third.result() == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "No network for <token removed> nor <token removed>. Training is not affected"
    )
    assert "\n    trl-grpo push out --repo-id ada/run\n" in record.getMessage()


def test_what_does_not_end_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    uploads, gate = BackgroundUploads("trl-grpo push out"), threading.Event()
    stuck, waiting = uploads.submit(lambda: gate.wait(30)), uploads.submit(lambda: True)
    uploads.finish(0.05)
    assert waiting.cancelled()
    assert "has not ended within" in caplog.text
    assert uploads.is_done()  # neither is waited for again
    gate.set()
    assert stuck.result(10) is True


def test_the_program_ends_after_its_uploads(
    hub: HubServer, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    source = (
        "import time\nfrom trl_grpo_ext.hub.background import BackgroundUploads\n"
        "BackgroundUploads('x').submit(lambda: (time.sleep(1), print('uploaded', flush=True)))\n"
        "print('end')"
    )
    ended = run_script(hub, source, home="unused")
    assert (ended.returncode, ended.stdout) == (0, "end\nuploaded\n"), ended.stderr
