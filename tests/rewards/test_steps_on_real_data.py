"""Splitters and token spans on the human-cut steps of PRM800K and ProcessBench, with tokenizers trained on that text.

Every eighth row, so that it takes seconds; TRL_GRPO_EXT_STEP_ROWS=1 takes all of them (some two minutes).
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_grpo_ext.rewards.arithmetic_claims import arithmetic_claims
from trl_grpo_ext.rewards.steps import SplitAt, split_blank_lines, split_step_headings
from trl_grpo_ext.rewards.token_spans import SpanDecoder

DATA = Path(os.environ.get("TRL_GRPO_EXT_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
EVERY = int(os.environ.get("TRL_GRPO_EXT_STEP_ROWS") or 8)
FILES = ("prm800k/phase1.jsonl.gz", *(f"processbench/{name}" for name in (
    "gsm8k.jsonl", "math.jsonl.gz", "olympiadbench.jsonl.gz", "omnimath.jsonl.gz")))  # fmt: skip
SPECIAL = ["<pad>", "<eos>", "<unk>"]
SEPARATOR = "\n<step>\n"


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not there: point TRL_GRPO_EXT_DATA to the folder of real datasets")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % EVERY == 0:
                yield json.loads(line)


@pytest.fixture(scope="module")
def solutions() -> list[list[str]]:
    """The steps of each solution: PRM800K's chosen ones, all of its alternatives in a row, ProcessBench's."""
    found = []
    for name in FILES:
        for row in rows_of(name):
            if name.startswith("prm800k"):
                chosen = [step["completions"][step["chosen"]] for step in row["steps"] if step["chosen"] is not None]
                offered = [completion for step in row["steps"] for completion in step["completions"]]
                found += [[completion["text"] for completion in steps] for steps in (chosen, offered)]
            else:
                found.append(row["steps"])
    return [steps for steps in found if steps]


@pytest.fixture(scope="module")
def byte_level_bpe(solutions: list[list[str]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return trained(tokenizer, trainer, solutions)


@pytest.fixture(scope="module")
def unigram(solutions: list[list[str]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted({character for steps in solutions for step in steps for character in step} - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    return trained(tokenizer, trainer, solutions)


def trained(tokenizer: Tokenizer, trainer: Any, solutions: list[list[str]]) -> PreTrainedTokenizerFast:
    # Some of the text, and separators: what a tokenizer has seen more of is in longer tokens
    tokenizer.train_from_iterator(["\n\n".join(steps) for steps in solutions[::6]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=10**9
    )


def with_headings(steps: list[str]) -> str:
    return "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, start=1))


def true_ends(text: str, steps: list[str]) -> list[int]:
    """Where each step's last character that is no white space stands in the joined text, plus one."""
    ends = []
    position = 0
    for step in steps:
        position = text.index(step, position) + len(step)
        ends.append(position - len(step) + len(step.rstrip()))
    return ends


@pytest.mark.parametrize("kind", ["byte_level_bpe", "unigram"])
@pytest.mark.parametrize(
    ("join", "split"),
    [
        pytest.param("\n\n".join, split_blank_lines, id="blank lines"),
        pytest.param(with_headings, split_step_headings, id="headings"),
        pytest.param(SEPARATOR.join, SplitAt(SEPARATOR), id="separator"),
    ],
)
def test_every_step_boundary_is_found_and_mapped_to_its_token(
    kind: str,
    join: Callable[[list[str]], str],
    split: Callable[[str], list[tuple[int, int]]],
    solutions: list[list[str]],
    request: pytest.FixtureRequest,
) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(kind)
    decoder = SpanDecoder(tokenizer)
    count = 0
    for steps in solutions:
        text = join(steps)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        spans = decoder.spans(ids)
        assert spans.text == (text.removeprefix(" ") if kind == "unigram" else text)
        assert spans.exact

        ends = [end for _, end in split(text)]
        truth = true_ends(text, steps)
        if split is split_blank_lines:
            # A step that holds a blank line is two steps by that rule; in these data it is one in ten thousand.
            inner = [step for step in steps if re.search(r"\n\s*\n", step.strip())]
            assert len(ends) - len(truth) == sum(len(split_blank_lines(step)) - 1 for step in inner)
            assert set(truth) <= set(ends)
        else:
            assert ends == truth

        lost = len(text) - len(spans.text)  # Unigram loses a leading space
        tokens = spans.end_tokens([end - lost for end in ends])
        for end, token in zip(ends[:-1], tokens, strict=False):
            # The library's own offsets of the text these ids were made from. Metaspace's span of a first token
            # includes the space that decoding loses.
            start, stop = encoded["offset_mapping"][token]
            assert start < end <= stop
        assert tokens[-1] == len(ids) - 1  # the last step takes the EOS
        count += len(ends)
    assert count > 90_000 // EVERY


def sampled(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The text in other tokens than the tokenizer would choose: every third is broken into characters (or bytes)."""
    tokens = tokenizer.tokenize(text)
    broken = [piece for i, token in enumerate(tokens) for piece in ([token] if i % 3 else token)]
    return [int(token_id) for token_id in tokenizer.convert_tokens_to_ids(broken)]


@pytest.mark.parametrize("kind", ["byte_level_bpe", "unigram"])
def test_other_tokens_than_the_tokenizer_would_choose(
    kind: str, solutions: list[list[str]], request: pytest.FixtureRequest
) -> None:
    """A policy may sample any tokens. Each step is encoded by itself here, so that the truth is known."""
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(kind)
    decoder = SpanDecoder(tokenizer)
    separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    others = 0
    for solution in solutions:
        steps = [step.strip() for step in solution[:30] if not re.search(r"\n\s*\n", step.strip())]
        ids: list[int] = []
        truth = []
        for step in steps:
            ids += separator if ids else []
            ids += sampled(tokenizer, step)
            truth.append(len(ids) - 1)
        spans = decoder.spans(ids)
        assert spans.exact
        assert spans.end_tokens([end for _, end in split_blank_lines(spans.text)]) == truth
        others += ids != tokenizer(spans.text, add_special_tokens=False)["input_ids"]
    assert others > 0.9 * len(solutions)


def test_the_definition_on_some_rows(
    solutions: list[list[str]], byte_level_bpe: PreTrainedTokenizerFast, unigram: PreTrainedTokenizerFast
) -> None:
    """Without any library's offsets: the tokens up to the one found write the step, those before it do not."""
    for steps in solutions[:: len(solutions) // 20]:
        for tokenizer in (byte_level_bpe, unigram):
            ids = tokenizer("\n\n".join(steps).lstrip(), add_special_tokens=False)["input_ids"]
            spans = SpanDecoder(tokenizer).spans(ids)
            ends = [end for _, end in split_blank_lines(spans.text)]
            for end, token in list(zip(ends, spans.end_tokens(ends), strict=True))[:-1]:
                assert tokenizer.decode(ids[: token + 1]).startswith(spans.text[:end])
                assert not tokenizer.decode(ids[:token]).startswith(spans.text[:end])


def test_arithmetic_claims_of_gold_solutions_hold() -> None:
    """GSM8K's own solutions; the few that do not hold are mistakes in the data, or 50 cents for half a dollar."""
    claims = [claim for row in rows_of("gsm8k/train.jsonl.gz") for claim in arithmetic_claims(row["answer"])]
    assert len(claims) > 40_000 // EVERY
    assert sum(claims) > 0.998 * len(claims)


def test_arithmetic_claims_against_human_ratings() -> None:
    """PRM800K: steps with a wrong claim are steps that people rated -1."""
    ratings = {True: [], False: []}
    for row in rows_of("prm800k/phase1.jsonl.gz"):
        for completion in (completion for step in row["steps"] for completion in step["completions"]):
            claims = arithmetic_claims(completion["text"])
            if claims and completion["rating"] is not None:
                ratings[all(claims)].append(completion["rating"])
    assert len(ratings[False]) > 400 // EVERY
    assert ratings[False].count(-1) > 0.88 * len(ratings[False])
    assert ratings[True].count(-1) < 0.55 * len(ratings[True])
