r"""The accuracy reward: gold columns, where answers are looked for, options, and answers made to hang it."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from trl_grpo_ext.rewards import AccuracyReward, accuracy_reward
from trl_grpo_ext.rewards.accuracy import gold_answer
from trl_grpo_ext.rewards.marks import is_row_wise
from trl_grpo_ext.rewards.symbolic import is_hostile


@pytest.mark.parametrize(
    ("gold", "completion", "reward"),
    [
        # Numbers and money: the dollars of money are no math delimiters, and a check comes after the answer
        ("18", "The answer is $18.\nCheck: 9 * $2 = $18.", 1.0),
        ("18", "She makes 9 * 2 = $18 every day.", 1.0),
        ("18", "She sells 9 eggs for $2 and keeps 3.", 0.0),
        ("70000", "The answer is 70,000 dollars.", 1.0),
        # Units are compared: of one kind converted, of two kinds never equal, on one side only ignored
        ("12 meters", r"\boxed{12 \text{ feet}}", 0.0),
        ("12 meters", r"\boxed{12 \text{ m}}", 1.0),
        ("12 meters", "It is 1200 cm long.", 1.0),
        ("12 meters", r"\boxed{12}", 1.0),
        ("2 hours", "<answer>120 minutes</answer>", 1.0),
        ("5", "5 million", 0.0),
        ("5000000", "5 million", 1.0),
        ("5", "It costs 5 million dollars.", 0.0),
        ("$5", "5 cents", 0.0),
        ("$5", "500 cents", 1.0),
        ("$5", "It costs 5 cents.", 0.0),
        # A last clause with several numbers: the one that it begins with, or else its last
        ("12", "The answer is 12 apples, because 3 * 4 = 12 and 5 are rotten.", 1.0),
        ("3", "The answer is 12 apples, because 3 * 4 = 12 and 5 are rotten.", 0.0),
        ("34", "8.5 * 4 = 34. So it takes 34 hours in 4 weeks.", 1.0),
        ("4", "8.5 * 4 = 34. So it takes 34 hours in 4 weeks.", 0.0),
        # Words
        ("Paris", "Paris", 1.0),
        ("Paris", "The answer is Paris.", 1.0),
        ("Paris", "paris.", 1.0),
        ("Paris", "London", 0.0),
        ("Evelyn", r"It is \boxed{\text{Evelyn}}", 1.0),
        # LaTeX
        (r"\frac{1}{2}", r"Hence \boxed{\dfrac12}.", 1.0),
        (r"2\sqrt{3}", r"We get $\sqrt{12}$.", 1.0),
        (r"2\sqrt{3}", r"We get $\sqrt{13}$.", 0.0),
        ("x^2 + 2x + 1", "<answer>(x + 1)^2</answer>", 1.0),
        # No answer at all, or in the thinking only
        ("5", "", 0.0),
        ("5", "I do not know.", 0.0),
        ("5", "<think>so it is 5</think>", 0.0),
    ],
)
def test_reward(gold: str, completion: str, reward: float) -> None:
    assert accuracy_reward([completion], solution=[gold]) == [reward]


def test_standard_and_conversational_completions() -> None:
    standard = ["<think>6 * 7</think><answer>42</answer>", r"so \boxed{41}"]
    conversational = [[{"role": "assistant", "content": text}] for text in standard]
    assert accuracy_reward(standard, solution=["42", "42"]) == [1.0, 0.0]
    assert accuracy_reward(conversational, answer=["#### 42", "#### 42"], prompts=[], completion_ids=[]) == [1.0, 0.0]


def test_the_last_assistant_message_is_judged() -> None:
    messages = [{"role": "assistant", "content": r"\boxed{1}"}, {"role": "user", "content": r"\boxed{2}"}]
    assert accuracy_reward([messages, messages], solution=["1", "2"]) == [1.0, 0.0]


def test_solution_comes_before_answer_and_answer_fills_its_gaps() -> None:
    rewards = accuracy_reward(["1", "1", "1", "1"], solution=["1", "2", None, ""], answer=["2", "1", "1", ""])
    assert rewards == [1.0, 0.0, 1.0, None]


@pytest.mark.parametrize(
    ("values", "gold"),
    [
        (["She has 3 eggs, sells them, and earns some money with them.", "18"], "18"),  # prose does not shadow
        (["She has 3 eggs and earns 6 dollars.\n#### 6", "18"], "6"),  # a marked answer does
        ([r"We find that it is \boxed{7} in all cases.", "18"], "7"),
        (["Paris", "18"], "Paris"),
        (["She has 3 eggs and sells all of them.", None], "She has 3 eggs and sells all of them."),
        ([None, float("nan"), 3], "3"),
        ([None, "", "####"], None),
    ],
)
def test_gold_of_a_row(values: list[Any], gold: str | None) -> None:
    assert gold_answer(values) == gold


def test_gold_that_cannot_be_read_is_left_out_and_numbers_are_read() -> None:
    golds = [None, r"\boxed{\frac{3}{", float("nan"), 3, 3.0, 3]
    rewards = accuracy_reward(["3", "3", "3", "3", "3", "none"], answer=golds)
    assert rewards == [None, None, None, 1.0, 1.0, 0.0]


def test_no_gold_column_names_both() -> None:
    with pytest.raises(ValueError, match=r"neither `solution` nor `answer`"):
        accuracy_reward(["1"])
    with pytest.raises(ValueError, match=r"neither `final` among the columns"):
        AccuracyReward(gold_columns=["final"])(["1"], solution=["1"])


def test_wrong_length_and_wrong_type() -> None:
    with pytest.raises(ValueError, match="`answer` has 1 values for 2 completions"):
        accuracy_reward(["1", "2"], answer=["1"])
    for value in (["1"], True):
        with pytest.raises(TypeError, match="gold answer must be text or a number, got"):
            accuracy_reward(["1"], answer=[value])


def test_extract_from_decides_where_to_look() -> None:
    completions = ["<answer>42</answer>", r"\boxed{42}", "The answer is 42.", "6 * 7 = 42 in all", "42"]
    golds = ["42"] * len(completions)
    # A completion that is the gold answer and nothing else is right wherever one looks
    assert AccuracyReward(extract_from=["answer_tag"])(completions, solution=golds) == [1, 0, 0, 0, 1]
    assert AccuracyReward(extract_from=["boxed", "answer_is"])(completions, solution=golds) == [0, 1, 1, 0, 1]
    assert AccuracyReward(extract_from=["last_number"])([r"\boxed{42} of 50"], solution=["50"]) == [1]


def test_compare_decides_what_is_equal() -> None:
    completions = [r"\boxed{42}", r"\boxed{42.0}", r"\boxed{6 \cdot 7}"]
    golds = ["42"] * 3
    assert AccuracyReward(compare=["text"])(completions, solution=golds) == [1, 0, 0]
    assert AccuracyReward(compare=["text", "number"])(completions, solution=golds) == [1, 1, 0]
    assert AccuracyReward()(completions, solution=golds) == [1, 1, 1]
    assert AccuracyReward(compare=["symbolic"])(completions, solution=golds) == [1, 1, 1]


def test_gold_columns() -> None:
    reward = AccuracyReward(gold_columns=["final", "answer"])
    assert reward(["1", "2"], final=["1", None], answer=["9", "2"], solution=["7", "7"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extract_from": []}, r"`extract_from` is \[\]: give one or more of"),
        ({"extract_from": ["boxes"]}, r"`extract_from` is \['boxes'\]: give one or more of \('answer_tag', "),
        ({"extract_from": "boxed"}, r"`extract_from` is 'boxed': .* in a list"),
        ({"compare": ["value"]}, r"`compare` is \['value'\]: give one or more of \('text', 'number', 'symbolic'\)"),
        ({"compare": []}, r"`compare` is \[\]"),
        ({"gold_columns": "answer"}, r"`gold_columns` is 'answer': give a list"),
        ({"gold_columns": []}, r"`gold_columns` is \[\]"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccuracyReward(**options)


def test_is_picklable_and_marked() -> None:
    reward = pickle.loads(pickle.dumps(AccuracyReward(extract_from=["boxed"])))
    assert reward([r"\boxed{1}", "the answer is 1"], solution=["1", "1"]) == [1.0, 0.0]
    assert reward.__name__ == accuracy_reward.__name__ == "accuracy_reward"
    assert is_row_wise(reward) and is_row_wise(accuracy_reward)
    assert pickle.loads(pickle.dumps(accuracy_reward)) is accuracy_reward


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys; from trl_grpo_ext.rewards import accuracy_reward, countdown_reward, multiple_choice_reward\n"
    code += "assert accuracy_reward(['x'], solution=['y']) == [0.0]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "plain tower": "9^9^9^9",
    "python tower": "9**9**9**9",
    "more powers of powers": r"(((9999^{99})^{99})^{99})^{99}",
    "factorial": "99999999!",
    "factorial of a sum": "(99999 + 99999)!",
    "factorial of a factorial": "9!!!!",
    "power": "10^{100000000}",
    "power of powers": r"((9999^{99})^{99})^{99}",
    "braces": "{" * 5_000,
    "boxes": r"\boxed{" * 5_000,
    "digits": "1" * 100_000,
    "exponent": "1e999999999",
    "expansion": "(a+b+c+d+e+f)^{32}",
    "polynomial": r"\frac{x^{9999}-1}{x-1}",
    "product": r"\prod_{k=1}^{1000000} k",
    "binomial": r"\binom{1000000000}{500000000}",
    "exp": r"\exp(10^{9999})",
    "flat functions": r"\sin(x)\cos(2x)\tan(3x)\sin(4x)\cos(5x)\tan(6x)\sin(7x)",
    "functions": r"\sin(\cos(\tan(" * 4 + "x" + ")))" * 4,
    "condition": r"x \text{" + "a " * 240,
    "list": ", ".join(f"x^{{{k}}}" for k in range(60)),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("in_thread", [False, True], ids=["main", "thread"])
def test_hostile_answer_costs_little_and_earns_nothing(name: str, in_thread: bool) -> None:
    text = HOSTILE[name]
    completions = [text, f"<answer>{text}</answer>", rf"\boxed{{{text}}}", f"The answer is ${text}$"]
    rewards: list[float | None] = []

    def score() -> None:
        rewards.extend(accuracy_reward(completions, solution=["x^2 + 1"] * 4))
        accuracy_reward([r"\boxed{7}"], solution=[text])  # and as gold

    started = time.perf_counter()
    if in_thread:
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()
    else:
        score()
    assert rewards == [0.0] * 4
    assert time.perf_counter() - started < 20.0  # math-verify alone does not return from the worst of them


# Those that math-verify itself takes for ever over, so that only the guard can stop them in a thread.
@pytest.mark.parametrize(
    "name",
    ["tower", "plain tower", "python tower", "factorial", "factorial of a sum", "factorial of a factorial", "power",
     "power of powers", "more powers of powers", "polynomial", "product", "binomial", "exp"],
)  # fmt: skip
def test_hostile_answer_is_refused_before_parsing(name: str) -> None:
    assert is_hostile(HOSTILE[name])


def test_symbolic_stage_works_outside_the_main_thread() -> None:
    rewards: list[float | None] = []
    thread = threading.Thread(target=lambda: rewards.extend(accuracy_reward([r"\boxed{(x+1)^2}"], ["x^2+2x+1"])))
    thread.start()
    thread.join()
    assert rewards == [1.0]


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        # "the answer is" that states none
        ("72", "48 + 24 = 72. I checked, so the answer is correct.", 1.0),
        ("72", "She sold 72 clips in total. I hope my answer is correct.", 1.0),
        ("72", "The answer is 72. I think the answer is correct.", 1.0),
        ("35", "The answer is as follows. 30 + 5 = 35.", 1.0),
        # a number in bold within its sentence, and a whole answer in bold
        ("72", "**Answer:** Natalia sold **72** clips altogether.", 1.0),
        ("72", "**Final Answer:** Natalia sold **72** clips", 1.0),
        ("35", "Answer: The total is **35**.", 1.0),
        ("Paris", "**Answer: Paris** is the capital.", 1.0),
        # "Answer:" before a whole calculation
        ("72", "Answer: Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips altogether.", 1.0),
        ("24", "Answer: Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips altogether.", 0.0),
        ("35", "To find the answer: add 30 and 5. This gives 35.", 1.0),
        ("42", "Answer: 42. It was 3 before.", 1.0),
        # a mixed number with its unit
        ("2.5", "The answer is 2 1/2 hours.", 1.0),
        ("2", "The answer is 2 1/2 hours.", 0.0),
        ("2.5", "<answer>2 1/2 hours</answer>", 1.0),
    ],
)
def test_statements_that_models_make(gold, completion, right):
    assert accuracy_reward([completion], solution=[gold]) == [right]
