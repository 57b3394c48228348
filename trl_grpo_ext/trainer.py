"""`GRPOTrainer`: prompts -> rollouts -> rewards -> advantages -> loss -> update, wired into `transformers.Trainer`.

The seams: `get_batch_samples` turns rows into rollouts, rewards, advantages and packed micro-batches, once per
optimizer step; `compute_loss` scores one micro-batch; `evaluate` generates on held-out prompts; `log` adds our metrics.
What happens inside each is in the package's folders.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, speed_metrics
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
from trl.trainer.utils import identity

from .checkpoint import load_state, place_in_cycle, save_state
from .config import GRPOConfig
from .data import EpochOrder, GenerationFeed, GroupOrder, PromptEncoder
from .evaluating import evaluating
from .experience import Experience, MicroBatch, StepBatch
from .generation import ExperienceMaker
from .hub.publishing import HubPublishing
from .metrics import CompletionLog, MetricLog, StepClock, record_loss_terms, record_micro_batches
from .objective import StepNormalizer, grpo_loss
from .policy import (
    CompletionScorer,
    RecomputeBudget,
    TokenScores,
    active_adapter_only,
    base_model_of,
    exact_kl,
    head_spec,
    is_default_checkpointing,
    no_gradient_loss,
)
from .row_order import group_order, grouped_stream
from .startup import (
    EvalDataset,
    as_dict,
    check_all_prompts,
    check_train_dataset,
    choose_packing,
    load_policy,
    make_rewards,
    make_sampler,
    make_trainable,
    named_datasets,
    resolve_config,
    resolve_tokenizer,
)
from .syncing import start_reference
from .watching import BaseFingerprint, UpdateLost


class GRPOTrainer(HubPublishing):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300 §4.1) for LoRA, QLoRA or full policies.

    Used like `trl.GRPOTrainer`:

        trainer = GRPOTrainer(
            model="Qwen/Qwen2.5-1.5B-Instruct",
            reward_funcs=[think_answer_format_reward, accuracy_reward],
            args=GRPOConfig(output_dir="out"),
            train_dataset=dataset,
            peft_config=LoraConfig(target_modules="all-linear"),
        )
        trainer.train()

    Args:
        model: Id, path, `PreTrainedModel` or `PeftModel`. A `PeftModel` goes on training its adapter. None: the base of
            `args.adapter_name_or_path`.
        reward_funcs: One or a list of callables
            `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async, ids of reward
            models, or reward models.
        args: Our `GRPOConfig`, or TRL's, which is converted (`GRPOConfig.from_trl`).
        train_dataset: Rows with a `prompt` (string or messages); further columns are handed to the rewards.
        eval_dataset: The same, or a dict of them.
        processing_class: Tokenizer; by default the model's.
        reward_processing_classes: Tokenizers of the reward models.
        callbacks, optimizers: As in `transformers.Trainer`.
        quantization_config: For a model given by id or path.
        peft_config: Adapter to put on the model; without one (and without a `PeftModel`) every weight is trained.

    Raises:
        ValueError, TypeError: for input that could not be trained on, before anything is.
    """

    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # the base class says None: undecided
    _tag_names = ["trl", "grpo", "trl-grpo-ext"]  # noqa: RUF012 (declared so by the base class)
    _name = "GRPO"
    _paper = {  # noqa: RUF012
        "title": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "id": "2402.03300",
    }
    # Narrower than the base class declares them
    args: GRPOConfig
    model: PreTrainedModel | PeftModel
    train_dataset: Dataset | IterableDataset
    eval_dataset: EvalDataset | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None,
        reward_funcs: Any,
        args: GRPOConfig | TRLGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = resolve_config(args, model, peft_config)
        datasets = named_datasets(train_dataset, eval_dataset)
        check_train_dataset(datasets["train_dataset"], args)
        rewards, weights = make_rewards(reward_funcs, reward_processing_classes, args, eval_dataset)
        set_seed(args.seed)  # a fresh adapter is drawn at random
        model = load_policy(model, args, quantization_config)
        base = base_model_of(model)
        tokenizer = resolve_tokenizer(processing_class, base, args)
        encoder = PromptEncoder(tokenizer, as_dict(args.chat_template_kwargs))
        longest = args.sampling_options()["max_new_tokens"]
        prompt_limit = check_all_prompts(datasets, encoder, base, longest)
        model = make_trainable(model, args, peft_config)

        super().__init__(
            model=model,
            args=args,
            data_collator=identity,
            train_dataset=grouped_stream(datasets["train_dataset"], args),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), BaseFingerprint()],  # as one that is in checkpoints must be
            optimizers=optimizers,
        )
        # The model is on its device now, and what is measured there is what training runs
        self._scorer = CompletionScorer(base, args.temperature)
        self._packed = choose_packing(base, self._scorer, args.attention_packing)
        self._recompute: RecomputeBudget | None = None
        if self._packed and is_default_checkpointing(args):
            self._recompute = RecomputeBudget(model, base, self._scorer, autocast=self.accelerator.autocast)
        self._sampler = make_sampler(model, tokenizer, args, shared_prompts=self._packed)  # fuses layers
        if self._recompute is not None:
            self._recompute.weigh_again(model, base, self._scorer)
        self._metrics = MetricLog()
        self._clock = StepClock(self._metrics)
        for callback in (self._clock, EpochOrder(), UpdateLost(self._metrics)):
            self.add_callback(callback)
        self._feed = GenerationFeed(args.steps_per_generation or 1, args.num_iterations)
        self._experience: Experience | None = None
        self._loss_beta = 0.0 if args.kl_in_reward else args.beta
        self._reference = start_reference(self.model, args, self._metrics, self.add_callback) if args.beta else None
        self._completion_log = CompletionLog(str(args.output_dir), args.num_completions_to_print)
        self._maker = ExperienceMaker(
            args=args,
            accelerator=self.accelerator,
            model=self.model,
            encoder=encoder,
            sampler=self._sampler,
            reward_scorer=rewards,
            reward_weights=weights,
            score=self._scores,
            reference=self._reference,
            prompt_limit=prompt_limit,
            packed=self._packed,
            completion_log=self._completion_log,
            further_prompts=self.train_dataset,
        )
        base.add_model_tags(self._tag_names)

    # --- rows -> rollouts -> rewards -> advantages ---

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GroupOrder | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(data, IterableDataset):
            return None
        return GroupOrder(data, **group_order(self.args))

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[dict[str, Any]]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """One optimizer step's micro-batches, from `num_batches` micro-batches of rows, and the step's normaliser."""
        self._clock.start_step()
        size = self.args.per_device_train_batch_size
        step = StepBatch(self.state.global_step)
        drawn = 0
        for take in self._feed.take(epoch_iterator, num_batches):
            if take.new_rows is not None:
                self._experience = self._maker.make(take.new_rows, self.state, drawn, self._metrics, self._clock)
                drawn += len(self._experience.prompt_ids)
            assert self._experience is not None
            step.add(self._experience, self._experience.of_slices(take.slices, size))
            step.micro_steps += len(take.slices)
        if not step.micro_steps:
            if self.state.global_step == 0:
                raise ValueError(
                    f"train_dataset ended before it filled one generation of {self.args.generation_batch_size} "
                    f"completions, {self.args.num_generations} for each prompt: nothing could be trained. Lower "
                    "steps_per_generation or per_device_train_batch_size, or add rows."
                )
            return [], None
        # With several processes the last micro-batch must run on all of them, or gradients would not be reduced
        chosen = step.trained(
            skip_zero_advantages=self._loss_beta == 0.0, at_least_one=self.accelerator.num_processes > 1
        )
        batches = step.micro_batches(chosen, step.micro_steps, size, packed=self._packed, device=device)
        record_micro_batches(self._metrics, step, chosen, batches, size)
        norm = StepNormalizer(len(step.completion_ids), step.num_loss_tokens, 0.0, self.args.max_completion_length)
        empty = torch.zeros(1, 0, dtype=torch.long)
        rows = [empty if batch is None or batch.row is None else batch.row.input_ids for batch in batches]
        return [{"input_ids": row, "micro_batch": b} for row, b in zip(rows, batches, strict=True)], norm

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Nothing: each completion's tokens and its prompt's are counted when it is drawn, as in TRL."""

    # --- log-probs -> loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Loss of one micro-batch of `get_batch_samples`, as its share of the optimizer step's."""
        if return_outputs:
            raise ValueError("return_outputs=True is not supported: a GRPO micro-batch has no outputs to return")
        batch: MicroBatch | None = inputs["micro_batch"]
        if batch is None:
            return no_gradient_loss(model)
        if self._recompute is not None and batch.row is not None:
            self._recompute.apply(batch.row.layout.num_tokens, batch.padded_tokens)
        scores = self._scores(model, batch)
        exact_kl = self._loss_beta != 0 and self.args.kl_estimator == "full"
        mask = scores.mask & batch.in_loss[:, None]
        terms = grpo_loss(
            scores.logps,
            torch.where(batch.fresh[:, None], scores.logps.detach(), batch.old_logps),
            batch.advantages,
            mask,
            norm=replace(num_items_in_batch, dapo_tokens=batch.dapo_tokens),
            ref_logps=batch.ref_logps,
            per_token_kl=self._exact_kl(batch, scores) if exact_kl else None,
            beta=self._loss_beta,
            epsilon_low=self.args.epsilon,
            epsilon_high=self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high,
            delta=self.args.delta,
            level=self.args.importance_sampling_level,
            kl_estimator=self.args.kl_estimator,
            use_bias_correction_kl=self.args.use_bias_correction_kl,
            aggregation=self.args.loss_type,
        )
        record_loss_terms(self._metrics, terms, scores, mask)
        return terms.loss

    def _scores(self, model: nn.Module, batch: MicroBatch) -> TokenScores:
        if batch.row is not None:
            return self._scorer.packed(model, batch.row)
        return self._scorer.padded(
            model,
            batch.prompt_ids,
            batch.completion_ids,
            pad_token_id=self._sampler.pad_token_id,
            device=self.args.device,
        )

    def _exact_kl(self, batch: MicroBatch, scores: TokenScores) -> torch.Tensor:
        """`(S, C)` KL of the whole distributions; the reference's hidden states are computed here, not kept."""
        assert self._reference is not None
        base = base_model_of(self.accelerator.unwrap_model(self.model))
        with torch.no_grad(), evaluating(self.model), self._reference.active():
            ref_hidden = self._scores(self.model, batch).hidden
            ref_head = head_spec(base).detached()
        return exact_kl(scores, ref_hidden, head_spec(base), ref_head, self.args.temperature)

    # --- evaluation, logs, checkpoints ---

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: EvalDataset | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Sample `num_generations_eval` completions for every held-out prompt, score them, log `eval_*`.

        The noise is the same at every call, so that two evaluations differ by the policy alone.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            data = cast(dict[str, Any], self.eval_dataset)[data]
        if data is None:
            raise ValueError("evaluation requires an eval_dataset: pass one to the trainer or to evaluate()")
        if isinstance(data, dict):
            merged: dict[str, float] = {}
            for name, dataset in data.items():
                merged |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return merged
        started = time.time()
        metrics = MetricLog()
        count = self._maker.evaluate(data, self.state, metrics)
        values = {name: value for name, value in metrics.flush(self.accelerator).items() if value is not None}
        results = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        results |= speed_metrics(metric_key_prefix, started, num_samples=count)
        self.log(results)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was collected since the last log; print and save completions if asked to."""
        if "loss" in logs:
            logs.update(self._metrics.flush(self.accelerator))  # type: ignore[arg-type]
            if self.args.log_completions and self.accelerator.is_main_process:
                self._completion_log.write(self.state.global_step)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with active_adapter_only(self.model):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.create_model_card(model_name=Path(self.args.hub_model_id or str(self.args.output_dir)).name)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # Before super(), which pushes the folder to the Hub: all processes' files belong to it
        save_state(folder, self.args, self._feed, self._experience, self._reference, self._maker.curriculum)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        place = place_in_cycle(self.args, self.state.global_step, self._get_train_sampler())
        restored = load_state(Path(checkpoint), self.args, self._feed, self._reference, self._maker.curriculum, place)
        if restored is not None:
            self._experience = restored
