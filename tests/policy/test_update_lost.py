"""The share of updates that rounding swallows."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_grpo_ext.policy import UpdateWatch


def step(watch, parameters, gradients, updates):
    """One optimizer step by hand; (lost, counted)."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    watch.before_step()
    with torch.no_grad():
        for parameter, update in zip(parameters, updates, strict=True):
            parameter += update.to(parameter.dtype)
    lost, counted = watch.after_step()
    return int(lost), int(counted)


def test_by_hand():
    a, b, frozen = (nn.Parameter(torch.ones(n)) for n in (5, 3, 2))
    frozen.requires_grad_(False)
    watch = UpdateWatch([a, b, frozen])
    gradients = [torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, -1.0, 1.0])]
    # 1 + 2^-25 is 1 in float32: of a's three entries with a gradient the first and the last are lost, of b's two none
    updates = [torch.tensor([2.0**-25, 0.0, 0.5, 2.0**-25, 0.5]), torch.tensor([0.0, 0.5, 0.5])]
    assert step(watch, [a, b], gradients, updates) == (2, 3 + 2)
    # A second step starts anew
    assert step(watch, [a, b], gradients, [torch.ones(5), torch.ones(3)]) == (0, 5)


def test_without_a_gradient_nothing_is_counted():
    parameter = nn.Parameter(torch.ones(4))
    watch = UpdateWatch([parameter])
    assert step(watch, [parameter], [None], [torch.zeros(4)]) == (0, 0)
    assert step(watch, [parameter], [torch.zeros(4)], [torch.zeros(4)]) == (0, 0)


def test_large_parameters_are_sampled_evenly():
    large, small = nn.Parameter(torch.ones(300, 100)), nn.Parameter(torch.ones(4096))
    watch = UpdateWatch([large, small])
    # 30,000 / 4,096 = 7.3, so every 9th entry: 3,334. The step is odd, so all columns are seen
    gradients = [torch.ones(300, 100), torch.ones(4096)]
    assert step(watch, [large, small], gradients, [torch.zeros(300, 100), torch.ones(4096)]) == (3334, 3334 + 4096)
    half = torch.zeros(300, 100)
    half[:, ::2] = 1.0
    lost, counted = step(watch, [large, small], gradients, [half, torch.ones(4096)])
    assert counted == 3334 + 4096
    assert abs(lost - 3334 / 2) <= 1


@pytest.mark.parametrize("lr", [1e-6, 1e-5])
def test_a_bf16_adapter_loses_most_and_a_float32_one_nothing(make_model, lr):
    """AdamW's first step moves every entry by `lr`, whatever its gradient."""
    torch.manual_seed(0)
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = make_model("qwen2").to(dtype)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {dtype}
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        model(torch.tensor([[5, 6, 7, 8]])).logits.float().log_softmax(-1)[..., 3].sum().backward()
        watch = UpdateWatch(model.parameters())
        watch.before_step()
        before = copy.deepcopy(trained)
        optimizer.step()
        lost, counted = watch.after_step()
        shares[dtype] = float(lost / counted)
        entries = [(p, old) for p, old in zip(trained, before, strict=True)]
        exact = sum(int(((p == old) & (p.grad != 0)).sum()) for p, old in entries) / float(counted)
        assert shares[dtype] == pytest.approx(exact)  # all matrices here are small enough to be counted whole
    assert shares[torch.float32] < 0.01
    assert shares[torch.bfloat16] > (0.9 if lr == 1e-6 else 0.6)
