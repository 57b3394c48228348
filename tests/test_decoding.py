"""Layers while decoding compute what they compute otherwise, and are as before afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig

import trl_grpo_ext.decoding as decoding
import trl_grpo_ext.fused as fused
from trl_grpo_ext.decoding import thin_products
from trl_grpo_ext.fused import fuse_layers
from trl_grpo_ext.policy import load_model
from trl_grpo_ext.rollout import GroupSampler

IN, OUT = 6, 10


class Net(nn.Module):
    """One linear layer, which PEFT can wrap."""

    def __init__(self, bias):
        super().__init__()
        self.proj = nn.Linear(IN, OUT, bias=bias)

    def forward(self, x):
        return self.proj(x)


def adapted(bias=True, dtype=torch.float32, adapter_dtype=True, **overrides):
    """An adapted layer, fused; B is not zero."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["proj"], "init_lora_weights": False} | overrides
    model = get_peft_model(Net(bias).to(dtype), LoraConfig(**settings), autocast_adapter_dtype=adapter_dtype)
    fuse_layers(model)
    return model


def proj(model):
    return model.base_model.model.proj


# What to make, and what to do to it
LEFT_TO_PEFT = {
    "lora bias": ({"lora_bias": True}, None),
    "two adapters": (
        {},
        lambda model: (
            model.add_adapter("second", LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)),
            model.base_model.set_adapter(["default", "second"]),
        ),
    ),
    "no active adapter": ({}, lambda model: model.base_model.set_adapter([])),
    "disabled": ({}, lambda model: proj(model).enable_adapters(False)),
    "merged": ({}, lambda model: proj(model).merge()),
    "trainable base": ({}, lambda model: proj(model).base_layer.weight.requires_grad_(True)),
    "trainable bias": ({}, lambda model: proj(model).base_layer.bias.requires_grad_(True)),
}


def forwards(model):
    return [vars(module).get("forward") for module in model.modules()]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapter", ["none", "merged", "beside"])
def test_thin_products_are_the_same_at_any_number_of_rows(monkeypatch, bias, adapter):
    monkeypatch.setattr(decoding, "_MERGED_BYTES", 4 * IN * OUT - (adapter == "beside"))  # the size of the one weight
    model = Net(bias) if adapter == "none" else adapted(bias)
    layer = model.proj if adapter == "none" else proj(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    adds = count_additions(monkeypatch)
    torch.manual_seed(2)
    for count in (1, 2, 3, 7, 8, 9, 16, 17, 95, 96, 97, 150):
        x = torch.randn(count, IN)
        with torch.no_grad():
            expected = model(x)
            with thin_products(model):
                assert vars(layer)["forward"].__name__ == "forward"  # a stand-in, not a method
                found = model(x)
                folded = model(x[None, :, None])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(folded, expected[None, :, None], rtol=1e-5, atol=1e-6)
        assert found.is_contiguous()
    assert len(adds) == (12 if adapter == "merged" else 0)  # once for each `with`, and not for each product
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def count_additions(monkeypatch):
    """Of adapters to copies of weights: the calls of `torch.addmm` for matrices."""
    calls = []
    addmm = torch.addmm

    def count(weight, *args, **kwargs):
        calls.extend([1] * ("alpha" in kwargs))
        return addmm(weight, *args, **kwargs)

    monkeypatch.setattr(torch, "addmm", count)
    return calls


def test_half_precision_is_not_merged(monkeypatch):
    # 1 + 2^-10 is 1 in bfloat16: an adapter this small would vanish in a copy of the weight
    model = adapted(bias=False, dtype=torch.bfloat16, adapter_dtype=False, r=1, lora_alpha=1)
    layer = proj(model)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]], dtype=torch.bfloat16)
    adds = count_additions(monkeypatch)
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.copy_(x)
        layer.lora_B["default"].weight.fill_(2.0**-10)
        with thin_products(model):
            out = model(x)
    assert not adds
    assert torch.equal(out, torch.full((1, OUT), 6 * 2.0**-10, dtype=torch.bfloat16))  # base 1 - 1 + ... = 0


@pytest.mark.parametrize("fuse", [False, True])
def test_layers_are_as_before_after_thin_products(make_model, fuse):
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["q_proj", "dense"], init_lora_weights=False)
    model = get_peft_model(make_model("phi"), config).eval()
    if fuse:
        fuse_layers(model)
    before = forwards(model)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    with thin_products(model):
        assert forwards(model) != before
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert forwards(model) == before
    with pytest.raises(RuntimeError, match="inside"), thin_products(model):
        raise RuntimeError("inside")
    assert forwards(model) == before
    assert torch.equal(model(ids).logits, expected)


def test_thin_products_follow_the_weights_of_the_next_time():
    ours = adapted()
    x = torch.randn(3, IN)
    for _ in range(2):
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter += 0.1
            expected = ours(x)
            with thin_products(ours):
                torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", LEFT_TO_PEFT)
def test_thin_products_leave_the_out_of_the_ordinary_alone(case):
    config, change = LEFT_TO_PEFT[case]
    model = adapted(**config)
    torch.manual_seed(3)
    if change is not None:
        change(model)
    x = torch.randn(5, IN)
    before = forwards(model)
    with torch.no_grad():
        expected = model(x)
        with thin_products(model):
            for layer in (proj(model), proj(model).base_layer):
                forward = vars(layer).get("forward")
                assert forward is None or forward.__func__ is fused._fused_forward
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert forwards(model) == before


def test_thin_products_leave_autocast_alone():
    model = Net(True)
    x = torch.randn(5, IN)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        assert expected.dtype == torch.bfloat16
        with thin_products(model):
            assert forwards(model) == [None, None]
            assert torch.equal(model(x), expected)


def test_thin_products_refuse_mixed_precisions_as_a_layer_does():
    model = Net(True)
    x = torch.randn(5, IN).bfloat16()
    with torch.no_grad(), thin_products(model), pytest.raises(RuntimeError, match="same dtype"):
        model(x)


# --- a quantized base ---


class Counted(TorchDispatchMode):
    """How often bitsandbytes dequantizes, in a product or by itself."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.name() in ("bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("qwen2", hidden_size=64, intermediate_size=128).save_pretrained(path)
    return str(path)


def quantized(folder, compute=torch.float32, **config):
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    base = load_model(folder, {"device_map": None}, bits)
    torch.manual_seed(0)
    settings = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False} | config
    model = get_peft_model(base, LoraConfig(**settings))
    fuse_layers(model)
    return model.eval()


LINEAR_LAYERS = 2 * 7


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dequantize", ["layer", "resident"])
def test_a_layer_is_dequantized_once_per_step_at_the_most(folder, tiny_tokenizer, dora, dequantize):
    model = quantized(folder, use_dora=dora)
    sampler = GroupSampler(model, tiny_tokenizer, dequantize=dequantize)
    calls = {}
    for tokens in (1, 6):
        with Counted() as counted:
            sampler.generate([[5, 6, 7]], 2, max_new_tokens=tokens, suppress_tokens=sampler.eos_token_ids)
        calls[tokens] = counted.calls
    norms = LINEAR_LAYERS if dora else 0  # once per generation, for ||W + s B A||
    passes = {1: 1, 6: 6} if dequantize == "layer" else {1: 1, 6: 1}  # reading the prompt is one
    assert calls == {tokens: norms + passes[tokens] * LINEAR_LAYERS for tokens in (1, 6)}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dequantize", ["layer", "resident"])
def test_layers_are_as_before_on_a_quantized_base(folder, compute, dequantize):
    model = quantized(folder, compute)
    before = forwards(model)
    x = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(x).logits
        with thin_products(model, dequantize):
            assert forwards(model) != before
            found = model(x).logits
        assert (found - expected).norm() <= (1e-5 if compute == torch.float32 else 5e-2) * expected.norm()
        assert forwards(model) == before
        assert torch.equal(model(x).logits, expected)


def test_resident_weights_are_those_of_autocast_too(folder):
    model = quantized(folder, torch.bfloat16)
    x = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x).logits
        with thin_products(model, "resident"), Counted() as counted:
            found = model(x).logits
            after_first = counted.calls
            model(x)
            assert counted.calls == after_first == LINEAR_LAYERS
    assert (found - expected).norm() <= 5e-2 * expected.norm()


def test_an_unknown_way_to_dequantize_is_refused(make_model, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"dequantize='once' must be 'layer' or 'resident'"):
        GroupSampler(make_model(), tiny_tokenizer, dequantize="once")


def test_dora_is_settled():
    model = adapted(use_dora=True, bias=True)
    with torch.no_grad():
        proj(model).lora_magnitude_vector["default"].weight.mul_(1.5)
        x = torch.randn(4, IN)
        expected = model(x)
        with thin_products(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
            proj(model).lora_magnitude_vector["default"].weight.mul_(2.0)  # which must not happen inside
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(model(x), expected)
