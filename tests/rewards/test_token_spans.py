"""Which characters each sampled token wrote, for the ways in which tokenizers spread text over tokens."""

from __future__ import annotations

import itertools
import random
from bisect import bisect_left

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from trl_grpo_ext.rewards.token_spans import SpanDecoder

SPECIAL = ["<pad>", "<eos>", "<unk>"]
# Bytes of "日" E6 97 A5, of "é" C3 A9, of "😀" F0 9F 98 80, of U+FFFD EF BF BD; others that are no character
HARD_BYTES = [0x41, 0x20, 0xE6, 0x97, 0xA5, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xEF, 0xBF, 0xBD]


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, and merges across a character's and a word's end, as byte-level BPE makes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [".Ċ", ".ĊĊ", "Ġa", "æĹ", "¥æ", "Ġæ"]  # "æĹ" is E6 97 of 日, "¥æ" its A5 and the E6 of another
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *joined])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


@pytest.fixture(scope="module")
def unigram() -> PreTrainedTokenizerFast:
    pieces = [*SPECIAL, "▁", "▁▁", "▁a", "a", "b", "▁ab", ".", "\n", "日", "é"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return fast(tokenizer)


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """The decoder of Llama 2 and Mistral: a space at the beginning is lost, unknown characters are bytes."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", ".", "\n"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=\n)"), "isolated")
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(fallback)
    return fast(tokenizer)


def spans_of(tokenizer, tokens):
    spans = SpanDecoder(tokenizer).spans([tokenizer.convert_tokens_to_ids(token) for token in tokens])
    return spans.text, list(zip(spans.starts, spans.ends, strict=True)), spans.exact


# --- one token after the other, by hand ---


def test_byte_level(byte_level):
    #                         0 1  2 3 4    5
    assert spans_of(byte_level, ["a", "Ġa", ".ĊĊ", "b", "<eos>"]) == (
        "a a.\n\nb",
        [(0, 1), (1, 3), (3, 6), (6, 7), (7, 7)],
        True,
    )


def test_a_character_of_several_tokens_is_in_the_span_of_each(byte_level):
    # "a日é": 日 is E6 97 + A5, é is C3 + A9; a special token between the bytes writes nothing
    text, spans, exact = spans_of(byte_level, ["a", "æĹ", "<pad>", "¥", "Ã", "©"])
    assert (text, spans, exact) == ("a日é", [(0, 1), (1, 2), (1, 1), (1, 2), (2, 3), (2, 3)], True)


def test_a_token_that_ends_one_character_and_begins_the_next(byte_level):
    # " 日日.": space and E6, 97 is missing a token of its own: Ġæ | Ĺ | ¥æ | Ĺ | ¥ | .
    text, spans, exact = spans_of(byte_level, ["Ġæ", "Ĺ", "¥æ", "Ĺ", "¥", "."])
    assert (text, exact) == (" 日日.", True)
    assert spans == [(0, 2), (1, 2), (1, 3), (2, 3), (2, 3), (3, 4)]
    spans = SpanDecoder(byte_level).spans(byte_level.convert_tokens_to_ids(["Ġæ", "Ĺ", "¥æ", "Ĺ", "¥", "."]))
    # The space ends in the first token, each 日 in the token with its last byte
    assert spans.end_tokens([1, 2, 3]) == [0, 2, 4]


def test_bytes_that_are_no_character(byte_level):
    # E6 and A by themselves: E6 is a replacement character; so is a last one that is cut off
    assert spans_of(byte_level, ["æ", "A", "Ĺ", "b", "æĹ"]) == (
        "\ufffdA\ufffdb\ufffd",
        [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)],
        True,
    )


def test_unigram_loses_the_first_space_only(unigram):
    assert spans_of(unigram, ["<pad>", "▁a", "b", "▁a", "▁", "▁ab", ".", "<eos>"]) == (
        "ab a  ab.",
        [(0, 0), (0, 1), (1, 2), (2, 4), (4, 5), (5, 8), (8, 9), (9, 9)],
        True,
    )
    # A lone first space writes nothing, and then the next token's is no first one
    assert spans_of(unigram, ["▁", "▁a"]) == (" a", [(0, 0), (0, 2)], True)


def test_byte_fallback(byte_fallback):
    tokens = ["▁", "<0xE6>", "<0x97>", "<0xA5>", "<0xC3>", "<0xA9>", "▁a", "<0x0A>", "<0xFF>", "b"]
    assert spans_of(byte_fallback, tokens[:8]) == (
        "日é a\n",
        [(0, 0), (0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (2, 4), (4, 5)],
        True,
    )
    # An invalid byte turns the whole run of bytes into replacement characters, one for each
    text, spans, exact = spans_of(byte_fallback, tokens)
    assert text == "日é a\ufffd\ufffdb"
    assert (spans[6:], exact) == ([(2, 4), (4, 6), (4, 6), (6, 7)], False)


def test_a_slow_tokenizer():
    # Its decoder drops the first bytes of a character until the last one comes
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    spans = SpanDecoder(tokenizer).spans(tokenizer("a日.\n")["input_ids"])  # ends with EOS
    assert (spans.text, spans.exact) == ("a日.\n", True)
    # a | E6 97 A5 | . | \n | EOS
    assert [bisect_left(spans.starts, end) - 1 for end in (1, 2, 3, 4)] == [0, 3, 4, 5]


def test_a_tokenizer_of_the_tokenizers_library(byte_level):
    ids = byte_level("a. b")["input_ids"]
    spans = SpanDecoder(byte_level.backend_tokenizer).spans([*ids, byte_level.eos_token_id])
    assert spans.ends == [1, 2, 3, 4, 4]
    assert spans.text == "a. b"


def test_tokens_that_are_decoded_together_share_a_span():
    class Odd:
        """What three tokens write together is not what they write one after the other."""

        def decode(self, ids, skip_special_tokens):
            return "".join("abcdefgh"[i] for i in ids).replace("cd", "X").replace("Xe", "YZ!")

    spans = SpanDecoder(Odd()).spans([0, 2, 3, 4, 1])
    assert (spans.text, spans.exact) == ("aYZ!b", False)
    assert list(zip(spans.starts, spans.ends, strict=True)) == [(0, 1), (1, 4), (1, 4), (1, 4), (4, 5)]
    assert spans.end_tokens([1, 2, 4]) == [0, 3, 3]


# --- the definition, on random tokens ---


def first_tokens(tokenizer, ids):
    """For each character the first token with which, and ever after, the decoded text begins as it will in the end."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    common = []
    for count in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:count], skip_special_tokens=True)
        same = [a == b for a, b in zip(prefix, text, strict=False)]
        common.append(same.index(False) if False in same else len(same))
    for i in reversed(range(len(ids) - 1)):
        common[i] = min(common[i], common[i + 1])
    return text, [next(i for i, length in enumerate(common) if length >= end) for end in range(1, len(text) + 1)]


def assert_like_the_definition(tokenizer, decoder, ids):
    text, truth = first_tokens(tokenizer, ids)
    spans = decoder.spans(ids)
    assert spans.text == text
    assert spans.exact
    assert [bisect_left(spans.starts, end) - 1 for end in range(1, len(text) + 1)] == truth
    assert all(a <= b for a, b in itertools.pairwise(spans.starts))
    assert all(0 <= a <= b <= len(text) for a, b in zip(spans.starts, spans.ends, strict=True))


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_any_tokens(kind, request):
    tokenizer = request.getfixturevalue(kind)
    decoder = SpanDecoder(tokenizer)
    choices = list(range(len(tokenizer)))
    if kind == "byte_level":  # most bytes are like each other: more of the hard ones
        choices = [*range(len(SPECIAL)), *range(len(tokenizer) - 6, len(tokenizer))]
        choices += tokenizer.convert_tokens_to_ids(list("AĠæĹ¥Ã©ðŁĺĢÿï¿½Ċ."))
    rng = random.Random(0)
    for _ in range(400):
        assert_like_the_definition(tokenizer, decoder, rng.choices(choices, k=rng.randrange(1, 12)))


def test_any_text_with_a_slow_tokenizer():
    tokenizer = ByT5Tokenizer()
    decoder = SpanDecoder(tokenizer)
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices("a .\n日é😀", k=rng.randrange(1, 9)))
        assert_like_the_definition(tokenizer, decoder, tokenizer(text)["input_ids"])


def test_any_bytes_with_byte_fallback(byte_fallback):
    decoder = SpanDecoder(byte_fallback)
    rng = random.Random(0)
    known = 0
    choices = [byte_fallback.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in HARD_BYTES]
    choices += [byte_fallback.convert_tokens_to_ids(token) for token in ("<eos>", "▁", "▁a", "b")]
    for _ in range(400):
        ids = byte_fallback.convert_tokens_to_ids(["b"]) + rng.choices(choices, k=rng.randrange(1, 30))
        spans = decoder.spans(ids)
        assert spans.text == byte_fallback.decode(ids, skip_special_tokens=True)
        assert all(a <= b for a, b in itertools.pairwise(spans.starts))
        assert max(spans.ends) == len(spans.text)
        # Whatever bytes came before: once they are over, everything is right again, or is said to be not exact
        after = decoder.spans(ids + byte_fallback.convert_tokens_to_ids(["▁a", ".", "\n", "b"]))
        known += after.exact
        if after.exact:
            end = len(after.text)
            assert after.starts[-3:] == [end - 3, end - 2, end - 1]
    assert known > 200


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "byte_fallback"])
def test_long_and_hostile_completions(kind, request):
    """Windows that grow with the text would take hours here."""
    tokenizer = request.getfixturevalue(kind)
    decoder = SpanDecoder(tokenizer)
    rng = random.Random(0)
    count = 30_000
    bad = tokenizer.convert_tokens_to_ids({"byte_level": "ÿ", "unigram": "▁", "byte_fallback": "<0xFF>"}[kind])
    half = tokenizer.convert_tokens_to_ids({"byte_level": "æ", "unigram": "▁▁", "byte_fallback": "<0xE6>"}[kind])
    for ids in (
        [bad] * count,
        [half] * count,
        [tokenizer.eos_token_id] * count,
        [half, tokenizer.eos_token_id] * (count // 2),
        [tokenizer.convert_tokens_to_ids("a")] * count + [bad],
        [rng.randrange(len(tokenizer)) for _ in range(count)],
    ):
        spans = decoder.spans(ids)
        assert len(spans.starts) == len(spans.ends) == len(ids)
        assert spans.text == tokenizer.decode(ids, skip_special_tokens=True)


# --- from characters to tokens ---


def test_steps_end_at_the_token_of_their_last_character(byte_level):
    #        tokens: "a" "Ġa" ".ĊĊ" "b" "Ġa" "." "<eos>"; text "a a.\n\nb a."
    ids = byte_level.convert_tokens_to_ids(["a", "Ġa", ".ĊĊ", "b", "Ġa", ".", "<eos>"])
    spans = SpanDecoder(byte_level).spans(ids)
    assert spans.text == "a a.\n\nb a."
    # "a a." ends in the token that writes the blank line too; the last step takes the EOS
    assert spans.end_tokens([4, 10]) == [2, 6]
    assert spans.end_tokens([1, 3, 7, 9]) == [0, 1, 3, 4]
    assert spans.end_tokens([]) == []


def test_what_follows_the_last_step_belongs_to_it_if_it_is_white_space_only(byte_level):
    ids = byte_level.convert_tokens_to_ids(["a", ".", "Ċ", "Ġ", "<eos>"])
    assert SpanDecoder(byte_level).spans(ids).end_tokens([2]) == [4]
    ids = byte_level.convert_tokens_to_ids(["a", ".", "Ċ", "b", "<eos>"])
    assert SpanDecoder(byte_level).spans(ids).end_tokens([2]) == [1]


def test_characters_of_the_prompt_belong_to_no_token(byte_level):
    # The reward function was given "<think>\n" + "a.\n\nb"
    ids = byte_level.convert_tokens_to_ids(["a", ".ĊĊ", "b", "<eos>"])
    spans = SpanDecoder(byte_level).spans(ids)
    assert spans.end_tokens([3, 8, 10, 13], prefill=8) == [-1, -1, 1, 3]


def test_an_end_outside_the_text_is_named(byte_level):
    spans = SpanDecoder(byte_level).spans(byte_level.convert_tokens_to_ids(["a", "b"]))
    with pytest.raises(ValueError, match=r"ends at character 6, but the text has 5 \(3 of them the prompt's\)"):
        spans.end_tokens([6], prefill=3)
    with pytest.raises(ValueError, match=r"ends at character -1"):
        spans.end_tokens([-1])


def test_an_empty_completion(byte_level):
    spans = SpanDecoder(byte_level).spans([])
    assert (spans.text, spans.starts, spans.ends, spans.exact) == ("", [], [], True)
    spans = SpanDecoder(byte_level).spans([byte_level.eos_token_id])
    assert (spans.text, spans.starts, spans.exact) == ("", [0], True)
    assert spans.end_tokens([4], prefill=4) == [-1]
