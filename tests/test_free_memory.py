"""Free memory, as the system tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trl_grpo_ext import free_memory
from trl_grpo_ext.free_memory import free_bytes, gib, pick_device


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 5,000 kB available, and a control group without a limit."""
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:   5000 kB\n")
    for name, content in (("max", "max\n"), ("current", "700000\n"), ("stat", "anon 5\ninactive_file 200000\n")):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(free_memory, "_CGROUPS", ((*files, "inactive_file"),))
    return tmp_path


def test_what_the_kernel_calls_available(system: Path) -> None:
    assert free_bytes(torch.device("cpu")) == 5000 * 1024


def test_a_container_may_have_less(system: Path) -> None:
    (system / "max").write_text("1000000\n")
    assert free_bytes(torch.device("cpu")) == 500_000  # 1,000,000 - 700,000 + 200,000 of cache that can go
    (system / "max").write_text("1000\n")
    assert free_bytes(torch.device("cpu")) == 0


def test_unknown_elsewhere(system: Path) -> None:
    assert free_bytes(torch.device("mps")) is None
    (system / "meminfo").unlink()
    assert free_bytes(torch.device("cpu")) is None


def test_devices_that_are_not_here_are_refused() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("warp", "cuda:99"):
        with pytest.raises(ValueError, match=f"device='{name}' cannot be used here: "):
            pick_device(name)


def test_gib() -> None:
    assert gib(3 * 2**29) == "1.50 GiB"
    assert gib(5 * 2**20) == "5.0 MiB"
