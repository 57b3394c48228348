"""Fused layers compute what the libraries' own do, and leave to them whatever is out of the ordinary."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.activations import NewGELUActivation

import trl_grpo_ext.fused as fused
from trl_grpo_ext.fused import fuse_layers

IN, OUT = 6, 10


class Net(nn.Module):
    """One linear layer, which PEFT can wrap."""

    def __init__(self, bias):
        super().__init__()
        self.proj = nn.Linear(IN, OUT, bias=bias)

    def forward(self, x):
        return self.proj(x)


def twins(bias=True, dtype=torch.float32, adapter_dtype=True, **overrides):
    """The same adapted layer twice, the second one fused; B is not zero."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["proj"], "init_lora_weights": False} | overrides
    plain = get_peft_model(Net(bias).to(dtype), LoraConfig(**settings), autocast_adapter_dtype=adapter_dtype)
    ours = copy.deepcopy(plain)
    fuse_layers(ours)
    return plain, ours


def proj(model):
    return model.base_model.model.proj


@pytest.fixture
def fallbacks(monkeypatch):
    """Counts the calls that are left to PEFT."""
    calls = []
    original = fused._peft_forward

    def count(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(fused, "_peft_forward", count)
    return calls


def run(model, x, **kwargs):
    """Output, and gradients of input and parameters for a random output gradient."""
    x = x.clone().requires_grad_(x.is_floating_point())
    out = model(x, **kwargs)
    torch.manual_seed(1)
    out.backward(torch.randn_like(out))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.detach(), x.grad, grads


def assert_same(ours, plain, **tolerance):
    for a, b in zip(ours[:2], plain[:2], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert ours[2].keys() == plain[2].keys()
    for name, grad in plain[2].items():
        torch.testing.assert_close(ours[2][name], grad, msg=name, **tolerance)


@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 5, IN)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("rslora", [False, True])
def test_values_and_gradients_are_peft_s(fallbacks, shape, bias, rank, rslora):
    plain, ours = twins(bias, r=rank, use_rslora=rslora)
    torch.manual_seed(2)
    x = torch.randn(shape)
    expected = run(plain, x)
    assert len(expected[2]) == 2
    assert_same(run(ours, x), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
        assert not ours(x).requires_grad
    assert not fallbacks


def test_in_double_precision_the_gradient_is_the_numerical_one(fallbacks):
    _, ours = twins(dtype=torch.float64)
    layer = proj(ours)
    torch.manual_seed(2)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert all(w.dtype == torch.float64 for w in weights)
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *weights))
    assert not fallbacks


def test_an_input_without_a_gradient(fallbacks):
    plain, ours = twins()
    x = torch.randn(5, IN)
    for model in (plain, ours):
        model(x).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        grads = [getattr(proj(model), name)["default"].weight.grad for model in (ours, plain)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert proj(ours).base_layer.weight.grad is None
    assert not fallbacks


def test_inputs_that_are_not_contiguous(fallbacks):
    plain, ours = twins()
    x = torch.randn(IN, 4, 3).permute(2, 1, 0)
    assert_same(run(ours, x), run(plain, x), rtol=1e-5, atol=1e-6)
    assert not fallbacks


def test_the_input_is_not_written_to():
    _, ours = twins()
    x = torch.randn(5, IN)
    before = x.clone()
    run(ours, x)
    with torch.no_grad():
        ours(x)
    assert torch.equal(x, before)


def autocast(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run(model, x)


# What to make, what to do to each of the twins, and how to run them
LEFT_TO_PEFT = {
    "dora": ({"use_dora": True}, None, run),
    "lora bias": ({"lora_bias": True}, None, run),
    "two adapters": (
        {},
        lambda model: (
            model.add_adapter("second", LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)),
            model.base_model.set_adapter(["default", "second"]),
        ),
        run,
    ),
    "no active adapter": ({}, lambda model: model.base_model.set_adapter([]), None),
    "disabled": ({}, lambda model: proj(model).enable_adapters(False), None),
    "merged": ({}, lambda model: proj(model).merge(), None),
    "autocast": ({}, None, autocast),
    "trainable base": ({}, lambda model: proj(model).base_layer.weight.requires_grad_(True), run),
    "trainable bias": ({}, lambda model: proj(model).base_layer.bias.requires_grad_(True), run),
}


@pytest.mark.parametrize(("config", "change", "how"), LEFT_TO_PEFT.values(), ids=LEFT_TO_PEFT)
def test_out_of_the_ordinary_is_peft_s(fallbacks, config, change, how):
    models = twins(**config)
    results = []
    x = torch.randn(5, IN)
    for model in models:
        torch.manual_seed(3)  # a second adapter is drawn at random
        if change is not None:
            change(model)
        results.append(how(model, x) if how else (model(x).detach(), None, {}))
    assert torch.equal(results[0][0], results[1][0])
    if how:
        assert_same(results[1], results[0], rtol=0, atol=0)
    assert len(fallbacks) == 1


def test_a_layer_switches_back_when_it_is_ordinary_again(fallbacks):
    plain, ours = twins()
    x = torch.randn(5, IN)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(x), proj(plain).base_layer(x))
    assert len(fallbacks) == 1
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
    assert len(fallbacks) == 1


def test_dropout_is_peft_s_in_training_and_nothing_in_evaluation(fallbacks):
    plain, ours = twins(lora_dropout=0.5)
    x = torch.randn(5, IN)
    outputs = []
    for model in (plain, ours):
        torch.manual_seed(4)
        outputs.append(model.train()(x))
    assert torch.equal(*outputs)
    assert len(fallbacks) == 1
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-6)
    assert len(fallbacks) == 1
    ours.train()
    proj(ours).lora_dropout["default"].p = 0.0  # as disable_dropout leaves it
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
    assert len(fallbacks) == 1


def test_a_bf16_base_computes_a_float32_adapter_in_bf16(fallbacks):
    plain, ours = twins(dtype=torch.bfloat16)
    assert proj(ours).lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(5, IN, dtype=torch.bfloat16)
    (out, x_grad, grads), (plain_out, plain_x_grad, plain_grads) = run(ours, x), run(plain, x)
    assert out.dtype == x_grad.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    pairs = [(out, plain_out), (x_grad, plain_x_grad), *((grads[name], g) for name, g in plain_grads.items())]
    for own, theirs in pairs:  # PEFT's are of products in float32
        assert (own - theirs).float().norm() <= 0.02 * theirs.float().norm()
    # By hand: the float32 weights are rounded, and nothing else is
    layer = proj(ours)
    a, b = (layer.lora_A["default"].weight.bfloat16(), layer.lora_B["default"].weight.bfloat16())
    assert torch.equal(out, torch.add(layer.base_layer(x), (x @ a.t()) @ b.t(), alpha=layer.scaling["default"]))
    assert not fallbacks


def test_all_in_bf16(fallbacks):
    plain, ours = twins(dtype=torch.bfloat16, adapter_dtype=False)
    x = torch.randn(5, IN, dtype=torch.bfloat16)
    (out, x_grad, grads), (plain_out, plain_x_grad, plain_grads) = run(ours, x), run(plain, x)
    assert out.dtype == x_grad.dtype == torch.bfloat16
    pairs = [(out, plain_out), (x_grad, plain_x_grad), *((grads[name], g) for name, g in plain_grads.items())]
    for own, theirs in pairs:
        assert (own - theirs).float().norm() <= 0.02 * theirs.float().norm()
    assert not fallbacks


def test_mixed_batches_of_adapters_are_peft_s(fallbacks):
    plain, ours = twins()
    x = torch.randn(2, IN)
    names = ["default", "__base__"]
    outputs = [proj(model)(x, adapter_names=names) for model in (ours.eval(), plain.eval())]
    assert torch.equal(*outputs)
    assert len(fallbacks) == 1


def test_layers_that_are_none_of_ours_are_left_alone(make_model):
    model = make_model("gpt2")  # its Conv1D layers are transposed
    config = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    fuse_layers(model)
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, LoraLinear))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_whole_model_is_the_same(make_model, fallbacks):
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    plain = get_peft_model(make_model("phi"), config).train()  # biases, gelu_new
    assert any(isinstance(m, NewGELUActivation) for m in plain.modules())
    ours = copy.deepcopy(plain)
    fuse_layers(ours)
    fuse_layers(ours)  # idempotent
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    grads = []
    for model in (plain, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = model(ids).logits
        logits.log_softmax(-1)[..., 5].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"": logits.detach()})
    assert not fallbacks
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_a_copy_of_a_fused_layer_is_a_layer_of_its_own(fallbacks):
    plain, ours = twins()
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        proj(twin).lora_B["default"].weight.zero_()
    x = torch.randn(5, IN)
    torch.testing.assert_close(twin(x), proj(plain).base_layer(x))
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
    assert not fallbacks


def test_a_fused_model_saves_and_loads_like_any_other(make_model, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    plain = get_peft_model(make_model("qwen2"), config).eval()
    ours = copy.deepcopy(plain)
    fuse_layers(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ids = torch.tensor([[5, 6, 7]])
    expected = plain(ids).logits
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("qwen2"), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    merged = ours.merge_and_unload()
    assert not any(isinstance(m, LoraLinear) for m in merged.modules())
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
