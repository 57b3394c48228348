"""`load_prompts`: a data set, a file or a mixture of several -> prompts to train and evaluate on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .mixing import finish, mix
from .plan import Choice, check_arguments, plan_sources
from .report import PromptReport


def load_prompts(
    source: str | os.PathLike[str] | Sequence[str] | Mapping[str, float],
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    answer: str | None = None,
    template: str | Mapping[str, str] = "r1",
    system_prompt: str | None = None,
    few_shot: Sequence[Mapping[str, str]] | str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_tokens: int | None = None,
    deduplicate: str = "normalized",
    decontaminate: Sequence[str] = (),
    decontaminate_ngram: int = 13,
    decontaminate_share: float = 0.5,
    pass_rate: tuple[float, float] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    skip: int = 0,
    take: int | None = None,
    stopping_strategy: str = "first_exhausted",
    unreadable: str = "error",
    streaming: bool = False,
    report: PromptReport | None = None,
) -> Dataset | IterableDataset:
    r"""Prompts out of one or several sources, through `datasets`: cached by fingerprint, or read as they are needed.

    In this order: rows are read, golds parsed and templates applied; rows outside of the pass-rate band, too long ones,
    contaminated ones and duplicates are left out, counted and reported; the sources are mixed, shuffled, and cut by
    `skip` and `take`. A row that cannot be read is an error, unless it is said otherwise.

    Args:
        source: what to read, one, several (one after the other) or a mapping of sources to weights (a mixture):
            a name (gsm8k, math, math-500, svamp, aime, mgsm, deepmath-103k, countdown), the id of a set on the Hub, a
            local .jsonl, .json, .parquet, .csv or .tsv file (also .gz), `NAME:FILE` for a local copy of a named set,
            `procedural:arithmetic`, `procedural:countdown`, or `reasoning_gym:TASK`.
        split: split of the source; a local file is one split, whatever it is called.
        config: configuration of a Hub dataset (MGSM's language), or options of a procedural source,
            "rows=5000,max_operand=99".
        columns: "problem" and "answer" -> their columns in a source that is not known by name; any further name is a
            column to keep -> its column.
        answer: how gold answers are written: "gsm8k" (after ####), "boxed", "number", "text" (as it is), "raw".
        template: "r1" (arXiv:2501.12948, Table 1, as a system prompt), "r1-zero" (the same as plain text),
            "qwen-boxed", "plain" (the problem alone, as a user message), Jinja of a plain-text prompt or a .jinja file,
            or a mapping {system, user, assistant} of a conversation.
        system_prompt: in place of the template's; "" for none.
        few_shot: examples before the problem, rows of {problem, answer, solution} or a JSON Lines file of them.
        overrides: per source, any of these arguments that concern one source: {"math": {"template": "qwen-boxed"}}; of
            a source to decontaminate against, its split, config and columns.
        tokenizer: of the model, to count tokens with; needed for `max_prompt_tokens`.
        chat_template_kwargs: arguments of its chat template, as in the trainer's config.
        max_prompt_tokens: longer prompts (after the chat template) are left out; none is ever cut.
        deduplicate: "normalized" (but for case, white space and LaTeX's spacing), "exact" or "off".
        decontaminate: evaluation sources whose problems must not be trained on; of each its evaluation split, unless
            `overrides` names another. Their gold answers are not read.
        decontaminate_ngram: words of the n-grams that are compared.
        decontaminate_share: the part of an evaluation problem's n-grams that a contaminated problem shares; 0 for any.
        pass_rate: (lowest, highest) value of the column `pass_rate` to keep, which `trl-grpo difficulty` writes.
        shuffle: shuffle before `skip` and `take`; a stream within a buffer of 10,000 rows.
        seed: of the shuffle, the mixture and procedural sources.
        skip: prompts to leave out at the start.
        take: prompts to take, at most.
        stopping_strategy: when a mixture ends, as in `datasets.interleave_datasets`.
        unreadable: what becomes of a row without a problem, or whose answer cannot be parsed: "error", or "drop", which
            counts and reports it.
        streaming: an `IterableDataset`, in constant memory.
        report: is filled with the counts.

    Returns:
        Columns `prompt` (messages, or text), `solution` (the gold answer), `problem`, `source`, and what the source
        keeps for rewards and evaluations (`level`, `subject`, `nums`, `target`, `pass_rate`, ...).

    Raises:
        ValueError: an argument does not fit, a column or file is missing, an answer cannot be parsed, nothing is left.
        TypeError: an argument is of the wrong type.
    """
    own = {
        "split": split,
        "config": config,
        "columns": columns,
        "answer": answer,
        "template": template,
        "system_prompt": system_prompt,
        "few_shot": few_shot,
        "max_prompt_tokens": max_prompt_tokens,
        "decontaminate": decontaminate,
        "decontaminate_ngram": decontaminate_ngram,
        "decontaminate_share": decontaminate_share,
        "pass_rate": pass_rate,
        "unreadable": unreadable,
        "seed": seed,
    }
    whole = Choice(shuffle, seed, skip, take)
    check_arguments(deduplicate, stopping_strategy, tokenizer, whole)
    if report is not None and not isinstance(report, PromptReport):
        raise TypeError(f"report={report!r:.80} must be a PromptReport: it is filled with the counts.")
    report = PromptReport() if report is None else report
    report.sources.clear()
    report.streaming = streaming
    sources = plan_sources(source, own, overrides, streaming, deduplicate)
    prepared = [plan.prepare(sources, tokenizer, chat_template_kwargs, report) for plan in sources]
    mixed = mix(prepared, sources, deduplicate, stopping_strategy, seed, report)
    return finish(mixed, whole, report)
