"""Prompts -> rollouts -> rewards -> advantages: one generation, and what is logged about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainerState

from .config import GRPOConfig
from .credit import CreditAssigner
from .data import PromptEncoder, batched, check_columns
from .evaluating import evaluating
from .experience import Experience, MicroBatch, StepBatch
from .metrics import CompletionLog, MetricLog, StepClock, length_metrics, reward_metrics
from .objective import kl_penalised_rewards
from .policy import AdapterOff, Snapshot, TokenScores
from .rewards import RewardScorer, Scores, SpanDecoder
from .rollout import GroupSampler, Rollouts

Row = dict[str, Any]


@dataclass(slots=True)
class Scored:
    """Rollouts with their rewards, and prompts and completions as rewards saw them."""

    rollouts: Rollouts
    scores: Scores
    prompts: list[Any]
    completions: list[Any]
    prefills: list[str]
    seconds: dict[str, float]  # "rollout", "reward"


@dataclass
class ExperienceMaker:
    """Draws and scores completions. Knows nothing of optimizer steps."""

    args: GRPOConfig
    accelerator: Accelerator
    model: nn.Module
    encoder: PromptEncoder
    sampler: GroupSampler
    reward_scorer: RewardScorer
    reward_weights: torch.Tensor  # (K,)
    score: Callable[[nn.Module, MicroBatch], TokenScores]
    reference: AdapterOff | Snapshot | None
    prompt_limit: int | None  # tokens
    packed: bool
    completion_log: CompletionLog
    _extras: dict[str, list[Any]] = field(default_factory=dict)  # columns that rewards logged with the latest rollouts

    def __post_init__(self) -> None:
        self._credit = CreditAssigner(
            self.args,
            self.accelerator,
            self.reward_scorer.names,
            self.reward_weights,
            self.reward_scorer.judges_steps,
            SpanDecoder(self.encoder.tokenizer),
        )

    def roll_out(
        self,
        rows: list[Row],
        num_generations: int,
        *,
        state: TrainerState,
        noise_step: int,
        first_prompt_index: int,
        greedy: bool = False,
    ) -> Scored:
        """Completions of these rows' prompts, and their rewards."""
        started = time.perf_counter()
        encoded = [self.encoder.encode(row["prompt"]) for row in rows]
        for row, prompt in zip(rows, encoded, strict=True):
            if self.prompt_limit is not None and len(prompt.ids) > self.prompt_limit:
                raise ValueError(
                    f"a prompt has {len(prompt.ids)} tokens, the model's context has room for {self.prompt_limit}: "
                    f"{str(row['prompt'])[:200]!r}. Filter such prompts out of the dataset."
                )
        with self.accelerator.autocast():
            rollouts = self.sampler.generate(
                [prompt.ids for prompt in encoded],
                num_generations,
                seed=self.args.seed,
                step=noise_step,
                first_prompt_index=first_prompt_index,
                greedy=greedy,
            )
        generated = time.perf_counter()
        repeated = [row for row in rows for _ in range(num_generations)]
        prompts = [row["prompt"] for row in repeated]
        prefills = [prompt.prefill for prompt in encoded for _ in range(num_generations)]
        completions = self.encoder.completions(prompts, prefills, rollouts.completion_ids)
        names = sorted(set(rows[0]) - {"prompt", "completion", "completion_ids"})
        scores = self.reward_scorer.score(
            prompts,
            completions,
            rollouts.completion_ids,
            {name: [row.get(name) for row in repeated] for name in names},
            trainer_state=state,
            step=state.global_step,
            prefills=prefills,
        )
        seconds = {"rollout": generated - started, "reward": time.perf_counter() - generated}
        return Scored(rollouts, scores, prompts, completions, prefills, seconds)

    def make(
        self, rows: list[Row], state: TrainerState, drawn: int, metrics: MetricLog, clock: StepClock
    ) -> Experience:
        """One generation of this process.

        Args:
            rows: Each prompt `num_generations` times, as the dataloader deals them out.
            drawn: Prompts this process already drew in this optimizer step; keeps their noise apart.
        """
        generations, processes = self.args.num_generations, self.accelerator.num_processes
        prompts = rows[::generations]
        first = drawn * processes + self.accelerator.process_index * len(prompts)
        scored = self.roll_out(
            prompts, generations, state=state, noise_step=state.global_step, first_prompt_index=first
        )
        rollouts = scored.rollouts
        clock.spend("rollout", scored.seconds["rollout"])
        clock.spend("reward", scored.seconds["reward"])
        state.num_input_tokens_seen += self.record([scored], metrics)
        metrics.latest("num_tokens", state.num_input_tokens_seen)

        kept = [reason == "eos" or not self.args.mask_truncated_completions for reason in rollouts.finish_reasons]
        tokens = sum(length for length, keep in zip(rollouts.lengths, kept, strict=True) if keep)
        experience = Experience(
            prompt_ids=rollouts.prompt_ids,
            completion_ids=rollouts.completion_ids,
            num_generations=generations,
            old_logps=rollouts.logps,
            ref_logps=None,
            advantages=torch.zeros(len(kept)),
            in_loss=torch.tensor(kept),
            slice_tokens=sum(gather_object([tokens])) / processes / (self.args.steps_per_generation or 1),
            generated_at=state.global_step,
        )
        if self.reference is not None and self.args.kl_estimator != "full":
            experience.ref_logps = self._reference_logps(experience)
        penalty = self._kl_penalty(experience, scored.scores.rewards, metrics) if self.args.kl_in_reward else None
        greedy = None
        if self.args.advantage_estimator == "remax":
            baseline = self.roll_out(prompts, 1, state=state, noise_step=0, first_prompt_index=first, greedy=True)
            greedy = baseline.scores.rewards
            clock.spend("rollout", baseline.seconds["rollout"])
            clock.spend("reward", baseline.seconds["reward"])
        experience.advantages, zero_std, logged = self._credit.assign(
            scored.scores, rollouts.completion_ids, scored.prefills, penalty=penalty, greedy=greedy
        )
        for name, value in {"frac_reward_zero_std": zero_std, **logged}.items():
            metrics.record(name, value)
        if self.args.log_completions:
            self._keep_completions(scored, experience.advantages)
        return experience

    def evaluate(self, data: Dataset | IterableDataset, state: TrainerState, metrics: MetricLog) -> int:
        """Log lengths and rewards of held-out prompts' completions, each process taking its share; how many prompts."""
        check_columns(data, "eval_dataset")
        generations = self.args.num_generations_eval or self.args.num_generations
        per_process = max(1, self.args.per_device_eval_batch_size // generations)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        scored: list[Scored] = []
        count = 0
        for rows in batched(data, per_process * processes):
            own = rows[rank * per_process : (rank + 1) * per_process]
            if own:
                first = count + rank * per_process
                # The same noise at every evaluation, whatever the step
                scored.append(self.roll_out(own, generations, state=state, noise_step=0, first_prompt_index=first))
            count += len(rows)
        # Once, so that every completion weighs the same: a mean over batches would favour those of the last, short one
        self.record(scored, metrics)
        return count

    def record(self, batches: Sequence[Scored], metrics: MetricLog) -> int:
        """Log lengths and rewards of all processes' completions; tokens of prompts and completions together.

        A process that has nothing takes part with an empty list.
        """
        own: list[tuple[int, int, bool, list[float], list[bool]]] = []
        for scored in batches:
            rollouts = scored.rollouts
            prompt_lengths = [len(ids) for ids in rollouts.prompt_ids for _ in range(rollouts.num_generations)]
            ended = [reason == "eos" for reason in rollouts.finish_reasons]
            own += zip(prompt_lengths, rollouts.lengths, ended, *scored.scores.columns(), strict=True)
        everyone = gather_object(own)
        prompts, lengths, stops, rewards, failed = zip(*everyone, strict=True)
        for name, value in length_metrics(torch.tensor(lengths), torch.tensor(stops)).items():
            metrics.record(name, value)
        names = self.reward_scorer.names
        for name, value in reward_metrics(torch.tensor(rewards), names, self.reward_weights).items():
            metrics.record(name, value)
        for name, count in zip(names, torch.tensor(failed).sum(dim=0).tolist(), strict=True):
            metrics.record(f"rewards/{name}/failed", count)
        extras, values = self.reward_scorer.pop_logged()
        self._extras = extras
        # Not every process has logged every metric, nor the same number of times
        for name in sorted(set(gather_object(list(values)))):
            logged = gather_object(values.get(name, []))
            metrics.record(name, sum(logged) / len(logged))
        return sum(prompts) + sum(lengths)

    @torch.no_grad()
    def _reference_logps(self, experience: Experience) -> torch.Tensor:
        """`(B, C)` log-probabilities under the reference of completions whose KL is asked for; 0 for the others."""
        assert self.reference is not None
        step = StepBatch(experience.generated_at)
        step.add(experience, range(len(experience.completion_ids)))
        # A reward counts in its group's mean whether or not its completion is in the loss, so the KL in it does too
        everything = range(len(experience.completion_ids))
        chosen = everything if self.args.kl_in_reward else step.trained(skip_zero_advantages=False, at_least_one=False)
        size = self.args.per_device_train_batch_size
        # As many as it takes: packed rows are as few as can be, padded ones are dealt out evenly
        num = len(chosen) if self.packed else -(-len(chosen) // size)
        batches = step.micro_batches(chosen, max(1, num), size, packed=self.packed, device=self.args.device)
        out = torch.zeros_like(experience.old_logps)
        # Without dropout: the reference is one fixed policy, and a resumed run draws no other random numbers
        with evaluating(self.model), self.reference.active(), self.accelerator.autocast():
            for batch in batches:
                if batch is not None:
                    logps = self.score(self.model, batch).logps.float().cpu()
                    out[batch.indices, : logps.shape[1]] = logps
        return out

    def _kl_penalty(self, experience: Experience, rewards: torch.Tensor, metrics: MetricLog) -> torch.Tensor:
        """`(B, 1)` one more reward, -beta times the KL of the completion; NaN where no reward function gave any."""
        assert experience.ref_logps is not None
        lengths = torch.tensor([len(ids) for ids in experience.completion_ids])
        mask = torch.arange(experience.old_logps.shape[1]) < lengths[:, None]
        log_ratio = (experience.old_logps - experience.ref_logps) * mask
        metrics.accumulate("kl", log_ratio.sum().to(self.args.device), mask.sum().to(self.args.device))
        nothing = torch.where(rewards.isnan().all(dim=1), torch.nan, 0.0)
        penalty = kl_penalised_rewards(nothing, experience.old_logps, experience.ref_logps, mask, self.args.beta)
        return penalty[:, None]

    def _keep_completions(self, scored: Scored, advantages: torch.Tensor) -> None:
        own = list(
            zip(
                scored.prompts,
                scored.completions,
                scored.scores.rewards.tolist(),
                _of_completions(advantages, scored),
                strict=True,
            )
        )
        prompts, completions, rewards, gathered = zip(*gather_object(own), strict=True)
        nothing = [None] * len(own)
        names = sorted(set(gather_object(list(self._extras))))
        extras = {name: gather_object(self._extras.get(name, nothing)) for name in names}
        by_name = {name: [row[k] for row in rewards] for k, name in enumerate(self.reward_scorer.names)}
        self.completion_log.update(list(prompts), list(completions), by_name, list(gathered), extras)


def _of_completions(advantages: torch.Tensor, scored: Scored) -> list[float]:
    """One number per completion, for the log: of advantages of tokens the mean."""
    if advantages.dim() == 1:
        return advantages.tolist()
    lengths = torch.tensor(scored.rollouts.lengths)
    return (advantages.sum(dim=1) / lengths.clamp(min=1)).tolist()
