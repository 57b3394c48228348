"""Norms, gated MLPs and gelu_new in fewer passes: the libraries' own values and gradients, or left alone."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import dropout, gelu, silu
from transformers.activations import NewGELUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trl_grpo_ext.elementwise import fuse_elementwise

WIDTH, INNER = 6, 10


def fused(module):
    """Whether its forward is ours."""
    return "forward" in vars(module)


def norm(eps=0.3):
    """Its weight is frozen, as under an adapter; eps is so large that it matters."""
    layer = LlamaRMSNorm(WIDTH, eps)
    torch.manual_seed(0)
    layer.weight = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
    return layer


class Gated(nn.Module):
    def __init__(self, act_fn=silu, factor=1.0, lora=None):
        super().__init__()
        torch.manual_seed(1)
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)
        self.act_fn, self.factor = act_fn, factor

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor


def both(layer, x):
    """Outputs and gradients of input and parameters, of the layer as it is and fused."""
    results = []
    for one in (copy.deepcopy(layer), copy.deepcopy(layer)):
        if results:
            fuse_elementwise(nn.Sequential(one))
            assert fused(one)
        own = x.clone().requires_grad_()
        out = one(own)
        torch.manual_seed(2)
        out.backward(torch.randn_like(out))
        with torch.no_grad():
            again = one(x)
        results.append([out.detach(), own.grad, again, *(p.grad for p in one.parameters() if p.requires_grad)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("layer", [norm(), norm(1e-6), Gated()], ids=["norm", "norm, small eps", "gated"])
@pytest.mark.parametrize("shape", [(WIDTH,), (7, WIDTH), (2, 5, WIDTH)])
def test_values_and_gradients_are_the_layer_s_own(layer, shape):
    torch.manual_seed(3)
    for plain, ours in both(layer, 2 * torch.randn(shape)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_a_norm_by_hand():
    # mean((3, 4)^2) = 12.5, + 0.5 = 13; (3 * 2, 4 * -1) / sqrt(13)
    layer = LlamaRMSNorm(2, 0.5)
    layer.weight = nn.Parameter(torch.tensor([2.0, -1.0]), requires_grad=False)
    fuse_elementwise(nn.Sequential(layer))
    assert fused(layer)
    expected = torch.tensor([6.0, -4.0]) / 13**0.5
    torch.testing.assert_close(layer(torch.tensor([3.0, 4.0])), expected)


@pytest.mark.parametrize("layer", [norm(), Gated()], ids=["norm", "gated"])
def test_gradients_are_the_numerical_ones(layer):
    from trl_grpo_ext.elementwise import _RMSNorm, _SwiGLU

    torch.manual_seed(4)
    x, y = (torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if isinstance(layer, LlamaRMSNorm):
        assert torch.autograd.gradcheck(lambda x: _RMSNorm.apply(x, layer.weight.double(), 0.3), (x,))
    else:
        assert torch.autograd.gradcheck(_SwiGLU.apply, (x, y))
        assert torch.autograd.gradcheck(lambda x: _SwiGLU.apply(x, y.detach()), (x,))
        assert torch.autograd.gradcheck(lambda y: _SwiGLU.apply(x.detach(), y), (y,))


def test_less_is_kept_for_the_backward():
    """Bytes that autograd holds on to, parameters aside."""

    def kept(layer):
        sizes = {}
        own = {p.data_ptr() for p in layer.parameters()}
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(
            lambda t: (sizes.update({t.data_ptr(): t.nbytes} if t.data_ptr() not in own else {}), t)[1], lambda t: t
        ):
            layer(torch.randn(50, WIDTH, requires_grad=True))
        return sum(sizes.values())

    layer = Gated()
    before = kept(layer)
    fuse_elementwise(nn.Sequential(layer))
    # input 50 x 6; gate, up and product 50 x 10 each; before also silu(gate)
    assert (before, kept(layer)) == (4 * 50 * (6 + 4 * 10), 4 * 50 * (6 + 3 * 10))
    layer = norm()
    before = kept(layer)
    fuse_elementwise(nn.Sequential(layer))
    assert kept(layer) == before == 4 * 50 * (6 + 1)  # the input, and one number per row


LEFT_ALONE = {
    "gated by gelu": lambda: Gated(gelu),
    "scaled": lambda: Gated(factor=1.001),
    "one plus weight": lambda: GemmaRMSNorm(WIDTH),
    "bf16 norm": lambda: norm().bfloat16(),
    "bf16 gated": lambda: Gated().bfloat16(),
    "meta": lambda: Gated().to("meta"),
}


@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_layers_that_compute_something_else_are_left_alone(make):
    layer = make()
    fuse_elementwise(nn.Sequential(layer))
    assert not fused(layer)


def test_a_layer_that_takes_more_is_left_alone():
    class Routed(Gated):
        def forward(self, x, experts):
            return super().forward(x) * experts

    layer = Routed()
    fuse_elementwise(nn.Sequential(layer))
    assert not fused(layer)


def test_an_mlp_with_dropout_of_its_own_is_left_alone():
    """The trial runs in evaluation, where the two are the same."""

    class Dropping(Gated):
        def __init__(self):
            super().__init__()
            self.residual_dropout = 0.5

        def forward(self, x):
            return dropout(super().forward(x), self.residual_dropout, self.training)

    layer = Dropping()
    fuse_elementwise(nn.Sequential(layer))
    assert not fused(layer)


def test_somebody_s_hook_stays():
    layer = norm()
    mine = layer.forward = lambda x: x
    fuse_elementwise(nn.Sequential(layer))
    assert layer.forward is mine


def test_a_trainable_norm_gets_its_gradient():
    layer = norm()
    fuse_elementwise(nn.Sequential(layer))
    layer.weight.requires_grad_(True)
    layer(torch.randn(4, WIDTH)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("layer", [norm(), Gated()], ids=["norm", "gated"])
def test_autocast_and_half_precision_are_the_layer_s_own(layer):
    plain = copy.deepcopy(layer)
    fuse_elementwise(nn.Sequential(layer))
    torch.manual_seed(5)
    x = torch.randn(4, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x)) and layer(x).dtype == plain(x).dtype
    half = x.bfloat16()
    assert torch.equal(layer.bfloat16()(half), plain.bfloat16()(half))


def test_a_whole_model_with_dropout_is_the_same(make_model):
    """Fusing draws no random numbers, and a dropout falls as it would have."""
    config = LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    torch.manual_seed(6)
    plain = get_peft_model(make_model("qwen2"), config).train()
    ours = copy.deepcopy(plain)
    state = torch.get_rng_state()
    fuse_elementwise(ours)
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.training and sum(map(fused, ours.modules())) > 4
    fuse_elementwise(ours)  # idempotent
    grads = []
    for model in (plain, ours):
        torch.manual_seed(7)
        logits = model(torch.tensor([[5, 6, 7, 8]])).logits
        logits.log_softmax(-1)[..., 5].sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"": logits.detach()})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_gelu_new_is_transformers_own():
    plain, ours = NewGELUActivation(), NewGELUActivation()
    fuse_elementwise(nn.Sequential(ours))
    grads, outputs = [], []
    for activation in (plain, ours):
        x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
        outputs.append(activation(x))
        outputs[-1].sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    # 0.5 * 1 * (1 + tanh(sqrt(2 / pi) * (1 + 0.044715))) = 0.5 * (1 + tanh(0.833562)) = 0.841192
    assert ours(torch.tensor(1.0)).item() == pytest.approx(0.841192, abs=1e-6)
    assert len(outputs[1].grad_fn.next_functions) == 1  # one operation on x
