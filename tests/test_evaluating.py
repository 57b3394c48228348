"""Evaluation mode for a while, and every module back as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from trl_grpo_ext.evaluating import evaluating
from trl_grpo_ext.policy import load_model


def test_modules_come_back_as_they_were_after_an_error_too(make_model):
    model = make_model("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    ids = torch.tensor([[5, 6, 7]])
    random = torch.get_rng_state()
    with evaluating(model), torch.no_grad():
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(IndexError), evaluating(model):
        raise IndexError
    assert [module.training for module in model.modules()] == before


def test_a_4_bit_base_has_the_same_gradient_afterwards(make_model, tmp_path):
    """A pass in bitsandbytes' own evaluation mode would leave it without one, on a CPU that has AVX512-BF16."""
    make_model("qwen2", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = load_model(str(tmp_path), {"device_map": None}, config)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).train()
    ids = torch.tensor([[5, 6, 7, 8]])

    def gradients():
        model.zero_grad()
        model(input_ids=ids).logits.log_softmax(-1)[..., 3].sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    before = gradients()
    model.eval()  # as from_pretrained leaves a model
    with evaluating(model), torch.no_grad():
        model(input_ids=ids)
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))
