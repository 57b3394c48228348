"""Held-out prompts for `trl-grpo eval`: through `load_prompts`, or out of a file that has them ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .parser import Gather

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# What makes prompts, and has no effect on those that are there already
_MAKING = "template system_prompt few_shot problem_column answer_column answer max_prompt_tokens dataset_config".split()


@dataclass
class EvalPrompts:
    """What is completed: the arguments of `load_prompts`."""

    _argument_group_name: ClassVar[str] = "prompts"

    dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "source(s) of prompts, by name, Hub id or file; a file whose rows have a 'prompt' already is taken "
            "as it is",
            "action": Gather,
            "metavar": "NAME",
        },
    )
    dataset_split: str = field(default="test", metadata={"help": "split to evaluate on"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset on the Hub"})
    problem_column: str | None = field(
        default=None, metadata={"help": "column of the problem, in a source of your own"}
    )
    answer_column: str | None = field(default=None, metadata={"help": "column of its gold answer"})
    answer: str | None = field(
        default=None, metadata={"help": "how gold answers are written: gsm8k (after ####), boxed, number, text, raw"}
    )
    template: str = field(
        default="r1",
        metadata={"help": "r1, r1-zero, qwen-boxed, plain, Jinja text, or a .jinja file", "metavar": "NAME"},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "instead of the template's", "metavar": "TEXT"})
    few_shot: str | None = field(default=None, metadata={"help": "JSON Lines file of examples", "metavar": "FILE"})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "longer prompts are dropped, and counted"})
    dataset_shuffle: bool = field(default=False, metadata={"help": "shuffle before skip and take"})
    dataset_seed: int = field(default=0, metadata={"help": "of that shuffle, and of procedural sources"})
    dataset_skip: int = field(default=0, metadata={"help": "rows to leave out at the start"})
    dataset_take: int | None = field(default=None, metadata={"help": "rows to take, at most"})

    def read(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Dataset:
        """The rows, with a prompt each.

        Args:
            tokenizer: Loads the tokenizer, where prompts are measured; not called otherwise, so that what cannot be
                read is refused before a model is loaded.

        Raises:
            ValueError: no source, one that cannot be read, or options that have no effect on it.
        """
        if not self.dataset:
            raise ValueError("dataset is missing: say where the prompts come from, --dataset NAME")
        ready = _rows_with_prompts(self.dataset[0]) if len(self.dataset) == 1 else None
        return self._chosen(ready) if ready is not None else self._made(tokenizer)

    def _chosen(self, rows: Dataset) -> Dataset:
        file = (self.dataset or [""])[0]
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

    def _made(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Dataset:
        """No duplicates are taken out: a test set is what it is."""
        from datasets import Dataset

        from ..data import PromptReport, load_prompts

        named = {"problem": self.problem_column, "answer": self.answer_column}
        sources, report = self.dataset or [], PromptReport()
        rows = load_prompts(
            sources[0] if len(sources) == 1 else sources,
            split=self.dataset_split,
            config=self.dataset_config,
            columns={role: name for role, name in named.items() if name is not None} or None,
            answer=self.answer,
            template=self.template,
            system_prompt=self.system_prompt,
            few_shot=self.few_shot,
            tokenizer=None if self.max_prompt_tokens is None else tokenizer(),
            max_prompt_tokens=self.max_prompt_tokens,
            deduplicate="off",
            shuffle=self.dataset_shuffle,
            seed=self.dataset_seed,
            skip=self.dataset_skip,
            take=self.dataset_take,
            report=report,
        )
        assert isinstance(rows, Dataset)  # as nothing is streamed
        print(report)
        return rows


def _rows_with_prompts(source: str) -> Dataset | None:
    """The rows of a local JSON Lines or Parquet file that have a prompt; None for any other source."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    if kind is None or not Path(source).is_file():
        return None
    try:
        rows = load_dataset(kind, data_files=source, split="train")
    except (DatasetGenerationError, UnicodeDecodeError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"--dataset {source} cannot be read: {cause}. Every row must have the same columns, each of one type"
        ) from error
    return rows if "prompt" in rows.column_names else None
