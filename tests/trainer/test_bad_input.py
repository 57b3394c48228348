"""Input that could not be trained on is refused before anything is, by an error that says what to do about it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, TrainingArguments
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from trl_grpo_ext import RewardError


def without_eos(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    return tokenizer


def prompts(*values: Any) -> Dataset:
    return Dataset.from_dict({"prompt": list(values)})


def stream(*rows: dict[str, Any]) -> IterableDataset:
    return Dataset.from_list(list(rows)).to_iterable_dataset()


# What is given, the error, and what its message must name: the field, the value or the rule, and the remedy
CASES: dict[str, tuple[Callable[[Any], dict[str, Any]], type[Exception], tuple[str, ...]]] = {
    "no dataset": (lambda f: {"train_dataset": None}, ValueError, ("train_dataset", "prompt")),
    "empty dataset": (
        lambda f: {"train_dataset": prompts("a").select([])},
        ValueError,
        ("train_dataset is empty", "filter"),
    ),
    "empty stream": (
        lambda f: {"train_dataset": prompts("a").to_iterable_dataset().filter(lambda row: False)},
        ValueError,
        ("train_dataset is empty",),
    ),
    "empty eval dataset": (
        lambda f: {"eval_dataset": {"easy": prompts("a"), "hard": prompts("a").select([])}},
        ValueError,
        ("eval_dataset['hard'] is empty",),
    ),
    "no prompt column": (
        lambda f: {"train_dataset": Dataset.from_dict({"question": ["a"], "answer": ["b"]})},
        ValueError,
        ("no 'prompt' column", "['answer', 'question']", "rename_column"),
    ),
    "no prompt column in a stream": (
        lambda f: {"train_dataset": stream({"question": "a"})},
        ValueError,
        ("no 'prompt' column", "question"),
    ),
    "no prompt column in eval": (
        lambda f: {"eval_dataset": Dataset.from_dict({"question": ["a"]})},
        ValueError,
        ("eval_dataset has no 'prompt' column",),
    ),
    "prompts of ints": (
        lambda f: {"train_dataset": prompts(1, 2)},
        ValueError,
        ("'prompt' of the first row is 1", "string"),
    ),
    "prompts of token ids": (
        lambda f: {"train_dataset": prompts([1, 2])},
        ValueError,
        ("'prompt' of the first row is [1, 2]",),
    ),
    "a list for a dataset": (
        lambda f: {"train_dataset": [{"prompt": "a"}]},
        TypeError,
        ("train_dataset", "datasets.Dataset", "list"),
    ),
    "a list for an eval dataset": (lambda f: {"eval_dataset": [{"prompt": "a"}]}, TypeError, ("eval_dataset", "list")),
    "a prompt that is none": (
        lambda f: {"train_dataset": prompts("a", "b", None)},
        ValueError,
        ("train_dataset", "'prompt' of row 2 is null", "string"),
    ),
    "an empty prompt": (
        lambda f: {"train_dataset": prompts("a", "b", "")},
        ValueError,
        ("train_dataset, row 2", "no tokens", "filter"),
    ),
    "conversations without a chat template": (
        lambda f: {"train_dataset": prompts(*[[{"role": "user", "content": "a"}]] * 2)},
        ValueError,
        ("train_dataset, row 0", "chat_template"),
    ),
    "fewer prompts than a generation takes": (
        lambda f: {"train_dataset": prompts("a", "b", "c"), "gradient_accumulation_steps": 2},
        ValueError,
        ("train_dataset has 3 rows", "takes 4 prompts", "steps_per_generation"),
    ),
    "a column named like an argument of rewards": (
        lambda f: {"train_dataset": prompts("a", "b").add_column("log_metric", [1, 2])},
        ValueError,
        ("train_dataset", "['log_metric']", "rename_column"),
    ),
    "prompt longer than the context": (
        lambda f: {"train_dataset": prompts("short", "x" * 256, "y" * 300)},
        ValueError,
        ("row 1 has 256 tokens", "255", "context of 256", "2 of 3", "filter"),
    ),
    "eval prompt longer than the context": (
        lambda f: {"eval_dataset": prompts("x" * 400)},
        ValueError,
        ("eval_dataset", "400 tokens"),
    ),
    "no EOS": (
        lambda f: {"processing_class": without_eos(f.tokenizer)},
        ValueError,
        ("processing_class", "no EOS token", "eos_token"),
    ),
    "processing class of a wrong type": (
        lambda f: {"processing_class": "a name"},
        TypeError,
        ("processing_class must be a tokenizer", "str"),
    ),
    "batch that does not divide": (
        lambda f: {"per_device_train_batch_size": 4},
        ValueError,
        ("generation_batch_size=4", "num_generations=3", "steps_per_generation=3"),
    ),
    "args of a wrong type": (
        lambda f: {"args": TrainingArguments(output_dir=f.folder, use_cpu=True)},
        TypeError,
        ("args", "GRPOConfig", "TrainingArguments"),
    ),
    "args of a dict": (lambda f: {"args": {"output_dir": f.folder}}, TypeError, ("args", "dict")),
    "unsupported fields of TRL's config": (
        lambda f: {
            "args": TRLGRPOConfig(output_dir=f.folder, bf16=False, use_cpu=True, loss_type="cispo", entropy_coef=0.1)
        },
        ValueError,
        ("loss_type='cispo'", "entropy_coef=0.1", "trl"),
    ),
    "too few reward weights": (
        lambda f: {"reward_funcs": [f.reward, f.reward], "reward_weights": [1.0]},
        ValueError,
        ("reward_weights=[1.0]", "1 values for 2", "token_sum"),
    ),
    "no reward": (lambda f: {"reward_funcs": []}, ValueError, ("reward_funcs", "at least one")),
    "a reward that is none": (
        lambda f: {"reward_funcs": [f.reward, 3]},
        TypeError,
        ("reward_funcs", "int", "callable"),
    ),
    "no reward at all": (lambda f: {"reward_funcs": None}, TypeError, ("reward_funcs", "NoneType")),
    "too few reward processing classes": (
        lambda f: {"reward_processing_classes": [None, None]},
        ValueError,
        ("reward_processing_classes", "2 entries for 1"),
    ),
    "peft config of a wrong type": (
        lambda f: {"model": f.model(), "peft_config": {"r": 4}},
        TypeError,
        ("peft_config", "LoraConfig", "dict"),
    ),
    "peft config for a PeftModel": (
        lambda f: {"model": get_peft_model(f.model(), f.lora()), "peft_config": f.lora()},
        ValueError,
        ("peft_config", "PeftModel already", "merge_and_unload"),
    ),
    "prompt tuning": (
        lambda f: {"model": f.model(), "peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
        ValueError,
        ("PROMPT_TUNING", "LoRA"),
    ),
    "adapter on the head": (
        lambda f: {"model": f.model(), "peft_config": LoraConfig(target_modules=["lm_head"], use_dora=True)},
        ValueError,
        ("target_modules", "LM head"),
    ),
    "PeftModel without anything to train": (
        lambda f: {"model": get_peft_model(f.model(), LoraConfig(target_modules=["q_proj"], inference_mode=True))},
        ValueError,
        ("no trainable parameter", "is_trainable=True"),
    ),
    "quantization of a loaded model": (
        lambda f: {"model": f.model(), "quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        ValueError,
        ("quantization_config", "already loaded"),
    ),
    "init kwargs for a loaded model": (
        lambda f: {"model": f.model(), "model_init_kwargs": {"dtype": "bfloat16"}},
        ValueError,
        ("model_init_kwargs", "already loaded"),
    ),
    "packing where it is impossible": (
        lambda f: (
            {"model": f.model("mamba"), "peft_config": LoraConfig(target_modules=["in_proj"])}
            | {"attention_packing": "on"}
        ),
        ValueError,
        ("attention_packing='on'", "'auto'"),
    ),
    "packing of eager attention": (
        lambda f: {"model": f.model(attn_implementation="eager"), "peft_config": f.lora(), "attention_packing": "on"},
        ValueError,
        ("attention_packing='on'", "eager", "sdpa"),
    ),
    "best model by a loss that evaluation has not": (
        lambda f: (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
            | {"per_device_eval_batch_size": 3, "eval_dataset": prompts("a")}
        ),
        ValueError,
        ("metric_for_best_model='loss'", "eval_reward"),
    ),
    "learning rate by a loss that evaluation has not": (
        lambda f: (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_dataset": prompts("a")}
            | {"per_device_eval_batch_size": 3}
        ),
        ValueError,
        ("metric_for_best_model='loss'", "eval_reward"),
    ),
}


class Fixtures:
    """What the cases are made of."""

    def __init__(self, make_model: Any, tokenizer: Any, reward: Any, lora: Any, folder: str) -> None:
        self.model, self.tokenizer, self.reward, self.lora, self.folder = make_model, tokenizer, reward, lora, folder


@pytest.fixture
def given(make_model, tiny_tokenizer, reward, lora, tmp_path):
    return Fixtures(make_model, tiny_tokenizer, reward, lora, str(tmp_path / "out"))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_the_constructor(make_trainer, given, case):
    arguments, error, words = CASES[case]
    with pytest.raises(error) as caught:
        make_trainer(**arguments(given))
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


def test_model_that_cannot_be_packed_is_trained_with_padded_rows_and_a_warning(make_trainer, make_model, caplog):
    trainer = make_trainer(model=make_model("mamba"), peft_config=LoraConfig(target_modules=["in_proj"]), max_steps=1)
    assert not trainer._packed
    assert [r for r in caplog.records if "padded rows are used" in r.message and r.levelname == "WARNING"]
    trainer.train()
    assert trainer.state.global_step == 1


# --- what can only be found out later ---


def test_stream_that_ends_before_one_generation(make_trainer):
    trainer = make_trainer(train_dataset=stream({"prompt": "ab"}))
    with pytest.raises(ValueError, match=r"train_dataset ended before it filled one generation of 6 completions"):
        trainer.train()


def test_learned_positions_leave_room_for_what_is_sampled(make_trainer, make_model, lora):
    """`generation_kwargs` may ask for longer completions than `max_completion_length`, which only the loss uses."""
    given = {"train_dataset": prompts("x" * 40, "y"), "peft_config": lora()}
    context = make_model("gpt2").config.max_position_embeddings
    make_trainer(model=make_model("gpt2"), generation_kwargs={"max_new_tokens": context - 40}, **given)
    with pytest.raises(ValueError, match="row 0 has 40 tokens, more than the 39 that the model's context"):
        make_trainer(model=make_model("gpt2"), generation_kwargs={"max_new_tokens": context - 39}, **given)


def test_reward_with_a_wrong_number_of_values(make_trainer):
    def short(completion_ids, **kwargs):
        return [1.0] * (len(completion_ids) - 1)

    trainer = make_trainer(reward_funcs=short)
    with pytest.raises(RewardError, match=r"(?s)'short' failed on 6 of 6 completions at step 0.*returned 0 values"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_reward_that_raises(make_trainer):
    """The error names the reward, the step, the prompt and the completion."""
    seen = []

    def fragile(prompts, completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            seen.append((prompts, completions))
            if "question" in prompts:
                raise KeyError("no such answer")
        return [0.5 * len(completion) for completion in completions]

    trainer = make_trainer(
        reward_funcs=fragile,
        train_dataset=prompts("ab", "cd", "x", "question"),
        shuffle_dataset=False,
        reward_max_failure_rate=0.4,
    )
    with pytest.raises(RewardError) as caught:
        trainer.train()
    message = str(caught.value)
    first_bad = seen[0][1][3]
    for part in ("'fragile'", "KeyError", "no such answer", "step 1", "completion 3 of 6", "'question'"):
        assert part in message
    assert repr(first_bad) in message


def test_reward_that_is_not_a_number(make_trainer):
    def bad(completion_ids, **kwargs):
        return [float("nan")] * len(completion_ids)

    with pytest.raises(RewardError, match=r"(?s)'bad' failed on 6 of 6 completions at step 0.*returned nan"):
        make_trainer(reward_funcs=bad).train()


def test_long_prompt_in_a_stream(make_trainer):
    """Only known when it is read; the context of 256 has room for 255 tokens and a completion of one."""
    trainer = make_trainer(
        train_dataset=stream({"prompt": "a"}, {"prompt": "x" * 256}), shuffle_dataset=False, max_steps=1
    )
    with pytest.raises(ValueError, match=r"256 tokens, the model's context has room for 255"):
        trainer.train()


def test_evaluation_data_is_checked_too(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"eval_dataset is empty"):
        trainer.evaluate(prompts("a").select([]))
    with pytest.raises(ValueError, match=r"eval_dataset has no 'prompt' column"):
        trainer.evaluate(Dataset.from_dict({"question": ["a"]}))


@pytest.mark.parametrize("packing", ["on", "off"])
def test_diverged_policy_cannot_be_sampled(make_trainer, packing):
    trainer = make_trainer(attention_packing=packing)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match=r"logits are NaN for 6 of 6 completions.*learning rate"):
        trainer.train()


def test_loss_has_no_outputs(make_trainer):
    with pytest.raises(ValueError, match="return_outputs=True"):
        make_trainer().compute_loss(None, {}, return_outputs=True)
