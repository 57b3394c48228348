"""Held-out prompts for `trl-grpo eval`: through `load_prompts`, or out of a file that has them ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .prompt_options import PromptOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# What makes prompts, and has no effect on those that are there already
_MAKING = (
    "dataset_config columns answer unreadable template system_prompt few_shot overrides max_prompt_tokens deduplicate "
    "stopping_strategy"
).split()


@dataclass
class EvalPrompts(PromptOptions):
    """Of a test set, which is what it is: no duplicates are taken out."""

    dataset: dict[str, float] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "source(s), by name, Hub id or file; a mapping {source: weight} is a mixture; one file whose rows "
            "have a 'prompt' already is taken as it is"
        },
    )
    dataset_split: str = field(default="test", metadata={"help": "split to evaluate on"})
    deduplicate: Literal["normalized", "exact", "off"] = field(
        default="off", metadata={"help": "how alike two problems must be for the second one to be dropped"}
    )

    def read(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Dataset:
        """The rows, with a prompt each.

        Args:
            tokenizer: Loads the tokenizer, where prompts are measured; not called otherwise, so that what cannot be
                read is refused before a model is loaded.

        Raises:
            ValueError: no source, one that cannot be read, or options that have no effect on it.
        """
        arguments = self.arguments()
        file = self.dataset
        ready = _rows_with_prompts(file) if isinstance(file, str) else None
        return self._chosen(ready) if ready is not None else self._made(arguments, tokenizer)

    def sources(self) -> list[str]:
        """Their names."""
        return [self.dataset] if isinstance(self.dataset, str) else list(self.dataset or ())

    def _chosen(self, rows: Dataset) -> Dataset:
        file = self.dataset
        for name in _MAKING:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"--{name.replace('_', '-')} has no effect on {file!r}, whose rows have a 'prompt' already: leave "
                    "it out, or rename that column"
                )
        if self.dataset_shuffle:
            rows = rows.shuffle(seed=self.dataset_seed)
        last = len(rows) if self.dataset_take is None else min(len(rows), self.dataset_skip + self.dataset_take)
        if not 0 <= self.dataset_skip < last:
            raise ValueError(
                f"--dataset-skip {self.dataset_skip} and --dataset-take {self.dataset_take} leave nothing of the "
                f"{len(rows)} rows of {file!r}: lower the one, or raise the other"
            )
        return rows.select(range(self.dataset_skip, last))

    def _made(self, arguments: dict[str, Any], tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Dataset:
        from datasets import Dataset

        from ..data import PromptReport, load_prompts

        report = PromptReport()
        counted = None if self.max_prompt_tokens is None else tokenizer()
        rows = load_prompts(**arguments, tokenizer=counted, report=report)
        assert isinstance(rows, Dataset)  # as nothing is streamed
        print(report)
        return rows


def _rows_with_prompts(source: str) -> Dataset | None:
    """The rows of a local JSON Lines or Parquet file that have a prompt; None for any other source."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    if kind is None or not Path(source).is_file() or not Path(source).stat().st_size:
        return None  # as all that `load_prompts` has a word for
    try:
        rows = load_dataset(kind, data_files=source, split="train")
    except (DatasetGenerationError, UnicodeDecodeError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"--dataset {source} cannot be read: {cause}. Every row must have the same columns, each of one type"
        ) from error
    return rows if "prompt" in rows.column_names else None
