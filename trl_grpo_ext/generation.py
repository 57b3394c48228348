"""Prompts -> rollouts -> rewards -> advantages: one generation, and what is logged about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from rich.progress import track
from torch import nn
from transformers import TrainerState

from .config import GRPOConfig
from .credit import CreditAssigner
from .curriculum import CurriculumRows, start_curriculum
from .data import PromptEncoder, batched, check_columns
from .evaluating import evaluating
from .experience import Experience, MicroBatch, StepBatch
from .metrics import CompletionLog, MetricLog, StepClock, length_metrics, reward_metrics
from .objective import kl_penalised_rewards
from .pass_rates import PassRates
from .policy import AdapterOff, LivingReference, Snapshot, TokenScores
from .resampling import Resampled, Resampler, uniformly
from .rewards import RewardScorer, SpanDecoder
from .rollout import GroupSampler
from .scored import Scored

Row = dict[str, Any]


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
    reference: AdapterOff | Snapshot | LivingReference | None
    prompt_limit: int | None  # tokens
    packed: bool
    completion_log: CompletionLog
    further_prompts: Dataset | IterableDataset | None = None  # where curriculum and dynamic sampling draw from
    curriculum: CurriculumRows | None = field(init=False)
    _credit: CreditAssigner = field(init=False)
    _resampler: Resampler = field(init=False)
    _pass_rates: PassRates = field(init=False)

    def __post_init__(self) -> None:
        self._pass_rates = PassRates.of(self.args, self.reward_scorer.names)
        self._credit = CreditAssigner(
            self.args,
            self.accelerator,
            self.reward_scorer.names,
            self.reward_weights,
            self.reward_scorer.judges_steps,
            SpanDecoder(self.encoder.tokenizer),
        )
        data, names = self.further_prompts, self.reward_scorer.names
        self.curriculum = start_curriculum(self.args, data, names, self.accelerator)
        further = uniformly(data) if isinstance(data, Dataset) else None
        if self.curriculum is not None:
            further = self.curriculum.another
        steps = self.reward_scorer.judges_steps
        self._resampler = Resampler(self.args, self.reward_weights, steps, further, self.accelerator.process_index)

    def roll_out(
        self,
        rows: list[Row],
        num_generations: int,
        *,
        state: TrainerState,
        noise_step: int,
        prompt_indices: Sequence[int],
        first_completion_index: int = 0,
        may_stop: bool = True,
        greedy: bool = False,
    ) -> Scored:
        """Completions of these rows' prompts, and their rewards.

        Args:
            prompt_indices, first_completion_index: Key of the noise, as in `GroupSampler.generate`.
            may_stop: Whether a reward that fails on too many of these completions stops the run.
        """
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
                prompt_indices=prompt_indices,
                first_completion_index=first_completion_index,
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
            may_stop=may_stop,
        )
        extras, logged = self.reward_scorer.pop_logged()
        return Scored(
            prompt_ids=rollouts.prompt_ids,
            prompt_of=[p for p in range(len(rows)) for _ in range(num_generations)],
            completion_ids=rollouts.completion_ids,
            logps=rollouts.logps,
            finish_reasons=rollouts.finish_reasons,
            scores=scores,
            prompts=prompts,
            completions=completions,
            prefills=prefills,
            extras=extras,
            logged=logged,
            seconds={"rollout": generated - started, "reward": time.perf_counter() - generated},
        )

    def make(
        self, rows: list[Row], state: TrainerState, drawn: int, metrics: MetricLog, clock: StepClock
    ) -> Experience:
        """One generation of this process.

        Args:
            rows: Each prompt `num_generations` times, as the dataloader deals them out; a curriculum has its own in
                their place.
            drawn: Prompts this process already drew in this optimizer step; keeps their noise apart.
        """
        generations, processes = self.args.num_generations, self.accelerator.num_processes
        prompts = rows[::generations]
        draw: Callable[..., Scored] = partial(self.roll_out, state=state, noise_step=state.global_step)
        greedily = partial(draw, greedy=True)
        if self.curriculum is not None:
            prompts, draw = self.curriculum.rows(len(prompts)), self.curriculum.watching(draw)
        first = drawn * processes + self.accelerator.process_index * len(prompts)
        indices = list(range(first, first + len(prompts)))
        drawn_first = draw(prompts, generations, prompt_indices=indices)
        resampled = Resampled(drawn_first, [])
        if self._resampler.is_on:
            # A draw of a few completions says little about a reward's failures: the first draw decides
            few = partial(draw, may_stop=False)
            resampled = self._resampler.resample(drawn_first, prompts, indices, state.global_step, few)
        for some in (drawn_first, *resampled.further):
            clock.spend("rollout", some.seconds["rollout"])
            clock.spend("reward", some.seconds["reward"])
        # Lengths and rewards of the first draw: what the policy does on the data's own prompts, nothing selected
        state.num_input_tokens_seen += self.record([drawn_first], metrics, resampled.further)
        metrics.latest("num_tokens", state.num_input_tokens_seen)
        self._record_resampling(resampled, metrics)
        if self.curriculum is not None:
            self.curriculum.learn(metrics)
        scored = resampled.scored

        kept = [reason == "eos" or not self.args.mask_truncated_completions for reason in scored.finish_reasons]
        tokens = sum(len(ids) for ids, keep in zip(scored.completion_ids, kept, strict=True) if keep)
        experience = Experience(
            prompt_ids=scored.prompt_ids,
            prompt_of=scored.prompt_of,
            completion_ids=scored.completion_ids,
            num_generations=generations,
            old_logps=scored.logps,
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
            baseline = greedily(prompts, 1, prompt_indices=indices)
            greedy = baseline.scores.rewards
            clock.spend("rollout", baseline.seconds["rollout"])
            clock.spend("reward", baseline.seconds["reward"])
        experience.advantages, zero_std, logged = self._credit.assign(
            scored.scores, scored.completion_ids, scored.prompt_of, scored.prefills, penalty=penalty, greedy=greedy
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
        size = per_process * processes
        total = -(-len(data) // size) if isinstance(data, Dataset) else None
        hidden = bool(self.args.disable_tqdm) or rank > 0
        for rows in track(batched(data, size), "Evaluating", total, disable=hidden, transient=True):
            own = rows[rank * per_process : (rank + 1) * per_process]
            if own:
                first = count + rank * per_process
                # The same noise at every evaluation, whatever the step
                indices = range(first, first + len(own))
                scored.append(self.roll_out(own, generations, state=state, noise_step=0, prompt_indices=indices))
            count += len(rows)
        # Once, so that every completion weighs the same: a mean over batches would favour those of the last, short one
        self.record(scored, metrics)
        self._pass_rates.record(scored, generations, metrics)
        return count

    def record(self, batches: Sequence[Scored], metrics: MetricLog, further: Sequence[Scored] = ()) -> int:
        """Log lengths and rewards of all processes' completions; tokens of prompts and completions together.

        A process that has nothing takes part with an empty list. Of `further` draws only tokens and failures count.
        """
        own: list[tuple[int, bool, list[float]]] = []
        for scored in batches:
            ended = [reason == "eos" for reason in scored.finish_reasons]
            own += zip(map(len, scored.completion_ids), ended, scored.scores.rewards.tolist(), strict=True)
        lengths, stops, rewards = zip(*gather_object(own), strict=True)
        for name, value in length_metrics(torch.tensor(lengths), torch.tensor(stops)).items():
            metrics.record(name, value)
        names = self.reward_scorer.names
        for name, value in reward_metrics(torch.tensor(rewards), names, self.reward_weights).items():
            metrics.record(name, value)
        drawn = [(some.num_tokens, some.scores.failed.sum(dim=0).tolist()) for some in (*batches, *further)]
        tokens, failed = zip(*gather_object(drawn), strict=True)
        for k, name in enumerate(names):
            metrics.record(f"rewards/{name}/failed", sum(counts[k] for counts in failed))
        values: dict[str, list[float]] = {}
        for scored in batches:
            for name, logged in scored.logged.items():
                values.setdefault(name, []).extend(logged)
        # Not every process has logged every metric, nor the same number of times
        for name in sorted(set(gather_object(list(values)))):
            everywhere = gather_object(values.get(name, []))
            metrics.record(name, sum(everywhere) / len(everywhere))
        return sum(tokens)

    def _record_resampling(self, resampled: Resampled, metrics: MetricLog) -> None:
        """What was drawn beyond the first draw, and what came of it; sums over all processes."""
        if not self._resampler.is_on:
            return
        everywhere = gather_object([resampled.counts])
        counts = {name: sum(own[name] for own in everywhere) for name in resampled.counts}
        groups = counts.pop("groups")
        for when in ("before", "after"):
            metrics.record(f"resampling/frac_silent_{when}", counts.pop(f"silent_{when}") / groups)
        for name, value in counts.items():
            metrics.record(name, value)

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
        # Of whole completions, where there are such rewards: a failed one is not made up for by the steps'
        judged = rewards[:, ~self.reward_scorer.judges_steps]
        nothing = torch.where((judged if judged.shape[1] else rewards).isnan().all(dim=1), torch.nan, 0.0)
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
        names = sorted(set(gather_object(list(scored.extras))))
        extras = {name: gather_object(scored.extras.get(name, nothing)) for name in names}
        by_name = {name: [row[k] for row in rewards] for k, name in enumerate(self.reward_scorer.names)}
        self.completion_log.update(list(prompts), list(completions), by_name, list(gathered), extras)


def _of_completions(advantages: torch.Tensor, scored: Scored) -> list[float]:
    """One number per completion, for the log: of advantages of tokens the mean."""
    if advantages.dim() == 1:
        return advantages.tolist()
    lengths = torch.tensor([len(ids) for ids in scored.completion_ids])
    return (advantages.sum(dim=1) / lengths.clamp(min=1)).tolist()
