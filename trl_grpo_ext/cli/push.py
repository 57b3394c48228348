"""`trl-grpo push FOLDER --repo-id ID`: upload what a run has left on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from .main import OK, CheckFailed
from .parser import CommandParser

_DESCRIPTION = """\
Upload an adapter (or a model), its card and its training config to the Hub. The token is that of `hf auth login` or
HF_TOKEN; there is no option for it, as a command line is seen by others."""


@dataclass
class PushWhat:
    """What is uploaded."""

    _argument_group_name: ClassVar[str] = "what to push"

    folder: str = field(
        metadata={"help": "a run's output_dir, or a checkpoint in it; --folder may be left out if it comes first"}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "id of the base, where the adapter was trained on one from a folder"}
    )
    eval: str | None = field(
        default=None,
        metadata={"help": "what trl-grpo eval wrote: its results go into the card", "metavar": "DIR"},
    )


@dataclass
class PushWhere:
    """Where to, and how."""

    _argument_group_name: ClassVar[str] = "where to"

    repo_id: str = field(metadata={"help": "repository: owner/name, or name for your own; made if it is not there"})
    private: bool = field(default=False, metadata={"help": "make a repository that is not there yet private"})
    revision: str | None = field(default=None, metadata={"help": "branch; by default main; made if it is not there"})
    create_pr: bool = field(default=False, metadata={"help": "open a pull request instead of committing"})
    commit_message: str = field(default="Upload adapter", metadata={"help": "title of the commit"})


def run(argv: Sequence[str]) -> int:
    """Push, print where it is, and return the exit code."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--folder")
    what, where = CommandParser("push", _DESCRIPTION, [PushWhat, PushWhere]).read(words)

    from ..hub import UploadError, push_adapter

    try:
        commit = push_adapter(
            what.folder,
            where.repo_id,
            private=where.private or None,
            revision=where.revision,
            create_pr=where.create_pr,
            commit_message=where.commit_message,
            base_model=what.base_model,
            evaluation=what.eval,
        )
    except UploadError as error:
        raise CheckFailed(str(error)) from error
    print(commit.pr_url or commit.commit_url)
    return OK
