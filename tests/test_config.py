"""`GRPOConfig`: TRL's defaults, every check of a value, the command line, and the conversion from TRL's config."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import ParallelismConfig
from transformers import HfArgumentParser, TrainingArguments
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from trl_grpo_ext.config import GRPOConfig
from trl_grpo_ext.config_checks import InvalidConfigError
from trl_grpo_ext.config_rules import CHOICES, REFUSED, RULES

OWN_FIELDS = {"kl_estimator", "kl_in_reward", "attention_packing", "advantage_estimator", "num_generations_max"} | {
    "dynamic_sampling", "dynamic_sampling_max_rounds", "rollout_dequantize", "reference_rounds",
    "adapter_name_or_path", "adapter_revision", "eval_pass_at_k", "eval_pass_at_k_reward",
    "curriculum", "curriculum_reward", "curriculum_floor", "curriculum_decay",
    *(f"reward_{name}" for name in ("timeout", "memory_mb", "workers", "concurrency", "max_failure_rate")),
}  # fmt: skip
FIELDS_OF_TRL = set(
    "num_generations max_completion_length temperature top_p top_k min_p repetition_penalty beta epsilon epsilon_high "
    "delta num_iterations steps_per_generation generation_batch_size loss_type scale_rewards importance_sampling_level "
    "reward_weights multi_objective_aggregation mask_truncated_completions disable_dropout shuffle_dataset "
    "num_generations_eval model_init_kwargs trust_remote_code chat_template_kwargs generation_kwargs log_completions "
    "num_completions_to_print use_bias_correction_kl sync_ref_model ref_model_mixup_alpha ref_model_sync_steps".split()
)


class TwoProcesses(GRPOConfig):
    """As if it were launched with two processes: what a process sees of the others is their number."""

    world_size = property(lambda self: 2)


class TwoDevices(GRPOConfig):
    n_gpu = property(lambda self: 2)


@pytest.fixture
def make(tmp_path: Any) -> Callable[..., GRPOConfig]:
    def make(cls: type[GRPOConfig] = GRPOConfig, **settings: Any) -> GRPOConfig:
        return cls(output_dir=str(tmp_path), **settings)

    return make


@pytest.fixture
def make_trl(tmp_path: Any) -> Callable[..., TRLGRPOConfig]:
    def make_trl(cls: type[TRLGRPOConfig] = TRLGRPOConfig, **settings: Any) -> TRLGRPOConfig:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL's default uses a deprecated name of gradient checkpointing
            return cls(output_dir=str(tmp_path), **({"bf16": False} | settings))

    return make_trl


def problems_of(call: Callable[..., Any], *args: Any, **settings: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidConfigError) as caught:
        call(*args, **settings)
    return caught.value.problems


# --- Fields and defaults ---


def test_fields_are_those_of_training_arguments_plus_the_listed_ones() -> None:
    base = {f.name for f in fields(TrainingArguments)}
    assert {f.name for f in fields(GRPOConfig)} - base == FIELDS_OF_TRL | OWN_FIELDS


def test_defaults_are_those_of_trl() -> None:
    theirs = {f.name: f for f in fields(TRLGRPOConfig)}
    differing = {
        f.name
        for f in fields(GRPOConfig)
        if f.name in theirs
        and (f.default, f.default_factory) != (theirs[f.name].default, theirs[f.name].default_factory)
    }
    assert differing == {"logging_nan_inf_filter"}
    assert GRPOConfig.logging_nan_inf_filter is False
    assert (GRPOConfig.kl_estimator, GRPOConfig.kl_in_reward, GRPOConfig.attention_packing) == ("k3", False, "auto")
    assert GRPOConfig.rollout_dequantize == "layer"


def test_bf16_is_chosen_by_the_device_unless_set(make: Callable[..., GRPOConfig]) -> None:
    cuda = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    assert make().bf16 is cuda
    assert make(use_cpu=True).bf16 is False
    assert make(fp16=True).bf16 is False
    assert make(use_cpu=True, bf16=True).bf16 is True


def test_defaults_warn_of_nothing(make: Callable[..., GRPOConfig]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = make()
    assert config.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("given", "kept"),
    [(True, "group"), (False, "none"), ("True", "group"), ("False", "none"), ("batch", "batch"), ("none", "none")],
)
def test_scale_rewards_takes_booleans_as_trl(make: Callable[..., GRPOConfig], given: Any, kept: str) -> None:
    assert make(scale_rewards=given).scale_rewards == kept


@pytest.mark.parametrize(
    ("settings", "batch", "steps"),
    [
        ({}, 12, 2),  # 6 per device * 1 process * 2 accumulation steps
        ({"steps_per_generation": 5}, 30, 5),  # 6 * 5
        ({"generation_batch_size": 24}, 24, 4),  # 24 / 6
    ],
)
def test_generation_batch_is_derived_as_in_trl(
    make: Callable[..., GRPOConfig],
    make_trl: Callable[..., TRLGRPOConfig],
    settings: dict[str, int],
    batch: int,
    steps: int,
) -> None:
    shared = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_generations": 3} | settings
    for config in (make(**shared), make_trl(**shared)):
        assert (config.generation_batch_size, config.steps_per_generation) == (batch, steps)


def test_generation_batch_counts_the_processes(make: Callable[..., GRPOConfig]) -> None:
    config = make(TwoProcesses, per_device_train_batch_size=6, gradient_accumulation_steps=5, num_generations=3)
    assert (config.generation_batch_size, config.steps_per_generation) == (60, 5)  # 6 * 2 * 5


# --- Checks ---

BAD_NUMBERS = [
    ("num_generations", [1, 0, -2, 2.0, None, True]),
    ("num_generations_eval", [0, -1]),
    ("num_generations_max", [1, 2.5, "4"]),
    ("dynamic_sampling_max_rounds", [0, None, 1.5]),
    ("max_completion_length", [0, None]),
    ("num_iterations", [0]),
    ("per_device_train_batch_size", [0]),
    ("gradient_accumulation_steps", [0]),
    ("steps_per_generation", [0, -1]),
    ("generation_batch_size", [0, -8]),
    ("temperature", [0.0, -1.0, float("nan"), float("inf")]),
    ("top_p", [0.0, 1.01]),
    ("top_k", [-1, 0.5, None]),
    ("min_p", [-0.1, 1.1]),
    ("repetition_penalty", [0.0, -1.0]),
    ("beta", [-0.04, float("nan"), float("inf"), "0.1"]),
    ("epsilon", [-0.1, 1.0]),
    ("epsilon_high", [-0.1]),
    ("delta", [0.0, -1.0]),
    ("ref_model_mixup_alpha", [0.0, -0.1, 1.1]),
    ("ref_model_sync_steps", [0, 1.5]),
    ("reference_rounds", [0, 1.5]),
    ("reward_timeout", [0.0, -1.0, float("inf")]),
    ("reward_memory_mb", [0, 1.5]),
    ("reward_workers", [-1, 1.5]),
    ("reward_concurrency", [0]),
    ("reward_max_failure_rate", [-0.1, 1.1]),
    ("learning_rate", [-1e-6, float("nan"), float("inf")]),
    ("weight_decay", [-0.1]),
    ("seed", [-1, 2**32, 1.5, True]),
]
GOOD_NUMBERS = {
    "num_generations": [2, 4],
    "num_generations_eval": [None, 1],
    "num_generations_max": [None, 8, 100],
    "dynamic_sampling_max_rounds": [1, 10],
    "max_completion_length": [1],
    "num_iterations": [1, 3],
    "per_device_train_batch_size": [8],
    "gradient_accumulation_steps": [1, 3],
    "steps_per_generation": [None, 1],
    "generation_batch_size": [None, 16],
    "temperature": [0.1, 1],
    "top_p": [0.01, 1.0],
    "top_k": [0, 50],
    "min_p": [None, 0.0, 1.0],
    "repetition_penalty": [0.5, 1.1],
    "beta": [0, 0.04],
    "epsilon": [0.0, 0.99],
    "epsilon_high": [None, 0.0, 5.0],
    "delta": [None, 0.5, 4.0],
    "ref_model_mixup_alpha": [0.6],
    "ref_model_sync_steps": [512],
    "reference_rounds": [1],
    "reward_timeout": [0.5, 60],
    "reward_memory_mb": [1],
    "reward_workers": [None, 0, 3],
    "reward_concurrency": [1],
    "reward_max_failure_rate": [0.0, 1],
    "learning_rate": [0.0, 1e-4],
    "weight_decay": [0.0, 0.1],
    "seed": [0, 2**32 - 1, np.int64(7)],
}


def test_every_rule_has_cases() -> None:
    assert {rule.field for rule in RULES} == {field for field, _ in BAD_NUMBERS} == set(GOOD_NUMBERS)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD_NUMBERS for value in values])
def test_number_out_of_range_is_refused_by_one_line(make: Callable[..., GRPOConfig], field: str, value: Any) -> None:
    (problem,) = problems_of(make, **{field: value})
    rule, remedy = problem.split(". ", 1)
    assert rule.startswith(f"{field}={value!r} must be ")
    assert remedy.endswith(".")


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in GOOD_NUMBERS for value in GOOD_NUMBERS[field]]
)
def test_number_in_range_is_kept(make: Callable[..., GRPOConfig], field: str, value: Any) -> None:
    config = make(**{field: value})
    assert value is None or getattr(config, field) == value


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("loss_type", "dr-grpo", "Did you mean 'dr_grpo'?"),
        ("loss_type", "cispo", "The default is 'dapo'."),
        ("scale_rewards", "groups", "Did you mean 'group'?"),
        ("scale_rewards", None, "Did you mean 'none'?"),
        ("importance_sampling_level", "Sequence", "Did you mean 'sequence'?"),
        ("multi_objective_aggregation", "normalise_then_sum", "Did you mean 'normalize_then_sum'?"),
        ("kl_estimator", "K3", "Did you mean 'k3'?"),
        ("attention_packing", True, "The default is 'auto'."),
        ("rollout_dequantize", "layers", "Did you mean 'layer'?"),
    ],
)
def test_unknown_choice_is_refused(make: Callable[..., GRPOConfig], field: str, value: Any, remedy: str) -> None:
    allowed = ", ".join(repr(choice) for choice in CHOICES[field])
    assert problems_of(make, **{field: value}) == (f"{field}={value!r} must be one of {allowed}. {remedy}",)


@pytest.mark.parametrize(("field", "choice"), [(field, choice) for field in CHOICES for choice in CHOICES[field]])
def test_every_choice_is_taken(make: Callable[..., GRPOConfig], field: str, choice: str) -> None:
    assert getattr(make(**{field: choice}), field) == choice


def test_trackers_are_there(make: Callable[..., GRPOConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems_of(make, report_to="wandbb")
    assert problem.startswith("report_to='wandbb' must be one of ") and problem.endswith("Did you mean 'wandb'?")
    from transformers.integrations import integration_utils

    for name, found in (("wandb", True), ("comet", False)):
        monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda found=found: found)
    assert make(report_to=["wandb"]).report_to == ["wandb"]
    (problem,) = problems_of(make, report_to=["wandb", "comet_ml"])
    assert problem == (
        "report_to='comet_ml' must be a tracker that is installed. Run `pip install comet-ml`, or set 'none'."
    )
    assert make(report_to="none").report_to == []


def test_the_hub_takes_the_name(make: Callable[..., GRPOConfig], tmp_path: Path) -> None:
    for given in ("me/model-1.5", "model_a"):
        assert make(hub_model_id=given).hub_model_id == given
    (problem,) = problems_of(make, hub_model_id="me/my/model")
    assert problem.startswith("hub_model_id='me/my/model' must be a name that the Hub takes, NAME or OWNER/NAME: ")
    GRPOConfig(output_dir=str(tmp_path / "my model"))  # which is not pushed
    with pytest.raises(InvalidConfigError) as refused:
        GRPOConfig(output_dir=str(tmp_path / "my model"), push_to_hub=True)
    (problem,) = refused.value.problems
    assert problem.startswith("hub_model_id='my model' (the name of output_dir) must be a name that the Hub takes")


@pytest.mark.parametrize("weights", [[], [1.0, float("nan")], [float("inf")], ["1.0"], 2.0])
def test_reward_weights_are_finite_numbers(make: Callable[..., GRPOConfig], weights: Any) -> None:
    (problem,) = problems_of(make, reward_weights=weights)
    assert problem.startswith(f"reward_weights={weights!r} must be a list of finite numbers")


def test_negative_reward_weight_is_fine(make: Callable[..., GRPOConfig]) -> None:
    assert make(reward_weights=[1, -0.5]).reward_weights == [1, -0.5]


def test_a_living_reference_needs_a_reference_and_one_rule(make: Callable[..., GRPOConfig]) -> None:
    assert make(sync_ref_model=True, beta=0.04, ref_model_mixup_alpha=1.0, ref_model_sync_steps=3).sync_ref_model
    assert make(reference_rounds=3, beta=0.04).reference_rounds == 3
    for field, value in (("sync_ref_model", True), ("reference_rounds", 2)):
        (problem,) = problems_of(make, **{field: value})
        assert problem.startswith(f"{field}={value} must come with beta above 0")
    (problem,) = problems_of(make, beta=0.04, sync_ref_model=True, reference_rounds=2)
    assert problem.startswith("sync_ref_model=True and reference_rounds=2 exclude each other")
    for field, value in (("ref_model_mixup_alpha", 0.5), ("ref_model_sync_steps", 7)):
        (problem,) = problems_of(make, beta=0.04, **{field: value})
        assert problem == (
            f"{field}={value} has an effect only with sync_ref_model=True. Set that, or leave the field unset."
        )


def test_from_trl_takes_a_synced_reference(make_trl: Callable[..., TRLGRPOConfig]) -> None:
    theirs = make_trl(beta=0.04, sync_ref_model=True, ref_model_sync_steps=64, ref_model_mixup_alpha=0.9)
    ours = GRPOConfig.from_trl(theirs)
    assert (ours.sync_ref_model, ours.ref_model_sync_steps, ours.ref_model_mixup_alpha) == (True, 64, 0.9)


def test_kl_in_reward_needs_a_kl_of_sampled_tokens(make: Callable[..., GRPOConfig]) -> None:
    (no_beta,) = problems_of(make, kl_in_reward=True)
    assert "beta above 0" in no_beta
    for estimator in ("k2", "full"):
        (ignored,) = problems_of(make, kl_in_reward=True, beta=0.04, kl_estimator=estimator)
        assert f"kl_estimator={estimator!r} would have no effect" in ignored
    (alone,) = problems_of(make, kl_in_reward=True, beta=0.04, multi_objective_aggregation="normalize_then_sum")
    assert "multi_objective_aggregation='sum_then_normalize'" in alone
    assert make(kl_in_reward=True, beta=0.04, kl_estimator="k1").kl_in_reward
    assert make(beta=0.04, kl_estimator="full").kl_estimator == "full"


REFUSED_SETTINGS: dict[str, Any] = {
    "use_liger_kernel": True,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "deepspeed": "zero3.json",
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "auto_find_batch_size": True,
    "remove_unused_columns": True,
}


@pytest.mark.parametrize("field", list(REFUSED))
def test_unsupported_feature_is_refused_before_it_is_set_up(make: Callable[..., GRPOConfig], field: str) -> None:
    value = REFUSED_SETTINGS[field]
    (problem,) = problems_of(make, **{field: value})
    assert problem.startswith(f"{field}={value!r} is not supported")


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_launcher_cannot_switch_on_what_is_not_supported(
    make: Callable[..., GRPOConfig], monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    monkeypatch.setenv(variable, "true")
    (problem,) = problems_of(make)
    assert problem.startswith(f"{name} is switched on by {variable}=true")
    monkeypatch.setenv(variable, "false")
    make()


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_sequence_parallelism_is_refused(make: Callable[..., GRPOConfig], size: str) -> None:
    (problem,) = problems_of(make, parallelism_config=ParallelismConfig(**{size: 2}))
    assert f"{size}=2" in problem
    make(parallelism_config=ParallelismConfig())


def test_several_devices_in_one_process_are_refused(make: Callable[..., GRPOConfig]) -> None:
    (problem,) = problems_of(make, TwoDevices)
    assert problem.startswith("n_gpu=2 ")


@pytest.mark.parametrize(
    ("cls", "settings", "start", "fit"),
    [
        # 5 per device * 2 steps = 10 is no multiple of 4; lcm(5, 4) = 20 is, and holds 4 micro-batches
        (GRPOConfig, {"gradient_accumulation_steps": 2}, "generation_batch_size=10 (", (4, 20)),
        # 12 is no multiple of 5; the next multiple of 20 is 20
        (GRPOConfig, {"generation_batch_size": 12}, "generation_batch_size=12 must", (4, 20)),
        # 25 is 5 whole micro-batches, and no multiple of 4; the next multiple of 20 is 40
        (GRPOConfig, {"generation_batch_size": 25}, "generation_batch_size=25 must", (8, 40)),
        # 5 * 2 processes * 2 steps = 20 holds 5 groups of 4, but one process would hold 2.5 of them
        (TwoProcesses, {"steps_per_generation": 2}, "generation_batch_size=20 (", (4, 40)),
    ],
)
def test_generation_batch_holds_whole_groups(
    make: Callable[..., GRPOConfig], cls: type[GRPOConfig], settings: dict[str, int], start: str, fit: tuple[int, int]
) -> None:
    (problem,) = problems_of(make, cls, per_device_train_batch_size=5, num_generations=4, **settings)
    assert problem.startswith(start)
    assert "must be divisible by" in problem
    steps, size = fit
    assert problem.endswith(f"use steps_per_generation={steps}, which makes it {size}.")
    remedied = make(cls, per_device_train_batch_size=5, num_generations=4, steps_per_generation=steps)
    assert remedied.generation_batch_size == size


def test_only_one_of_the_generation_sizes_may_be_set(make: Callable[..., GRPOConfig]) -> None:
    (problem,) = problems_of(make, generation_batch_size=16, steps_per_generation=2)
    assert problem.startswith("generation_batch_size=16 and steps_per_generation=2 must not both be set")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"eval_pass_at_k": []}, "eval_pass_at_k=[] must be a list of different integers"),
        ({"eval_pass_at_k": [1, 1]}, "eval_pass_at_k=[1, 1] must be a list of different integers"),
        ({"eval_pass_at_k": [0, 2]}, "eval_pass_at_k=[0, 2] must be a list of different integers of at least 1"),
        ({"eval_pass_at_k": 4}, "eval_pass_at_k=4 must be a list"),
        ({"eval_pass_at_k": [1, 9]}, "eval_pass_at_k=[1, 9] must be at most 8, the completions per prompt"),
        ({"eval_pass_at_k": [1, 3], "num_generations_eval": 2}, "Set num_generations_eval=3, or lower k."),
        ({"eval_pass_at_k": [1], "eval_pass_at_k_reward": ""}, "eval_pass_at_k_reward='' must be the name"),
        ({"eval_pass_at_k_reward": "accuracy_reward"}, "has an effect only with eval_pass_at_k"),
        ({"metric_for_best_model": "pass@4"}, "eval_pass_at_k=None does not ask for it. Add 4 to eval_pass_at_k."),
        ({"metric_for_best_model": "eval_hard_pass@4", "eval_pass_at_k": [1, 8]}, "Add 4 to eval_pass_at_k."),
    ],
)
def test_pass_at_k_of_an_evaluation(make: Callable[..., GRPOConfig], settings: dict[str, Any], problem: str) -> None:
    [found] = problems_of(make, **settings)
    assert problem in found


def test_pass_at_k_from_the_command_line(tmp_path: Any) -> None:
    [args] = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--eval_pass_at_k", "1", "4", "--metric_for_best_model", "pass@4"]
    )
    assert args.eval_pass_at_k == [1, 4] and args.greater_is_better


def test_eval_batch_holds_whole_groups(make: Callable[..., GRPOConfig]) -> None:
    settings = {"eval_strategy": "steps", "num_generations": 4, "per_device_eval_batch_size": 6}
    (problem,) = problems_of(make, **settings)
    assert problem.startswith("per_device_eval_batch_size=6 * 1 processes = 6 must be divisible by the 4 completions")
    make(**settings, num_generations_eval=3)  # 6 / 3
    make(**(settings | {"eval_strategy": "no", "do_eval": True}))  # nothing is evaluated while training, as in TRL
    make(TwoProcesses, **settings)  # 6 * 2 / 4


def test_generation_kwargs_override_the_fields_while_sampling(make: Callable[..., GRPOConfig]) -> None:
    config = make(top_k=7, generation_kwargs={"max_new_tokens": 5, "temperature": 0.5, "suppress_tokens": [3, 0]})
    assert config.sampling_options() == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 7,
        "min_p": None,
        "repetition_penalty": 1.0,
        "suppress_tokens": [3, 0],
    }
    assert (config.max_completion_length, config.temperature) == (512, 1.0)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_beams": 3}, ["generation_kwargs['num_beams']=3 is not supported", "suppress_tokens. Remove it."]),
        ({"temprature": 1.0}, ["generation_kwargs['temprature']=1.0 is not supported", "Did you mean 'temperature'?"]),
        ({"top_p": 0.0}, ["generation_kwargs['top_p']=0.0 must be a number in (0, 1]."]),
        ({"max_new_tokens": None}, ["generation_kwargs['max_new_tokens']=None must be an integer of at least 1"]),
        ({"suppress_tokens": ["a"]}, ["generation_kwargs['suppress_tokens']=['a'] must be a list of token ids"]),
    ],
)
def test_generation_kwargs_are_checked(make: Callable[..., GRPOConfig], options: Any, parts: list[str]) -> None:
    (problem,) = problems_of(make, generation_kwargs=options)
    assert all(part in problem for part in parts)


@pytest.mark.parametrize("field", ["model_init_kwargs", "generation_kwargs", "chat_template_kwargs"])
def test_dicts_may_be_json_and_nothing_else(make: Callable[..., GRPOConfig], field: str) -> None:
    (problem,) = problems_of(make, **{field: "top_k=3"})
    assert problem.startswith(f"{field}='top_k=3' must be a dict")
    assert getattr(make(**{field: '{"top_k": 3}'}), field) == {"top_k": 3}


def test_all_problems_come_in_one_message(make: Callable[..., GRPOConfig]) -> None:
    settings = {"beta": -1.0, "loss_type": "dapoo", "generation_kwargs": {"top_k": -1}}
    with pytest.raises(ValueError) as caught:
        make(**settings)
    for part in ("beta=-1.0", "loss_type='dapoo'", "generation_kwargs['top_k']=-1"):
        assert part in str(caught.value)
    # Also where TrainingArguments is not run because of a feature that it would set up
    first, *rest = problems_of(make, deepspeed="zero3.json", **settings)
    assert first.startswith("deepspeed=")
    assert [problem.split(" ")[0] for problem in rest] == ["beta=-1.0", "loss_type='dapoo'"]


def test_the_error_can_cross_processes(make: Callable[..., GRPOConfig]) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        make(beta=-1.0, top_k=-1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.problems, str(again)) == (caught.value.problems, str(caught.value))


def test_field_of_trl_that_is_not_ours_is_refused_by_name(make: Callable[..., GRPOConfig]) -> None:
    with pytest.raises(TypeError, match="use_vllm"):
        make(use_vllm=True)


# --- The command line ---


def test_help_renders() -> None:
    text = HfArgumentParser(GRPOConfig).format_help()
    for field in FIELDS_OF_TRL | OWN_FIELDS:
        assert f"--{field} " in text


def test_command_line_gives_the_config_of_the_same_settings(make: Callable[..., GRPOConfig], tmp_path: Any) -> None:
    arguments = (
        "--scale_rewards False --beta 0.04 --num_generations 4 --reward_weights 1 0.5 --kl_in_reward --kl_estimator k1 "
        "--no_shuffle_dataset --epsilon_high 0.28"
    ).split()
    arguments += ["--output_dir", str(tmp_path), "--generation_kwargs", '{"top_k": 5, "temperature": 0.7}']
    (config,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(arguments)
    expected = make(
        scale_rewards=False,
        beta=0.04,
        num_generations=4,
        reward_weights=[1.0, 0.5],
        kl_in_reward=True,
        kl_estimator="k1",
        shuffle_dataset=False,
        epsilon_high=0.28,
        generation_kwargs={"top_k": 5, "temperature": 0.7},
    )
    assert config.to_dict() == expected.to_dict()


# --- GRPOConfig.from_trl ---

CONVERTED: dict[str, Any] = {  # every field that TRL and we share by name, away from its default
    "num_generations": 4,
    "max_completion_length": 33,
    "temperature": 0.9,
    "top_p": 0.8,
    "top_k": 7,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "beta": 0.04,
    "epsilon": 0.1,
    "epsilon_high": 0.28,
    "delta": 4.0,
    "num_iterations": 2,
    "steps_per_generation": 6,
    "loss_type": "dr_grpo",
    "scale_rewards": False,
    "importance_sampling_level": "sequence",
    "reward_weights": [0.5, 2.0],
    "multi_objective_aggregation": "normalize_then_sum",
    "mask_truncated_completions": True,
    "disable_dropout": True,
    "shuffle_dataset": False,
    "num_generations_eval": 2,
    "model_init_kwargs": {"dtype": "float32"},
    "trust_remote_code": True,
    "chat_template_kwargs": {"enable_thinking": True},
    "generation_kwargs": {"suppress_tokens": [5]},
    "log_completions": True,
    "num_completions_to_print": 3,
    "use_bias_correction_kl": False,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.9,
    "ref_model_sync_steps": 64,
}
TRAINING: dict[str, Any] = {  # TrainingArguments that its __post_init__ rewrites
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "learning_rate": 2e-5,
    "eval_strategy": "steps",
    "logging_steps": 5,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "report_to": "none",
    "debug": "underflow_overflow",
    "warmup_steps": 0.1,
    "save_strategy": "epoch",
    "gradient_checkpointing": False,
    "include_num_input_tokens_seen": True,
    "accelerator_config": {"even_batches": False},
    "use_cpu": True,
    "bf16": None,
    "seed": 7,
}


def shared_values(config: Any) -> dict[str, Any]:
    ours, theirs = ({f.name for f in fields(cls)} for cls in (GRPOConfig, TRLGRPOConfig))
    return {name: getattr(config, name) for name in (ours & theirs) - {"logging_nan_inf_filter"}}


@pytest.mark.parametrize("settings", [{}, CONVERTED | TRAINING], ids=["defaults", "everything set"])
def test_from_trl_keeps_every_shared_field(make_trl: Callable[..., TRLGRPOConfig], settings: dict[str, Any]) -> None:
    assert set(CONVERTED) == FIELDS_OF_TRL - {"generation_batch_size"}  # which follows from steps_per_generation
    trl_config = make_trl(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = GRPOConfig.from_trl(trl_config)
    assert type(config) is GRPOConfig
    assert shared_values(config) == shared_values(trl_config)
    assert config.logging_nan_inf_filter is False
    assert config.kl_estimator == "k3"


def test_from_trl_refuses_every_field_that_is_only_trls(make_trl: Callable[..., TRLGRPOConfig]) -> None:
    only_theirs = {f.name for f in fields(TRLGRPOConfig)} - {f.name for f in fields(GRPOConfig)}
    harmless = {"pad_to_multiple_of", "ds3_gather_for_generation", "log_multimodal"}
    assert harmless < only_theirs
    pristine = make_trl()
    for name in only_theirs - harmless:
        trl_config = copy.copy(pristine)
        setattr(trl_config, name, "something else")
        (problem,) = problems_of(GRPOConfig.from_trl, trl_config)
        assert problem.startswith(f"{name}='something else' is not supported")
    for name in harmless:
        trl_config = copy.copy(pristine)
        setattr(trl_config, name, False)
        GRPOConfig.from_trl(trl_config)


def test_from_trl_names_all_problems_at_once(make_trl: Callable[..., TRLGRPOConfig]) -> None:
    unsupported = {
        "use_vllm": True,
        "vllm_mode": "server",
        "loss_type": "cispo",
        "use_liger_kernel": True,
        "log_unique_prompts": True,
    }
    problems = problems_of(GRPOConfig.from_trl, make_trl(**unsupported))
    assert {problem.split("=")[0] for problem in problems} == set(unsupported)
    assert len(problems) == len(unsupported)


def test_from_trl_takes_subclasses_and_makes_them(make_trl: Callable[..., TRLGRPOConfig]) -> None:
    @dataclass
    class Theirs(TRLGRPOConfig):
        beta: float = 0.04
        note: str = "no effect"

    @dataclass
    class Ours(GRPOConfig):
        extra: int = 3

    config = Ours.from_trl(make_trl(Theirs))
    assert (type(config), config.beta, config.extra) == (Ours, 0.04, 3)
    (problem,) = problems_of(Ours.from_trl, make_trl(Theirs, note="wanted"))
    assert problem.startswith("note='wanted' is not supported")


def test_from_trl_compares_a_subclass_with_trls_own_defaults(make_trl: Callable[..., TRLGRPOConfig]) -> None:
    @dataclass
    class WithVLLM(TRLGRPOConfig):
        use_vllm: bool = True

    (problem,) = problems_of(GRPOConfig.from_trl, make_trl(WithVLLM))
    assert problem.startswith("use_vllm=True is not supported by trl_grpo_ext and must keep its default, False.")


def test_from_trl_refuses_a_config_changed_into_a_contradiction(make_trl: Callable[..., TRLGRPOConfig]) -> None:
    trl_config = make_trl()  # 8 per device, one step: a generation batch of 8
    trl_config.per_device_train_batch_size = 16
    (problem,) = problems_of(GRPOConfig.from_trl, trl_config)
    assert problem.startswith("generation_batch_size=8 must be 16")


@pytest.mark.parametrize("wrong", [None, {"beta": 0.1}, TRLGRPOConfig])
def test_from_trl_takes_nothing_else(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes an instance of trl"):
        GRPOConfig.from_trl(wrong)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"adapter_name_or_path": ""}, "adapter_name_or_path='' must be a string that is not empty."),
        ({"adapter_name_or_path": 3}, "adapter_name_or_path=3 must be a string"),
        ({"adapter_name_or_path": "a/b", "adapter_revision": ""}, "adapter_revision='' must be a string"),
        ({"adapter_revision": "v1"}, "adapter_revision='v1' must come with adapter_name_or_path"),
    ],
)
def test_adapter_to_start_from(make: Callable[..., GRPOConfig], given: dict[str, Any], problem: str) -> None:
    (found,) = problems_of(make, **given)
    assert found.startswith(problem)
    make(adapter_name_or_path="a/b", adapter_revision="v1")


def test_tokens_are_in_no_text_of_a_config(make: Callable[..., GRPOConfig]) -> None:
    """`dataclass` would write a `__repr__` with every field, and dicts are written as they are."""
    token = "hf_" + "TestOnly" * 4
    config = make(hub_token=token, model_init_kwargs={"token": token, "revision": "v2"})
    for text in (str(config), repr(config), config.to_json_string(), str(config.to_dict())):
        assert token not in text
        assert "v2" in text
    assert config.hub_token == token
    assert config.model_init_kwargs == {"token": token, "revision": "v2"}


# --- The curriculum ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum": "pass-rate"}, "curriculum='pass-rate' must be one of 'pass_rate', or unset"),
        ({"curriculum_floor": 1.1}, "curriculum_floor=1.1 must be a number in [0, 1]"),
        ({"curriculum_floor": None}, "curriculum_floor=None must be a number in [0, 1]"),
        ({"curriculum_decay": 0.0}, "curriculum_decay=0.0 must be a number in (0, 1]"),
        ({"curriculum_decay": 1.5}, "curriculum_decay=1.5 must be a number in (0, 1]"),
        ({"curriculum_reward": ""}, "curriculum_reward='' must be the name of a reward function"),
        ({"shuffle_dataset": False}, "shuffle_dataset=False must not come with curriculum='pass_rate'"),
    ],
)
def test_a_curriculum_s_fields(make: Callable[..., GRPOConfig], settings: dict[str, Any], message: str) -> None:
    (problem,) = problems_of(make, **{"curriculum": "pass_rate"} | settings)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("field", "value"), [("curriculum_floor", 0.2), ("curriculum_decay", 1.0), ("curriculum_reward", "right")]
)
def test_options_of_a_curriculum_without_one_are_refused(
    make: Callable[..., GRPOConfig], field: str, value: Any
) -> None:
    (problem,) = problems_of(make, **{field: value})
    assert problem == (
        f"{field}={value!r} has an effect only with curriculum='pass_rate'. Set that, or leave it unset."
    )
    config = make(**{"curriculum": "pass_rate", field: value})
    assert getattr(config, field) == value


def test_trl_s_config_comes_without_a_curriculum(make_trl: Callable[..., TRLGRPOConfig]) -> None:
    config = GRPOConfig.from_trl(make_trl())
    assert (config.curriculum, config.curriculum_reward) == (None, None)
    assert (config.curriculum_floor, config.curriculum_decay) == (0.1, 0.99)
