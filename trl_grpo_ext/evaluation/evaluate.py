"""Base and adapter on the same held-out prompts, with the same noise: sampled, judged, counted, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import PromptEncoder, check_columns
from ..hub.datasets import describe_dataset
from ..partial_file import weights_hash
from ..policy import base_model_of
from ..rewards import AccuracyReward, Limits, accuracy_reward, think_answer_format_reward
from ..rewards.accuracy import gold_answer
from ..side_by_side import LoadedPolicy, Which, encode_prompts, group_sampler, load_policy
from .judging import Judge, RewardFunc
from .report import FORMAT_VERSION, Evaluation
from .settings import Settings
from .summary import break_down, per_prompt, summarise

BREAKDOWN = ("level", "subject", "source")


def evaluate_policy(
    model: LoadedPolicy | PreTrainedModel | PeftModel | str | None,
    data: Dataset | IterableDataset,
    *,
    adapter: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    which: Which | None = None,
    reward: RewardFunc = accuracy_reward,
    format_reward: RewardFunc | None = think_answer_format_reward,
    breakdown: Sequence[str] = BREAKDOWN,
    chat_template_kwargs: dict[str, Any] | None = None,
    reward_limits: Limits | None = None,
    failures_file: str | Path | None = None,
    partial: str | Path | None = None,
    name: str = "data",
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Sample, judge and count completions of held-out prompts, by the base, by base + adapter, or by both.

    Completion g of prompt p is drawn with the same random numbers by either policy, so that what differs, the adapter
    did; the difference is tested prompt by prompt (`compare_paired`). A completion is right where `reward` is 1.0.

    Args:
        model: Id or folder of a base, a model in memory (a `PeftModel`'s adapter can be switched off, which makes it
            both), or what `load_policy` returned; None: the base that `adapter` names.
        data: Rows with a `prompt` (text, taken as it is, or messages) and what the rewards need: a `solution` or
            `answer` with the gold answer by default.
        adapter: Id or folder of an adapter, for a model given by id or folder.
        tokenizer: Of a model in memory.
        which: "base", "adapter" or "both"; by default both where there is an adapter.
        reward: Says what is right. Runs behind the firewall, as all rewards do.
        format_reward: Says whether the format is kept, where it is 1.0; None: not asked.
        breakdown: Columns to break results down by, those of them that there are.
        chat_template_kwargs: For `apply_chat_template`.
        reward_limits: What a reward may take before it is stopped.
        failures_file: Where completions that a reward fails on are written; nowhere by default.
        partial: File for completions as they are drawn, by default none. If it is there, an interrupted evaluation goes
            on with it; remove it when the results are saved.
        name: What errors call the data.
        progress: Whether to show progress, on stderr.
        **settings: Fields of `Settings`: num_generations, k, temperature, max_new_tokens, seed, ...

    Raises:
        ValueError: an unknown or unfit setting, a row without a prompt that fits or, for the accuracy reward, without a
            gold answer; `partial` is of another evaluation.
        RewardError: a reward failed on more than half of a batch.
    """
    unknown = sorted(set(settings) - set(Settings.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no setting of an evaluation: they are {list(Settings.__dataclass_fields__)}"
        )
    ks = settings.get("k") or ()
    how = Settings(**{**settings, "k": tuple(ks) if isinstance(ks, list | tuple) else ks})
    if which not in (None, *get_args(Which)):
        raise ValueError(f"which={which!r} must be one of {', '.join(get_args(Which))}")
    check_columns(data, name)
    rows = data if isinstance(data, Dataset) else Dataset.from_list(list(data))
    if isinstance(breakdown, str):
        raise ValueError(f"breakdown={breakdown!r} must be a list of columns: [{breakdown!r}]")
    for column in breakdown:
        if column not in (*BREAKDOWN, *rows.column_names):
            raise ValueError(f"breakdown: {column!r} is no column of {name} (its columns: {rows.column_names})")
    _check_golds(rows, reward, name)
    policy = _loaded(model, adapter, tokenizer)
    has_adapter = isinstance(policy.model, PeftModel)
    who: Which = which or ("both" if has_adapter else "base")
    if who != "base" and not has_adapter:
        raise ValueError(f"which={who!r} needs an adapter: pass one, or which='base'")
    encoder = PromptEncoder(policy.tokenizer, chat_template_kwargs)
    origins = [f"{name}, row {number}: the prompt" for number in range(len(rows))]
    encoded = encode_prompts(
        rows["prompt"][:], encoder, base_model_of(policy.model), how.max_new_tokens, origins, progress
    )
    judge = Judge(rows, encoder, encoded, how, reward, format_reward, reward_limits, failures_file)
    try:
        if partial is not None:
            model_and_format = {
                "model": policy.base,
                "adapter": policy.adapter,
                "weights_hash": weights_hash(policy.model),
                "format_version": FORMAT_VERSION,
            }
            judge.go_on(Path(partial), model_and_format)
        sampler = group_sampler(policy.model, policy.tokenizer, how.sampling())
        found = {one: judge.sample(sampler, policy, one, progress) for one in _speakers(who)}
    finally:
        judge.close()
    values = {one: per_prompt(groups, how.ks) for one, groups in found.items()}
    options: dict[str, Any] = {"level": how.confidence, "resamples": how.resamples, "seed": how.seed}
    columns = {column: rows[column][:] for column in breakdown if column in rows.column_names}
    summary = {
        "format_version": FORMAT_VERSION,
        "model": policy.base,
        "adapter": None if who == "base" else policy.adapter,
        "data": describe_dataset(rows),
        "settings": {**asdict(how), "k": list(how.ks), "reward": judge.names[0], "format_reward": judge.format_name},
        "prompts": len(rows),
        "counts": {one: judge.counts(groups) for one, groups in found.items()},
        "results": summarise(values, **options),
        "by": break_down(values, columns, **options),
        "seconds": round(judge.seconds, 3),
    }
    return Evaluation(summary, judge.as_dataset(found))


def _loaded(
    model: LoadedPolicy | PreTrainedModel | PeftModel | str | None,
    adapter: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> LoadedPolicy:
    if model is None or isinstance(model, str):
        if tokenizer is not None:
            raise ValueError("tokenizer is for a model in memory; of a folder or an id its own is loaded: leave it out")
        return load_policy(model, adapter)
    if adapter is not None:
        raise ValueError(f"adapter={adapter!r} is for a model given by id or folder: put it on with PeftModel, or so")
    if isinstance(model, LoadedPolicy):
        return model
    if tokenizer is None:
        raise ValueError("tokenizer is missing: a model in memory does not know its own. Pass tokenizer=...")
    name = str(getattr(base_model_of(model).config, "_name_or_path", "") or "a model in memory")
    return LoadedPolicy(model, tokenizer, name, "in memory" if isinstance(model, PeftModel) else None)


def _check_golds(rows: Dataset, reward: RewardFunc, data: str) -> None:
    """Refuse rows that the accuracy reward has no gold answer for: they would count in nothing."""
    if reward is not accuracy_reward and not isinstance(reward, AccuracyReward):
        return
    names = reward.gold_columns if isinstance(reward, AccuracyReward) else AccuracyReward().gold_columns
    found = [name for name in names if name in rows.column_names]
    if not found:
        raise ValueError(
            f"{data} has none of the columns {list(names)} with the gold answer (its columns: {rows.column_names}). "
            "Rename the one that has it: data.rename_column('final', 'solution'); or pass another reward."
        )
    golds = [gold_answer(values) for values in zip(*(rows[name][:] for name in found), strict=True)]
    without = [number for number, gold in enumerate(golds) if gold is None]
    if without:
        value = {name: rows[without[0]][name] for name in found}
        raise ValueError(
            f"{data}, row {without[0]}: no gold answer can be read from {value!r:.200}; {len(without)} of {len(rows)} "
            "rows have none. Mend them, or leave them out with data.filter."
        )


def _speakers(which: Which) -> tuple[str, ...]:
    return ("base", "adapter") if which == "both" else (which,)
