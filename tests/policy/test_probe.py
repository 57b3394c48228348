"""Whether prompts can be shared is found out by trying, and said once where they cannot."""

import logging

import pytest
import torch
from accelerate import PartialState

from trl_grpo_ext.attention import GROUP_ATTENTION, use_group_attention
from trl_grpo_ext.policy import CompletionScorer, packing_problem
from trl_grpo_ext.startup import choose_packing

SHAREABLE = {
    "qwen2": {},
    "llama": {},
    "phi": {},
    "gpt2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"head_dim": 8, "layer_types": ["full_attention"] * 2},
}
# On SDPA, and found out only by running them
FOUND = {
    "window": ("mistral", {"sliding_window": 6}, "sliding_window=6"),
    "window longer than the probe": ("mistral", {"sliding_window": 100}, "sliding_window=100"),
    "window in some layers": (
        "gemma3_text",
        {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 100},
        "sliding_window=100",
    ),
    "window of qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "sliding_w",
    ),
    "state space in some layers": (
        "jamba",
        {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "differ by",
    ),
    "convolution in some layers": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "differ by"),
    "layout not handed on": ("stablelm", {}, "differ by"),
    "two attention calls a layer": ("diffllama", {}, "layer_idx"),
}
# Not on SDPA to begin with
UNSWITCHABLE = {
    "state space": ("mamba", {"state_size": 4}),
    "soft-capped": ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 5.0}),
    "alibi": ("bloom", {"n_head": 4}),
}


@pytest.fixture
def logged(caplog):
    """Records of the start-up logger, which speaks once accelerate has a state."""
    ours = not PartialState._shared_state
    if ours:
        PartialState(cpu=True)
    with caplog.at_level(logging.WARNING, logger="trl_grpo_ext.startup"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "trl_grpo_ext.startup"]
    if ours:
        PartialState._reset_state()


def probed(model):
    use_group_attention(model)
    return packing_problem(model, CompletionScorer(model, 1.0))


@pytest.mark.parametrize("kind", SHAREABLE)
def test_causal_attention_can_be_shared(make_model, kind):
    assert probed(make_model(kind, **SHAREABLE[kind])) is None


@pytest.mark.parametrize(("kind", "overrides", "reason"), FOUND.values(), ids=FOUND)
def test_what_cannot_be_shared_is_found(make_model, kind, overrides, reason):
    model = make_model(kind, **overrides)
    assert model.config._attn_implementation == "sdpa"
    problem = probed(model)
    assert problem is not None
    assert reason in problem


@pytest.mark.parametrize(("kind", "overrides"), UNSWITCHABLE.values(), ids=UNSWITCHABLE)
def test_a_layout_that_nobody_reads_is_found(make_model, kind, overrides):
    model = make_model(kind, **overrides)
    assert not use_group_attention(model)
    assert packing_problem(model, CompletionScorer(model, 1.0)) is not None


def test_a_temperature_near_zero_does_not_look_like_a_problem(make_model):
    model = make_model("qwen2")
    use_group_attention(model)
    assert packing_problem(model, CompletionScorer(model, 0.1)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(make_model, dtype):
    assert probed(make_model("qwen2").to(dtype)) is None
    assert probed(make_model("stablelm").to(dtype)) is not None


def test_the_probe_leaves_no_trace(make_model):
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()
    training = [module.training for module in model.modules()]
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert probed(model) is None
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- startup.choose_packing ---


def test_sharing_is_chosen_silently(make_model, logged):
    for choice in ("auto", "on"):
        model = make_model("qwen2")
        assert choose_packing(model, CompletionScorer(model, 1.0), choice) is True
        assert model.config._attn_implementation == GROUP_ATTENTION
    assert logged() == []


def test_off_leaves_the_model_alone(make_model, logged):
    model = make_model("qwen2")
    assert choose_packing(model, CompletionScorer(model, 1.0), "off") is False
    assert model.config._attn_implementation == "sdpa"
    assert logged() == []


CASES = {
    "window": (*FOUND["window"], "sdpa"),
    "hybrid": (*FOUND["state space in some layers"], "sdpa"),
    "soft-capped": (*UNSWITCHABLE["soft-capped"], "attn_implementation='eager' is not 'sdpa'", "eager"),
    "state space": (*UNSWITCHABLE["state space"], "attn_implementation='eager' is not 'sdpa'", "eager"),
}


@pytest.mark.parametrize(("kind", "overrides", "reason", "implementation"), CASES.values(), ids=CASES)
def test_auto_falls_back_with_one_warning_that_says_why(make_model, logged, kind, overrides, reason, implementation):
    model = make_model(kind, **overrides)
    assert choose_packing(model, CompletionScorer(model, 1.0), "auto") is False
    (message,) = logged()
    assert reason in message
    assert "padded rows" in message
    assert model.config._attn_implementation == implementation  # as it was


@pytest.mark.parametrize("case", ["window", "soft-capped"])
def test_on_insists(make_model, logged, case):
    kind, overrides, reason, _ = CASES[case]
    model = make_model(kind, **overrides)
    with pytest.raises(ValueError, match="attention_packing='on'") as caught:
        choose_packing(model, CompletionScorer(model, 1.0), "on")
    assert reason in str(caught.value)
    assert "'auto' or 'off'" in str(caught.value)
    assert logged() == []
