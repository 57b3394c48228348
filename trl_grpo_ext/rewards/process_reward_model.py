"""A process reward model: a token classifier that says of each reasoning step whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForTokenClassification, AutoTokenizer
from trl.trainer.utils import get_config_model_id

from trl_grpo_ext.rewards.step_rewards import StepReward
from trl_grpo_ext.rewards.steps import Splitter


def prompt_text(prompt: Any) -> str:
    """A plain prompt itself; of a conversation the last user message, as process reward models are given the problem.

    Raises:
        ValueError: a conversation without a user message of plain text.
    """
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            return str(message["content"])
    raise ValueError(
        f"a prompt has no user message of plain text: {str(prompt)[:200]}. Pass ProcessRewardModel a prompt_text that "
        "makes a string of such prompts."
    )


class ProcessRewardModel(StepReward):
    """Scores steps with an `AutoModelForTokenClassification`, read as TRL's `PRMTrainer` trains it.

    The input is `bos + prompt + step 1 + separator + step 2 + separator + ...`, each part tokenized by itself. The
    label of a step stands at the last token of its separator, 1 for a right step and 0 for a wrong one; every other
    token is unlabelled. So the reward of a step is the probability of label 1 there, after all steps up to this one.

    It runs in the training process, beside the policy. For any other way to ask a model, such as a server, use
    `JudgedSteps` with a function.

    Args:
        model: id, path or model.
        tokenizer: the model's; loaded from its id by default.
        splitter: where the completions' steps are, as in `StepReward`.
        separator: what the model was trained to read behind a step (`PRMConfig.step_separator`).
        right_label: index of the label that means right.
        prompt_text: makes the string the model reads of a prompt.
        max_length: tokens the model may be given; steps that end after that get None.
        batch_size: completions at a time.
        device: where to put the model; where it is by default.
        model_init_kwargs: for loading a model given by id.

    Raises:
        ValueError: the model has one label only or no label `right_label`, or the separator has no tokens.
    """

    reward_runs_in_process = True

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        splitter: str | Splitter = "blank_lines",
        separator: str = "\n",
        right_label: int = 1,
        prompt_text: Callable[[Any], str] = prompt_text,
        max_length: int | None = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(splitter)
        loaded: Any = model
        if isinstance(model, str):
            loaded = AutoModelForTokenClassification.from_pretrained(model, **(model_init_kwargs or {}))
        model_id = get_config_model_id(loaded.config)
        if tokenizer is None:
            revision = (model_init_kwargs or {}).get("revision")
            tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision)
        labels = int(loaded.config.num_labels)
        if not (labels > 1 and 0 <= right_label < labels):
            raise ValueError(
                f"the process reward model has {labels} labels and right_label={right_label}: it must be one of at "
                "least two, as the reward is that label's probability. Pass a model trained with TRL's PRMTrainer (two "
                "labels, 1 is right), or its label for a right step, or use JudgedSteps."
            )
        self.model, self.tokenizer = loaded.eval(), tokenizer
        if device is not None:
            self.model.to(device)
        self.__name__ = model_id.split("/")[-1] or type(loaded).__name__  # what the trainer logs it by
        self._right_label, self._prompt_text = right_label, prompt_text
        self._max_length, self._batch_size = max_length, batch_size
        self._separator_ids = self._ids(separator)
        if not self._separator_ids:
            raise ValueError(f"separator={separator!r} has no tokens: the reward is read at its last one. Change it.")

    def judge(
        self, prompts: Sequence[Any], steps: Sequence[Sequence[str]], **columns: Any
    ) -> Sequence[Sequence[float | None]]:
        """The probability that each step is right; None for steps beyond `max_length`."""
        rows = [self._row(prompt, row) for prompt, row in zip(prompts, steps, strict=True)]
        rewards: list[list[float | None]] = []
        self.model.eval()  # someone else may hold the model too, and have put it in training mode
        for start in range(0, len(rows), self._batch_size):
            rewards += self._probabilities(rows[start : start + self._batch_size])
        return rewards

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _row(self, prompt: Any, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Token ids of prompt and steps, and the position of each step's last token."""
        bos = self.tokenizer.bos_token_id
        ids = ([] if bos is None else [bos]) + self._ids(self._prompt_text(prompt))
        ends = []
        for step in steps:
            ids += self._ids(step) + self._separator_ids
            ends.append(len(ids) - 1)
        return ids[: self._max_length], ends

    @torch.inference_mode()
    def _probabilities(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[list[float | None]]:
        device = next(self.model.parameters()).device
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # padding is masked: any id will do
        attention_mask = torch.zeros_like(input_ids)
        for b, (ids, _) in enumerate(rows):
            input_ids[b, : len(ids)] = torch.tensor(ids)
            attention_mask[b, : len(ids)] = 1
        logits = self.model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
        right = logits.float().softmax(dim=-1)[..., self._right_label].cpu()  # (B, tokens)
        return [
            [float(right[b, end]) if end < len(ids) else None for end in ends] for b, (ids, ends) in enumerate(rows)
        ]
