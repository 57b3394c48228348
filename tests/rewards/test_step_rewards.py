"""Step rewards: what they return, arithmetic claims, and process reward models."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForTokenClassification
from trl.trainer.utils import get_callable_name

from trl_grpo_ext.rewards.arithmetic_claims import MAX_TOKENS, arithmetic_claims
from trl_grpo_ext.rewards.process_reward_model import ProcessRewardModel, prompt_text
from trl_grpo_ext.rewards.step_rewards import (
    ArithmeticSteps,
    JudgedSteps,
    StepRewards,
    is_step_reward,
    step_reward,
)
from trl_grpo_ext.rewards.steps import SplitAt

# --- arithmetic claims ---


@pytest.mark.parametrize(
    "claim",
    [
        "48 / 2 = 24",
        "48/2=24.",
        "3 + 4*5 = 23",
        "(3 + 4) * 5 = 35",
        "2(3 + 4) = 14",
        "7*-5+-1*4 = -39",
        "-5 + 3 = -2",
        "7 = 3 + 4",
        "3 + 4 = 2 + 5",
        "0.1 + 0.2 = 0.3",  # exact, not floating point
        "1,234 + 1 = 1,235",
        "$1,000.50 * 2 = $2,001",
        "3 × 4 = 12",
        "3 x 4 = 12 apples",
        "12 ÷ 4 = 3",
        "5 − 3 = 2",
        r"3 \times 4 = 12",
        r"\( 3 \cdot 4 = 12 \)",
        r"\[ \frac{1}{4} \times 60 = 15 \text{ pounds} \]",
        r"145 + 3 = \boxed{148}",
        r"\$65 - \$50 = \$15",
        "a &= 3 + 4 \\\\\n&= 7",
        "3 + 4\n= 7",
        "10 / 3 = 3.33",  # rounded
        "2 / 3 = 0.67",  # rounded
        "2 / 3 = 0.66",  # cut off
        "2 / 3 = 0.666...",
        "1000 * 20% = 200",
        "10 / 50 = 20%",
        "10 / 50 * 100 = 20%",
        "100% - 80% = 20%",
        "**Total: 3 + 4 = 7**",
        "* 3 + 4 = 7",
        "- so 3 + 4 = 7",
        "2) 3 + 4 = 7",
        "(since 5 - 3 = 2)",
        "x = 3 + 4 = 7",
        "2x = 3 + 4 = 7",
        "f(2) = 3 + 4 = 7",
        "a total of 4 + 16 = 20",
    ],
)
def test_a_claim_that_holds_and_the_same_with_another_number(claim):
    assert arithmetic_claims(claim) == [True]
    assert arithmetic_claims("Before, " + claim + " Afterwards.") in ([True], [])  # words do not make it wrong
    last = max(position for position, character in enumerate(claim) if character.isdigit())
    wrong = claim[:last] + str((int(claim[last]) + 4) % 10) + claim[last + 1 :]
    assert arithmetic_claims(wrong) == [False]


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("48/2 = <<48/2=24>>24 clips in May. 48+24 = <<48+24=73>>72", [True, False, True, True]),
        ("5 + 3 = 8 * 2 = 16", [False, True]),  # a chain is read as it is written
        ("1/2 - 2/5 = 5/10 - 4/10 = 1/10", [True, True]),
        ("3 + 4 = 7, 5 + 6 = 12; 1 + 1 = 2", [True, False, True]),
        ("10 / 3 = 3", [False]),  # an integer is exact
        ("10 / 3 = 3.34", [False]),
        ("0.5 * 0.5 = -0.2", [False]),
    ],
)
def test_several_claims(text, claims):
    assert arithmetic_claims(text) == claims


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=",
        "no claim",
        "x = 5",
        "7 = 7",
        "x + 3 + 4 = 8",  # variables
        "3 + 4 = 8x",
        "3 + 4 = 8 x",
        "a3 + 4 = 8",
        "2x + 1 = 8",
        "3 + 4 = 8 + y",
        "3 + 4 = x",
        "2^3 + 1 = 4",  # powers and functions
        "3 + 4 = 7^2",
        "2**3 + 1 = 4",
        "3² + 1 = 4",
        "sqrt(16) + 3 = 19",
        r"\sqrt{16} + 3 = 19",
        "5! / 3 = 2",
        "4 * 4! != 16",
        "|3 - 4| = 1",
        "f(2) = 3 + 4",
        r"\sum_{k=1}^{44} 2 = 2 + 2",
        r"2 + 4 = 6 \pi",
        "Day 1 = 5 + 3",  # labels
        "- 3 + 4 = 7",  # a point of a list, or a negative number
        "Before - 3 + 4 = 7",
        "half of 10 + 2 = 6",  # words that calculate
        "20% of 10 + 2 = 4",
        "12 * 2 = 2 dozen",
        "3 * 1000 = 3 thousand",
        "3 + 4 = 2 (mod 5)",
        r"3 + 4 = 2 \pmod 5",
        "17 / 5 = 3 remainder 2",
        "17 / 5 = 3 with a remainder of 2",
        "10 / 3 = 3 (rounded down)",
        "17/3 = 5 and 2/3",
        "1 hour + 30 minutes = 90 minutes",  # units in the middle
        "3 dozen + 2 = 38",
        "3,5 + 1 = 4,6",  # decimal commas, times, numbers of three parts
        "3:30 + 2 = 5:31",
        "1.2.3 + 1 = 5",
        r"1/3 = 0.\overline{3}",
        "6/2(1+2) = 2",  # ambiguous
        "2 1/2 + 1 = 9",
        "1 / 0 = 5",
        "3 + 4 == 8",  # other signs
        "3 + 4 >= 8",
        "3 + 4 => 8",
        "3 + 4 ≈ 8",
        "3 + = 8",
        "(3 + 4 = 8",
        "9" * 25 + " + 1 = 2",  # too long
        "1 + " * MAX_TOKENS + "1 = 2",
        "__import__('os').getcwd() = 3 + 4",
    ],
)
def test_no_claim_rather_than_a_wrong_reading(text):
    expected = [False] if text == "(3 + 4 = 8" else []
    assert arithmetic_claims(text) == expected


def test_any_text_is_read_in_time():
    n = 100_000
    units = [
        "=",
        "1+",
        "(",
        ")",
        "1=",
        "1+1=2\n",
        "<<1+1=2",
        r"\frac{1}{",
        "1,234",
        "-",
        ".",
        "\\",
        "1x",
        "**",
        "$",
        "%",
    ]
    units += [
        "\n",
        " ",
        "- ",
        "1. ",
        "\\\\ ",
        "9",
        "9/7+",
        "of ",
        "\ud800",
        "\x00",
        "x = ",
        "a" * 50 + "= ",
        "{,}",
        "2(",
    ]
    for unit in units:
        text = unit * (n // len(unit)) + "=1+1=2"
        claims = arithmetic_claims(text)
        assert len(claims) <= text.count("="), unit


# --- what a step reward returns ---


def test_arithmetic_steps():
    reward = ArithmeticSteps()
    text = "<think>\nIt is 3 + 4 = 7.\n\nThen 7 * 2 = 15, and 1 + 1 = 2.\n\nSo 15.</think>"
    #         0 to 24                 26 to 57                                59 to 73
    conversation = [{"role": "assistant", "content": "2 + 2 = 4"}]
    assert reward(prompts=["a", "b", "c"], completions=[text, conversation, " "], completion_ids=[[1], [2], [3]]) == [
        StepRewards([1.0, 0.0, None], [24, 57, 73]),
        StepRewards([1.0], [9]),
        StepRewards([], []),
    ]


def test_arithmetic_steps_with_another_splitter():
    (steps,) = ArithmeticSteps("lines")(["a"], ["3 + 4 = 7\n7 * 2 = 15\n"], column=[1])
    assert steps == StepRewards([1.0, 0.0], [9, 20])
    (steps,) = ArithmeticSteps(SplitAt("|"))(["a"], ["3 + 4 = 7|7 * 2 = 15"])
    assert steps == StepRewards([1.0, 0.0], [9, 20])
    with pytest.raises(ValueError, match="splitter='words'"):
        ArithmeticSteps("words")


def lengths(prompts, steps, bonus, **columns):
    """A judge for `JudgedSteps`: longer steps are better, very short ones it cannot judge."""
    return [
        [len(step) + extra if len(step) > 1 else None for step in row] for row, extra in zip(steps, bonus, strict=True)
    ]


def too_few(prompts, steps, **columns):
    return [row[1:] for row in steps]


def test_judged_steps():
    reward = JudgedSteps(lengths, splitter="lines")
    assert reward(prompts=["p", "q"], completions=["abc\nde\nf", "ghij"], bonus=[0.5, 10]) == [
        StepRewards([3.5, 2.5, None], [3, 6, 8]),
        StepRewards([14], [4]),
    ]
    assert get_callable_name(reward) == "lengths"
    with pytest.raises(ValueError, match=r"JudgedSteps.judge returned \[0, 1\] rewards for completions of \[1, 2\]"):
        JudgedSteps(too_few)(["p", "q"], ["a", "b\n\nc"])


@step_reward
def marked(completions, **kwargs):
    return [StepRewards([1.0], [len(completion)]) for completion in completions]


def unmarked(completions, **kwargs):
    return [1.0 for _ in completions]


def test_a_step_reward_can_be_told_from_an_outcome_reward():
    for reward in (ArithmeticSteps(), JudgedSteps(lengths), marked, functools.partial(marked, option=1)):
        assert is_step_reward(reward)
        assert is_step_reward(pickle.loads(pickle.dumps(reward)))
    for reward in (unmarked, functools.partial(unmarked), len, "some/model"):
        assert not is_step_reward(reward)


def test_step_rewards_can_be_sent_to_a_worker_and_back():
    for reward in (ArithmeticSteps("lines"), JudgedSteps(lengths), ArithmeticSteps(SplitAt("|"))):
        again = pickle.loads(pickle.dumps(reward))
        kwargs = {"prompts": ["p"], "completions": ["1 + 1 = 2\n\n3"], "bonus": [0.0]}
        assert again(**kwargs) == reward(**kwargs)
        assert pickle.loads(pickle.dumps(reward(**kwargs))) == reward(**kwargs)


@pytest.mark.parametrize(
    ("rewards", "ends", "said"),
    [
        ([1.0], [1, 2], r"1 rewards and 2 ends"),
        ([1.0, 0.0], [3, 3], r"\[3, 3\]: ends must increase"),
        ([1.0, 0.0], [3, 2], r"\[3, 2\]: ends must increase"),
        ([1.0], [0], r"\[0\]: ends must increase, and the first be at least 1"),
    ],
)
def test_impossible_steps_are_named(rewards, ends, said):
    with pytest.raises(ValueError, match=said):
        StepRewards(rewards, ends)


# --- process reward models ---


@pytest.fixture(scope="module")
def make_prm(tiny_tokenizer):
    def make(num_labels=2, kind="qwen2", **options):
        config = AutoConfig.for_model(
            kind,
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            num_labels=num_labels,
        )
        torch.manual_seed(0)
        return ProcessRewardModel(AutoModelForTokenClassification.from_config(config), tiny_tokenizer, **options)

    return make


def labelled(tokenizer, prompt, steps, separator):
    """Input and labels as TRL 1.0's `PRMTrainer.tokenize_row` makes them (it is no part of later versions)."""
    ids = [tokenizer.bos_token_id] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    labels = [-100] * len(ids)
    for number, step in enumerate(steps):
        step_ids = tokenizer(step, add_special_tokens=False)["input_ids"]
        separator_ids = tokenizer.encode(separator, add_special_tokens=False)
        ids += step_ids + separator_ids
        labels += [-100] * (len(step_ids) + len(separator_ids) - 1) + [number]
    return ids, labels


@pytest.mark.parametrize("separator", ["\n", "<s>"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_reward_is_read_where_trl_puts_the_label(make_prm, tiny_tokenizer, separator, batch_size):
    reward = make_prm(separator=separator, batch_size=batch_size)
    prompts = ["2 + 2?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why so?"}], "x"]
    steps = [["It is 4.", "Or five, perhaps.", "No: 4."], ["Because."], []]
    completions = ["\n\n".join(row) for row in steps]
    completions[1] = [{"role": "assistant", "content": completions[1]}]
    scored = reward(prompts=prompts, completions=completions)

    for prompt, row, found in zip(["2 + 2?", "Why so?", "x"], steps, scored, strict=True):
        ids, labels = labelled(tiny_tokenizer, prompt, row, separator)
        with torch.no_grad():
            logits = reward.model(input_ids=torch.tensor([ids])).logits[0]  # (tokens, 2)
        positions = [labels.index(number) for number in range(len(row))]
        expected = [torch.sigmoid(logits[t, 1] - logits[t, 0]).item() for t in positions]
        assert found.rewards == pytest.approx(expected, abs=1e-6)
    assert [one.ends for one in scored] == [[8, 27, 35], [8], []]
    values = [value for one in scored for value in one.rewards]
    assert len({round(value, 4) for value in values}) == 4  # a model that tells nothing apart would hide mistakes


def test_steps_beyond_max_length_are_not_judged(make_prm):
    long = make_prm()(["q"], ["abc\n\nde\n\nf"])[0]
    # <bos> q a b c \n d e \n f \n: the separators stand at 5, 8 and 10
    for max_length, judged in ((11, 3), (10, 2), (9, 2), (8, 1), (6, 1), (5, 0)):
        (short,) = make_prm(max_length=max_length)(["q"], ["abc\n\nde\n\nf"])
        assert short.rewards[:judged] == pytest.approx(long.rewards[:judged])
        assert short.rewards[judged:] == [None] * (3 - judged)
        assert short.ends == long.ends


def test_other_labels(make_prm):
    (first,), (second,) = (make_prm(right_label=k)(["q"], ["a\n\nb"]) for k in (0, 1))
    assert [x + y for x, y in zip(first.rewards, second.rewards, strict=True)] == pytest.approx([1.0, 1.0])
    three = [make_prm(num_labels=3, right_label=k)(["q"], ["a"])[0].rewards[0] for k in range(3)]
    assert sum(three) == pytest.approx(1.0)


def test_it_is_evaluated_without_dropout_and_without_a_graph(make_prm):
    reward = make_prm()
    reward.model.train()
    first = reward(["q"], ["a\n\nb"])
    assert reward(["q"], ["a\n\nb"]) == first
    assert not reward.model.training


def test_from_a_folder_with_its_tokenizer(make_prm, tiny_tokenizer, tmp_path):
    reward = make_prm(splitter="lines")
    reward.model.save_pretrained(tmp_path / "my-prm")
    tiny_tokenizer.save_pretrained(tmp_path / "my-prm")
    loaded = ProcessRewardModel(str(tmp_path / "my-prm"), splitter="lines")
    ours, theirs = reward(["q"], ["a\nb"])[0], loaded(["q"], ["a\nb"])[0]
    assert theirs.rewards == pytest.approx(ours.rewards)
    assert get_callable_name(loaded) == "my-prm"
    assert is_step_reward(loaded)
    assert loaded.reward_runs_in_process


def test_models_and_prompts_that_do_not_fit_are_named(make_prm):
    with pytest.raises(ValueError, match=r"has 1 labels and right_label=1"):
        make_prm(num_labels=1)
    with pytest.raises(ValueError, match=r"has 2 labels and right_label=2"):
        make_prm(right_label=2)
    with pytest.raises(ValueError, match=r"separator='' has no tokens"):
        make_prm(separator="")
    with pytest.raises(ValueError, match=r"no user message of plain text"):
        prompt_text([{"role": "system", "content": "Be brief."}])
    assert make_prm(prompt_text=str)([["anything"]], ["a"])[0].ends == [1]
