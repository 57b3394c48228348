"""The policy: a base model, usually with an adapter on it."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, PeftType, PromptLearningConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from trl.trainer.utils import create_model_from_path

from ..quantized import keep_quantized
from .adapter_dtype import keep_adapter_in_float32
from .head import head_problem


def load_model(
    model: str | PreTrainedModel | PeftModel,
    model_init_kwargs: dict[str, Any],
    quantization_config: BitsAndBytesConfig | None,
) -> PreTrainedModel | PeftModel:
    """The model itself, or the one at an id or path, in float32 unless `model_init_kwargs` says otherwise (as in TRL).

    Its quantized layers, if it has any, are kept as they are from here on, see `keep_quantized`.

    Raises:
        ValueError: if `quantization_config` is given twice, or given for a model that is already loaded; for
            `model_init_kwargs` that the model does not take; for weights that bitsandbytes has repacked, or does not
            keep in 8 bits.
    """
    if not isinstance(model, str):
        for name, value in (("quantization_config", quantization_config), ("model_init_kwargs", model_init_kwargs)):
            if value:
                raise ValueError(
                    f"{name} is set, but the model is already loaded, so it could have no effect. Load the model with "
                    "it, or pass the model's id or path."
                )
        keep_quantized(model)
        return model
    kwargs = dict(model_init_kwargs)
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "quantization_config is set both as a trainer argument and in model_init_kwargs; keep the trainer's "
                "argument"
            )
        kwargs["quantization_config"] = quantization_config
    try:
        loaded = create_model_from_path(model, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"model_init_kwargs={model_init_kwargs!r} do not fit the model {model!r}: {error}. Pass what "
            "AutoModelForCausalLM.from_pretrained takes."
        ) from error
    keep_quantized(loaded)
    return loaded


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """Wrap `model` with a fresh adapter, if a config is given. Whatever adapter it has is kept in float32.

    Raises:
        TypeError: if `peft_config` is not a PEFT config.
        ValueError: for a config that PEFT refuses, for a model that has an adapter already, for prompt learning, for
            adapters on the LM head other than LoRA, and for biases of a 16-bit base that train.
    """
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config must be a peft.PeftConfig such as peft.LoraConfig, got {type(peft_config).__name__}"
            )
        if isinstance(model, PeftModel):
            raise ValueError(
                "peft_config is set, but the model is a PeftModel already. Pass the PeftModel alone to go on training "
                "its adapter, or merge it (merge_and_unload) and pass the result with the new peft_config."
            )
        try:
            model = cast(PeftModel, get_peft_model(model, peft_config))
        except (ValueError, NotImplementedError) as error:  # PEFT's words name the field, not where it comes from
            raise ValueError(
                f"peft_config cannot be put on {type(model).__name__} as given ({type(peft_config).__name__}): {error}"
            ) from error
    if isinstance(model, PeftModel):
        if isinstance(model.active_peft_config, PromptLearningConfig):
            raise ValueError(
                f"peft_type={PeftType(model.active_peft_config.peft_type).value} is prompt learning: its virtual "
                "tokens have no place in a packed row. Use LoRA (peft.LoraConfig)."
            )
        problem = head_problem(base_model_of(model))
        if problem is not None:
            raise ValueError(
                f"the LM head has {problem}: log-probabilities are computed from its weight, which takes plain LoRA on "
                "an unquantized layer. Remove it from target_modules, or from the layers that are quantized."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "the PeftModel has no trainable parameter: it was loaded for inference. Load it with "
                "PeftModel.from_pretrained(..., is_trainable=True)."
            )
        keep_adapter_in_float32(model)
    return model


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside (or `model` itself)."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def disable_dropout(model: nn.Module) -> None:
    """Set dropout probabilities to 0: those of `nn.Dropout` modules, as TRL does, adapters' included, and those that
    modules keep as numbers, such as `attention_dropout`, which TRL leaves.

    A model that reads a probability from its config whenever it runs (Falcon, Persimmon) goes on doing so.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)


def context_limit(model: PreTrainedModel) -> int | None:
    """Tokens of prompt and completion that the model was made for; None if its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def no_gradient_loss(model: nn.Module) -> torch.Tensor:
    """0, with a gradient of zeros for every trainable parameter.

    For a micro-batch without a token in the loss: an optimizer skips parameters whose gradient is None, but moves on
    those of zero gradient (momentum, weight decay), which is what computing the zeros the long way would lead to.
    """
    return torch.stack([p.flatten()[:1].sum() * 0.0 for p in model.parameters() if p.requires_grad]).sum()
