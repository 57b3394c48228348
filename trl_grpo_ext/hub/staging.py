"""A folder with what is uploaded of a run, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from ..credentials import check_no_tokens, known_tokens
from ..evaluation import load_summary
from .card import model_card, replace_evaluation
from .curves import FILE as CURVES_FILE
from .evaluation import results_of
from .run_config import FILE as CONFIG_FILE
from .run_config import is_hub_id, load_run_config
from .tokenizer import TOKENIZER_FILES, tokenizer_changed

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
RUN_FILES = ("README.md", CONFIG_FILE, CURVES_FILE)
UNFINISHED_CARD = "[More Information Needed]"  # what PEFT leaves to be filled in


def stage(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    base_model: str | None = None,
    with_tokenizer: bool | None = None,
    weights: Path | None = None,
    evaluation: str | Path | None = None,
) -> Path:
    """A new folder with what is uploaded of `folder`; the caller removes it.

    Args:
        with_tokenizer: Whether the tokenizer belongs to it; None: if it is not the base's.
        weights: Where weights and tokenizer are taken from, if not from `folder`: a checkpoint, whose files are never
            written again, and are linked.
        evaluation: Of `trl-grpo eval`: its file or folder.

    Raises:
        ValueError: there is nothing to upload, a file holds a token, or `evaluation` is none.
    """
    results = None if evaluation is None else results_of(load_summary(evaluation))
    source = weights or folder
    found = weight_files(source)
    is_adapter = Path(ADAPTER_FILES[0]) in found
    if with_tokenizer is None:
        with_tokenizer = not is_adapter or tokenizer_changed(source, _base_of(source))
    staged = staging_folder(folder)
    try:
        take(source, found, staged, link=weights is not None or not is_adapter)
        take(source, existing(source, TOKENIZER_FILES) if with_tokenizer else [], staged)
        take(folder, existing(folder, RUN_FILES), staged)
        if is_adapter:
            _complete_adapter_config(staged, base_model)
        _complete_card(staged, repo_id, is_adapter, with_tokenizer, base_model)
        if results is not None:
            replace_evaluation(staged / "README.md", results, repo_id.split("/")[-1])
        check_no_tokens((file for file in staged.rglob("*") if file.is_file()), known_tokens(token))
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def weight_files(folder: Path) -> list[Path]:
    """Adapter or model weights and their config, relative to `folder`.

    Raises:
        ValueError: there are none.
    """
    for patterns, needed in ((ADAPTER_FILES, 2), (MODEL_FILES, 2)):
        found = existing(folder, patterns)
        if len(found) >= needed and any(path.suffix == ".safetensors" for path in found):
            return found
    raise ValueError(
        f"{folder} has no adapter to push: {' and '.join(ADAPTER_FILES)} are missing. Give the folder that "
        "trainer.save_model() wrote to (the run's output_dir, or a checkpoint in it)."
    )


def staging_folder(folder: Path) -> Path:
    """An empty folder on the same file system, if it can be written to, so that files can be linked."""
    try:
        return Path(tempfile.mkdtemp(prefix=".hub-upload-", dir=folder))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hub-upload-"))


def take(folder: Path, files: Iterable[Path], target: Path, link: bool = False) -> None:
    """Copy files, or link them where the file system can: a link is of no use if its file is written to again."""
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(folder / file, target / file)
                continue
            except OSError:
                pass
        shutil.copyfile(folder / file, target / file)


def existing(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files that match, relative to `folder`."""
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("**/*") if path.is_file())
    return [Path(name) for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _base_of(folder: Path) -> str | None:
    return cast("str | None", _adapter_config(folder / ADAPTER_FILES[1]).get("base_model_name_or_path"))


def _adapter_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is not JSON ({error}): save the adapter again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} holds no PEFT config, but {config!r:.100}: save the adapter again")
    return config


def _record(folder: Path) -> dict[str, Any] | None:
    return load_run_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None


def _complete_adapter_config(staged: Path, base_model: str | None) -> None:
    """Base and revision, so that whoever loads the adapter loads the base that it was trained on."""
    file = staged / ADAPTER_FILES[1]
    config = _adapter_config(file)
    record = _record(staged)
    if base_model:
        config["base_model_name_or_path"] = base_model
    elif record and not config.get("revision"):
        config["revision"] = record["model"].get("revision")
    file.unlink()  # it may be a link
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _complete_card(staged: Path, repo_id: str, is_adapter: bool, with_tokenizer: bool, base_model: str | None) -> None:
    """A card where there is none, or only PEFT's template; the trainer has written one already."""
    file = staged / "README.md"
    if base_model is None and file.is_file() and UNFINISHED_CARD not in file.read_text(encoding="utf-8"):
        return
    base = base_model or (_base_of(staged) if is_adapter else None)
    record = _record(staged) or {
        "model": {"architecture": "a causal language model"},
        "adapter": {} if is_adapter else None,
        "training": {},
    }
    card = model_card(
        record,
        repo_id=repo_id if "/" in repo_id else None,
        model_name=repo_id.split("/")[-1],
        has_curves=(staged / CURVES_FILE).is_file(),
        tokenizer_included=with_tokenizer,
        base_model=base if base and is_hub_id(base) else None,
    )
    card.save(file)
