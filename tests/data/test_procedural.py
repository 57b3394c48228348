"""Problems made by code: right, reproducible, and never in both splits."""

from __future__ import annotations

import re
from itertools import permutations, product
from typing import Any

import pytest

from trl_grpo_ext import load_prompts
from trl_grpo_ext.data.procedural import generate, split_of
from trl_grpo_ext.rewards import countdown_reward

SMALL = "rows=300,max_operand=19"


def problems(source: str, **arguments: Any) -> list[str]:
    return load_prompts(source, deduplicate="off", **arguments)["problem"][:]


def what_it_is_about(problem: str) -> str:
    """The numbers in any order, and the signs, or the target (which comes last) with the numbers it is made of."""
    numbers = re.findall(r"\d+", problem)
    if "equals" in problem:
        return f"{sorted(numbers[:-1])} {numbers[-1]}"
    return f"{sorted(numbers)} {sorted(re.findall('[-+*]', problem))}"


def test_arithmetic_is_right() -> None:
    rows = load_prompts("procedural:arithmetic", config="rows=200,terms=4,max_operand=30", deduplicate="off")
    for row in rows:
        expression = row["problem"].removeprefix("What is ").removesuffix("?")
        assert re.fullmatch(r"\d+( [-+*] \d+){3}", expression)
        assert row["solution"] == str(eval(expression))  # digits and signs only


def test_countdown_can_be_solved_and_the_reward_knows() -> None:
    rows = load_prompts("procedural:countdown", config="rows=20,min_numbers=3,max_numbers=3,max_number=12")
    for row in rows:
        solved = None
        for (a, b, c), (f, g) in product(permutations(row["nums"]), product("+-*/", repeat=2)):
            for expression in (f"({a} {f} {b}) {g} {c}", f"{a} {f} ({b} {g} {c})"):
                if countdown_reward([f"<answer>{expression}</answer>"], target=[row["target"]], nums=[row["nums"]]) == [
                    1.0
                ]:
                    solved = expression
        assert solved, row
        assert str(row["target"]) == row["solution"] and 1 <= row["target"] <= 100


@pytest.mark.parametrize("source", ["procedural:arithmetic", "procedural:countdown"])
def test_splits_cannot_overlap_under_any_seeds(source: str) -> None:
    config = SMALL if source.endswith("arithmetic") else "rows=300,max_number=9"
    train = [p for seed in (0, 1) for p in problems(source, config=config, seed=seed)]
    held_out = [
        p for seed in (0, 7) for p in problems(source, split="test", config=config.replace("300", "60"), seed=seed)
    ]
    about = [{what_it_is_about(p) for p in split} for split in (train, held_out)]
    assert len(train) == 600 and len(held_out) == 120 and not about[0] & about[1]


def test_held_out_split_is_a_tenth() -> None:
    share = sum(split_of(f"{n}") == "test" for n in range(10_000)) / 10_000
    assert abs(share - 0.1) < 0.012  # four standard deviations: 4 * sqrt(0.1 * 0.9 / 10,000)


def test_seed_decides() -> None:
    first, again, other = (problems("procedural:arithmetic", config=SMALL, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 300


def test_stream_has_the_same_rows() -> None:
    stream = load_prompts("procedural:countdown", config="rows=50", streaming=True)
    assert list(stream) == list(load_prompts("procedural:countdown", config="rows=50"))


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("procedural:algebra", {}, "source='procedural:algebra' is not known; procedural are procedural:arithmetic"),
        ("procedural:arithmetic", {"split": "dev"}, "has no split 'dev'; it has train, test"),
        ("procedural:arithmetic", {"config": "row=5"}, "has no option 'row'; it has rows, terms"),
        ("procedural:arithmetic", {"config": "rows"}, "config='rows' of .* write key=value"),
        ("procedural:arithmetic", {"config": "rows=few"}, "rows='few' must be a whole number of at least 1"),
        ("procedural:arithmetic", {"config": "rows=5,rows=6"}, "has 'rows' twice"),
        ("procedural:countdown", {"config": "max_numbers=2"}, "min_numbers=3 is more than max_numbers=2: give both"),
        ("procedural:arithmetic", {"config": "terms=1"}, "terms='1' must be a whole number of at least 2"),
        ("procedural:arithmetic", {"config": "signs=^"}, r"signs='\^' must be some of"),
        (
            "procedural:arithmetic",
            {"config": "rows=99,max_operand=2"},
            r"has only \d+ different problems",
        ),
    ],
)
def test_refusals(source: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(source, **arguments)


def test_generator_alone() -> None:
    (row,) = generate("arithmetic", "train", 0, "", 1, terms=2, max_operand=9, signs="+")
    assert re.fullmatch(r"What is \d \+ \d\?", row["problem"])


def test_held_out_split_has_as_many_rows_as_there_are() -> None:
    for source in ("procedural:arithmetic", "procedural:countdown"):
        assert len(problems(source, split="test")) == 1000
