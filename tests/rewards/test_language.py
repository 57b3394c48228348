"""Language consistency: by script, by py3langid, in proportion, and on the questions of MGSM in eleven languages."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from trl_grpo_ext.rewards import language
from trl_grpo_ext.rewards.language import LanguageConsistencyReward, language_share

DATA = Path(os.environ.get("TRL_GRPO_EXT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
ENGLISH = "First we add the apples that she has left to those that her brother gave her."
FRENCH = "D'abord, nous ajoutons les pommes qui lui restent à celles que son frère lui a données."
GERMAN = "Zuerst zählen wir die Äpfel zusammen, die sie noch hat, und die von ihrem Bruder."
CHINESE = "首先我们把她剩下的苹果和她哥哥给她的苹果加起来，然后再减去她吃掉的苹果，就得到了最后剩下的苹果的数量。"
JAPANESE = "まず、彼女に残っているりんごと、お兄さんからもらったりんごを足します。それから食べたりんごを引きます。"


def read_rows(name: str) -> list[dict[str, Any]]:
    path = DATA / "mgsm" / name
    if not path.exists():
        pytest.skip(f"mgsm/{name} is not there: point TRL_GRPO_EXT_DATA to the folder of real datasets")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("text", "code", "share"),
    [
        ("абвгд αβγδε", "el", 5 / 10),
        ("ก ข abc", "th", 2 / 5),  # letters, not words
        ("ค่ะ ok", "th", 3 / 5),  # vowel and tone signs too: ค ่ ะ
        ("తెలుగు abc", "te", 6 / 9),  # త ె ల ు గ ు
        ("답은 42 입니다", "ko", 5 / 5),  # digits are nobody's
        ("答えは四つです", "ja", 7 / 7),
        ("答えは四つです", "zh", 0 / 7),
        ("答案是四", "zh", 4 / 4),
        ("答案是四", "ja", 0 / 4),
        ("答案是四 abcd", "zh", 4 / 8),
        ("我最喜欢的日语假名就是の因为它看起来很可爱", "zh", 20 / 21),  # kana are never Chinese
        ("ＡＢ กขค", "th", 3 / 5),  # full width
        ("人々 กข", "th", 2 / 4),
        ("答案是四", "en", 0.0),
        ("x = 3, y₂ = 4 и z", "th", 0 / 1),  # variables are nobody's either, и is a word
    ],
)
def test_by_script(text: str, code: str, share: float) -> None:
    assert language_share(text, code) == pytest.approx(share)


@pytest.mark.parametrize(
    "noise",
    [
        "$x + \\text{apples}$",
        "$$\\frac{apples}{oranges}$$",
        "\\(apples\\)",
        "\\[\napples\n\\]",
        "\\begin{align*} apples &= 3 \\end{align*}",
        "`apples()`",
        "```python\nprint('apples')\n```",
        "[asy] draw(apples); [/asy]",  # MATH's figures
        "\\boxed{12}",
        "\\frac{1}{2}",
        "https://apples.example/x?y=z",
        "12,345.67 € 100% x y Z α",
        "𝒙𝐀𝔹ℂ µ ª º",
        "\ud800",
    ],
)
def test_what_is_nobodys_language(noise: str) -> None:
    thai = "คำตอบคือ"
    assert language_share(f"{thai} {noise} {thai}", "th") == 1.0
    assert language_share(noise, "th") is None


@pytest.mark.parametrize(
    "text",
    [
        "$2 for one and $3 for two",
        "2$ for one and 3$ for two",
        "from $2-$3 on",
        "one `quote\nand another` one",
        "open \\( and never closed",
        "```open and never closed",
        "$open\nand closed$ later",
    ],
)
def test_what_only_looks_like_latex_or_code_is_read(text: str) -> None:
    letters = sum(map(str.isalpha, text))
    share = language_share("ก" * letters + " " + text, "th")
    assert share == pytest.approx(0.5)


def test_languages_of_one_script() -> None:
    for text, code in ((ENGLISH, "en"), (FRENCH, "fr"), (GERMAN, "de")):
        assert [language_share(text, target) for target in ("en", "fr", "de", "sw")] == [
            float(target == code) for target in ("en", "fr", "de", "sw")
        ]


@pytest.mark.parametrize("first", [ENGLISH, FRENCH, CHINESE])
@pytest.mark.parametrize("copies", [1, 3])
def test_mixed_in_proportion(first: str, copies: int) -> None:
    letters = [sum(map(str.isalpha, text)) for text in (first, GERMAN)]
    # lone letters, D' and à, are not counted: at most 2 of some 60
    expected = copies * letters[1] / (letters[0] + copies * letters[1])
    assert language_share(f"{first}\n" + f"{GERMAN}\n" * copies, "de") == pytest.approx(expected, abs=0.02)


def test_another_script_within_a_sentence() -> None:
    head, tail = ENGLISH[:37], ENGLISH[37:]  # between words
    letters = [sum(map(str.isalpha, text)) for text in (ENGLISH, CHINESE)]
    share = language_share(head + CHINESE.replace("，", " ").replace("。", " ") + tail, "en")
    assert share == pytest.approx(letters[0] / sum(letters))


def test_chinese_and_japanese_in_proportion() -> None:
    chinese, japanese = (sum(map(str.isalpha, text)) for text in (CHINESE, JAPANESE))
    assert language_share(CHINESE + JAPANESE, "zh") == pytest.approx(chinese / (chinese + japanese), abs=0.01)
    assert language_share(CHINESE + JAPANESE, "ja") == pytest.approx(japanese / (chinese + japanese), abs=0.01)


def test_thinking_alone_is_judged() -> None:
    reward = LanguageConsistencyReward("th")
    thai = "คำตอบคือ"
    texts = [
        f"<think>{thai}</think>The answer",
        f"{thai}</think>The answer",  # opened by the prompt
        f"<think>{thai}",  # cut off
        f"Well <think>{thai}</think>The answer",
        thai,
        f"<think>answer</think>{thai}",
        "<think>42</think>The answer",
        "",
        f"answer</think>answer<think>{thai}",
    ]
    assert reward(texts) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, None, None, 1.0]
    conversational = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(conversational, prompts=[], completion_ids=[]) == reward(texts)
    strict = LanguageConsistencyReward("th", require_thinking=True)
    assert strict(texts[1:6]) == [1.0, 1.0, 1.0, None, 0.0]
    # 8 Thai characters of 8 + 5 + 6 + 9
    whole = LanguageConsistencyReward("th", scope="completion")
    assert whole(["<think>" + thai + "</think>The answer"]) == [pytest.approx(8 / (8 + 10 + 9))]


def test_language_by_row() -> None:
    texts = ["คำตอบ", "คำตอบ", "答案", "คำตอบ"]
    assert LanguageConsistencyReward()(texts, language=["th", "te", "zh-CN", None]) == [1.0, 0.0, 1.0, None]
    assert LanguageConsistencyReward(column="lang")(texts, lang=["TH", "th_TH", "ja", "ko"]) == [1.0, 1.0, 0.0, 0.0]


def test_pickled_and_named() -> None:
    reward = pickle.loads(pickle.dumps(LanguageConsistencyReward("en")))
    assert reward(completions=[ENGLISH, FRENCH], prompts=["a", "b"], completion_ids=[[1], [2]]) == [1.0, 0.0]
    assert (reward.__name__, reward.reward_is_row_wise) == ("language_consistency_reward", True)


def test_library_is_loaded_where_it_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = [pickle.dumps(LanguageConsistencyReward(code)) for code in ("en", "th", None)]
    loads: list[str] = []
    monkeypatch.setattr(language, "_ranking", lambda: loads.append("py3langid"))
    for blob in pickled:
        pickle.loads(blob)
    assert loads == ["py3langid"]  # once: Thai needs none, and for None nobody knows


@pytest.mark.parametrize(
    ("options", "columns", "error", "message"),
    [
        ({}, {}, ValueError, "found no column `language`"),
        ({"column": "lang"}, {"language": ["en"]}, ValueError, "found no column `lang`"),
        ({}, {"language": ["th", "th"]}, ValueError, "`language` has 2 values for 1 completions"),
        ({}, {"language": ["xx"]}, ValueError, "`language` is 'xx', which is not a known ISO 639-1 code"),
        ({"language": "tha"}, {}, ValueError, r"did you mean 'th'"),
        ({}, {"language": [7]}, TypeError, "`language` must be a language code such as 'en', got int"),
        ({"language": "th", "scope": "all"}, {}, ValueError, "`scope` is 'all'"),
    ],
)
def test_mistakes(options: dict[str, Any], columns: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LanguageConsistencyReward(**options)(["a"], **columns)


def test_missing_library_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "py3langid":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    language._ranking.cache_clear()
    with pytest.raises(ImportError, match="pip install py3langid"):
        LanguageConsistencyReward("en")
    assert LanguageConsistencyReward("th")(["คำตอบ"]) == [1.0]  # needs none
    language._ranking.cache_clear()


@pytest.mark.parametrize(
    "piece",
    ["a", "a ", "a. ", ". ", "word. ", "$", "`", "```", r"\(", r"\(\)", r"\begin{", r"\begin{a}\end{", "[asy]", r"\a", "http://",
     "<think>", "</think>", "答", "か。", "\ud800", "\u0301", "x1 "],
    ids=ascii,
)  # fmt: skip
def test_is_linear_on_hostile_text(piece: str) -> None:
    # 10^6 characters: quadratic code would need minutes.
    text = piece * (1_000_000 // len(piece))
    for code in ("en", "ja", "th"):
        (value,) = LanguageConsistencyReward(code)([text])
        assert value is None or 0 <= value <= 1


LANGUAGES = "bn de en es fr ja ru sw te th zh".split()


@pytest.fixture(scope="module")
def mgsm() -> dict[str, list[str]]:
    """Per language 250 questions and 8 worked answers, as texts."""
    texts: dict[str, list[str]] = {code: [] for code in LANGUAGES}
    for row in read_rows("mgsm.jsonl.gz"):
        texts[row["lang"]].append(row["question"])
    for row in read_rows("cot_exemplars.jsonl"):
        texts[row["lang"]].append(row["cot"])
    assert {len(group) for group in texts.values()} == {258}
    return texts


@pytest.mark.parametrize("code", LANGUAGES)
def test_mgsm_in_the_right_language(mgsm: dict[str, list[str]], code: str) -> None:
    shares = LanguageConsistencyReward(code)(mgsm[code])
    assert sum(share or 0.0 for share in shares) / len(shares) >= 0.95
    # and worked answers each by itself
    assert all(share is not None and share >= 0.95 for share in shares[250:])


@pytest.mark.parametrize("code", LANGUAGES)
def test_mgsm_against_other_languages(mgsm: dict[str, list[str]], code: str) -> None:
    """Of another script or of the same one. Only texts on iPhones, Facebook and DVDs have English letters in them."""
    for target in LANGUAGES:
        if target != code:
            shares = [share or 0.0 for share in LanguageConsistencyReward(target)(mgsm[code][::5])]
            assert sum(shares) / len(shares) <= 0.02, target
            assert sum(share > 0.1 for share in shares) <= 2, target  # of 52


def test_real_thinking_in_english_and_indonesian() -> None:
    """Cut-off thinking on English problems, from a GRPO run: 7 completions in English, 13 in Indonesian."""
    path = DATA / "completions_grpo_rollouts" / "rollouts.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there: point TRL_GRPO_EXT_DATA to the folder of real datasets")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row["completion"] for row in rows if row["template"] == "think"]
    indonesian = [float(text.startswith(("<think>\nPertama", "<think>\nSaya"))) for text in texts]
    assert (len(texts), sum(indonesian)) == (20, 13)
    assert LanguageConsistencyReward("id")(texts) == indonesian
    assert LanguageConsistencyReward("en")(texts) == [1 - share for share in indonesian]


@pytest.mark.parametrize(("first", "second"), [("en", "zh"), ("th", "en"), ("de", "sw"), ("ja", "zh"), ("fr", "es")])
def test_mgsm_mixed_in_proportion(mgsm: dict[str, list[str]], first: str, second: str) -> None:
    reward = LanguageConsistencyReward(first)
    for index in range(250, 258):
        # 1, 2 or 3 worked answers in the other language
        parts = [mgsm[first][index], *mgsm[second][index - index % 3 : index + 1]]
        letters = [sum(language._letters(part).values()) for part in parts]
        expected = letters[0] / sum(letters)
        lines, line = ("\n".join(parts), " ".join(parts))
        assert reward([f"<think>{lines}</think>"]) == [pytest.approx(expected, abs=0.01)]
        # On one line a short last sentence goes with the first one of the other language
        assert reward([f"<think>{line}</think>"]) == [pytest.approx(expected, abs=0.2)]
