"""`trl-grpo train`: recipes by --dry-run, which value wins, what is refused, and real runs of two steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trl_grpo_ext import GRPOConfig
from trl_grpo_ext.cli import train_inputs
from trl_grpo_ext.cli.main import main
from trl_grpo_ext.cli.prompt_options import TrainPrompts
from trl_grpo_ext.cli.run_plan import bar, histogram, planned_steps
from trl_grpo_ext.cli.train import _print_results as print_results
from trl_grpo_ext.cli.train import config_sections, make_parser
from trl_grpo_ext.cli.train_options import TrainAdapter, TrainModel, TrainRewards
from trl_grpo_ext.hub import load_run_config
from trl_grpo_ext.hub.evaluation import BestLoaded

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Of the sizes that the recipes name, for the estimate of memory
QWEN = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12),
    "Qwen/Qwen2.5-3B-Instruct": (2048, 11008, 36, 16),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny tokenizer with a chat template; not the session's own, which has none."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    own.chat_template = CHAT
    return own


@pytest.fixture(scope="module")
def model(make_model: Callable[..., PreTrainedModel], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Qwen2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("qwen2", max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 problems with worked solutions, as GSM8K has them."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    names = "Ada Bo Cy Dee Eve Flo Gus".split()
    lines = [
        {
            "question": f"{names[i % 7]} has {i} figs and finds {i + 3}. How many?",
            "answer": f"{i}+{i + 3}\n#### {2 * i + 3}",
        }
        for i in range(21)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = {"question": "How far is it to the moon?", "answer": "Far. #### 384400"}
    file.with_name("other.jsonl").write_text(json.dumps(other) + "\n")
    return file


@pytest.fixture
def small(model: Path, rows: Path, tmp_path: Path) -> list[str]:
    """Options of a run that takes a second."""
    return [
        *("--model", str(model), "--dataset", str(rows), "--output-dir", str(tmp_path / "out")),
        *("--columns", '{"problem": "question", "answer": "answer"}', "--answer", "gsm8k", "--rewards", "accuracy"),
        *("--use-cpu", "--bf16", "false", "--max-steps", "2", "--num-generations", "3", "--report-to", "none"),
        *("--per-device-train-batch-size", "6", "--max-completion-length", "5", "--logging-steps", "1"),
        *("--disable-tqdm", "true", "--lora-r", "4", "--reward-workers", "0"),
    ]


def errors_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a refused command says: one line."""
    assert main(["train", *argv]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-grpo")]
    assert len(err) == 1
    return err[0]


# --- recipes ---


def as_on_a_card(recipe: dict[str, Any], tokenizer: Any, folder: Path) -> Path:
    """A model of the size that the recipe names: config and tokenizer, no weights."""
    hidden, inner, layers, heads = QWEN[recipe["model"]]
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_has_a_plan(
    file: Path, tokenizer: Any, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load(file.read_text())
    given = ["--dry-run", "--config", str(file)]
    on_card = recipe["model"] in QWEN
    given += ["--model", str(as_on_a_card(recipe, tokenizer, tmp_path / "card") if on_card else model)]
    given += local_data(recipe, rows)
    assert main(["train", *given]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert f"{recipe['max_steps']:,} steps" in out
    for reward in recipe["rewards"]:
        assert reward["name"] in out
    assert not list(tmp_path.glob("*/model*.safetensors")) and not (ROOT / recipe["output_dir"] / "README.md").exists()
    if on_card:
        peak, unit = out.split("most at a time")[1].split("│")[1].split()
        assert unit == "GiB" and 1 < float(peak) < 24


def local_data(recipe: dict[str, Any], rows: Path) -> list[str]:
    """A file in the place of every data set that would come from the Hub or from another recipe."""
    if recipe["dataset"] == "procedural:countdown":
        return ["--dataset-config", "rows=100"]
    if recipe["dataset"].startswith("countdown:"):
        countdowns = rows.with_name("countdowns.jsonl")
        lines = [{"nums": [i, i + 1, 2], "target": 2 * i + 3} for i in range(1, 40)]
        countdowns.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return ["--dataset", f"countdown:{countdowns}", "--eval-dataset", f"countdown:{countdowns}"]
    given = ["--dataset", f"gsm8k:{rows}", "--eval-dataset", f"gsm8k:{rows}", "--answer", "gsm8k"]
    return [
        *given,
        *(["--decontaminate", f"gsm8k:{rows.with_name('other.jsonl')}"] if "decontaminate" in recipe else []),
    ]


def test_recipes_are_the_ones_that_the_readme_lists() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(RECIPES) >= 7
    for file in RECIPES:
        assert f"recipes/{file.name}" in text
        head = file.read_text()
        for word in ("trl-grpo train --config", "# Hardware:", "# Time:", "# Number to expect:"):
            assert word in head, f"{file.name} does not say {word}"


# --- the plan ---


def test_a_dry_run_shows_what_the_model_reads(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*small, "--dry-run", "--dry-run-prompts", "1", "--rewards", "accuracy:1.0", "format:0.25"]
    assert main(["train", *argv]) == 0
    out = capsys.readouterr().out
    assert "<|user|>" in out and "<|assistant|>" in out  # special tokens
    assert "Ada has 0 figs and finds 3" in " ".join(out.split())
    assert "solution: 3" in out
    assert "format" in out and "0.25" in out
    assert "2 prompts, 6 completions" in out
    # 10 generations of 2 prompts in 21 rows
    assert "10 steps" in out and "1 rows, which do not fill a generation" in out
    assert "2 steps" in out and "0.20" in out and "12" in out


def test_histogram() -> None:
    # 3..12 in bins of ceil(10 / 4) = 3: 3-5, 6-8, 9-11, 12
    assert histogram([3, 3, 5, 7, 12], bins=4) == [(3, 5, 3), (6, 8, 1), (9, 11, 0), (12, 12, 1)]
    assert histogram([7, 7]) == [(7, 7, 2)]
    assert [len(bar(count, 80)) for count in (0, 1, 40, 80)] == [0, 1, 20, 40]


def test_planned_steps(tmp_path: Path) -> None:
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_generations=3,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        num_train_epochs=1.5,
        num_iterations=2,
    )
    steps = planned_steps(args, rows=23)
    # A generation: 6 * 2 completions of 4 prompts; 5 of them in 23 rows, each trained on twice: 10 steps
    assert (steps.per_epoch, steps.total, steps.unused_rows) == (10, 15, 3)
    assert (steps.prompts_per_step, steps.completions_per_step, steps.completions) == (2.0, 6.0, 90.0)
    stream = planned_steps(args, rows=None)
    assert (stream.per_epoch, stream.total, stream.completions) == (None, None, None)


def test_help_has_our_options_first_and_every_field_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--help"])
    titles = [line for line in capsys.readouterr().out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[1:7] == [
        "model:",
        "adapter:",
        "prompts:",
        "rewards:",
        "dry run:",
        "run (transformers.TrainingArguments):",
    ]
    assert titles[-1] == "everything else (transformers.TrainingArguments):"
    named = [name for names in config_sections().values() for name in names]
    assert sorted(named) == sorted(f.name for f in GRPOConfig.__dataclass_fields__.values() if f.init)


# --- which value wins ---


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        """
model: from-yaml
columns: {problem: question}
rewards: [{name: accuracy, weight: 2}, format]
lora: {r: 4, lora_alpha: 5, bias: none}
lora_dropout: 1e-1
learning_rate: 3e-5
num_generations: 4
use_cpu: true
save_strategy: no
generation_kwargs: {top_k: 7}
model_init_kwargs: {revision: main}
shuffle_dataset: false
overrides: {gsm8k: {template: plain}}
few_shot: [{problem: "1+1", answer: "2"}]
"""
    )
    who, adapter, prompts, rewards, _, args = make_parser().read(
        ["--config", str(file), "--model", "other", "--lora-r", "8", "--num-generations", "2", "--no-dry-run"][:-1]
    )
    assert (who.model, args.num_generations, args.learning_rate, args.temperature) == ("other", 2, 3e-5, 1.0)
    assert (args.save_strategy.value, args.shuffle_dataset) == ("no", False)
    assert args.generation_kwargs == {"top_k": 7}
    assert prompts.columns == {"problem": "question"} and prompts.template == "r1"
    assert prompts.few_shot == [{"problem": "1+1", "answer": "2"}]
    assert train_inputs.reward_specs(rewards) == [{"name": "accuracy", "weight": 2}, {"name": "format"}]
    config = train_inputs.peft_config_of(adapter, has_adapter=False)
    assert isinstance(config, LoraConfig)
    # the option over the mapping, the mapping over the default
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (8, 5, 0.1, "all-linear")
    train_inputs.with_init_kwargs(replace(who, dtype="bfloat16"), args)
    assert args.model_init_kwargs == {"revision": "main", "dtype": "bfloat16"}


def test_arguments_of_load_prompts() -> None:
    options = TrainPrompts(dataset={"a": 0.5, "b": 0.5}, dataset_split="part", pass_rate=[0.1, 0.9], dataset_take=7)
    found = train_inputs.prompt_arguments(options)
    assert (found["source"], found["split"], found["take"]) == ({"a": 0.5, "b": 0.5}, "part", 7)
    assert (found["pass_rate"], found["decontaminate"], found["seed"]) == ((0.1, 0.9), (), 0)
    assert train_inputs.eval_prompt_arguments(options) == {}
    options = replace(options, eval_dataset=["x", "y"], eval_take=3, template="plain")
    held_out = train_inputs.eval_prompt_arguments(options)
    assert list(held_out) == ["x", "y"]
    assert (held_out["x"]["split"], held_out["x"]["take"], held_out["x"]["template"]) == ("test", 3, "plain")
    assert "pass_rate" not in held_out["x"] and held_out["x"]["deduplicate"] == "off"
    # A set known by name has its own columns, another one those of the training's
    options = replace(options, columns={"problem": "q"}, answer="boxed", overrides={"a": {"take": 1}, "x": {"take": 2}})
    named = train_inputs.eval_prompt_arguments(replace(options, eval_dataset=["gsm8k:a.jsonl", "x"]))
    assert [named[name]["columns"] for name in named] == [None, {"problem": "q"}]
    assert [named[name]["answer"] for name in named] == [None, "boxed"]
    assert [named[name]["overrides"] for name in named] == [None, {"x": {"take": 2}}]
    # What is said of a set that is evaluated on alone does not concern training
    assert train_inputs.prompt_arguments(replace(options, eval_dataset="x"))["overrides"] == {"a": {"take": 1}}
    both = replace(options, eval_dataset="x", decontaminate=["x"])
    assert list(train_inputs.prompt_arguments(both)["overrides"]) == ["a", "x"]
    # Metrics call them by a short name, where that is one
    files = ["data/hard.v2.jsonl.gz", "openai/gsm8k", "math:data/m.jsonl", "procedural:countdown"]
    named = train_inputs.eval_prompt_arguments(replace(options, eval_dataset=files))
    assert list(named) == ["hard.v2", "gsm8k", "math", "procedural:countdown"]
    assert [arguments["source"] for arguments in named.values()] == files
    same = ["a/test.jsonl", "b/test.jsonl"]
    assert list(train_inputs.eval_prompt_arguments(replace(options, eval_dataset=same))) == same
    with pytest.raises(ValueError, match="eval_dataset names 'x' twice"):
        train_inputs.eval_prompt_arguments(replace(options, eval_dataset=["x", "y", "x"]))
    options = replace(options, eval_dataset={"source": "x", "template": "r1"})
    assert train_inputs.eval_prompt_arguments(options)["x"]["template"] == "r1"
    mixture = replace(options, eval_dataset={"source": {"x": 1.0, "z": 2.0}, "deduplicate": "exact"})
    assert train_inputs.prompt_arguments(mixture)["overrides"] == {"a": {"take": 1}}
    found = train_inputs.eval_prompt_arguments(mixture)["eval"]
    assert (found["overrides"], found["deduplicate"]) == ({"x": {"take": 2}}, "exact")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("accuracy", {"name": "accuracy"}),
        ("accuracy:0.5", {"name": "accuracy", "weight": 0.5}),
        ("trl:think_format_reward", {"name": "trl:think_format_reward"}),
        ("trl:think_format_reward:2", {"name": "trl:think_format_reward", "weight": 2.0}),
        ("my.py:brevity:-1e-1", {"name": "my.py:brevity", "weight": -0.1}),
    ],
)
def test_rewards_in_one_word(text: str, spec: dict[str, Any]) -> None:
    assert train_inputs.reward_specs(TrainRewards(rewards=[text])) == [spec]


def test_weights_are_given_once() -> None:
    specs = [{"name": "a", "weight": 2.0}, {"name": "b"}]
    assert train_inputs.merged_weights([2.0, 1.0], specs, None) == [2.0, 1.0]
    assert train_inputs.merged_weights([1.0, 1.0], [{"name": "a"}, {"name": "b"}], [3.0, 4.0]) == [3.0, 4.0]
    with pytest.raises(ValueError, match=r"reward_weights=\[3.0, 4.0\] and the weights \[2.0, 1.0\]"):
        train_inputs.merged_weights([2.0, 1.0], specs, [3.0, 4.0])


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1.0", "unknown option 'learnin_rate': did you mean learning_rate?"),
        ("lora_alhpa: 4", "unknown option 'lora_alhpa': did you mean lora_alpha?"),
        ("max_steps: many", "argument --max_steps/--max-steps: invalid int value: 'many'"),
        ("columns: question", "columns: 'question' must be a mapping"),
        ("few_shot: 3", "few_shot: 3 must be text or a list of mappings, not a value (int)"),
        ("lora: [4]", "lora: [4] must be a mapping, not a list"),
        ("report_to: tensorbord", "Did you mean 'tensorboard'?"),
        ("temperature: -1", "temperature=-1.0 must be a number above 0"),
    ],
)
def test_yaml_is_refused_by_file_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text + "\nuse_cpu: true\n")
    error = errors_of(capsys, "--config", str(file))
    assert message in error
    assert "bad.yaml" in error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rewards", "acuracy"], "did you mean 'accuracy'?"),
        (["--rewards", '{"name": "length", "max_char": 3}'], "did you mean 'max_chars'?"),
        (["--adapter", "none"], "lora_r: no LoRA is put on"),
        (["--lora", '{"rank": 3}'], "LoraConfig has no field 'rank'"),
        (["--adapter", "lore"], "did you mean 'lora'?"),
        (["--quantize", "nf5"], "quantize='nf5' must be one of"),
        (["--quantize", '{"load_in_4bits": true}'], "did you mean 'load_in_4bit'?"),
        (["--pass-rate", "0.5"], "pass_rate=[0.5] must be two numbers"),
        (["--eval-dataset", '{"take": 3}'], "eval_dataset is a mapping without source"),
        (["--eval-dataset", '{"sourc": "x"}'], "did you mean 'source'?"),
        (["--eval-dataset", '{"source": 4}'], "eval_dataset: source=4 must be a name"),
        (["--dataset-streaming", "--max-steps", "-1"], "dataset_streaming is set, and max_steps=-1"),
        (
            ["--eval-strategy", "epoch", "--per-device-eval-batch-size", "3"],
            "there are no prompts for them: set eval_dataset",
        ),
        (["--eval-on-start"], "eval_on_start=True asks for evaluations"),
        (["--resume-from-checkpoint", "true"], "has no checkpoint: leave it out to begin a run there"),
        (["--lora-r", "0"], "`r` should be a positive integer value"),
        (["--lora", '{"bias": "some"}'], "Requested bias: some, is not implemented"),
        (["--resume-from-checkpoint", "nowhere"], "resume_from_checkpoint='nowhere' is no folder"),
        (["--revision", "a", "--model-init-kwargs", '{"revision": "b"}'], "keep one of them"),
        (["--model", "no/such/folder"], "cannot be found"),
        (["--per-device-train-batch-size", "60"], "train_dataset has 21 rows, and one generation takes 20 prompts"),
    ],
)
def test_options_are_refused(
    small: list[str], capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    if "train_dataset" in message:
        given = [*given, "--gradient-accumulation-steps", "2"]
        message = "train_dataset has 21 rows, and one generation takes 40 prompts"
    assert message in errors_of(capsys, *small, *given, "--dry-run")


def test_a_best_model_is_chosen_by_a_metric_that_there_is(
    small: list[str], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(rows.with_name("other.jsonl"))
    given = [*small, "--eval-split", "train", "--num-generations-eval", "2", "--eval-strategy", "steps"]
    given += ["--eval-steps", "1", "--per-device-eval-batch-size", "2", "--load-best-model-at-end", "true"]
    given += ["--save-steps", "1", "--eval-dataset", str(rows), other, "--metric-for-best-model"]
    error = errors_of(capsys, *given, "reward", "--dry-run")
    assert "metric_for_best_model='reward' must be a metric of an evaluation, and with several held-out sets" in error
    assert error.endswith("Set one of eval_rows_reward, eval_other_reward.")
    assert main(["train", *given, "eval_other_reward", "--dry-run"]) == 0
    error = errors_of(capsys, *given, "rows_rewards/accuracy/mean")
    assert error.endswith("Set 'rows_rewards/accuracy_reward/mean', for example.")
    # which nobody can know: a reward may log what it likes
    error = errors_of(capsys, *given, "rows_rewarded")
    assert "set to 'eval_rows_rewarded', which is not found in the evaluation metrics" in error


def test_where_it_is_written_is_checked_first(
    small: list[str], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = errors_of(capsys, *small, "--output-dir", str(rows), "--model", "no/such/folder")
    assert "rows.jsonl' is a file, and a folder is to be written" in error
    error = errors_of(capsys, *small, "--output-dir", str(rows / "run"))
    assert "rows.jsonl is not a folder" in error
    name = "an id!"
    error = errors_of(capsys, *small, "--push-to-hub", "true", "--output-dir", str(tmp_path / name))
    assert "hub_model_id='an id!' (the name of output_dir) must be a name that the Hub takes" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("with_model", [True, False])
def test_an_adapter_that_is_not_there(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], with_model: bool
) -> None:
    without = [("--lora-r", "4"), *([] if with_model else [("--model", small[1])])]
    given = small.copy()
    for name, value in without:
        place = given.index(name)
        assert given[place + 1] == value
        del given[place : place + 2]
    error = errors_of(capsys, *given, "--adapter-name-or-path", str(tmp_path))
    assert f"adapter_name_or_path={str(tmp_path)!r} has no adapter that can be read" in error


@pytest.mark.parametrize("missing", ["--model", "--dataset", "--rewards"])
def test_what_is_missing_is_named(small: list[str], capsys: pytest.CaptureFixture[str], missing: str) -> None:
    place = small.index(missing)
    assert f"{missing[2:]} is missing" in errors_of(capsys, *small[:place], *small[place + 2 :])


def test_quantized_weights_are_not_trained_themselves(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    place = small.index("--lora-r")
    given = [*small[:place], *small[place + 2 :], "--adapter", "none", "--quantize", "nf4", "--dry-run"]
    assert "weights in 4 or 8 bits cannot be trained" in errors_of(capsys, *given)


def test_quantization_by_name_and_by_settings(tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    named = train_inputs.quantization_of(TrainModel(quantize="nf4", dtype="bfloat16"), args)
    assert named is not None
    assert (named.bnb_4bit_quant_type, named.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "quant_method": "bitsandbytes"}
    spelled = train_inputs.quantization_of(TrainModel(quantize=settings), args)
    assert spelled is not None and spelled.bnb_4bit_quant_type == "fp4"
    assert train_inputs.peft_config_of(TrainAdapter(), has_adapter=True) is None


# --- runs ---

# Rarely the same for two completions
JUDGE = """
def first_bytes(completion_ids, most=5, **columns):
    return [sum(ids[:3]) % most / most for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def trained(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps from a YAML file, on NF4, evaluated before and after."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "judge.py").write_text(JUDGE)
    recipe = {
        "model": str(model),
        "dataset": str(rows),
        "columns": {"problem": "question", "answer": "answer"},
        "answer": "gsm8k",
        "eval_dataset": str(rows),
        "eval_take": 4,
        "rewards": [{"name": f"{folder}/judge.py:first_bytes", "weight": 0.5, "most": 7}, "accuracy"],
        "quantize": "nf4",
        "lora": {"r": 3, "lora_alpha": 6},
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 9,
        "num_generations": 3,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 6,
        "max_completion_length": 5,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_on_start": True,
        "report_to": "none",
        "disable_tqdm": True,
        "reward_workers": 0,
        "logging_steps": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(folder / "run.yaml"), "--max-steps", "2"]) == 0
    return folder / "out"


def test_a_run_leaves_an_adapter_that_loads(trained: Path, model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    policy = PeftModel.from_pretrained(base, trained)
    assert policy.active_peft_config.r == 3
    moved = [p.abs().max().item() for name, p in policy.named_parameters() if "lora_B" in name]
    assert len(moved) == 14 and max(moved) > 0  # 7 linear layers in 2 blocks
    state = json.loads((trained / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # the command line's, not the file's 9
    evaluated = [entry["step"] for entry in state["log_history"] if "eval_reward" in entry]
    assert evaluated == [0, 2]
    assert "eval_rewards/first_bytes/mean" in state["log_history"][0]


def test_its_record_makes_the_run_again(
    trained: Path, model: Path, rows: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = load_run_config(trained / "training_config.yaml")
    assert str(model.parent) not in (trained / "training_config.yaml").read_text()
    rewards = [{"name": "judge.py:first_bytes", "weight": 0.5, "most": 7}, "accuracy"]
    assert record["recipe"]["rewards"] == rewards
    assert (record["recipe"]["model"], record["recipe"]["dataset"]) == (model.name, rows.name)  # without their folders
    again = ["--model", str(model), "--dataset", str(rows), "--eval-dataset", str(rows)]
    rewards[0]["name"] = f"{trained.parent}/judge.py:first_bytes"
    again += ["--rewards", json.dumps(rewards)]
    again += ["--output-dir", str(tmp_path / "again"), "--disable-tqdm", "true"]
    assert main(["train", "--config", str(trained / "training_config.yaml"), *again]) == 0
    first, second = ((folder / "adapter_model.safetensors").read_bytes() for folder in (trained, tmp_path / "again"))
    assert first == second
    capsys.readouterr()


def test_results_of_several_sets_by_the_best_weights(
    small: list[str], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*small, "--eval-split", "train", "--num-generations-eval", "2", "--eval-strategy", "steps"]
    given += ["--eval-steps", "1", "--per-device-eval-batch-size", "2", "--load-best-model-at-end", "true"]
    given += ["--save-steps", "1", "--eval-dataset", str(rows), str(rows.with_name("other.jsonl")), "--eval-take", "3"]
    given += ["--metric-for-best-model", "rows_completions/mean_length", "--greater-is-better", "true"]
    given += ["--learning-rate", "0", "--eval-on-start"]  # so that no step is better than the first
    assert main(["train", *given]) == 0
    out = capsys.readouterr().out
    table = out[out.index("Held out") : out.index("Written to")]
    assert "step 0" in table and "the best, of step 1" in table
    for name in ("rows_reward", "other_reward", "other_rewards/accuracy_reward/mean"):
        (line,) = [line for line in table.splitlines() if f" {name} " in line]
        first, last = line.split("│")[2:4]
        assert float(first) == float(last)
    assert "failed" not in table  # none has
    card = (Path(small[small.index("--output-dir") + 1]) / "README.md").read_text()
    assert "The weights are those of step 1, the best of the run." in card


def test_the_table_has_the_values_of_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    log = [
        {"step": 0, "eval_a_reward": 0.5, "eval_a_rewards/f/failed": 3.0, "eval_a_reward_std": 1.0},
        {"step": 0, "eval_b_reward": 0.25, "eval_b_rewards/f/failed": 0.0},
        {"step": 2, "eval_b_reward": 9.0, "loss": 1.0},
        {"step": 4, "eval_a_reward": 0.1, "eval_a_rewards/f/failed": 0.0},  # by the last weights
        {"step": 4, "eval_a_reward": 0.75, "eval_a_rewards/f/failed": 0.0, "eval_a_pass@2": 1.0},
    ]
    trainer = SimpleNamespace(
        state=SimpleNamespace(log_history=log), best_loaded=BestLoaded(2, 4), args=SimpleNamespace(output_dir="out")
    )
    print_results(trainer)
    lines = [line for line in capsys.readouterr().out.splitlines() if "\u2502" in line or "step" in line]
    rows = [
        [cell.strip() for cell in line.strip("\u2502\u2503").replace("\u2503", "\u2502").split("\u2502")]
        for line in lines
    ]
    assert rows == [
        ["metric", "step 0", "the best, of step 2"],
        ["a_reward", "0.5", "0.75"],
        ["a_rewards/f/failed", "3", "0"],  # not the 3 of step 0 in both
        ["b_reward", "0.25", ""],
        ["a_pass@2", "", "1"],
    ]


def test_a_run_goes_on_from_its_last_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rates() -> list[float]:
        history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
        return [entry["learning_rate"] for entry in history if "loss" in entry]

    before = rates()
    argv = ["--config", str(trained.parent / "run.yaml"), "--max-steps", "3", "--resume-from-checkpoint", "true"]
    assert main(["train", *argv]) == 0
    assert len(before) == 2
    assert rates()[:2] == before  # of a run of two steps; one of three decays more slowly
    assert len(rates()) == 3
    capsys.readouterr()
