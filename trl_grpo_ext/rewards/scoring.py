"""Run the reward functions on a batch of completions.

A reward that raises, answers with the wrong number of values, or with something that is not a finite number, stops the
run with an error that says which reward, at which step, on which prompt and completion. Nothing is replaced by 0.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from trl.trainer.utils import (
    get_callable_name,
    is_async_callable,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

from trl_grpo_ext.rewards.firewall import RewardBatch, blame, checked, short
from trl_grpo_ext.rewards.reward_model import RewardModel

logger = logging.getLogger(__name__)

RewardFunc: TypeAlias = "str | nn.Module | Callable[..., Any]"


class RewardScorer:
    """K rewards of one kind or another behind one call: `score(...)` -> (B, K).

    Args:
        reward_funcs: one reward or a list of them, as in `trl.GRPOTrainer`: a callable (sync or async)
            `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, also called with
            `trainer_state`, `log_extra` and `log_metric`; the id or path of a sequence-classification model; or such a
            model. Async functions run together, in the event loop of a background thread that lives as long as the
            process (their HTTP clients stay usable from step to step).
        names: K names to log by. By default the function's name or the last part of the model's id. Of equal names the
            later ones get `_2`, `_3`, ...
        processing_classes: one or a list of K tokenizers for reward models, None for callables. A reward model's own
            is loaded from its id by default.
        chat_template_kwargs: for the reward models' chat templates.
        device: where reward models run.
        model_init_kwargs: for loading reward models given by id.
        trust_remote_code: for loading reward models and their tokenizers.
        reward_model_batch_size: how many completions a reward model sees at a time.

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
        self._loop: asyncio.AbstractEventLoop | None = None

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
    ) -> torch.Tensor:
        """Every reward of every completion.

        Args:
            prompts, completions, completion_ids: B values each, standard or conversational.
            columns: the dataset's other columns, B values each, passed to the functions by name.
            step: the trainer's step, for error messages.
            trainer_state: passed to the functions.
            prefills: what each completion's text begins with that its prompt wrote already (a `<think>` opened by a
                chat template), so that reward models do not read it twice. Nothing by default.

        Returns:
            (B, K) float32 on the CPU; NaN where a function returned None.

        Raises:
            ValueError: a function did not return one value per completion, or B differs between the arguments.
            RewardError: a reward raised, or a function returned something that is not a finite number or None.
        """
        ids = [list(completion) for completion in completion_ids]
        written = [""] * len(completions) if prefills is None else list(prefills)
        batch = RewardBatch(list(prompts), list(completions), ids, dict(columns), step, written)
        hooks = {"trainer_state": trainer_state, "log_extra": self._log_extra, "log_metric": self._log_metric}
        awaited = [k for k, reward in enumerate(self.rewards) if _is_async(reward)]
        outputs = {k: self._call(k, batch, hooks) for k in range(len(self.rewards)) if k not in awaited}
        for k, output in zip(awaited, self._gather(awaited, batch, hooks), strict=True):
            if isinstance(output, BaseException):
                raise self._blame(k, batch, hooks, output) from output
            outputs[k] = output
        rows = [checked(name, outputs[k], batch) for k, name in enumerate(self.names)]
        rewards = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), -1).T.contiguous()  # (B, K)
        _warn_if_unscored(rewards, batch)
        return rewards

    def pop_logged(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """What the functions logged by `log_extra` and `log_metric` since the last call: columns, metrics."""
        logged = dict(self._extras), dict(self._metrics)
        self._extras, self._metrics = defaultdict(list), defaultdict(list)
        return logged

    def _call(self, k: int, batch: RewardBatch, hooks: dict[str, Any]) -> Any:
        reward = self.rewards[k]
        try:
            if isinstance(reward, RewardModel):
                return reward.score(batch.prompts, batch.completions, batch.prefills)
            return reward(**batch.kwargs(), **hooks)
        except Exception as error:
            raise self._blame(k, batch, hooks, error) from error

    def _gather(self, awaited: list[int], batch: RewardBatch, hooks: dict[str, Any]) -> list[Any]:
        """What these async functions return, run together; an exception stands in its function's place."""
        if not awaited:
            return []

        async def call(k: int) -> Any:
            # Called in here, so that a wrong signature is that function's error too.
            return await self.rewards[k](**batch.kwargs(), **hooks)  # type: ignore[operator]

        async def gather() -> list[Any]:
            return await asyncio.gather(*(call(k) for k in awaited), return_exceptions=True)

        # In a thread of its own: `asyncio.run` cannot be called where a loop is running already (a notebook), and a new
        # loop for every step would break clients that are tied to the loop they were first used in.
        if self._loop is None:
            thread, self._loop, ready = start_event_loop_in_daemon(name="trl_grpo_ext-rewards")
            ready.wait()
            atexit.register(shutdown_event_loop_in_daemon, thread, self._loop)
        return asyncio.run_coroutine_threadsafe(gather(), self._loop).result()

    def _blame(self, k: int, batch: RewardBatch, hooks: dict[str, Any], error: BaseException) -> Exception:
        silent = {**hooks, "log_extra": _ignore, "log_metric": _ignore}
        reward = self.rewards[k]

        def call(row: RewardBatch) -> None:
            if isinstance(reward, RewardModel):
                reward.score(row.prompts, row.completions, row.prefills)
                return
            if not _is_async(reward):
                reward(**row.kwargs(), **silent)
                return
            (result,) = self._gather([k], row, silent)
            if isinstance(result, BaseException):
                raise result

        return blame(self.names[k], batch, error, call)

    def _log_extra(self, column: str, values: list[Any]) -> None:
        self._extras[column].extend(values)

    def _log_metric(self, name: str, value: float) -> None:
        self._metrics[name].append(value)


def _is_async(reward: RewardModel | Callable[..., Any]) -> bool:
    return not isinstance(reward, RewardModel) and is_async_callable(reward)


def _ignore(*args: Any) -> None:
    """Stands in for `log_extra` and `log_metric` while a culprit is looked for: what they got is logged already."""


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


def _warn_if_unscored(rewards: torch.Tensor, batch: RewardBatch) -> None:
    unscored = torch.isnan(rewards).all(dim=1).nonzero().flatten().tolist()
    if unscored:
        logger.warning(
            "All reward functions returned None for %d of %d completions at step %d; the first:\n%s\ncolumns: %s\n"
            "Please ensure that at least one reward function returns a valid reward.",
            len(unscored),
            len(rewards),
            batch.step,
            batch.shown(unscored[0]),
            short({name: values[unscored[0]] for name, values in batch.columns.items()}),
        )
