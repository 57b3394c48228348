"""What reward functions get and may return, and what an error says. See test_runner.py for the worker processes."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trl_grpo_ext.rewards import Limits, RewardError, RewardScorer

PROMPTS = ["p0", "p0", "p0", "p1", "p1", "p1"]  # P=2, G=3
COMPLETIONS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
IDS = [[1] * length for length in range(1, 7)]
COLUMNS = {"solution": [10, 11, 12, 13, 14, 15]}


def make(*args: Any, **kwargs: Any) -> RewardScorer:
    return RewardScorer(*args, **{"limits": Limits(workers=0), "max_failure_rate": 0.0} | kwargs)


def score(scorer: RewardScorer, **kwargs: Any) -> torch.Tensor:
    return scorer.score(PROMPTS, COMPLETIONS, IDS, COLUMNS, **{"step": 7, **kwargs}).rewards


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [len(completion) for completion in completions]


async def async_length(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [-len(completion) for completion in completions]


def test_values_columns_and_none() -> None:
    def some(solution: list[int], **kwargs: Any) -> list[float | None]:
        return [None if value % 2 else value / 10 for value in solution]

    rewards = score(make([length, async_length, some]))
    assert rewards.shape == (6, 3)
    assert rewards.dtype == torch.float32
    assert rewards.device.type == "cpu"
    nan = math.nan
    expected = torch.tensor(
        [[1, -1, 1.0], [2, -2, nan], [3, -3, 1.2], [4, -4, nan], [5, -5, 1.4], [6, -6, nan]]
    )  # solutions 10, 12, 14 over 10
    torch.testing.assert_close(rewards, expected, equal_nan=True)


def test_functions_get_what_trl_gives_them() -> None:
    seen: dict[str, Any] = {}

    def reward(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * 6

    score(make(reward), trainer_state="state")
    assert seen.pop("log_extra") and seen.pop("log_metric")
    assert seen == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": IDS,
        "solution": COLUMNS["solution"],
        "trainer_state": "state",
    }


def test_numpy_torch_and_bool_values() -> None:
    def reward(**kwargs: Any) -> list[Any]:
        return [True, np.float32(0.5), np.bool_(False), torch.tensor(2), 3, 0.25]

    assert score(make(reward)).flatten().tolist() == [1.0, 0.5, 0.0, 2.0, 3.0, 0.25]
    assert score(make(lambda **kwargs: torch.arange(6) / 2)).flatten().tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


def test_names_are_unique() -> None:
    class Judge:
        def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            return [0.0] * len(completions)

    partial = functools.partial(length, scale=2)
    assert make([length, partial, Judge(), length]).names == ["length", "length_2", "Judge", "length_3"]
    assert make([length, length, length], names=["a", "a_2", "a"]).names == ["a", "a_2", "a_3"]


def test_logged_columns_and_metrics() -> None:
    def reward(completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_extra("seen", completions)
        log_metric("mean", 3.5)
        return [0.0] * len(completions)

    scorer = make(reward)
    score(scorer)
    score(scorer)
    assert scorer.pop_logged() == ({"seen": COMPLETIONS * 2}, {"mean": [3.5, 3.5]})
    assert scorer.pop_logged() == ({}, {})


def test_async_functions_run_together_and_keep_their_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    met = None

    async def first(completions: list[str], **kwargs: Any) -> list[float]:
        nonlocal met
        loops.append(asyncio.get_running_loop())
        met = asyncio.Event()
        await asyncio.wait_for(met.wait(), timeout=5)  # only the other one, running at the same time, can set it
        return [1.0] * len(completions)

    async def second(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        assert met is not None
        met.set()
        return [2.0] * len(completions)

    scorer = make([first, second])
    assert score(scorer).tolist() == [[1.0, 2.0]] * 6
    score(scorer)
    assert loops[0] is loops[1]


def test_async_functions_where_a_loop_is_running() -> None:
    async def notebook() -> torch.Tensor:
        return score(make(async_length))

    assert asyncio.run(notebook()).flatten().tolist() == [-1, -2, -3, -4, -5, -6]


def test_async_callable_class() -> None:
    class Judge:
        async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            return [1.0] * len(completions)

    assert score(make(Judge())).flatten().tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ([1.0, 2.0], "returned 2 values, expected 1 value: one number or None per completion"),
        (1.0, r"returned 1.0 \(float\), expected 1 value"),
        (None, "NoneType"),
        ("abcdef", "str"),
    ],
)
def test_wrong_number_of_values(output: Any, said: str) -> None:
    def short_reward(**kwargs: Any) -> Any:
        return output

    with pytest.raises(RewardError, match=f"(?s)reward 'short_reward' failed on 6 of 6 .*{said}"):
        score(make([length, short_reward]))


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, "1.0", 1e39, 10**400, [1.0], np.float32("nan"), 1j], ids=repr
)
def test_value_that_is_no_finite_number(value: Any) -> None:
    def bad(**kwargs: Any) -> list[Any]:
        return [0.0, 0.0, 0.0, 0.0, value, 0.0]

    with pytest.raises(RewardError) as error:
        score(make(bad))
    for part in ("'bad'", "step 7", "completion 4 of 6", type(value).__name__, "prompt: 'p1'", "completion: 'eeeee'"):
        assert part in str(error.value)


def fails_on_dddd(completions: list[str], log_metric: Any, **kwargs: Any) -> list[float]:
    log_metric("calls", 1.0)
    if "dddd" in completions:
        raise ZeroDivisionError("no d")
    return [0.0] * len(completions)


async def async_fails_on_dddd(completions: list[str], **kwargs: Any) -> list[float]:
    return fails_on_dddd(completions, **kwargs)


@pytest.mark.parametrize("reward", [fails_on_dddd, async_fails_on_dddd])
def test_reward_that_raises_names_the_culprit(reward: Any) -> None:
    scorer = make([length, async_length, reward])
    with pytest.raises(RewardError) as error:
        score(scorer)
    said = str(error.value)
    for part in (f"'{reward.__name__}' failed on 1 of 6", "step 7", "completion 3 of 6: raised ZeroDivisionError: no d",
                 "prompt: 'p1'", "completion: 'dddd'", "in fails_on_dddd"):  # fmt: skip
        assert part in said


def test_reward_that_raises_on_the_batch_only(caplog: pytest.LogCaptureFixture) -> None:
    def at_most_one(completions: list[str], **kwargs: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("one at a time")
        return [0.0]

    with caplog.at_level(logging.WARNING):
        assert score(make(at_most_one)).flatten().tolist() == [0.0] * 6
    assert "raised RuntimeError: one at a time. It was called on each of them alone, and failed on 0." in caplog.text


def test_async_reward_with_a_wrong_signature() -> None:
    async def narrow(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"(?s)'narrow' failed on 6 of 6 completions at step 7.*raised TypeError"):
        score(make([async_length, narrow]))


def test_row_without_any_reward_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    def silent(**kwargs: Any) -> list[float | None]:
        return [1.0, None, 1.0, None, 1.0, 1.0]

    with caplog.at_level(logging.WARNING, logger="trl_grpo_ext.rewards.scoring"):
        score(make([silent, silent]))
        assert len(caplog.records) == 1
        message = caplog.records[0].getMessage()
        assert "None for 2 of 6 completions at step 7" in message
        assert "completion: 'bb'" in message and "11" in message
        caplog.clear()
        score(make([silent, length]))
        assert not caplog.records


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`reward_funcs` is empty"):
        make([])
    with pytest.raises(TypeError, match="`reward_funcs` holds a int"):
        make([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`names` has 1 entries for 2"):
        make([length, length], names=["a"])
    with pytest.raises(ValueError, match="`reward_processing_classes` has 1 entries for 2"):
        make([length, length], processing_classes=[None])
    with pytest.raises(ValueError, match="`solution` has 5 values for 6 prompts"):
        make(length).score(PROMPTS, COMPLETIONS, IDS, {"solution": [1] * 5}, step=0)
    with pytest.raises(ValueError, match=r"column\(s\) \['log_extra'\]"):
        make(length).score(PROMPTS, COMPLETIONS, IDS, {"log_extra": [1] * 6}, step=0)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{{ suffix or '' }}"
    return fast


def classifier(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        initializer_range=0.5,
        attention_dropout=0.5,  # so that training mode would show
    )
    return LlamaForSequenceClassification(config)


def expected_logits(model: nn.Module, tokenizer: Any, texts: list[str]) -> list[float]:
    """One text at a time, no padding."""
    model.eval()
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in texts]


def test_reward_model_scores_prompt_and_completion() -> None:
    model, tokenizer = classifier().train(), byte_tokenizer()
    scorer = make([length, model], processing_classes=[None, tokenizer], reward_model_batch_size=4)
    assert tokenizer.pad_token == "<eos>"  # it had none
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rewards = score(scorer)
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(rewards[:, 1], torch.tensor(expected_logits(model, tokenizer, texts)))
    assert rewards[:, 1].std() > 1e-3


def test_reward_model_applies_its_chat_template() -> None:
    model, tokenizer = classifier(), byte_tokenizer()
    scorer = make(model, processing_classes=tokenizer, chat_template_kwargs={"suffix": "!"})
    prompts = [[{"role": "user", "content": text}] for text in ("q", "rr")]
    completions = [[{"role": "assistant", "content": text}] for text in ("a", "bbb")]
    rewards = scorer.score(prompts, completions, [[1], [2]], {}, step=0).rewards
    expected = expected_logits(model, tokenizer, ["u:q;a:a;!", "u:rr;a:bbb;!"])
    torch.testing.assert_close(rewards[:, 0], torch.tensor(expected))


def test_reward_model_reads_what_the_prompt_wrote_of_the_completion_once() -> None:
    model, tokenizer = classifier(), byte_tokenizer()
    scorer = make(model, processing_classes=tokenizer)
    rewards = scorer.score(
        ["q<think>", "rr"], ["<think>a", "b"], [[1], [2]], {}, step=0, prefills=["<think>", ""]
    ).rewards
    torch.testing.assert_close(rewards[:, 0], torch.tensor(expected_logits(model, tokenizer, ["q<think>a", "rrb"])))


def test_reward_model_reads_a_continued_message_as_one() -> None:
    model, tokenizer = classifier(), byte_tokenizer()
    scorer = make(model, processing_classes=tokenizer)
    user = {"role": "user", "content": "q"}
    # The message to go on with; and a `<think>` of the policy's template, which is in no message of the prompt
    prompts = [[user, {"role": "assistant", "content": "well <think>i"}], [user]]
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>i am", "<think>hm")]
    rewards = scorer.score(prompts, completions, [[1], [2]], {}, step=0, prefills=["<think>i", "<think>"]).rewards
    expected = expected_logits(model, tokenizer, ["u:q;a:well <think>i am;", "u:q;a:<think>hm;"])
    torch.testing.assert_close(rewards[:, 0], torch.tensor(expected))


def test_reward_model_that_raises_names_the_culprit() -> None:
    """A text longer than its table of positions, say."""
    model, tokenizer = classifier(), byte_tokenizer()
    scorer = make(model, processing_classes=tokenizer, names=["judge"])
    with torch.no_grad():
        model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight[:5])
    with pytest.raises(
        RewardError, match=r"(?s)'judge' failed on 6 of 6 completions at step 7.*completion 0 of 6: raised IndexError"
    ):
        score(scorer)


def test_reward_model_by_path(tmp_path: Path) -> None:
    path = tmp_path / "judge"
    model, tokenizer = classifier(), byte_tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    scorer = make([str(path), length, str(path)])
    assert scorer.names == ["judge", "length", "judge_2"]
    rewards = score(scorer)
    loaded = AutoModelForSequenceClassification.from_pretrained(path)
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(rewards[:, 0], torch.tensor(expected_logits(loaded, tokenizer, texts)))
    torch.testing.assert_close(rewards[:, 0], rewards[:, 2])


def test_reward_model_that_gives_nan_is_an_error() -> None:
    model = classifier()
    nn.init.constant_(model.score.weight, math.nan)
    with pytest.raises(RewardError, match=r"(?s)step 7.*completion 0 of 6: returned nan \(float\)"):
        score(make(model, processing_classes=byte_tokenizer(), names=["judge"]))
