"""Base and adapter on the same prompts, with the same noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from saved_adapters import CHAT_TEMPLATE, save_adapter, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_grpo_ext.quantized import is_repacked
from trl_grpo_ext.rollout import GroupSampler, SamplingParams
from trl_grpo_ext.side_by_side import load_policy, sample_side_by_side

PARAMS = SamplingParams(max_new_tokens=9)
PROMPTS = ["ab", "forty-two"]


@pytest.fixture
def base(tmp_path: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> Path:
    return save_base(make_model(), tiny_tokenizer, tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, tmp_path / "adapter", spread=0.2)[0]


def test_both_are_what_each_draws_alone(base: Path, adapter: Path) -> None:
    found = sample_side_by_side(load_policy(None, str(adapter)), PROMPTS, "both", PARAMS, num_generations=3, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPTS)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    for who, model in (("base", plain), ("adapter", tuned)):
        # The same streams of noise through the slow path, one row per completion
        expected = GroupSampler(model, tokenizer, PARAMS, shared_prompts=False).generate(ids, 3, seed=5)
        texts = tokenizer.batch_decode(expected.completion_ids, skip_special_tokens=True)
        samples = [sample for row in found for sample in row.samples[who]]
        assert [sample.text for sample in samples] == texts
        assert [sample.tokens for sample in samples] == expected.lengths
        assert [sample.finish_reason for sample in samples] == expected.finish_reasons
        assert torch.allclose(torch.tensor([s.logp for s in samples]), expected.logps.sum(1), atol=1e-3)
    assert found[0].samples["base"] != found[0].samples["adapter"]
    assert [row.prompt for row in found] == PROMPTS


def test_an_adapter_that_does_nothing_draws_the_same(base: Path, tmp_path: Path) -> None:
    untrained, _ = save_adapter(base, tmp_path / "untrained", spread=0.0)
    [row] = sample_side_by_side(load_policy(None, str(untrained)), ["ab"], "both", PARAMS, num_generations=4)
    assert [s.text for s in row.samples["base"]] == [s.text for s in row.samples["adapter"]]
    assert len({s.text for s in row.samples["base"]}) > 1


def test_a_chat_template_is_applied_to_texts_unless_told_not_to(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(base)
    policy = load_policy(str(base))
    messages = [{"role": "user", "content": "ab"}]
    chat = sample_side_by_side(policy, ["ab", messages], "base", PARAMS)
    assert [row.prompt for row in chat] == [messages, messages]
    written = sample_side_by_side(policy, ["<user>ab<assistant>"], "base", PARAMS, chat=False)
    assert written[0].samples == chat[0].samples
    assert sample_side_by_side(policy, ["ab"], "base", PARAMS, chat=False)[0].samples != chat[0].samples


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_a_base_quantized_while_loading(adapter: Path, quantize: str) -> None:
    policy = load_policy(None, str(adapter), quantize=quantize)
    linear = policy.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(linear).__name__ == "Linear4bit" and linear.weight.quant_state.quant_type == quantize
    # Secured before anything is computed: bitsandbytes' own forward may repack the weight in its first pass
    assert "forward" in vars(linear)
    policy.model(input_ids=torch.tensor([[3, 4, 5]]))
    assert not is_repacked(linear)
    [row] = sample_side_by_side(policy, ["ab"], "both", PARAMS, num_generations=2)
    assert set(row.samples) == {"base", "adapter"} and len(row.samples["base"]) == 2


def test_models_that_cannot_share_prompts(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    """GPT-2 has learned positions; a model on eager attention is sampled by `model.generate`."""
    folder = save_base(make_model("gpt2", n_head=4, n_layer=2), tiny_tokenizer, tmp_path / "gpt2")
    policy = load_policy(str(folder))
    policy.model.set_attn_implementation("eager")
    slow = sample_side_by_side(policy, PROMPTS, "base", PARAMS)
    fast = sample_side_by_side(load_policy(str(folder)), PROMPTS, "base", PARAMS)
    assert [row.samples["base"][0].text for row in slow] == [row.samples["base"][0].text for row in fast]
    with pytest.raises(
        ValueError, match=r"has 250 tokens, and the model's context of 256 has room for 247.*lower max_new"
    ):
        sample_side_by_side(policy, ["x" * 250], "base", PARAMS)


def test_bad_input(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model and adapter are both missing"):
        load_policy(None)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="is not a folder"):
        load_policy(None, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        load_policy(None, str(base))
    with pytest.raises(ValueError, match=r"Its subfolder\(s\) adapter have one"):
        load_policy(None, str(adapter.parent))
    with pytest.raises(ValueError, match="adapter='no-such/adapter' cannot be read"):  # on the Hub, without network
        load_policy(None, "no-such/adapter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="broken' cannot be read"):
        load_policy(None, str(tmp_path / "broken"))
    with pytest.raises(ValueError, match="quantize='int3' must be one of"):
        load_policy(str(base), quantize="int3")
    policy = load_policy(str(base))
    with pytest.raises(ValueError, match="which='both' needs an adapter"):
        sample_side_by_side(policy, ["ab"], "both", PARAMS)
    with pytest.raises(ValueError, match="prompt 1 has 256 tokens, and the model's context of 256 has room for 255"):
        sample_side_by_side(policy, ["ab", "x" * 256], "base", PARAMS)
    with pytest.raises(ValueError, match="no chat template"):
        sample_side_by_side(policy, [[{"role": "user", "content": "ab"}]], "base", PARAMS)
