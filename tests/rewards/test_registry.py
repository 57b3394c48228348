"""Rewards by name: what recipes write, what comes of it, and that it works in other processes and in TRL's trainer."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_grpo_ext.rewards.registry import load_rewards, reward_names

FILE = '''
from dataclasses import dataclass

from trl_grpo_ext.rewards.marks import row_wise

calls = []


@row_wise
def brevity(completions, scale=1.0, **kwargs):
    calls.append(len(completions))
    return [scale / (1 + len(text)) for text in completions]


def with_column(completions, level, **kwargs):
    return [float(value) for value in level]


async def awaited(completions, **kwargs):
    return [0.5] * len(completions)


@dataclass
class Suffix:
    """Dataclasses look their module up."""

    end: str
    value: float = 1.0

    def __call__(self, completions, **kwargs):
        return [self.value * text.endswith(self.end) for text in completions]


class Guard:
    def __call__(self, texts):
        return [float("!" in text) for text in texts]


seven = 7
'''
RECIPE = """
rewards:
  - accuracy
  - {name: length, weight: 0.5, min_chars: 2, max_chars: 6}
  - {name: "trl:get_repetition_penalty_reward", weight: 2, ngram_size: 2}
  - {name: "mine.py:brevity", scale: 3.0}
  - {name: "mine.py:Suffix", weight: -1.0, end: "!"}
  - {name: safety, deny: [bomb], classifier: {name: "mine.py:Guard"}}
  - name: combine
    weight: 0.25
    metric_name: style
    rewards:
      - {name: tag_count, weight: 4.0, tags: [think]}
      - {name: "trl:think_format_reward", weight: 0.0}
      - {name: "mine.py:brevity"}
    gates: {brevity: {tag_count: 1.0}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE, encoding="utf-8")
    return tmp_path


def scores(reward: Callable[..., Any], texts: list[str], **columns: Any) -> Any:
    return reward(prompts=["Q"] * len(texts), completions=texts, completion_ids=[[1, 2, 1, 2]] * len(texts), **columns)


def test_recipe(folder: Path) -> None:
    functions, weights = load_rewards(yaml.safe_load(RECIPE)["rewards"][:-1], folder)
    assert weights == [1.0, 0.5, 2.0, 1.0, -1.0, 1.0]
    assert [get_callable_name(function) for function in functions] == [
        "accuracy_reward",
        "length_reward",
        "repetition_penalty_reward",
        "brevity",
        "Suffix",
        "safety_reward",
    ]
    values = [scores(function, ["4 is it", "four!"], answer=["4", "4"]) for function in functions]
    assert values == [
        [1.0, 0.0],
        [0.0, 1.0],
        [pytest.approx(-1 / 3)] * 2,  # 12 21 12: 2 of 3 bigrams differ
        [3 / 8, 3 / 6],
        [0.0, 1.0],
        [1.0, 0.0],
    ]


def test_combine_in_a_recipe(folder: Path) -> None:
    ((function,), (weight,)) = load_rewards(yaml.safe_load(RECIPE)["rewards"][-1:], folder)
    assert (function.__name__, weight) == ("style", 0.25)
    logged: dict[str, float] = {}
    # TRL's function reads conversations only
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>", "<think>a")]
    values = function(completions=completions, log_metric=logged.__setitem__)
    # both tags: 4 * 1 + 1 / (1 + 1 message);  one: 4 * 1/2, and brevity's gate is closed
    assert values == [4.5, 2.0]
    assert logged == {
        "rewards/style/tag_count/mean": 0.75,
        "rewards/style/think_format_reward/mean": 0.5,
        "rewards/style/brevity/mean": 0.5,
        "rewards/style/brevity/gated": 0.5,
    }


def test_every_name_can_be_loaded() -> None:
    needed = {
        "combine": {"rewards": [{"name": "accuracy"}]},
        "cosine_length": {"max_len": 10},
        "language": {"language": "th"},
        "safety": {"deny": ["bomb"]},
        "soft_overlong": {"max_completion_len": 10, "soft_punish_cache": 2},
    }
    functions, _ = load_rewards([{"name": name, **needed.get(name, {})} for name in reward_names()])
    assert all(callable(pickle.loads(pickle.dumps(function))) for function in functions)
    assert len({get_callable_name(function) for function in functions}) == len(functions)


def test_functions_of_one_file_share_it_and_an_edit_is_seen(folder: Path) -> None:
    (first, second), _ = load_rewards(["mine.py:brevity", {"name": "mine.py:brevity", "scale": 2.0}], folder)
    scores(first, ["a"]), scores(second, ["a", "b"])
    assert first.function.__globals__["calls"] == [1, 2]
    (folder / "mine.py").write_text(FILE.replace("scale / (1 +", "scale / (3 +"), encoding="utf-8")
    (edited,), _ = load_rewards(["mine.py:brevity"], folder)
    assert (scores(first, ["a"]), scores(edited, ["a"])) == ([0.5], [0.25])


def test_column_of_a_file_s_function_is_the_dataset_s(folder: Path) -> None:
    (reward,), _ = load_rewards([str(folder / "mine.py") + ":with_column"])
    assert scores(reward, ["a", "b"], level=["3", "4"]) == [3.0, 4.0]


def test_async_function_of_a_file(folder: Path) -> None:
    (reward,), _ = load_rewards(["mine.py:awaited"], folder)
    assert is_async_callable(reward) and is_async_callable(pickle.loads(pickle.dumps(reward)))
    assert asyncio.run(scores(reward, ["a", "b", "c"])) == [0.5, 0.5, 0.5]


def test_another_process_can_use_them(folder: Path) -> None:
    functions, _ = load_rewards(yaml.safe_load(RECIPE)["rewards"], folder)
    (folder / "rewards.pkl").write_bytes(pickle.dumps(functions))
    code = (
        "import pickle, sys; functions = pickle.load(open(sys.argv[1], 'rb'));"
        "print([f.__name__ for f in functions], functions[3](completions=['four!']), functions[4](completions=['!a']),"
        "functions[5](completions=['bomb', 'a', 'a!']), getattr(functions[3], 'reward_is_row_wise'),"
        "getattr(functions[4], 'reward_is_row_wise'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder / "rewards.pkl")],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    names = ["accuracy_reward", "length_reward", "repetition_penalty_reward", "brevity", "Suffix", "safety_reward"]
    assert result.stdout.strip() == f"{[*names, 'style']} [0.5] [0.0] [0.0, 1.0, 0.0] True False"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("acuracy", ValueError, r"`rewards\[1\]` \(acuracy\): there is no such reward \(did you mean 'accuracy'\?\)"),
        ("nothing like it", ValueError, "no such reward; known are accuracy, combine"),
        ({"name": "length", "max_char": 5}, ValueError, r"no option 'max_char' \(did you mean 'max_chars'\?\); its op"),
        ({"name": "length", "max_chars": "5"}, TypeError, r"\(length\): `max_chars` must be a whole number, got str"),
        ({"name": "length", "max_chars": 5}, ValueError, r"\(length\): `max_chars` is 5"),
        ({"name": "think_format", "tags": ["a"]}, ValueError, r"takes no options, got \['tags'\]"),
        ({"name": "soft_overlong", "max_completion_len": 9}, ValueError, "needs `soft_punish_cache`"),
        ({"name": "trl:think_format"}, ValueError, r"trl.rewards has no 'think_format' \(did you mean 'think_format_r"),
        ({"name": "trl:get_repetition_penalty_reward", "ngram": 2}, ValueError, "did you mean 'ngram_size'"),
        ({"name": "trl:think_format_reward", "tag": "t"}, ValueError, "no option 'tag'; it takes none"),
        ({"name": "trl:accuracy_reward", "solution": ["4"]}, ValueError, "no option 'solution'"),
        ({"name": "trl:reasoning_accuracy_reward", "log_extra": 1}, ValueError, "options are reasoning_delimiters"),
        ({"name": "none.py:f"}, FileNotFoundError, "there is no file .*none.py"),
        ({"name": "mine.py:brevit"}, ValueError, r"mine.py has no 'brevit' \(did you mean 'brevity'\?\)"),
        (
            {"name": "mine.py:brevity", "scal": 1},
            ValueError,
            r"brevity has no option 'scal' \(did you mean 'scale'\?\)",
        ),
        ({"name": "mine.py:with_column", "level": ["3"]}, ValueError, "no option 'level'; it takes none"),
        ({"name": "mine.py:Suffix"}, ValueError, "needs `end`"),
        ({"name": "mine.py:Suffix", "end": "!", "values": 2.0}, ValueError, "did you mean 'value'"),
        ({"name": "mine.py:seven"}, TypeError, r"mine.py:seven is no function or class, but 7 \(int\)"),
        (
            {"weight": 1.0},
            TypeError,
            r"`rewards\[1\]` is {'weight': 1.0}: it must be a reward's name or a mapping with",
        ),
        ({"name": 3}, TypeError, "a mapping with a `name`"),
        (None, TypeError, r"`rewards\[1\]` is None"),
        (
            {"name": "accuracy", "weight": "1"},
            TypeError,
            r"`rewards\[1\].weight` \(accuracy\) is '1': it must be a finite",
        ),
        ({"name": "accuracy", "weight": True}, TypeError, "must be a finite number"),
        ({"name": "accuracy", "weight": None}, TypeError, "must be a finite number"),
        ({"name": "accuracy", "weight": float("nan")}, TypeError, "must be a finite number"),
        (
            {"name": "safety", "classifier": {"name": "nope"}},
            ValueError,
            r"`rewards\[1\].classifier` \(nope\): there is",
        ),
        ({"name": "safety", "classifier": {"name": "mine.py:Guard", "weight": 2}}, ValueError, "is not part of a sum"),
        ({"name": "combine", "rewards": [{"name": "nope"}]}, ValueError, r"`rewards\[1\].rewards\[0\]` \(nope\)"),
        ({"name": "combine", "rewards": ["accuracy"]}, TypeError, "`rewards` must be a list of mappings"),
        ({"name": "combine", "rewards": []}, ValueError, "`rewards` is empty"),
        ({"name": "combine", "rewards": [{"name": "accuracy"}] * 2}, ValueError, "occur more than once"),
    ],
)
def test_mistakes(folder: Path, spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_rewards([{"name": "accuracy"}, spec], folder)


@pytest.mark.parametrize("specs", ["accuracy", {"name": "accuracy"}, None])
def test_rewards_must_be_a_list(specs: Any) -> None:
    with pytest.raises(TypeError, match="`rewards` must be a list"):
        load_rewards(specs)


def test_file_that_does_not_run_is_not_kept(folder: Path) -> None:
    (folder / "broken.py").write_text("import a_module_that_is_not_there\n", encoding="utf-8")
    for _ in range(2):  # the second time must not find half a module
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
            load_rewards(["broken.py:f"], folder)


def test_trl_trainer_takes_them_as_they_are(
    folder: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    specs = [
        *yaml.safe_load(RECIPE)["rewards"][:-1],
        {"name": "combine", "rewards": [{"name": "format", "weight": 0.5}, {"name": "language", "language": "th"}]},
        {"name": "cosine_length", "max_len": 7},
        {"name": "soft_overlong", "max_completion_len": 7, "soft_punish_cache": 3},
        {"name": "think_format"},
        {"name": "mine.py:awaited"},
    ]
    functions, weights = load_rewards(specs, folder)
    config = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=7,
        max_steps=1,
        reward_weights=weights,
    )
    trainer = GRPOTrainer(
        model=make_model(),
        reward_funcs=functions,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["ab", "question"], "answer": ["4", "7"]}),
        processing_class=tiny_tokenizer,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    for name in ("accuracy_reward", "Suffix", "combined_reward", "cosine_length_reward", "awaited"):
        assert f"rewards/{name}/mean" in logged
    assert "rewards/combined_reward/format/mean" in logged  # and language's only if a letter was drawn
