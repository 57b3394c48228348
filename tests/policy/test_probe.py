"""Whether prompts can be shared is found out by trying, and said once where they cannot."""

import logging
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig

from trl_grpo_ext.attention import GROUP_ATTENTION, use_group_attention
from trl_grpo_ext.policy import CompletionScorer, load_model, packing_problem
from trl_grpo_ext.startup import choose_packing

SHAREABLE = {
    "qwen2": {},
    "llama": {},
    "phi": {},
    "gpt2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "phi3": {},
    "qwen2_moe": {"num_experts": 4},
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
    # In the mask alone, and longer than the probe: the config says so
    "window in the mask": ("phimoe", {"sliding_window": 100, "num_local_experts": 2}, "sliding_window=100"),
    "window in the mask of some layers": (
        "qwen2_moe",
        {"num_experts": 4, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1},
        "layer_types are sliding_attention",
    ),
    "sparse attention": (
        "deepseek_v32",
        {"num_key_value_heads": 4, "first_k_dense_replace": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "index_n_heads": 2, "index_head_dim": 8},
        "layer_types are indexed_attention",
    ),
    "dynamic mask": ("doge", {"keep_window_size": 100}, "keep_window_size=100"),
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


class Noisy:
    """A scorer whose passes are off by noise: the packed one, and each pass of a single completion."""

    def __init__(self, scorer, packed, alone):
        self.scorer, self.noise, self.alone = scorer, packed, alone

    def packed(self, model, row):
        scores = self.scorer.packed(model, row)
        return replace(scores, logps=scores.logps + self.noise)

    def padded(self, model, prompts, completions, **kwargs):
        scores = self.scorer.padded(model, prompts, completions, **kwargs)
        return replace(scores, logps=scores.logps + (self.alone if len(prompts) == 1 else 0.0))


@pytest.mark.parametrize(
    ("quantized", "packed", "alone", "fine"),
    [
        (False, 5e-4, 0.0, True),
        (False, 0.05, 0.0, False),
        (False, 0.05, 0.02, True),  # within 4 times what the padded path is off by itself
        (False, 0.05, 0.01, False),
        (True, 0.05, 0.0, True),  # float32 by its embeddings, but its layers compute in bfloat16
        (True, 0.2, 0.0, False),
        (True, float("nan"), 0.0, False),
        (True, 0.05, float("nan"), True),
    ],
)
def test_rounding_is_told_from_a_mistake(make_model, quantized, packed, alone, fine):
    model = make_model("qwen2")
    use_group_attention(model)
    if quantized:
        model.quantization_method = "bitsandbytes"
    problem = packing_problem(model, Noisy(CompletionScorer(model, 1.0), packed, alone))
    assert (problem is None) is fine
    assert fine or "differ by" in problem


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_a_4_bit_base_can_be_packed(make_model, tmp_path, compute, seed):
    """Its embeddings are float32, so its dtype is; on some seeds and CPUs the first differ by 0.006."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "initializer_range": 0.1}
    make_model("qwen2", seed, **sizes).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = load_model(str(tmp_path), {"device_map": None}, config)
    assert model.dtype == torch.float32
    assert probed(model) is None


def test_running_out_of_memory_is_no_answer(make_model):
    model = make_model("qwen2").train()
    use_group_attention(model)
    scorer = CompletionScorer(model, 1.0)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scorer.packed = full
    with pytest.raises(torch.OutOfMemoryError):
        packing_problem(model, scorer)
    assert all(module.training for module in model.modules())


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
