"""A folder that appears as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_grpo_ext.export.folder import written_whole


def test_it_gets_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with written_whole(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists() and folder.parent == target.parent
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    assert (target / "file").read_text() == "x"


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with written_whole(tmp_path / "b") as folder:
        (folder / "file").touch()
    assert (tmp_path / "b" / "file").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_one_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(error), written_whole(tmp_path / "a" / "b") as folder:
        (folder / "file").touch()
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
