"""The model card, its evaluation table and its curves; and that the test Hub's validation refuses what it should."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
from hub_card_rules import card_problems
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard

from trl_grpo_ext.hub.card import model_card
from trl_grpo_ext.hub.curves import draw, reward_curves, thinned, ticks
from trl_grpo_ext.hub.evaluation import BestLoaded, HeldOut, confidence_interval, latest_results, wilson_interval

RECORD: dict[str, Any] = {
    "model": {"id": "ada/base", "revision": "v2", "architecture": "Qwen2ForCausalLM", "fingerprint": "sha256:12ab"},
    "adapter": {"peft_type": "LORA", "r": 16, "target_modules": ["q_proj", "v_proj"]},
    "datasets": {"train": {"id": "openai/gsm8k", "split": "train", "rows": 7473, "fingerprint": "f00d"}},
    "rewards": [{"name": "accuracy_reward", "weight": 1.0}, {"name": "format|reward", "weight": 0.5}],
    "training": {"learning_rate": 1e-6, "beta": 0.04, "bf16": True},
    "versions": {"trl": "1.16.0"},
}
GSM8K = HeldOut("eval", "openai/gsm8k", "openai/gsm8k", "main", "test", prompts=50, completions_per_prompt=1)
LOG = [
    {"step": 1, "loss": 0.1, "reward": 0.25, "rewards/accuracy_reward/mean": 0.2},
    {"step": 2, "eval_reward": 0.1, "eval_reward_std": 0.3, "eval_rewards/accuracy_reward/mean": 0.1},
    {"step": 3, "loss": 0.1, "reward": 0.5, "rewards/accuracy_reward/mean": float("nan")},
    # 20 of 50 right: the sample standard deviation of 0s and 1s is sqrt(0.4 * 0.6 * 50 / 49) = 0.494872
    {
        "step": 4,
        "eval_reward": 0.9,
        "eval_reward_std": 0.6,
        "eval_rewards/accuracy_reward/mean": 0.4,
        "eval_rewards/accuracy_reward/std": 0.494872,
    },
]


def test_wilson_interval() -> None:
    # n = 50, p = 0.4, z = 1.959964: z^2 = 3.841459, centre p + z^2/100 = 0.438415, 1 + z^2/50 = 1.076829,
    # spread z * sqrt(0.24/50 + 3.841459/10000) = 1.959964 * sqrt(0.0051841459) = 0.141119
    assert wilson_interval(0.4, 50) == pytest.approx((0.297296 / 1.076829, 0.579534 / 1.076829), abs=1e-5)
    assert wilson_interval(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)  # all of 10: 1 / (1 + z^2/10)


def test_confidence_interval_is_wilsons_for_zeros_and_ones() -> None:
    assert confidence_interval(0.4, 0.494872, 50, 50) == wilson_interval(0.4, 50)
    # Four completions for each prompt: 0.4 of 200, std sqrt(0.24 * 200/199), and still 50 prompts
    assert confidence_interval(0.4, (0.24 * 200 / 199) ** 0.5, 50, 200) == wilson_interval(0.4, 50)
    # Rewards that are no zeros and ones: 0.4 +- 1.959964 * 0.2 / sqrt(16)
    assert confidence_interval(0.4, 0.2, 16, 16) == pytest.approx((0.3020018, 0.4979982))
    assert confidence_interval(-3.0, 0.0, 7, 7) == (-3.0, -3.0)


def test_latest_results() -> None:
    total, accuracy = latest_results(LOG, [GSM8K])
    assert (total.metric, total.mean, total.step) == ("reward", 0.9, 4)
    assert total.interval == pytest.approx((0.9 - 1.959964 * 0.6 / 50**0.5, 0.9 + 1.959964 * 0.6 / 50**0.5))
    assert (accuracy.metric, accuracy.mean, accuracy.interval) == ("accuracy_reward", 0.4, wilson_interval(0.4, 50))
    unsized = HeldOut("eval", "stream", None, None, None, prompts=None, completions_per_prompt=1)
    assert [result.interval for result in latest_results(LOG, [unsized])] == [None, None]
    assert latest_results(LOG[:1], [GSM8K]) == []


def test_results_are_of_the_weights_that_there_are() -> None:
    # Step 2 was the best, and its weights are loaded: what step 4 had is not theirs
    (total, _) = latest_results(LOG, [GSM8K], BestLoaded(step=2, logged=len(LOG)))
    assert (total.mean, total.step) == (0.1, 2)
    after = [*LOG, {"step": 4, "eval_reward": 0.2, "eval_reward_std": 0.3}]  # evaluated when they were loaded
    (total,) = latest_results(after, [GSM8K], BestLoaded(step=2, logged=len(LOG)))
    assert (total.mean, total.step) == (0.2, 2)
    assert latest_results(LOG, [GSM8K], BestLoaded(step=1, logged=len(LOG))) == []
    card = model_card(RECORD, repo_id="ada/run", results=[total], has_curves=True)
    assert "The weights are those of step 2, the best of the run. On held-out prompts:" in card.text


def test_card_is_valid_and_complete(hub: HubServer) -> None:
    card = model_card(RECORD, repo_id="ada/run", results=latest_results(LOG, [GSM8K]), has_curves=True)
    card.validate()  # the client's method, against the local Hub
    data = card.data
    assert (data.base_model, data.library_name, data.datasets) == ("ada/base", "peft", ["openai/gsm8k"])
    assert data.tags == ["peft", "lora", "trl", "grpo", "trl-grpo-ext"]
    assert data.model_name == "run"
    total, accuracy = data.eval_results
    assert (total.metric_type, total.metric_value, total.dataset_split) == ("reward", 0.9, "test")
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.4)
    assert accuracy.metric_args == {
        "prompts": 50,
        "completions_per_prompt": 1,
        "step": 4,
        "confidence_interval_95": [0.276084, 0.538186],
    }
    for line in (
        "| openai/gsm8k | accuracy_reward | 0.4 | [0.2761, 0.5382] | 50 | 1 | 4 |",
        "| train | openai/gsm8k | train | 7473 |",
        "| `accuracy_reward` | 1 |",
        "| `format\\|reward` | 0.5 |",
        "| `learning_rate` | `1e-06` |",
        '| `target_modules` | `["q_proj", "v_proj"]` |',
        "| trl | 1.16.0 |",
        "![Rewards by optimizer step](reward_curves.svg)",
    ):
        assert line in card.text
    assert "[ada/base](https://huggingface.co/ada/base) at revision `v2`" in card.text
    assert "`sha256:12ab`" in card.text
    assert 'AutoTokenizer.from_pretrained("ada/base", revision="v2")' in card.text


def test_card_of_a_base_from_a_folder_names_no_base() -> None:
    record = RECORD | {
        "model": {"folder": "my-base", "architecture": "Qwen2ForCausalLM"},
        "rewards": [],
        "datasets": {},
    }
    card = model_card(record)
    assert card_problems(card.content) == ([], [])
    assert "base_model" not in card.content
    assert 'peft.PeftModel.from_pretrained(base, "owner/name")' in card.text
    assert "None was made during training." in card.text


def test_card_of_a_whole_model() -> None:
    card = model_card(RECORD | {"adapter": None}, repo_id="ada/run")
    assert card.data.library_name == "transformers"
    assert "peft" not in (card.data.tags or [])
    assert 'AutoModelForCausalLM.from_pretrained("ada/run")' in card.text


def test_card_holds_no_token() -> None:
    record = RECORD | {"rewards": [{"name": f"reward_{TOKEN}", "weight": 1.0}]}
    card = model_card(record, model_name="secret-of-a-private-hub", tokens=["secret-of-a-private-hub"])
    assert TOKEN not in card.content
    assert "secret-of" not in card.content


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: mine", '"license" must be one of'),
        ("language: english", '"language" with value "english" is not valid'),
        ("base_model: /models/base", '"base_model" with value "/models/base" is not valid'),
        ("tags: lora", '"tags" must be an array'),
        ("datasets: [a/b/c]", '"datasets" with value "a/b/c" is not valid'),
        ("library_name: [peft]", '"library_name" must be a string'),
        ("model-index: [{results: []}]", '"model-index[0].name" is required'),
        (
            "model-index: [{name: a, results: [{task: {type: t}, dataset: {name: d},metrics: [{type: m, value: 1}]}]}]",
            '"model-index[0].results[0].dataset.type" is required',
        ),
        (
            "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: m}]}]}]",
            '"model-index[0].results[0].metrics[0].value" is required',
        ),
        ("a: [", "YAML:"),
    ],
)
def test_invalid_cards_are_refused(metadata: str, error: str, hub: HubServer) -> None:
    with pytest.raises(ValueError, match="errors") as raised:
        content = f"---\n{metadata}\n---\n"
        card = ModelCard("")
        card.__class__ = type("Raw", (ModelCard,), {"__str__": lambda self: content})  # which would not parse some
        card.validate()
    assert error in str(raised.value).replace('\\"', '"')


def test_reward_curves() -> None:
    curves = reward_curves(LOG)
    assert curves == {
        "reward": [(1, 0.25), (3, 0.5)],
        "rewards/accuracy_reward/mean": [(1, 0.2)],  # NaN is left out
        "eval_reward": [(2, 0.1), (4, 0.9)],
        "eval_rewards/accuracy_reward/mean": [(2, 0.1), (4, 0.4)],
    }
    assert reward_curves([{"step": 1, "loss": 0.5, "reward_std": 1.0}]) == {}


def test_drawing() -> None:
    svg = draw({"reward": [(0, 0.0), (10, 1.0)], "eval_reward": [(5, 0.5)], "rewards/<b>/mean": [(1, 0.3)]})
    root = ElementTree.fromstring(svg)
    lines = root.findall("{*}polyline")
    # x: 64 + step/10 * (720 - 64 - 200); y: 360 - 40 - value * (360 - 16 - 40)
    assert [line.get("points") for line in lines] == ["64.0,320.0 520.0,16.0", "292.0,168.0", "109.6,228.8"]
    assert [(dot.get("cx"), dot.get("cy")) for dot in root.findall("{*}circle")] == [
        ("292.0", "168.0"),
        ("109.6", "228.8"),
    ]
    texts = [text.text for text in root.findall("{*}text")]
    assert texts[-3:] == ["reward", "held-out reward", "<b>"]


def test_ticks() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 3) == [2.5, 2.75, 3.0, 3.25, 3.5]
    for low, high in ((0.13, 0.87), (-3.0, 250.0), (1e-7, 3e-7), (999, 1001), (5, 5)):
        marks = ticks(low, high)
        assert 2 <= len(marks) <= 6
        assert marks[0] <= low
        assert marks[-1] >= high


def test_long_runs_are_thinned() -> None:
    curve = [(step, float(step % 2)) for step in range(1001)]
    points = thinned(curve)
    assert len(points) == 334  # groups of 3
    assert points[0] == (1, pytest.approx(1 / 3))  # 0, 1, 0
