"""PPO with a critic, as small as it can be told: what GRPO does without. For `ablations.py`.

TRL 1.16 has no PPO any more, so it is written out here, as InstructGPT describes it (arXiv:2203.02155, §3.5 and
appendix C.4): a reward of `-beta * log(policy / reference)` per token, the rules' rewards on top of the last one; a
critic, a copy of the model with an adapter and a linear head of its own; generalised advantage estimation
(arXiv:1506.02438) with `gamma = 1`; clipped surrogate and clipped value loss (arXiv:1707.06347). One completion per
prompt, drawn by the same sampler as everywhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from trl_grpo_ext import GroupSampler


@dataclass(frozen=True, slots=True)
class PPOSettings:
    """What is not the other methods' too."""

    epochs: int = 4  # over each batch of completions
    gae_lambda: float = 0.95
    clip: float = 0.2  # of the ratio, and of how far a value may move in a batch
    value_weight: float = 0.1


class Critic(nn.Module):
    """`V(s_t)` of every position, `(B, T)`: a copy of the model with an adapter, and a linear head."""

    def __init__(self, model: PreTrainedModel, lora: LoraConfig) -> None:
        super().__init__()
        self.body = get_peft_model(copy.deepcopy(model), lora)
        self.head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Values before each token of the row is followed by the next."""
        hidden = self.body.get_base_model().model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        )
        return self.head(hidden.last_hidden_state.float()).squeeze(-1)


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, `(B, C)`, of token rewards and values `(B, C)`, undiscounted; 0 where `mask` is 0.

    `delta_t = r_t + V_{t+1} - V_t`, `A_t = delta_t + lam * A_{t+1}`, with V = 0 after the last token; the return is
    `A_t + V_t` (arXiv:1506.02438, equations 11 and 16).
    """
    values = values * mask
    following = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(following)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + following - values[:, t]
        advantage = (delta + lam * advantage) * mask[:, t]
        following = values[:, t]
        columns.insert(0, advantage)
    advantages = torch.stack(columns, dim=1)
    return advantages, (advantages + values) * mask


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded prompts with right-padded completions behind them."""

    input_ids: torch.Tensor  # (B, P + C)
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor  # (B, C) 1 where a completion has a token

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int) -> Batch:
        longest, width = max(map(len, prompts)), max(map(len, completions))
        rows = [
            [pad] * (longest - len(p)) + [*p, *c] + [pad] * (width - len(c))
            for p, c in zip(prompts, completions, strict=True)
        ]
        live = [
            [0] * (longest - len(p)) + [1] * (len(p) + len(c)) + [0] * (width - len(c))
            for p, c in zip(prompts, completions, strict=True)
        ]
        attention = torch.tensor(live)
        return cls(
            torch.tensor(rows), attention, (attention.cumsum(1) - 1).clamp(min=0), attention[:, longest:].float()
        )

    @property
    def completion_ids(self) -> torch.Tensor:
        """`(B, C)`"""
        return self.input_ids[:, -self.mask.shape[1] :]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))

    def of_completions(self, per_position: torch.Tensor) -> torch.Tensor:
        """What stands at the positions that predict the completions' tokens."""
        return per_position[:, -self.mask.shape[1] - 1 : -1]

    def logps(self, model: nn.Module) -> torch.Tensor:
        """`(B, C)` log-probabilities of the completions' tokens."""
        logits = model(
            input_ids=self.input_ids, attention_mask=self.attention_mask, position_ids=self.position_ids
        ).logits
        chosen = self.of_completions(logits).float().log_softmax(-1)
        return chosen.gather(-1, self.completion_ids[..., None]).squeeze(-1) * self.mask

    def values(self, critic: Critic) -> torch.Tensor:
        """`(B, C)` the critic's values of the states that the completions' tokens were drawn in."""
        return self.of_completions(critic(self.input_ids, self.attention_mask, self.position_ids)) * self.mask


def train_ppo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    reward: Callable[[Sequence[dict[str, Any]], list[str]], list[float]],
    *,
    lora: LoraConfig,
    steps: int,
    completions: int,
    max_completion_length: int,
    beta: float,
    learning_rate: float,
    seed: int,
    settings: PPOSettings = PPOSettings(),
) -> nn.Module:
    """Train an adapter on `model` for so many batches of completions; returns the policy.

    Args:
        rows: With `prompt`, and what `reward` needs; drawn without replacement, an epoch at a time.
        reward: Rows and their completions -> one number each.
    """
    torch.manual_seed(seed)
    device = model.device
    critic = Critic(model, lora).to(device)
    policy = get_peft_model(model, lora)
    trained = [p for p in (*policy.parameters(), *critic.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 5 * settings.epochs, steps * settings.epochs)
    sampler = GroupSampler(policy, tokenizer)
    order = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for step in range(steps):
        while len(waiting) < completions:
            waiting += torch.randperm(len(rows), generator=order).tolist()
        chosen, waiting = [rows[i] for i in waiting[:completions]], waiting[completions:]
        prompt_ids = tokenizer([row["prompt"] for row in chosen])["input_ids"]
        drawn = sampler.generate(prompt_ids, 1, max_new_tokens=max_completion_length, seed=seed, step=step)
        scores = reward(chosen, tokenizer.batch_decode(drawn.completion_ids, skip_special_tokens=True))
        batch = Batch.of(prompt_ids, drawn.completion_ids, tokenizer.pad_token_id).to(device)
        # What the completions were drawn by is what the first pass trains: computed once, for both
        logps, values = batch.logps(policy), batch.values(critic)
        old, old_values = logps.detach(), values.detach()
        with torch.no_grad():
            with policy.disable_adapter():
                rewards = -beta * (old - batch.logps(policy))
            last = batch.mask.sum(1).long() - 1
            rewards[torch.arange(completions), last] += torch.tensor(scores, device=device)
            advantages, returns = generalised_advantages(rewards, old_values, batch.mask, settings.gae_lambda)
            count = batch.mask.sum()
            centred = (advantages - advantages.sum() / count) * batch.mask
            advantages = centred / (centred.square().sum() / count).sqrt().clamp(min=1e-8)
        for epoch in range(settings.epochs):
            if epoch > 0:
                logps, values = batch.logps(policy), batch.values(critic)
            ratio = (logps - old).exp()
            clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            surrogate = torch.minimum(ratio * advantages, clipped * advantages)
            near = old_values + (values - old_values).clamp(-settings.clip, settings.clip)
            error = torch.maximum((values - returns).square(), (near - returns).square())
            loss = ((settings.value_weight * 0.5 * error - surrogate) * batch.mask).sum() / count
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    return policy
