"""Uploads an adapter to the Hub, and says how to do it later where that fails."""

from __future__ import annotations

import inspect
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]  # public, but lazily exported

from ..credentials import known_tokens, redacted
from .card import UNKNOWN_REPO
from .staging import stage

# What the Hub's client retries on, and how long it waits, where it retries by itself (uploads, but not the call that
# makes a repository, nor without hf_xet the commit)
_BACKOFF = {name: p.default for name, p in inspect.signature(http_backoff).parameters.items()}
ATTEMPTS = 3

T = TypeVar("T")


class UploadError(RuntimeError):
    """An upload failed. The message says why, and the command that makes it later."""


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload adapter",
    base_model: str | None = None,
    with_tokenizer: bool | None = None,
    evaluation: str | Path | None = None,
    endpoint: str | None = None,
) -> CommitInfo:
    """Upload the adapter (or the model) in `folder`, with what belongs to it, and nothing else that lies there.

    These are `adapter_model.safetensors` and `adapter_config.json`, the tokenizer if it is not the base's, the model
    card (made if there is none yet), `training_config.yaml` and `reward_curves.svg`. The repository and the branch are
    made if they do not exist. What the Hub answers with an error that may pass (no connection, 408, 429, 5xx) is tried
    again with the waits of `huggingface_hub.utils.http_backoff`.

    Args:
        folder: Where `save_model` wrote to.
        repo_id: `name` (of the token's user) or `owner/name`.
        token: By default the one of `hf auth login`, or HF_TOKEN.
        private: Whether a repository that does not exist yet is private; None: as the account has it.
        revision: Branch; by default `main`.
        create_pr: Open a pull request instead of committing.
        commit_message: Title of the commit, and of the pull request.
        base_model: Id of the base to write into card and adapter, where it was loaded from a folder.
        with_tokenizer: Whether to upload the tokenizer; None: if it is not the base's.
        evaluation: `evaluation.json` of `trl-grpo eval`, or its folder, whose results take the place of those of
            training in the card.
        endpoint: Of the Hub; by default HF_ENDPOINT.

    Raises:
        ValueError: `folder` has nothing to upload, a file in it holds a token, or the Hub refuses the card.
        UploadError: the upload failed; everything is on disk still.
    """
    folder = Path(folder)
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"create_pr=True with revision={revision!r}: a pull request is opened against 'main'. Leave revision "
            "unset, or push to the branch without create_pr."
        )
    staged = stage(
        folder,
        repo_id,
        token=token,
        base_model=base_model,
        with_tokenizer=with_tokenizer,
        evaluation=evaluation,
    )
    try:
        return upload(
            staged,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            endpoint=endpoint,
        )
    except UploadError as error:
        command = push_command(folder, repo_id, private, revision, create_pr, base_model, evaluation)
        raise UploadError(f"{error} Everything is in {folder}; push it later with\n    {command}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def push_command(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    evaluation: str | Path | None = None,
) -> str:
    """The command that makes the same upload."""
    words = ["trl-grpo", "push", str(folder), "--repo-id", repo_id]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    words += ["--create-pr"] if create_pr else []
    words += ["--base-model", base_model] if base_model else []
    words += ["--eval", str(evaluation)] if evaluation else []
    return shlex.join(words)


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool = False,
    commit_message: str,
    path_in_repo: str | None = None,
    endpoint: str | None = None,
) -> CommitInfo:
    """Upload all of `folder`, a staged one.

    Raises:
        ValueError: the Hub refuses an id or the card.
        UploadError: anything else went wrong.
    """
    api = HfApi(endpoint=endpoint, token=token, library_name="trl-grpo-ext")
    try:
        repo_id = create_repository(api, repo_id, private)
        _name_repository(folder / "README.md", repo_id)
        if revision and revision != "main" and not revision.startswith("refs/"):
            branch = revision
            retried(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        return retried(
            lambda: api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=path_in_repo,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        )
    except ValueError:
        raise
    except Exception as error:  # the client's, httpx's and xet's: all mean that it is not on the Hub
        tokens = known_tokens(token)
        raise UploadError(redacted(f"The upload to {repo_id} failed: {reason(error)}.", tokens)) from error


def _name_repository(card: Path, repo_id: str) -> None:
    """In the card's lines that load the model: its owner is known once the Hub has answered."""
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(f'"{UNKNOWN_REPO}"', f'"{repo_id}"'), encoding="utf-8")


def create_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Make the repository if it does not exist; its full id."""
    return retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id


def retried(call: Callable[[], T]) -> T:
    """`call()`, again where the Hub's client would try again, which it does not do in every call of its own."""
    wait = float(_BACKOFF["base_wait_time"])
    for _ in range(ATTEMPTS - 1):
        try:
            return call()
        except _BACKOFF["retry_on_exceptions"]:
            pass
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in _BACKOFF["retry_on_status_codes"]:
                raise
        time.sleep(wait)
        wait = min(2 * wait, float(_BACKOFF["max_wait_time"]))
    return call()


_REASONS = {
    401: "the Hub does not know the token, or the repository is not yours to see (401). Log in with `hf auth login`",
    403: "the token may not write there (403). Log in with one that may: `hf auth login`",
    404: "the repository or the revision was not found (404)",
}


def reason(error: BaseException) -> str:
    """One clause that says what went wrong."""
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:  # "Error while uploading ..."
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in _REASONS:
            return _REASONS[status]
        return f"the Hub answers with {status}" + (f" ({error.server_message})" if error.server_message else "")
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"no answer from the Hub ({type(error).__name__}{': ' if first_line else ''}{first_line})"
