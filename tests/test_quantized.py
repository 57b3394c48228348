"""bitsandbytes' layers are computed as it computes them, and are never changed by it."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_grpo_ext import base_fingerprint
from trl_grpo_ext.decoding import thin_products
from trl_grpo_ext.fused import fuse_layers
from trl_grpo_ext.quantized import compute_dtype, dequantized, is_repacked, keep_quantized, quantized_layers

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
CONFIGS = {
    f"{kind}{'-nested' * nested}-{str(dtype)[6:]}": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype,
    }
    for kind in ("nf4", "fp4")
    for nested in (False, True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
CONFIGS["8bit"] = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = make_model("qwen2", hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(path)
    return path


def load(folder, config, dtype=torch.float32):
    quantization = BitsAndBytesConfig(**CONFIGS[config])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype)


def logits_and_gradient(model):
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    torch.manual_seed(0)
    logits.backward(torch.randn_like(logits))
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_values_and_gradients_are_bitsandbytes_own(folder, config, dtype):
    """Of its training mode, bit by bit."""
    theirs, ours = load(folder, config, dtype).train(), load(folder, config, dtype).train()
    for model in (theirs, ours):
        model.requires_grad_(False)
    keep_quantized(ours)
    expected = logits_and_gradient(theirs)
    found = logits_and_gradient(ours)
    for own, their in zip(found, expected, strict=True):
        assert own.dtype == their.dtype == dtype
        assert torch.equal(own, their)


@pytest.mark.parametrize("config", CONFIGS)
def test_no_pass_changes_the_base(folder, config):
    """Neither in training nor in evaluation mode, with gradients or without, in rollouts of either kind."""
    model = load(folder, config)
    keep_quantized(model)
    keep_quantized(model)  # idempotent
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprint = base_fingerprint(model)
    results = []
    for training in (True, False):
        model.train(training)
        results.append(logits_and_gradient(model))
        with torch.no_grad():
            results.append((model(IDS).logits, results[0][1]))
            for dequantize in ("layer", "resident"):
                with thin_products(model, dequantize):
                    results.append((model(IDS).logits, results[0][1]))
    for logits, gradient in results:  # `W x^T` and `x W^T` differ by their rounding
        assert (logits - results[0][0]).norm() <= (5e-2 if "float16" in config else 1e-5) * logits.norm()
        assert torch.equal(gradient, results[0][1])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in state.items())
    assert base_fingerprint(model) == fingerprint
    assert not any(is_repacked(layer) for _, layer in quantized_layers(model))


def test_bitsandbytes_own_pass_does_change_it(folder):
    """What all this is for: were it not so any more, `quantized.py` could go."""
    model = load(folder, "nf4-bfloat16").train()
    before = base_fingerprint(model)
    model(IDS)
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16  # cast in place
    assert base_fingerprint(model) != before


@pytest.mark.parametrize("config", CONFIGS)
def test_dequantized_is_what_the_layer_multiplies_by(folder, config):
    model = load(folder, config)
    for _, layer in quantized_layers(model):
        dtype = compute_dtype(layer, torch.float32)
        weight = dequantized(layer, dtype)
        assert weight.shape == (layer.out_features, layer.in_features)
        assert weight.dtype == dtype
        kept = layer.bias
        layer.bias = None
        identity = torch.eye(layer.in_features)
        torch.testing.assert_close(layer.train()(identity).t(), weight.float(), rtol=0, atol=0)
        layer.bias = kept


def test_layers_are_found_under_an_adapter(folder):
    model = load(folder, "nf4-float32")
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(list(quantized_layers(model))) == len(list(quantized_layers(adapted))) == 2 * 7
    assert {type(layer) for _, layer in quantized_layers(model)} == {Linear4bit}
    assert {type(layer) for _, layer in quantized_layers(load(folder, "8bit"))} == {Linear8bitLt}


def test_repacked_weights_are_refused(folder):
    model = load(folder, "nf4-float32").eval()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # what the pass below does, on some CPUs only
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj has been repacked.*Load the model again"):
        keep_quantized(model)


def test_a_repacked_model_is_found(folder):
    model = load(folder, "nf4-float32").eval()
    if not model.model.layers[0].self_attn.q_proj.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    before = base_fingerprint(model)
    with torch.no_grad():
        model(IDS)
    assert base_fingerprint(model) != before
    with pytest.raises(ValueError, match="repacked"):
        keep_quantized(model)


def test_16_bit_main_weights_are_refused(folder):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(ValueError, match="llm_int8_has_fp16_weight=False"):
        keep_quantized(model)


def test_a_model_that_has_run_in_8_bits_before_is_the_same(folder):
    """bitsandbytes moves the scales away in the first pass; PEFT's DoRA looks for them at their old place."""
    used, fresh = load(folder, "8bit").train(), load(folder, "8bit").train()
    used(IDS)
    assert base_fingerprint(used) == base_fingerprint(fresh)
    for model in (used, fresh):
        keep_quantized(model)
    config = {"r": 3, "target_modules": "all-linear", "use_dora": True, "init_lora_weights": False}
    outputs = []
    for model in (used, fresh):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**config))
        fuse_layers(adapted)
        outputs.append([adapted(IDS).logits for _ in range(2)])
    assert all(torch.equal(out, outputs[0][0]) for pair in outputs for out in pair)


def test_a_copy_of_a_layer_is_one_of_its_own(folder):
    model = load(folder, "nf4-float32")
    keep_quantized(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.data.zero_()
        expected = model(IDS).logits
        assert not torch.equal(twin(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)
