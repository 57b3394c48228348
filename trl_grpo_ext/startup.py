"""What the trainer resolves and refuses before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
from trl.trainer.utils import get_config_model_id

from .attention import use_group_attention
from .config import GRPOConfig
from .data import PromptEncoder, check_lengths
from .policy import CompletionScorer, context_limit, packing_problem

logger = get_logger(__name__)

EvalDataset = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]


def resolve_config(args: GRPOConfig | TRLGRPOConfig | None, model: str | PreTrainedModel | PeftModel) -> GRPOConfig:
    """Our config, TRL's converted, or the defaults with an output folder named after the model, as in TRL.

    Raises:
        TypeError: for anything else.
    """
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return GRPOConfig(output_dir=f"{model_id.split('/')[-1]}-GRPO")
    if isinstance(args, GRPOConfig):
        return args
    if isinstance(args, TRLGRPOConfig):
        return GRPOConfig.from_trl(args)
    raise TypeError(f"args must be trl_grpo_ext.GRPOConfig or trl.GRPOConfig, got {type(args).__name__}")


def resolve_tokenizer(
    processing_class: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the model's, with a padding token; the model is told of the padding id.

    Raises:
        TypeError: for a processor: only text is supported.
        ValueError: if the tokenizer has no EOS token.
    """
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(
            get_config_model_id(model.config), revision=revision, trust_remote_code=trust_remote_code
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a tokenizer (text only), got {type(processing_class).__name__}")
    if processing_class.eos_token_id is None:
        raise ValueError(
            "processing_class has no EOS token (eos_token=None): no completion could end, and none could be told from a "
            "truncated one. Set processing_class.eos_token."
        )
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = processing_class.pad_token_id
    return processing_class


def named_datasets(
    train: Dataset | IterableDataset | None, evaluation: EvalDataset | None
) -> dict[str, Dataset | IterableDataset]:
    """Every dataset under the name that an error should call it by.

    Raises:
        ValueError: if there is no training dataset.
    """
    if train is None:
        raise ValueError("train_dataset is missing: pass a datasets.Dataset with a 'prompt' column")
    named = {"train_dataset": train}
    if isinstance(evaluation, dict):
        return named | {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluation.items()}
    return named if evaluation is None else named | {"eval_dataset": evaluation}


def check_prompt_lengths(
    datasets: dict[str, Dataset | IterableDataset], encoder: PromptEncoder, model: PreTrainedModel
) -> int | None:
    """Longest prompt the model's context allows (None: unknown), after refusing longer ones in map-style datasets."""
    context = context_limit(model)
    if context is None:
        return None
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            why = f"that fit into the model's context of {context} tokens together with a completion"
            check_lengths(dataset, name, encoder, context - 1, why)
    return context - 1


def choose_packing(model: PreTrainedModel, scorer: CompletionScorer, choice: str) -> bool:
    """Whether prompts are shared between completions: `attention_packing`, and a probe of the model.

    Raises:
        ValueError: if `choice` is "on" and the model's prompts cannot be shared.
    """
    if choice == "off":
        return False
    original = model.config._attn_implementation
    if use_group_attention(model):
        problem = packing_problem(model, scorer)
    else:
        problem = f"attn_implementation={original!r} is not 'sdpa'"
    if problem is None:
        return True
    if choice == "on":
        raise ValueError(f"attention_packing='on', but prompts cannot be shared: {problem}. Set it to 'auto' or 'off'.")
    if model.config._attn_implementation != original:
        model.set_attn_implementation(original)
    logger.warning(f"Prompts are not shared between completions ({problem}): padded rows are used, which is slower.")
    return False


def reward_weights(weights: Sequence[float] | None, names: Sequence[str]) -> torch.Tensor:
    """`(K,)`, ones by default.

    Raises:
        ValueError: if there is not one weight per reward function.
    """
    if weights is None:
        return torch.ones(len(names))
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights={list(weights)} has {len(weights)} values for {len(names)} reward functions {list(names)}: "
            "give one weight per reward function"
        )
    return torch.tensor(weights, dtype=torch.float32)


def group_order(args: GRPOConfig) -> dict[str, Any]:
    """Arguments that `GroupOrder` and `repeat_stream` share."""
    return {
        "num_generations": args.num_generations,
        "batch_size": args.per_device_train_batch_size,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": args.num_iterations,
        "world_size": args.world_size,
        "shuffle": args.shuffle_dataset,
        "seed": args.seed,
    }
