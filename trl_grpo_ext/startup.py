"""What the trainer resolves and refuses before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
from trl.trainer.utils import get_config_model_id

from .attention import use_group_attention
from .config import GRPOConfig
from .config_evaluation import best_metric_problem
from .curriculum import pass_reward
from .data import PromptEncoder, check_columns, check_prompts
from .policy import (
    CompletionScorer,
    adapter_base,
    adapter_config,
    add_adapter,
    base_model_of,
    check_adapter_source,
    context_limit,
    disable_dropout,
    load_adapter,
    load_model,
    packing_problem,
    tokenizer_source,
)
from .rewards import Limits, RewardScorer
from .rewards.batch import RESERVED
from .rollout import GroupSampler, SamplingParams

logger = get_logger(__name__)

# Arguments of a reward function that are not columns; TRL drops a column `completion_ids`, and so do we
_TAKEN_COLUMNS = frozenset(RESERVED) - {"completion_ids"}

EvalDataset: TypeAlias = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]


def resolve_config(
    args: GRPOConfig | TRLGRPOConfig | None,
    model: str | PreTrainedModel | PeftModel | None,
    peft_config: PeftConfig | None = None,
) -> GRPOConfig:
    """Our config, TRL's converted, or the defaults with an output folder named after the model, as in TRL.

    Raises:
        TypeError: for anything else.
        ValueError: if there is no model, or more than one adapter.
    """
    check_adapter_source(getattr(args, "adapter_name_or_path", None), model, peft_config)
    if args is None:
        assert model is not None  # checked above
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return GRPOConfig(output_dir=f"{model_id.split('/')[-1]}-GRPO")
    if isinstance(args, GRPOConfig):
        return args
    if isinstance(args, TRLGRPOConfig):
        return GRPOConfig.from_trl(args)
    raise TypeError(f"args must be trl_grpo_ext.GRPOConfig or trl.GRPOConfig, got {type(args).__name__}")


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A copy of a config field that is a dict or unset: its JSON was read, and anything else refused, by the config."""
    return dict(value) if isinstance(value, dict) else {}


def load_policy(
    model: str | PreTrainedModel | PeftModel | None, args: GRPOConfig, quantization_config: BitsAndBytesConfig | None
) -> PreTrainedModel | PeftModel:
    """`load_model` as the config says.

    Raises:
        ValueError: for a mixture of experts whose load-balancing loss TRL would add to the objective.
    """
    init_kwargs = as_dict(args.model_init_kwargs)
    adapter, token = args.adapter_name_or_path, init_kwargs.get("token")
    if model is None:
        model, revision = adapter_base(cast(str, adapter), args.adapter_revision, token)
        init_kwargs.setdefault("revision", revision)
    elif adapter is not None:
        adapter_config(adapter, args.adapter_revision, token)  # before the base is loaded for nothing
    if isinstance(model, str):
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        if args.distributed_state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
            # As in TRL: every process has a whole model on its own device, "auto" would spread each over all of them
            init_kwargs["device_map"] = None
    loaded = load_model(model, init_kwargs, quantization_config)
    _check_router_loss(base_model_of(loaded))
    return load_adapter(loaded, adapter, args.adapter_revision, token) if adapter else loaded


def _check_router_loss(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if hasattr(config, "output_router_logits") and coefficient != 0.0:  # TRL's condition
        raise ValueError(
            f"the model's config has router_aux_loss_coef={coefficient!r}: TRL adds that much of its experts' "
            "load-balancing loss to the objective, which is not supported here. To train without it, set "
            "model.config.router_aux_loss_coef = 0.0, or model_init_kwargs={'router_aux_loss_coef': 0.0} for a model "
            "that is given by id or path."
        )


def make_trainable(
    model: PreTrainedModel | PeftModel, args: GRPOConfig, peft_config: PeftConfig | None
) -> PreTrainedModel | PeftModel:
    """Put the adapter on, if there is one to put on, and set dropout and gradient checkpointing as the config says."""
    model = add_adapter(model, peft_config)
    if args.disable_dropout:
        disable_dropout(model)
    if args.gradient_checkpointing and as_dict(args.gradient_checkpointing_kwargs).get("use_reentrant"):
        # A reentrant checkpoint has gradients only if its input has, and embeddings are frozen under an adapter
        base_model_of(model).enable_input_require_grads()
    return model


def resolve_tokenizer(
    processing_class: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    args: GRPOConfig,
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the model's, with a padding token; the model is told of the padding id.

    Raises:
        TypeError: for a processor: only text is supported.
        ValueError: if the tokenizer has no EOS token.
    """
    if processing_class is None:
        revision, token = (as_dict(args.model_init_kwargs).get(name) for name in ("revision", "token"))
        source = tokenizer_source(args.adapter_name_or_path, args.adapter_revision, token)
        source = source or (get_config_model_id(model.config), revision)
        processing_class = AutoTokenizer.from_pretrained(
            source[0], revision=source[1], token=token, trust_remote_code=args.trust_remote_code
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a tokenizer (text only), got {type(processing_class).__name__}")
    if processing_class.eos_token_id is None:
        raise ValueError(
            "processing_class has no EOS token (eos_token=None): no completion could end, and none could be told from "
            "a truncated one. Set processing_class.eos_token."
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
    """Every dataset under the name that an error should call it by, its columns checked.

    Raises:
        ValueError: if there is no training dataset, or one of them cannot be used; see `check_columns`.
        TypeError: for something that is not a `datasets` dataset.
    """
    if train is None:
        raise ValueError("train_dataset is missing: pass a datasets.Dataset with a 'prompt' column")
    named = {"train_dataset": train}
    if isinstance(evaluation, dict):
        named |= {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluation.items()}
    elif evaluation is not None:
        named["eval_dataset"] = evaluation
    for name, dataset in named.items():
        taken = sorted(set(check_columns(dataset, name)) & _TAKEN_COLUMNS)
        if taken:
            raise ValueError(
                f"{name} has the column(s) {taken}, and rewards are called with arguments of that name: rename them "
                "with dataset.rename_column."
            )
    return named


def check_train_dataset(dataset: Dataset | IterableDataset, args: GRPOConfig) -> None:
    """Refuse a dataset that does not fill one generation, of which training would silently do nothing.

    Raises:
        ValueError: says how many prompts there are, and how many it takes; and for a field that a stream excludes.
    """
    asked = [f"curriculum={args.curriculum!r}"] * (args.curriculum is not None)
    asked += ["dynamic_sampling=True"] * args.dynamic_sampling
    if asked and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{' and '.join(asked)} cannot be used without a train_dataset that can be indexed, as prompts are drawn "
            "from it at random; it is an IterableDataset. Load it without streaming, or leave the field(s) unset."
        )
    prompts = cast(int, args.generation_batch_size) // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(dataset)} rows, and one generation takes {prompts} prompts (generation_batch_size="
            f"{args.generation_batch_size} / num_generations={args.num_generations}): only whole generations are "
            "trained on. Lower steps_per_generation, gradient_accumulation_steps or per_device_train_batch_size, or "
            "add rows."
        )


def check_all_prompts(
    datasets: dict[str, Dataset | IterableDataset], encoder: PromptEncoder, model: PreTrainedModel, completion: int
) -> int | None:
    """Longest prompt the model's context allows (None: unknown), after refusing bad prompts of map-style datasets.

    Rotary positions go on beyond the context a model was trained for, so there a prompt must only leave room for the
    first token. A table of learned positions ends: a prompt must leave room for `completion` tokens.
    """
    context = context_limit(model)
    limit = _prompt_limit(context, model, completion)
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            why = f"that the model's context of {context} tokens has room for, beside a completion"
            check_prompts(dataset, name, encoder, limit, why)
    return limit


def _prompt_limit(context: int | None, model: PreTrainedModel, completion: int) -> int | None:
    if context is None:
        return None
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None) is not None
    limit = context - (1 if rotary else completion)
    if limit < 1:
        raise ValueError(
            f"max_completion_length={completion} must be below the model's context of {context} tokens, or no prompt "
            "fits beside a completion. Lower max_completion_length."
        )
    return limit


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


def make_sampler(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: GRPOConfig,
    *,
    shared_prompts: bool,
) -> GroupSampler:
    """The sampler of the rollouts, as the config says."""
    params = SamplingParams(**args.sampling_options(), logps_temperature=args.temperature)
    return GroupSampler(model, tokenizer, params, shared_prompts=shared_prompts, dequantize=args.rollout_dequantize)


def make_rewards(
    reward_funcs: Any,
    processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None,
    args: GRPOConfig,
    eval_dataset: EvalDataset | None = None,
) -> tuple[RewardScorer, torch.Tensor]:
    """The scorer of all rewards, and their weights, `(K,)`.

    Raises:
        ValueError: if `metric_for_best_model` cannot be a metric of an evaluation by these rewards; if groups are to be
            drawn on and no reward judges whole completions; see also `pass_reward`.
    """
    scorer = RewardScorer(
        reward_funcs,
        processing_classes=processing_classes,
        chat_template_kwargs=as_dict(args.chat_template_kwargs),
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        limits=Limits(args.reward_timeout, args.reward_memory_mb, args.reward_workers, args.reward_concurrency),
        max_failure_rate=args.reward_max_failure_rate,
        failures_file=Path(str(args.output_dir)) / "reward_failures.jsonl",
    )
    sets = list(eval_dataset) if isinstance(eval_dataset, dict) else []
    if eval_dataset is not None and (problem := best_metric_problem(args.metric_for_best_model, sets, scorer.names)):
        raise ValueError(problem)
    if args.curriculum is not None:
        pass_reward(args.curriculum_reward, scorer.names)
    asked = [f"num_generations_max={args.num_generations_max}"] * (args.num_generations_max is not None)
    asked += ["dynamic_sampling=True"] * args.dynamic_sampling
    if asked and bool(scorer.judges_steps.all()):
        raise ValueError(
            f"{' and '.join(asked)} cannot be used with step rewards alone: whether a group has a signal is decided by "
            "the rewards of whole completions. Add one of those, or leave the fields unset."
        )
    return scorer, reward_weights(args.reward_weights, scorer.names)


def reward_weights(weights: Sequence[float] | None, names: Sequence[str]) -> torch.Tensor:
    """`(K,)`, ones by default.

    Raises:
        ValueError: if there is not one weight per reward function.
    """
    if weights is None:
        return torch.ones(len(names))
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights={list(weights)} has {len(weights)} values for {len(names)} reward functions "
            f"{list(names)}: give one weight per reward function"
        )
    return torch.tensor(weights, dtype=torch.float32)
