"""The registered attention function: plain SDPA to everybody who does not hand it a layout."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from trl_grpo_ext.attention import (
    GROUP_ATTENTION,
    UnsupportedAttention,
    dummy_mask,
    group_attention,
    local_attention,
    use_group_attention,
)

KINDS = {"qwen2": {}, "gpt2": {}, "phi": {}, "mistral": {"sliding_window": 3}, "gemma3_text": {"head_dim": 8}}


@pytest.fixture(params=KINDS)
def twins(make_model, request):
    """The same model on SDPA and on the registered function."""
    plain, ours = (make_model(request.param, **KINDS[request.param]).eval() for _ in range(2))
    assert use_group_attention(ours)
    assert (plain.config._attn_implementation, ours.config._attn_implementation) == ("sdpa", GROUP_ATTENTION)
    return plain, ours


IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def test_a_forward_pass_is_plain_sdpa(twins):
    plain, ours = twins
    for mask in (None, MASK):
        assert torch.equal(ours(IDS, attention_mask=mask).logits, plain(IDS, attention_mask=mask).logits)


def test_generate_is_plain_sdpa(twins):
    plain, ours = twins
    outputs = [
        model.generate(IDS, attention_mask=MASK, max_new_tokens=9, do_sample=False, output_scores=True,
                       return_dict_in_generate=True)
        for model in (plain, ours)
    ]  # fmt: skip
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0].scores, outputs[1].scores, strict=True))


def test_gradients_are_plain_sdpa_s(twins):
    grads = []
    for model in twins:
        model(IDS, attention_mask=MASK).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Recorder:
    """A layout that notes what it is asked and answers with zeros."""

    def __init__(self):
        self.calls = []

    def attend(self, query, key, value, *, layer_idx, scaling, dropout):
        self.calls.append((tuple(query.shape), tuple(key.shape), layer_idx, scaling, dropout))
        return torch.zeros(query.shape).transpose(1, 2)


def test_a_layout_travels_through_the_model_to_every_layer(make_model):
    model = make_model("qwen2", attention_dropout=0.25).train()
    assert use_group_attention(model)
    layout = Recorder()
    positions = torch.arange(5)[None]
    model(torch.tensor([[5, 6, 7, 8, 9]]), attention_mask=dummy_mask(model.device), position_ids=positions,
          group_layout=layout)  # fmt: skip
    # 4 heads and 2 key-value heads of 8: scale 8 ** -0.5
    assert layout.calls == [((1, 4, 5, 8), (1, 2, 5, 8), layer, 8**-0.5, 0.25) for layer in range(2)]


def test_the_scale_is_one_over_the_root_of_the_depth_unless_given():
    layout = Recorder()
    query = torch.zeros(1, 2, 3, 16)
    group_attention(nn.Module(), query, query, query, None, group_layout=layout)
    group_attention(nn.Module(), query, query, query, None, scaling=0.5, group_layout=layout)
    assert [call[3] for call in layout.calls] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("keyword", "value"), [("softcap", 50.0), ("sliding_window", 3), ("s_aux", 1.0), ("position_bias", 2.0)]
)
def test_attention_of_another_kind_is_refused(keyword, value):
    query = torch.zeros(1, 2, 3, 4)
    layout = Recorder()
    with pytest.raises(UnsupportedAttention, match=f"Linear uses {keyword}={value}"):
        group_attention(nn.Linear(1, 1), query, query, query, None, group_layout=layout, **{keyword: value})
    assert layout.calls == []
    group_attention(nn.Linear(1, 1), query, query, query, None, group_layout=layout, **{keyword: None})
    assert len(layout.calls) == 1


LOCAL = {
    "mistral": ({}, "sliding_window=4096"),
    "phimoe": ({"sliding_window": 100}, "sliding_window=100"),
    "llama4_text": ({}, "chunked_attention"),
    "gemma3_text": ({}, "sliding_attention"),
    "qwen2": ({"use_sliding_window": True, "max_window_layers": 3}, "sliding_attention"),
    "qwen2_moe": ({"use_sliding_window": True}, "sliding_attention"),
    "deepseek_v32": ({}, "indexed_attention"),
    "glm_moe_dsa": ({}, "indexed_attention"),
    "jamba": ({}, "linear_attention"),
}
FULL = (
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "llama",
    "gemma",
    "phi",
    "phi3",
    "phimoe",
    "gpt2",
    "mixtral",
    "olmo2",
)


@pytest.mark.parametrize("kind", LOCAL)
def test_a_pattern_in_the_mask_alone_is_read_from_the_config(kind):
    overrides, reason = LOCAL[kind]
    found = local_attention(SimpleNamespace(config=AutoConfig.for_model(kind, **overrides)))
    assert found is not None and reason in found


@pytest.mark.parametrize("kind", FULL)
def test_full_attention_has_no_pattern(kind):
    assert local_attention(SimpleNamespace(config=AutoConfig.for_model(kind))) is None


def test_a_window_that_no_layer_uses_is_none():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    assert config.sliding_window == 4096
    assert local_attention(SimpleNamespace(config=config)) is None


def test_models_off_sdpa_stay_as_they_are(make_model):
    model = make_model("qwen2", attn_implementation="eager")
    assert not use_group_attention(model)
    assert model.config._attn_implementation == "eager"


def test_switching_twice_is_switching_once(make_model):
    model = make_model("qwen2")
    assert use_group_attention(model)
    assert use_group_attention(model)
    assert model.config._attn_implementation == GROUP_ATTENTION
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_a_switched_model_saves_like_any_other(make_model, tmp_path):
    model = make_model("qwen2")
    assert use_group_attention(model)
    model.save_pretrained(tmp_path)
    assert GROUP_ATTENTION not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"
