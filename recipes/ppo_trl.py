"""PPO with a critic through `trl.experimental.ppo`, on the same task as `ppo_baseline.py`. For `ablations.py`.

TRL had it until 1.12; 1.16, which this package needs, has not. The old one's folder is enough:

    pip install --no-deps --target outputs/old-trl trl==1.12.0
    TRL_WITH_PPO=outputs/old-trl python recipes/ablations.py --jobs 2 --methods ppo-trl

The critic is what `ppo_baseline.py`'s is, a copy of the model with an adapter and a linear head. TRL's trainer judges
with a reward *model*; here that is one whose "hidden states" are the token ids, and whose head decodes them and asks
the rules. It samples with `transformers`, and does not clip gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback

Reward = Callable[[Sequence[dict[str, Any]], list[str]], list[float]]


class Ids(nn.Module):
    """A "model" whose hidden states are the ids that it is given, -1 where there is padding."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        ids = input_ids.masked_fill(~attention_mask.bool(), -1)
        return SimpleNamespace(hidden_states=[ids], last_hidden_state=ids)


class RulesAsModel(nn.Module):
    """What TRL takes for a reward model: rewards of texts, by the rules, at every position of a row."""

    base_model_prefix = "ids"

    def __init__(self, rows: Sequence[dict[str, Any]], tokenizer: Any, reward: Reward) -> None:
        super().__init__()
        self.ids, self.tokenizer, self.reward = Ids(), tokenizer, reward
        self.row_of = {self._text(tokenizer(row["prompt"])["input_ids"]): row for row in rows}

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """`(B, T)` -> `(B, T, 1)`"""
        texts = [self._text([token for token in row if token >= 0]) for row in ids.tolist()]
        # A prompt ends with its first "="
        ends = [text.index("=") + 1 for text in texts]
        rows = [self.row_of[text[:end]] for text, end in zip(texts, ends, strict=True)]
        scores = self.reward(rows, [text[end:] for text, end in zip(texts, ends, strict=True)])
        return torch.tensor(scores, device=ids.device)[:, None, None].expand(*ids.shape, 1)


def classes() -> tuple[Any, Any]:
    """TRL's `PPOConfig` and `PPOTrainer`; of an older TRL in the folder `TRL_WITH_PPO`, on this one's other modules.

    Raises:
        ImportError: this TRL has no PPO, and there is no such folder.
    """
    import trl.experimental

    old = os.environ.get("TRL_WITH_PPO")
    if old is not None:
        trl.experimental.__path__.append(str(Path(old).resolve() / "trl" / "experimental"))
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError as error:
        raise ImportError(f"TRL {trl.__version__} has no PPO ({error}): the top of {__file__} has a remedy") from error
    return PPOConfig, PPOTrainer


def train_ppo_by_trl(
    warm_model: Path,
    rows: Sequence[dict[str, Any]],
    reward: Reward,
    *,
    out: Path,
    lora: LoraConfig,
    steps: int,
    completions: int,
    max_completion_length: int,
    beta: float,
    learning_rate: float,
    seed: int,
    epochs: int,
) -> nn.Module:
    """As `ppo_baseline.train_ppo`, by TRL's trainer.

    Raises:
        ImportError: this TRL has no PPO.
    """
    PPOConfig, PPOTrainer = classes()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(warm_model, padding_side="left")
    critic = AutoModelForSequenceClassification.from_pretrained(warm_model, num_labels=1)
    own = {name.rpartition(".")[2] for name, part in critic.model.named_modules() if isinstance(part, nn.Linear)}
    inject_adapter_in_model(LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=sorted(own)), critic)
    nn.init.zeros_(critic.score.weight)
    critic.score.requires_grad_(True)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(out),
            seed=seed,
            total_episodes=steps * completions,
            per_device_train_batch_size=completions,
            gradient_accumulation_steps=1,
            num_ppo_epochs=epochs,
            local_rollout_forward_batch_size=completions,
            response_length=max_completion_length,
            stop_token="eos",
            temperature=1.0,
            kl_coef=beta,
            learning_rate=learning_rate,
            weight_decay=0.0,
            warmup_steps=5,
            lr_scheduler_type="linear",
            num_sample_generations=0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=max(1, steps // 4),
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(warm_model),
        ref_model=None,
        reward_model=RulesAsModel(rows, tokenizer, reward),
        value_model=critic,
        train_dataset=Dataset.from_dict(tokenizer([row["prompt"] for row in rows])).select_columns(["input_ids"]),
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    policy: nn.Module = trainer.accelerator.unwrap_model(trainer.model).policy
    return policy
