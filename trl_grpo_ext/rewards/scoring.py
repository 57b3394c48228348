"""Completions -> rewards: reward functions and reward models of every kind behind one call.

What a reward fails on has no reward: it is counted and written down, never replaced by 0. See `runner.py`.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from trl.trainer.utils import get_callable_name

from trl_grpo_ext.rewards.batch import RewardBatch
from trl_grpo_ext.rewards.failures import FailureLog
from trl_grpo_ext.rewards.outcome import short
from trl_grpo_ext.rewards.reward_model import RewardModel
from trl_grpo_ext.rewards.runner import Limits, RewardRunner
from trl_grpo_ext.rewards.step_rewards import StepRewards, is_step_reward

logger = logging.getLogger(__name__)

RewardFunc: TypeAlias = "str | nn.Module | Callable[..., Any]"


@dataclass(frozen=True, slots=True)
class Scores:
    """The rewards of B completions by K functions, of which the step rewards judge the steps of a completion."""

    rewards: torch.Tensor  # (B, K) float32 on the CPU; NaN where a function returned None or failed; of steps: the mean
    failed: torch.Tensor  # (B, K) bool
    steps: dict[int, list[StepRewards | None]]  # k -> B, of the functions that are step rewards

    def columns(self) -> tuple[list[list[float]], list[list[bool]]]:
        """Rewards and failures as lists, B rows of K each."""
        return self.rewards.tolist(), self.failed.tolist()


class RewardScorer:
    """K rewards of one kind or another behind one call.

    Args:
        reward_funcs: one reward or a list of them, as in `trl.GRPOTrainer`: a callable (sync or async)
            `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, also called with
            `trainer_state`, `log_extra` and `log_metric`; the id or path of a sequence-classification model; or such a
            model. How functions are run is told in `runner.py`.
        names: K names to log by. By default the function's name or the last part of the model's id. Of equal names the
            later ones get `_2`, `_3`, ...
        processing_classes: one or a list of K tokenizers for reward models, None for callables. A reward model's own
            is loaded from its id by default.
        chat_template_kwargs: for the reward models' chat templates.
        device: where reward models run.
        model_init_kwargs: for loading reward models given by id.
        trust_remote_code: for loading reward models and their tokenizers.
        reward_model_batch_size: how many completions a reward model sees at a time.
        limits: what a function may take before it is stopped, and how many run at a time.
        max_failure_rate: share of a batch that a reward may fail on before the run is stopped.
        failures_file: where failures are written, as JSON Lines; nowhere by default.

    Raises:
        ValueError: no reward, or `names` or `processing_classes` of another length.
        TypeError: a reward that is neither callable, nor a model, nor a string.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        *,
        names: Sequence[str] | None = None,
        processing_classes: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        model_init_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        reward_model_batch_size: int = 16,
        limits: Limits | None = None,
        max_failure_rate: float = 0.5,
        failures_file: Path | None = None,
    ) -> None:
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not funcs:
            raise ValueError("`reward_funcs` is empty: pass at least one reward function or reward model.")
        tokenizers = _one_for_each("reward_processing_classes", processing_classes, len(funcs))
        self.rewards: list[RewardModel | Callable[..., Any]] = []
        for func, tokenizer in zip(funcs, tokenizers, strict=True):
            if isinstance(func, (str, nn.Module)):
                model = RewardModel.load(
                    func, tokenizer, device, dict(model_init_kwargs or {}), trust_remote_code=trust_remote_code
                )
                model.batch_size = reward_model_batch_size
                model.chat_template_kwargs = dict(chat_template_kwargs or {})
                self.rewards.append(model)
            elif callable(func):
                self.rewards.append(func)
            else:
                raise TypeError(
                    f"`reward_funcs` holds a {type(func).__name__} ({short(func)}): each must be a callable, a model "
                    f"id, or a sequence-classification model."
                )
        own_names = [r.name if isinstance(r, RewardModel) else get_callable_name(r) for r in self.rewards]
        self.names = _unique(_one_for_each("names", list(names), len(funcs)) if names is not None else own_names)
        self._extras: defaultdict[str, list[Any]] = defaultdict(list)
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        self.judges_steps = torch.tensor([is_step_reward(reward) for reward in self.rewards])  # (K,)
        self._failures = FailureLog(failures_file, max_failure_rate)
        self._runner = RewardRunner(self.rewards, self.names, limits or Limits())

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, list[Any]],
        *,
        step: int,
        trainer_state: Any = None,
        prefills: Sequence[str] | None = None,
        may_stop: bool = True,
    ) -> Scores:
        """Every reward of every completion.

        Args:
            prompts, completions, completion_ids: B values each, standard or conversational.
            columns: the dataset's other columns, B values each, passed to the functions by name.
            step: the trainer's step, for error messages.
            trainer_state: passed to the functions.
            prefills: what each completion's text begins with that its prompt wrote already (a `<think>` opened by a
                chat template), so that reward models do not read it twice. Nothing by default.
            may_stop: whether too many failures raise; False for a handful of completions, of which a share says little.

        Raises:
            ValueError: B differs between the arguments.
            RewardError: a reward failed on more than `max_failure_rate` of the completions, and `may_stop`.
        """
        ids = [list(completion) for completion in completion_ids]
        written = [""] * len(completions) if prefills is None else list(prefills)
        batch = RewardBatch(list(prompts), list(completions), ids, dict(columns), step, written)
        outcomes = self._runner.run(batch, trainer_state)
        for outcome in outcomes:
            for column, values in outcome.extras:
                self._extras[column].extend(values)
            for name, value in outcome.metrics:
                self._metrics[name].append(value)
        values = [[_mean_of(value) for value in outcome.values] for outcome in outcomes]
        rewards = torch.tensor(values, dtype=torch.float32)  # (K, B)
        failed = torch.zeros(rewards.shape, dtype=torch.bool)
        for k, outcome in enumerate(outcomes):
            failed[k, list(outcome.problems)] = True
            self._failures.report(self.names[k], outcome.problems, batch, may_stop=may_stop)
        steps = {k: outcomes[k].values for k in self.judges_steps.nonzero().flatten().tolist()}
        scores = Scores(rewards.T.contiguous(), failed.T.contiguous(), steps)
        _warn_if_unscored(scores, batch)
        return scores

    def pop_logged(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """What the functions logged by `log_extra` and `log_metric` since the last call: columns, metrics."""
        logged = dict(self._extras), dict(self._metrics)
        self._extras, self._metrics = defaultdict(list), defaultdict(list)
        return logged

    def close(self) -> None:
        """End the worker processes."""
        self._runner.close()


def _mean_of(value: float | StepRewards | None) -> float:
    """A reward as a number: of steps the mean of those that were judged, NaN for nothing."""
    if isinstance(value, StepRewards):
        judged = [reward for reward in value.rewards if reward is not None]
        return sum(judged) / len(judged) if judged else math.nan
    return math.nan if value is None else value


def _one_for_each(field: str, values: Any, count: int) -> list[Any]:
    values = [None] * count if values is None else list(values) if isinstance(values, (list, tuple)) else [values]
    if len(values) != count:
        raise ValueError(f"`{field}` has {len(values)} entries for {count} reward functions: give one for each.")
    return values


def _unique(names: list[str]) -> list[str]:
    """The names, with `_2`, `_3`, ... appended to later occurrences: metrics are logged by name."""
    unique: list[str] = []
    for name in names:
        candidate, occurrence = name, 1
        while candidate in unique:
            occurrence += 1
            candidate = f"{name}_{occurrence}"
        unique.append(candidate)
    return unique


def _warn_if_unscored(scores: Scores, batch: RewardBatch) -> None:
    """Of completions that no function would judge; those on which one failed are reported elsewhere."""
    silent = torch.isnan(scores.rewards).all(dim=1) & ~scores.failed.any(dim=1)
    unscored = silent.nonzero().flatten().tolist()
    if unscored:
        logger.warning(
            "All reward functions returned None for %d of %d completions at step %d; the first:\n%s\ncolumns: %s\n"
            "Please ensure that at least one reward function returns a valid reward.",
            len(unscored),
            len(scores.rewards),
            batch.step,
            batch.shown(unscored[0]),
            short({name: values[unscored[0]] for name, values in batch.columns.items()}),
        )
