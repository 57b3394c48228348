"""The work both trainers are given: shapes, a random model, a tokenizer, prompts and a reward, all made in code.

Weights are random and the end-of-sequence probability is set by hand, so completion lengths are geometric with a known
mean: the load is that of training, and nothing has to be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

PAD_ID, EOS_ID, FIRST_WORD_ID = 0, 1, 2
MODEL_SEED = 0  # the same weights and prompts in every run; what varies with the run is the sampling


def small_phi() -> PreTrainedConfig:
    """8 layers and 6,000 words: the LM head's share of the weights is that of a real model, and the head has a bias."""
    return PhiConfig(
        num_hidden_layers=8,
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        vocab_size=6000,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def qwen2_1_5b() -> PreTrainedConfig:
    """The dimensions of Qwen2-1.5B."""
    return Qwen2Config(
        num_hidden_layers=28,
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """One load. A step holds `prompts * num_generations` completions; lengths are in tokens."""

    prompts: int
    prompt_tokens: int  # lengths vary by +-10 %
    completion_mean: int  # of the geometric distribution, before the cap
    completion_cap: int
    num_generations: int = 8
    beta: float = 0.04
    model: Callable[[], PreTrainedConfig] = small_phi
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seconds_target: float | None = None  # this trainer's share of TRL's seconds per step, at most
    memory_target: float | None = None  # and of its growth of peak memory


SHAPES = {
    "standard": Shape(3, 170, 70, 256, seconds_target=0.25, memory_target=0.40),
    "long-prompt": Shape(2, 900, 40, 128, seconds_target=0.13, memory_target=0.40),
    "short": Shape(12, 30, 30, 128, seconds_target=0.25, memory_target=0.40),
    "gpu-1.5b": Shape(8, 200, 200, 512, model=qwen2_1_5b, dtype=torch.bfloat16, device="cuda"),
}


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token per word `w2`, `w3`, ..., so that a prompt's length is known exactly."""
    words = {"<pad>": PAD_ID, "<eos>": EOS_ID} | {f"w{i}": i for i in range(FIRST_WORD_ID, vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_prompts(shape: Shape, steps: int, vocab_size: int) -> Dataset:
    """Rows for `steps` optimizer steps, each prompt used once, of lengths uniform within 10 % of the shape's."""
    generator = torch.Generator().manual_seed(MODEL_SEED)
    spread = shape.prompt_tokens // 10
    prompts = []
    for _ in range(shape.prompts * steps):
        length = shape.prompt_tokens + int(torch.randint(-spread, spread + 1, (1,), generator=generator))
        ids = torch.randint(FIRST_WORD_ID, vocab_size, (length,), generator=generator)
        prompts.append(" ".join(f"w{i}" for i in ids.tolist()))
    return Dataset.from_dict({"prompt": prompts})


def make_model(shape: Shape) -> PreTrainedModel:
    """The shape's model with random weights, ending a completion with probability `1 / completion_mean` per token."""
    torch.manual_seed(MODEL_SEED)
    with torch.device(shape.device):
        model = AutoModelForCausalLM.from_config(shape.model(), dtype=shape.dtype)
    set_eos_probability(model, 1 / shape.completion_mean)
    return model


@torch.no_grad()
def set_eos_probability(model: PreTrainedModel, probability: float) -> None:
    """Set the LM head's end-of-sequence bias so that P(eos), averaged over random contexts, is `probability`.

    The weights of that token are zeroed first: its logit is then the bias in every context, `P = e^b / (e^b + Z)` with
    `Z` a sum over thousands of words, which hardly varies, and so the lengths are geometric.
    """
    head = model.get_output_embeddings()
    if head.bias is None:  # Qwen2 has none
        head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]))
    head.weight[EOS_ID] = 0.0
    head.bias[EOS_ID] = float("-inf")
    contexts = torch.randint(FIRST_WORD_ID, head.weight.size(0), (64, 16), device=model.device)  # [contexts, tokens]
    log_z = model.eval()(contexts, logits_to_keep=1).logits[:, 0].double().logsumexp(-1)  # [contexts]
    low, high = -50.0, 50.0
    for _ in range(60):
        bias = (low + high) / 2
        low, high = (bias, high) if torch.sigmoid(bias - log_z).mean() < probability else (low, bias)
    head.bias[EOS_ID] = bias


def make_lora() -> LoraConfig:
    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def token_hash_reward(completion_ids: list[int]) -> float:
    """A cheap reward in [0, 1) that no two completions of a group are likely to share."""
    return sum(7919 * token % 97 for token in completion_ids) / (97 * len(completion_ids))
