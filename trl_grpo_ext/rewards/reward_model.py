"""A reward model: a sequence classifier with one output, scoring prompt + completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer.utils import get_config_model_id


@dataclass
class RewardModel:
    """A classifier in eval mode, its tokenizer, and the name to log it by."""

    model: nn.Module
    tokenizer: Any
    name: str
    device: torch.device
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    reward_reads_prefills = True
    reward_runs_in_process = True

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], prefills: Sequence[str], **kwargs: Any
    ) -> list[float]:
        """`score`, called as reward functions are."""
        return self.score(prompts, completions, prefills)

    @classmethod
    def load(
        cls,
        model: str | nn.Module,
        tokenizer: Any,
        device: str | torch.device,
        model_init_kwargs: dict[str, Any],
        *,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """Load the model if it is an id or path, and its tokenizer if there is none; agree on the padding token.

        Raises:
            ValueError: a model that is not a `PreTrainedModel` came without a tokenizer, or the tokenizer has neither a
                padding nor an end-of-sequence token.
        """
        revision = None
        if isinstance(model, str):
            kwargs = {"trust_remote_code": trust_remote_code, **model_init_kwargs}
            revision = kwargs.get("revision")
            loaded: nn.Module = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **kwargs)
        else:
            loaded = model
        config: Any = loaded.config
        model_id = get_config_model_id(config)
        name = model_id.split("/")[-1] or type(loaded).__name__
        if tokenizer is None:
            if not isinstance(loaded, PreTrainedModel):
                raise ValueError(
                    f"reward model '{name}' is a {type(loaded).__name__}, not a PreTrainedModel: pass its tokenizer in "
                    f"`reward_processing_classes`."
                )
            tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=trust_remote_code)
        _agree_on_padding(config, tokenizer, name)
        device = torch.device(device)
        # A quantised or dispatched model is where it belongs already, and refuses to be moved.
        if not getattr(loaded, "is_quantized", False) and getattr(loaded, "hf_device_map", None) is None:
            loaded.to(device)
        else:
            device = next(loaded.parameters()).device
        return cls(loaded.eval(), tokenizer, name, device)

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], prefills: Sequence[str]) -> list[float]:
        """One score per completion: the logit at the last token of prompt + completion.

        `prefills` is what each completion's text begins with that its prompt wrote already; it is read once.
        """
        texts = self._texts(prompts, completions, prefills)
        scores: list[float] = []
        self.model.eval()  # someone else may hold the model too, and have put it in training mode
        with torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                inputs = self.tokenizer(
                    text=texts[start : start + self.batch_size],
                    return_tensors="pt",
                    padding=True,
                    padding_side="right",
                    add_special_tokens=False,
                ).to(self.device)
                scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _texts(self, prompts: Sequence[Any], completions: Sequence[Any], prefills: Sequence[str]) -> list[str]:
        rows = zip(prompts, completions, prefills, strict=True)
        if not prompts or not is_conversational({"prompt": prompts[0]}):
            return [prompt + completion[len(prefill) :] for prompt, completion, prefill in rows]
        messages = [{"messages": _conversation(*row)} for row in rows]
        return [apply_chat_template(row, self.tokenizer, **self.chat_template_kwargs)["text"] for row in messages]


def _conversation(prompt: list[dict[str, Any]], completion: list[dict[str, Any]], prefill: str) -> list[dict[str, Any]]:
    """Prompt and completion; a completion that continues the prompt's last message is joined to it."""
    if prompt[-1]["role"] != "assistant":
        return prompt + completion  # a `<think>` that the policy's template wrote is not in the prompt's messages
    continued = prompt[-1]["content"] + completion[0]["content"][len(prefill) :]
    return [*prompt[:-1], {**prompt[-1], "content": continued}, *completion[1:]]


def _agree_on_padding(config: Any, tokenizer: Any, name: str) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of reward model '{name}' has neither a padding nor an end-of-sequence token: set its "
                f"`pad_token`."
            )
        tokenizer.pad_token = tokenizer.eos_token
    # A sequence classifier reads its score at the last token that is not padding, so it has to know which one that is.
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
