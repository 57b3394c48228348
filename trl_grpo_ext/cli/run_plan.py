"""What `trl-grpo train` is about to do: how many steps, on prompts of what length, in how much memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase

    from ..config import GRPOConfig
    from ..memory_estimate import MemoryEstimate

MEASURED_PROMPTS = 20_000  # of a stream, or of a set that is larger, so many prompts are measured
_BINS = 12
_BAR = 40  # characters


@dataclass(frozen=True, slots=True)
class Steps:
    """How far a run goes. What depends on the number of rows is None for a stream."""

    prompts_per_step: float  # fresh ones; a fraction where one generation serves several steps
    completions_per_step: float
    per_epoch: int | None  # optimizer steps
    total: int | None
    epochs: float | None
    unused_rows: int | None  # of each epoch, which do not fill a generation

    @property
    def completions(self) -> float | None:
        """Drawn in the whole run."""
        return None if self.total is None else self.total * self.completions_per_step


@dataclass(frozen=True, slots=True)
class Shown:
    """One prompt as the model reads it."""

    text: str  # special tokens included
    tokens: int
    solution: str | None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything that a dry run prints."""

    model: str
    architecture: str
    dtype: str
    quantization: str | None
    adapter: str
    rows: int | None  # None: a stream
    eval_rows: dict[str, int | None]
    shown: list[Shown]
    lengths: list[int]  # tokens of the prompts measured
    rewards: list[tuple[str, float]]
    memory: MemoryEstimate
    steps: Steps
    args: GRPOConfig


def make_plan(
    args: GRPOConfig,
    *,
    model: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    quantization: BitsAndBytesConfig | None,
    train: Dataset | IterableDataset,
    evaluation: dict[str, Any],
    rewards: Sequence[Any],
    names: Sequence[str],
    shown: int,
) -> RunPlan:
    """Resolve a run on the model's config and tokenizer alone, with the checks that the trainer makes at its start.

    Raises:
        ValueError: for what the trainer would refuse.
    """
    from datasets import Dataset

    from ..adapter_source import dtype_name
    from ..adapter_source import quantization_of as stored_quantization
    from ..data import PromptEncoder
    from ..memory_estimate import meta_model
    from ..startup import (
        as_dict,
        check_all_prompts,
        check_train_dataset,
        make_rewards,
        named_datasets,
        resolve_tokenizer,
    )

    datasets = named_datasets(train, evaluation or None)
    check_train_dataset(train, args)
    no_workers = copy(args)
    no_workers.reward_workers = 0  # nothing is judged here
    held_out = evaluation if len(evaluation) > 1 else next(iter(evaluation.values()), None)
    scorer, weights = make_rewards(list(rewards), None, no_workers, held_out)
    scorer.close()
    dtype = _dtype(args, config)
    meta = meta_model(config, dtype, args.trust_remote_code)
    tokenizer = resolve_tokenizer(tokenizer, meta, args)
    encoder = PromptEncoder(tokenizer, as_dict(args.chat_template_kwargs))
    check_all_prompts(datasets, encoder, meta, args.sampling_options()["max_new_tokens"])
    stored = stored_quantization(config)
    if stored and quantization is not None:
        raise ValueError(f"quantize is set, but {model!r} is stored quantized already ({stored}): leave it out")
    lengths, examples = _measure(train, encoder, shown)
    memory, adapter = _memory(args, meta, peft_config, quantization, max(lengths))
    return RunPlan(
        model=model,
        architecture=type(meta).__name__,
        dtype=dtype_name(dtype),
        quantization=stored or _quantization_name(quantization),
        adapter=adapter,
        rows=len(train) if isinstance(train, Dataset) else None,
        eval_rows={name: len(data) if isinstance(data, Dataset) else None for name, data in evaluation.items()},
        shown=examples,
        lengths=lengths,
        rewards=list(zip(names, weights.tolist(), strict=True)),
        memory=memory,
        steps=planned_steps(args, len(train) if isinstance(train, Dataset) else None),
        args=args,
    )


def planned_steps(args: GRPOConfig, rows: int | None) -> Steps:
    """Optimizer steps, by what `GroupOrder` and `transformers.Trainer` do with so many rows."""
    from ..data import GroupOrder
    from ..row_order import group_order

    micro_batches = args.per_device_train_batch_size * args.world_size
    accumulated = args.gradient_accumulation_steps
    completions = micro_batches * accumulated / args.num_iterations
    most = args.max_steps if args.max_steps > 0 else None
    per_epoch = epochs = unused = None
    total = most
    if rows is not None:
        batches = len(GroupOrder(range(rows), **group_order(args))) // micro_batches
        per_epoch = max(math.ceil(batches / accumulated), 1)
        total = most or math.ceil(args.num_train_epochs * per_epoch)
        epochs = total / per_epoch
        in_generation = (args.generation_batch_size or micro_batches) // args.num_generations
        unused = rows % in_generation
    return Steps(completions / args.num_generations, completions, per_epoch, total, epochs, unused)


def histogram(lengths: Sequence[int], bins: int = _BINS) -> list[tuple[int, int, int]]:
    """(shortest, longest, how many) of each of at most `bins` equal ranges of whole tokens, empty ones included."""
    low, high = min(lengths), max(lengths)
    width = math.ceil((high - low + 1) / bins)
    counts = [0] * math.ceil((high - low + 1) / width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(low + i * width, min(low + (i + 1) * width - 1, high), count) for i, count in enumerate(counts)]


def bar(count: int, most: int) -> str:
    """A bar whose length is the count's share of the most there are; none is left out of sight."""
    return "█" * max(round(_BAR * count / most), count > 0)


def _dtype(args: GRPOConfig, config: PretrainedConfig) -> Any:
    """Of the base's weights: float32 unless `model_init_kwargs` say otherwise, as TRL loads them."""
    import torch

    from ..adapter_source import DTYPES

    asked = (args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}).get("dtype", "float32")
    if isinstance(asked, torch.dtype):
        return asked
    return DTYPES.get(asked) or config.dtype or config.get_text_config().dtype or torch.float32


def _measure(train: Any, encoder: Any, shown: int) -> tuple[list[int], list[Shown]]:
    """Tokens of the prompts, and the first few as the model reads them."""
    from rich.progress import track

    lengths: list[int] = []
    examples: list[Shown] = []
    known = getattr(train, "num_rows", None)
    rows = islice(train, MEASURED_PROMPTS)
    total = MEASURED_PROMPTS if known is None else min(known, MEASURED_PROMPTS)
    for row in track(rows, description="Measuring prompts", total=total, transient=True):
        ids = encoder.encode(row["prompt"]).ids
        lengths.append(len(ids))
        if len(examples) < shown:
            text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
            solution = row.get("solution")
            examples.append(Shown(text, len(ids), None if solution is None else str(solution)))
    return lengths, examples


def _memory(args: GRPOConfig, meta: Any, peft_config: Any, quantization: Any, longest: int) -> tuple[Any, str]:
    """The estimate, and what the adapter is."""
    import torch
    from peft import PeftModel, get_peft_model

    from ..memory_estimate import Load, estimate_memory
    from ..policy import adapter_config
    from ..startup import make_trainable

    name = "none: every weight is trained"
    own_dtype = meta.dtype
    if args.adapter_name_or_path is not None:
        peft_config = adapter_config(args.adapter_name_or_path, args.adapter_revision)
        peft_config.inference_mode = False
        name = f"{args.adapter_name_or_path} ({peft_config.peft_type.value}), trained on"
        with torch.device("meta"):
            meta = get_peft_model(meta, peft_config)
        meta = make_trainable(meta, args, None)
    elif peft_config is not None:
        name = f"a new {peft_config.peft_type.value}"
        with torch.device("meta"):
            meta = make_trainable(meta, args, peft_config)
    elif quantization is not None:
        raise ValueError(
            "quantize is set and no adapter is put on: weights in 4 or 8 bits cannot be trained. Set adapter: lora, or "
            "leave quantize out"
        )
    prompts = (args.generation_batch_size or 1) // args.world_size // args.num_generations
    load = Load(
        prompts=prompts,
        completions=prompts * args.num_generations,
        micro_batch=args.per_device_train_batch_size,
        prompt_tokens=longest,
        completion_tokens=args.sampling_options()["max_new_tokens"],
        num_generations=args.num_generations,
    )
    moves = args.sync_ref_model or args.reference_rounds > 1 or args.adapter_name_or_path is not None
    estimate = estimate_memory(
        meta,
        load,
        quantization=quantization,
        compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else own_dtype,
        checkpointing=bool(args.gradient_checkpointing),
        has_reference=args.beta > 0 and (moves or not isinstance(meta, PeftModel)),
        optimizer=str(getattr(args.optim, "value", args.optim)),
    )
    return estimate, name


def _quantization_name(quantization: Any) -> str | None:
    if quantization is None:
        return None
    if quantization.load_in_8bit:
        return "int8"
    twice = ", scales quantized too" if quantization.bnb_4bit_use_double_quant else ""
    return f"{quantization.bnb_4bit_quant_type}{twice}"
