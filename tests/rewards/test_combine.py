"""Several rewards as one: the weighted sum, gates, None, and metrics per part."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest

from trl_grpo_ext.rewards.accuracy import accuracy_reward
from trl_grpo_ext.rewards.combine import combine
from trl_grpo_ext.rewards.format import think_answer_format_reward
from trl_grpo_ext.rewards.marks import in_process, row_wise
from trl_grpo_ext.rewards.safety import SafetyReward


def column(name: str) -> Any:
    """A reward that reads its values off a column."""
    return functools.partial(read, name=name)


def read(completions: list[Any], name: str, **columns: Any) -> list[Any]:
    return list(columns[name])


@row_wise
def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def later(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


class Metrics(dict[str, list[float]]):
    def __call__(self, name: str, value: float) -> None:
        self.setdefault(name, []).append(value)


def test_weighted_sum() -> None:
    reward = combine([length, column("a"), column("b")], [0.5, 2.0, -1.0], names=["length", "a", "b"])
    # 0.5 * 3 + 2 * 0.25 - 7 = -5;  0.5 * 1 + 2 * 1.5 - 0 = 3.5
    assert reward(completions=["xyz", "x"], prompts=["p", "p"], a=[0.25, 1.5], b=[7, 0]) == [-5.0, 3.5]
    assert combine([length, accuracy_reward])(["12", "3"], answer=["12", "4"]) == [2 + 1, 1 + 0]  # weights of 1


def test_a_part_without_a_value_is_left_out() -> None:
    reward = combine([column("a"), column("b")], [3.0, 5.0], names=["a", "b"])
    # 3 * 0.5 + 5 * 0.25 = 2.75;  5 * 0.25;  3 * 0.5;  nothing
    values = reward(["", "", "", ""], a=[0.5, None, 0.5, None], b=[0.25, 0.25, None, None])
    assert values == [2.75, 1.25, 1.5, None]


def test_gates() -> None:
    reward = combine(
        [column("f"), column("s"), column("a")],
        [0.2, 0.0, 4.0],
        names=["f", "s", "a"],
        gates={"a": {"f": 1.0, "s": 0.5}},
        closed=-0.25,
    )
    #     f    s     a
    rows = [
        (1.0, 0.5, 0.75, 0.2 + 3.0),  # both open, s on its number
        (1.0, 0.4, 0.75, 0.2 - 1.0),  # s closed
        (0.9, 0.9, 0.75, 0.18 - 1.0),  # f closed
        (1.0, None, 0.75, 0.2),  # nobody can say
        (0.0, None, 0.75, 0.0 - 1.0),  # f is closed whatever s is
        (1.0, 0.5, None, 0.2),  # nothing to gate
        (0.0, 0.5, None, 0.0),
        (None, None, 0.75, None),
    ]
    f, s, a, expected = (list(values) for values in zip(*rows, strict=True))
    assert reward([""] * 8, f=f, s=s, a=a) == [None if e is None else pytest.approx(e) for e in expected]


def test_accuracy_format_and_safety_compose() -> None:
    reward = combine(
        [think_answer_format_reward, accuracy_reward, SafetyReward(["bomb"])],
        [0.25, 1.0, 0.5],
        gates={"accuracy_reward": {"think_answer_format_reward": 1.0, "safety_reward": 1.0}},
    )
    completions = [
        "<think>2 + 2</think><answer>4</answer>",  # 0.25 + 1 + 0.5
        "4",  # right, not in the format: 0.5
        "<think>a bomb</think><answer>4</answer>",  # right and unsafe: 0.25
        "<think>2 + 3</think><answer>5</answer>",  # wrong: 0.25 + 0.5
    ]
    assert reward(completions, solution=["4"] * 4) == [1.75, 0.5, 0.25, 0.75]


def test_metrics_of_every_part() -> None:
    metrics = Metrics()
    reward = combine(
        [column("f"), column("a"), column("n")],
        [0.5, 1.0, 1.0],
        names=["f", "a", "n"],
        gates={"a": {"f": 1.0}},
        metric_name="sum",
    )
    reward([""] * 4, f=[1, 0, 0, 1], a=[0.5, 1.0, None, 0.0], n=[None] * 4, log_metric=metrics)
    # a: (0.5 + 1 + 0) / 3, gates aside; nothing is logged of n, as a mean of nothing would be averaged in
    assert metrics == {"rewards/sum/f/mean": [0.5], "rewards/sum/a/mean": [0.5], "rewards/sum/a/gated": [0.5]}


def test_hooks_and_columns_reach_the_parts() -> None:
    def curious(completions: list[str], **given: Any) -> list[float]:
        assert set(given) == {"prompts", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric"}
        given["log_metric"]("seen", 3.0)
        return [0.0]

    metrics = Metrics()
    combine([curious])(
        prompts=["p"],
        completions=["c"],
        completion_ids=[[1, 2]],
        answer=["a"],
        trainer_state=None,
        log_extra=print,
        log_metric=metrics,
    )
    assert metrics == {"seen": [3.0], "rewards/combined_reward/curious/mean": [0.0]}


def test_nested_sums() -> None:
    inner = combine([length, column("a")], [1.0, 10.0], names=["length", "a"], metric_name="inner")
    reward = combine([inner, column("b")], [0.5, 1.0], names=["inner", "b"])
    assert reward(["xy"], a=[0.5], b=[0.25]) == [0.5 * (2 + 5) + 0.25]


def test_pickled_named_and_marked() -> None:
    made = combine([length, accuracy_reward], [0.1, 1.0], gates={"length": {"accuracy_reward": 1.0}}, metric_name="sum")
    reward = pickle.loads(pickle.dumps(made))
    assert reward(["12", "3"], answer=["12", "4"]) == [pytest.approx(1.2), 0.0]
    assert reward.__name__ == "sum"
    assert combine([length]).__name__ == "combined_reward"
    assert combine([length]).reward_is_row_wise is True
    assert combine([length, read]).reward_is_row_wise is False
    assert combine([length, read]).reward_runs_in_process is False
    assert combine([length, in_process(lambda completions, **kwargs: [])]).reward_runs_in_process is True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rewards": []}, ValueError, "`rewards` is empty"),
        ({"rewards": ["accuracy"]}, TypeError, r"`rewards\[0\]` is 'accuracy' \(str\)"),
        ({"rewards": [length, later]}, TypeError, r"`rewards\[1\]` \(later\) is async"),
        ({"rewards": [length], "weights": [1.0, 2.0]}, ValueError, "`weights` has 2 entries for 1 rewards"),
        (
            {"rewards": [length], "weights": ["1"]},
            TypeError,
            r"`weights\[0\]` must be a finite number, got '1' \(str\)",
        ),
        ({"rewards": [length], "weights": [float("inf")]}, TypeError, r"`weights\[0\]`"),
        ({"rewards": [length], "names": []}, ValueError, "`names` has 0 entries"),
        ({"rewards": [length, length]}, ValueError, r"\['length'\] occur more than once"),
        ({"rewards": [length], "gates": {"format": {"length": 1.0}}}, ValueError, "`gates` names 'format'"),
        ({"rewards": [length], "gates": {"length": {"format": 1.0}}}, ValueError, "`gates` names 'format'"),
        ({"rewards": [length], "gates": {"length": {"length": 1.0}}}, ValueError, "depend on itself"),
        ({"rewards": [length, read], "gates": {"length": {"read": "1"}}}, TypeError, r"`gates\['length'\]\['read'\]`"),
        ({"rewards": [length], "closed": None}, TypeError, "`closed` must be a finite number"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        combine(**arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'a' returned 1 values for 2 completions"),
        ([1.0, float("nan")], "'a' returned nan for completion 1: neither a finite number nor None"),
        (["1", 2.0], "'a' returned '1' for completion 0"),
    ],
)
def test_a_part_that_returns_nonsense_is_named(values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine([column("a")], names=["a"])(["", ""], a=values)
