"""`trl-grpo train`: a run from a YAML file, or what it would be (`--dry-run`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .main import FAILED, OK, CheckFailed, as_refusals
from .parser import CommandParser
from .prompt_options import TrainPrompts
from .recorded_run import options_of_record, recipe_of
from .run_checks import check_run
from .train_inputs import (
    eval_prompt_arguments,
    merged_weights,
    peft_config_of,
    prompt_arguments,
    quantization_of,
    reward_specs,
    with_init_kwargs,
)
from .train_options import TrainAdapter, TrainModel, TrainRewards, TrainRun

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase

    from ..config import GRPOConfig
    from ..trainer import GRPOTrainer

_DESCRIPTION = """\
Train an adapter (or every weight) with GRPO: prompts from a source, in a template, completed and judged by rewards.
--config takes a YAML file with any of the options (recipes/ has some), or the training_config.yaml of a run. Mappings
are written as JSON on the command line. --dry-run shows what the run would be."""

# Titles in --help, and the fields of GRPOConfig that each begins with: those declared after it come under it too
_SECTIONS = {
    "bf16": "GRPO: defaults other than transformers'",
    "model_init_kwargs": "GRPO: model and reference",
    "num_generations": "GRPO: groups of completions",
    "generation_batch_size": "GRPO: generation",
    "beta": "GRPO: objective",
    "reward_weights": "GRPO: rewards and advantages",
    "rollout_dequantize": "GRPO: how it is computed",
    "log_completions": "GRPO: logging",
}
_EVERYDAY = (
    "output_dir max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
    "gradient_checkpointing lr_scheduler_type warmup_steps weight_decay max_grad_norm optim seed logging_steps "
    "report_to run_name save_strategy save_steps save_total_limit resume_from_checkpoint eval_strategy eval_steps "
    "eval_on_start per_device_eval_batch_size load_best_model_at_end metric_for_best_model push_to_hub hub_model_id "
    "use_cpu"
).split()


def make_parser() -> CommandParser:
    """The parser of this command; imports transformers, whose `TrainingArguments` are a part of it."""
    from ..config import GRPOConfig

    groups = [TrainModel, TrainAdapter, TrainPrompts, TrainRewards, TrainRun, GRPOConfig]
    return CommandParser(
        "train",
        _DESCRIPTION,
        groups,
        sections={GRPOConfig: config_sections()},
        translate=options_of_record,
        usage="trl-grpo train [--config FILE] [--dry-run] [--OPTION VALUE ...]",
    )


def config_sections() -> dict[str, list[str]]:
    """`GRPOConfig`'s own fields by theme, transformers' everyday ones, and the hundred others."""
    from ..config import GRPOConfig

    names = [f.name for f in fields(GRPOConfig) if f.init]
    found: dict[str, list[str]] = {"run (transformers.TrainingArguments)": [n for n in _EVERYDAY if n in names]}
    own: list[str] = []
    for part in GRPOConfig.__mro__:  # its fields, and those of themes that have a class of their own
        if part.__module__.startswith(__package__.split(".")[0]):
            title = f"GRPO: {part.__name__.removesuffix('Fields').lower()}"
            for name in part.__annotations__:
                if name in names and name not in (*_EVERYDAY, *own):
                    title = _SECTIONS.get(name, title)
                    found.setdefault(title, []).append(name)
                    own.append(name)
    found["everything else (transformers.TrainingArguments)"] = [
        name for name in names if name not in own and name not in _EVERYDAY
    ]
    return found


def run(argv: Sequence[str]) -> int:
    """Train, or show the plan, and return the exit code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advice about 4-bit kernels
    *groups, args = make_parser().read(argv)
    with as_refusals():
        inputs = _resolve(groups, args)
    how: TrainRun = groups[-1]
    if how.dry_run:
        _show(inputs, how.dry_run_prompts)
        return OK
    with as_refusals():
        trainer = _make_trainer(inputs, groups)
    return _train(trainer, bool(inputs.evaluation))


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the options come to."""

    args: GRPOConfig
    model: str
    revision: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    peft_config: PeftConfig | None
    quantization: BitsAndBytesConfig | None
    train: Dataset | IterableDataset
    evaluation: dict[str, Any]  # name -> dataset
    rewards: list[Any]
    names: list[str]


def _resolve(groups: Sequence[Any], args: GRPOConfig) -> _Inputs:
    """Everything but the weights; what is cheap to refuse comes first."""
    from ..adapter_source import read_base_config
    from ..rewards import load_rewards

    who: TrainModel
    adapter: TrainAdapter
    prompts: TrainPrompts
    rewards: TrainRewards
    who, adapter, prompts, rewards, _ = groups
    has_adapter = args.adapter_name_or_path is not None
    peft_config = peft_config_of(adapter, has_adapter)
    quantization = quantization_of(who, args)
    with_init_kwargs(who, args)
    train_arguments, eval_arguments = prompt_arguments(prompts), eval_prompt_arguments(prompts)
    specs = reward_specs(rewards)
    functions, own_weights = load_rewards(specs)
    args.reward_weights = merged_weights(own_weights, specs, args.reward_weights)
    model, revision = _base(who, args)
    if args.output_dir == "trainer_output":  # transformers', where none is given; TRL names it after the model
        args.output_dir = f"{model.rstrip('/').split('/')[-1]}-GRPO"
    check_run(args, prompts.dataset_streaming, bool(eval_arguments))
    config = read_base_config(model, revision, args.trust_remote_code)
    tokenizer = _tokenizer(model, revision, args)
    reading = {"tokenizer": tokenizer, "chat_template_kwargs": args.chat_template_kwargs}
    return _Inputs(
        args=args,
        model=model,
        revision=revision,
        config=config,
        tokenizer=tokenizer,
        peft_config=peft_config,
        quantization=quantization,
        train=_load("training", train_arguments | reading, args),
        evaluation={name: _load(name, arguments | reading, args) for name, arguments in eval_arguments.items()},
        rewards=functions,
        names=[spec["name"] for spec in specs],
    )


def _base(who: TrainModel, args: GRPOConfig) -> tuple[str, str | None]:
    """The base and its revision: as given, or the adapter's."""
    from ..policy import adapter_base, adapter_config

    if who.model is not None and args.adapter_name_or_path is not None:
        adapter_config(args.adapter_name_or_path, args.adapter_revision)
    if who.model is not None:
        init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        return who.model, init_kwargs.get("revision")
    if args.adapter_name_or_path is None:
        raise ValueError(
            "model is missing: say what is trained, --model FOLDER or a Hub id, or model: in the YAML file"
        )
    return adapter_base(args.adapter_name_or_path, args.adapter_revision)


def _tokenizer(model: str, revision: str | None, args: GRPOConfig) -> PreTrainedTokenizerBase:
    """The adapter's own, if it has one, or the base's: as the trainer chooses it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from ..adapter_source import LOAD_ERRORS, first_line
    from ..policy import tokenizer_source

    source = tokenizer_source(args.adapter_name_or_path, args.adapter_revision) or (model, revision)
    try:
        found = AutoTokenizer.from_pretrained(source[0], revision=source[1], trust_remote_code=args.trust_remote_code)
    except LOAD_ERRORS as error:
        raise ValueError(f"model={source[0]!r} has no tokenizer that can be loaded: {first_line(error)}") from error
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def _load(name: str, arguments: Mapping[str, Any], args: GRPOConfig) -> Any:
    """The prompts of one split; what became of its rows is printed."""
    from ..data import PromptReport, load_prompts

    report = PromptReport()
    with args.main_process_first():  # the others find what it has cached
        data = load_prompts(**arguments, report=report)
    if args.process_index == 0:
        print(f"Prompts for {name}:", str(report) or "read as they are needed", sep="\n")
    return data


def _show(inputs: _Inputs, shown: int) -> None:
    from .run_plan import make_plan
    from .show_plan import print_plan

    with as_refusals():
        plan = make_plan(
            inputs.args,
            model=inputs.model,
            config=inputs.config,
            tokenizer=inputs.tokenizer,
            peft_config=inputs.peft_config,
            quantization=inputs.quantization,
            train=inputs.train,
            evaluation=inputs.evaluation,
            rewards=inputs.rewards,
            names=inputs.names,
            shown=shown,
        )
    if inputs.args.process_index == 0:
        print_plan(plan)


def _make_trainer(inputs: _Inputs, groups: Sequence[Any]) -> GRPOTrainer:
    from ..trainer import GRPOTrainer

    evaluation: Any = inputs.evaluation or None
    if len(inputs.evaluation) == 1:
        (evaluation,) = inputs.evaluation.values()
    trainer = GRPOTrainer(
        model=inputs.model,
        reward_funcs=inputs.rewards,
        args=inputs.args,
        train_dataset=inputs.train,
        eval_dataset=evaluation,
        processing_class=inputs.tokenizer,
        quantization_config=inputs.quantization,
        peft_config=inputs.peft_config,
    )
    trainer.run_recipe = recipe_of(groups)
    return trainer


def _train(trainer: GRPOTrainer, has_evaluation: bool) -> int:
    """Train, save, evaluate, push."""
    from ..hub import UploadError
    from ..rewards import RewardError

    args = trainer.args
    resume: Any = args.resume_from_checkpoint
    if resume is not None and str(resume).lower() in ("true", "false"):
        resume = str(resume).lower() == "true"
    try:
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model(_internal_call=True)  # pushed below, when all of it is there
        if has_evaluation:
            trainer.evaluate()
            trainer.save_state()
        trainer.create_model_card()
        if trainer.is_world_process_zero():
            _print_results(trainer)
        if args.push_to_hub:
            trainer.push_to_hub()
        # Of several processes the threads of the process group may outlive Python otherwise, and abort its end
        trainer.accelerator.end_training()
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(error.args[0]) from error  # no such metric: rewards log what they like
    except (RewardError, UploadError) as error:
        raise CheckFailed(str(error)) from error
    except KeyboardInterrupt:
        print(f"interrupted; --resume-from-checkpoint true goes on from the last checkpoint in {args.output_dir}")
        return FAILED
    return OK


def _print_results(trainer: GRPOTrainer) -> None:
    """The first and the last evaluation of each held-out set, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    found: dict[str, dict[int, float]] = {}  # metric -> step -> value, of two at one step the later one
    for entry in trainer.state.log_history:
        for name in _shown_metrics(entry):
            found.setdefault(name, {})[int(entry["step"])] = entry[name]
    if found:
        best, steps = trainer.best_loaded, {step for values in found.values() for step in values}
        columns = sorted({min(steps), max(steps)})
        table = Table(title="Held out", title_justify="left")
        table.add_column("metric")
        for step in columns:
            loaded = best if step == columns[-1] else None
            table.add_column(f"step {step}" if loaded is None else f"the best, of step {loaded.step}", justify="right")
        for name, values in found.items():
            if name.endswith("/failed") and not any(values.get(step) for step in columns):
                continue  # none has
            shown = (f"{values[step]:.4g}" if step in values else "" for step in columns)
            table.add_row(name.removeprefix("eval_"), *shown)
        Console().print(table)
    print(f"Written to {trainer.args.output_dir}")


def _shown_metrics(entry: Mapping[str, Any]) -> list[str]:
    wanted = ("reward", "rewards/", "pass@", "maj@", "avg@", "completions/mean_length", "completions/clipped_ratio")
    names = [name for name in entry if name.startswith("eval_") and not name.endswith("/std")]
    names = [name for name in names if any(part in name for part in wanted) and not name.endswith("reward_std")]
    return [name for name in names if entry[name] is not None]
