"""The quickstart's embedded task: additions, a tokenizer that knows nothing else, and a 1M-parameter model.

A worked addition goes column by column, units first, each column with the carry that it receives:

    prompt       475+386=
    completion   <think>5+6+0=11 7+8+1=16 4+3+1=8</think><answer>861</answer>
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DIGITS = {2: 3, 3: 1}  # digits of both numbers -> weight
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_COMPLETION_LENGTH = 60  # tokens; a worked addition has at most 35, and some room to go astray

Row = dict[str, str]


def worked_addition(a: int, b: int) -> str:
    """The completion for `a+b=`; both numbers have equally many digits."""
    digits = len(str(a))
    columns: list[str] = []
    answer: list[str] = []
    carry = 0
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        columns.append(f"{x}+{y}+{carry}={total}")
        answer.insert(0, str(total if place == digits - 1 else total % 10))
        carry = total // 10
    return f"<think>{' '.join(columns)}</think><answer>{''.join(answer)}</answer>"


def operands(prompt: str) -> tuple[int, int]:
    """The two numbers that a prompt asks to add."""
    a, b = prompt.rstrip("=").split("+")
    return int(a), int(b)


def right_columns(prompts: Sequence[str], steps: Sequence[Sequence[str]], **kwargs: object) -> list[list[float]]:
    """Judge of steps, for process supervision: 1 for each that is what a worked addition has in its place.

    Steps are what white space separates: the columns, the last one with the answer.
    """
    truths = [worked_addition(*operands(prompt)).split() for prompt in prompts]
    return [
        [float(i < len(truth) and step == truth[i]) for i, step in enumerate(own)]
        for truth, own in zip(truths, steps, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows with `prompt`, `solution` and, in `warm_up`, `completion`. No two rows of any split add the same numbers."""

    warm_up: list[Row]  # worked additions, for SFT
    practice: list[Row]  # problems and solutions only, for GRPO
    validation: list[Row]  # tells when to stop the warm-up
    held_out: list[Row]  # what is reported


def make_splits(
    seed: int, *, warm_up: int = 3000, practice: int = 1500, validation: int = 200, held_out: int = 400
) -> Splits:
    """Draw all problems at once, without replacement (`a+b` and `b+a` count as one), and cut the draw into splits."""
    rng = random.Random(seed)
    problems: dict[tuple[int, int], Row] = {}
    while len(problems) < warm_up + practice + validation + held_out:
        (digits,) = rng.choices(list(DIGITS), list(DIGITS.values()))
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        problems.setdefault((min(a, b), max(a, b)), {"prompt": f"{a}+{b}=", "solution": str(a + b)})
    rows = iter(problems.values())
    splits = [[next(rows) for _ in range(size)] for size in (held_out, validation, practice, warm_up)]
    for row in splits[3]:
        row["completion"] = worked_addition(*operands(row["prompt"]))
    return Splits(held_out=splits[0], validation=splits[1], practice=splits[2], warm_up=splits[3])


def make_tokenizer(characters: str = "0123456789+= ", words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per character, per word and per tag. Tags are ordinary: rewards must see them in the decoded text."""
    tokens = ("<pad>", "<eos>", "<unk>", *TAGS, *characters, *words)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    pattern = Regex("|".join((*TAGS, *map(re.escape, words), ".")))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A random Llama of 0.9M parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=96,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)
