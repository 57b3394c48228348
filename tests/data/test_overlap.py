"""Contamination, by hand."""

from __future__ import annotations

from trl_grpo_ext.data.overlap import Contamination


def test_share_of_the_evaluation_problem_s_ngrams() -> None:
    # 6 words: 4 trigrams
    screen = Contamination(3, 0.5)
    screen.add("test", ["How many apples has Ann eaten?"])
    problems = [
        "How many apples has Ann eaten?",  # the same
        "HOW MANY apples has Ann, eaten",  # 4 of 4 trigrams; the comma keeps it from being the same
        "Tell me how many apples has Bob.",  # "how many apples", "many apples has": 2 of 4
        "Tell me how many apples there are.",  # 1 of 4
        "How many pears?",
    ]
    assert screen({"problem": problems}) == [
        "the same as row 0 of test",
        "shares 4 of 4 3-grams with row 0 of test, the first: 'how many apples'",
        "shares 2 of 4 3-grams with row 0 of test, the first: 'how many apples'",
        "",
        "",
    ]
    anything = Contamination(3, 0.0)
    anything.add("test", ["How many apples has Ann eaten?"])
    assert [bool(why) for why in anything({"problem": problems})] == [True, True, True, True, False]


def test_evaluation_problem_shorter_than_n_is_compared_whole_with_its_signs() -> None:
    screen = Contamination(13, 0.5)
    screen.add("test", ["What is $2 + 3$?"])
    assert screen({"problem": ["What is 2+3?", "What is $2 - 3$?", "So: what is 2 + 3?"]}) == [
        "the same as row 0 of test",
        "",
        "",
    ]


def test_key_depends_on_all_that_verdicts_depend_on() -> None:
    keys = []
    for ngram, share, problems in ((13, 0.5, ["a"]), (12, 0.5, ["a"]), (13, 0.4, ["a"]), (13, 0.5, ["b"])):
        screen = Contamination(ngram, share)
        screen.add("test", problems)
        keys.append(screen.key)
    assert len(set(keys)) == 4


def test_characters_are_words_where_no_spaces_part_words() -> None:
    screen = Contamination(5, 0.5)
    screen.add("test", ["小明有三个苹果和两个梨"])  # 11 characters: 7 runs of 5
    assert screen({"problem": ["问：小明有三个苹果和两个桃", "小红有四个橘子"]}) == [
        "shares 6 of 7 5-grams with row 0 of test, the first: '小 明 有 三 个'",
        "",
    ]


def test_composed_and_decomposed_letters_are_the_same() -> None:
    screen = Contamination(3, 0.5)
    screen.add("test", ["Combien de cafe\u0301s a-t-il bus ?"])
    (why,) = screen({"problem": ["Dites combien de CAF\u00c9S a-t-il bus, lui ?"]})
    assert why.startswith("shares 5 of 5 3-grams")
