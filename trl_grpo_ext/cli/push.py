"""`trl-grpo push FOLDER --repo-id ID`: upload what a run has left on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from trl.scripts.utils import TrlParser

from ..hub import UploadError, push_adapter


@dataclass
class PushArguments:
    """Upload an adapter (or a model), its card and its training config to the Hub.

    The token is that of `hf auth login` or HF_TOKEN; there is no option for it, as a command line is seen by others.
    """

    folder: str = field(metadata={"help": "Where the adapter is: a run's output_dir, or a checkpoint in it."})
    repo_id: str = field(metadata={"help": "Repository: owner/name, or name for your own. Made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Make a repository that is not there yet private."})
    revision: str | None = field(default=None, metadata={"help": "Branch; by default main. Made if it is not there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    commit_message: str = field(default="Upload adapter", metadata={"help": "Title of the commit."})
    base_model: str | None = field(
        default=None, metadata={"help": "Id of the base, where the adapter was trained on one from a folder."}
    )


def run(arguments: PushArguments) -> int:
    """Push; 0, or 1 after saying what went wrong."""
    try:
        commit = push_adapter(
            arguments.folder,
            arguments.repo_id,
            private=arguments.private or None,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            commit_message=arguments.commit_message,
            base_model=arguments.base_model,
        )
    except (UploadError, ValueError) as error:
        print(f"trl-grpo push: {error}", file=sys.stderr)
        return 1
    print(commit.pr_url or commit.commit_url)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point: the folder may come first, as it does in the message that a failed upload prints."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--folder")
    parser = TrlParser(PushArguments, prog="trl-grpo push")  # type: ignore[arg-type]  # its annotation is a NewType
    (arguments,) = parser.parse_args_and_config(args=words)
    return run(arguments)
