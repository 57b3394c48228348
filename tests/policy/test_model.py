"""Loading the policy, putting an adapter on it, and what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import BitsAndBytesConfig

from trl_grpo_ext.policy import (
    add_adapter,
    base_model_of,
    context_limit,
    disable_dropout,
    load_model,
    no_gradient_loss,
)


@pytest.fixture
def base(make_model):
    return make_model("qwen2")


# --- load_model ---


def test_a_loaded_model_is_used_as_it_is(base):
    assert load_model(base, {}, None) is base


@pytest.mark.parametrize(
    ("kwargs", "quantization", "name"),
    [({"dtype": "bfloat16"}, None, "model_init_kwargs"), ({}, BitsAndBytesConfig(), "quantization_config")],
)
def test_settings_that_come_too_late_are_refused(base, kwargs, quantization, name):
    with pytest.raises(ValueError, match=f"{name} is set, but the model is already loaded"):
        load_model(base, kwargs, quantization)


def test_a_path_is_loaded_in_float32_unless_told_otherwise(base, tmp_path):
    base.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), {}, None)
    assert type(loaded) is type(base)
    assert loaded.dtype == torch.float32
    kwargs = {"dtype": torch.bfloat16}
    assert load_model(str(tmp_path), kwargs, None).dtype == torch.bfloat16
    assert kwargs == {"dtype": torch.bfloat16}


def test_quantization_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set both as a trainer argument and in model_init_kwargs"):
        load_model(str(tmp_path), {"quantization_config": BitsAndBytesConfig()}, BitsAndBytesConfig())


def test_settings_that_the_model_does_not_take_are_named(base, tmp_path):
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_init_kwargs=\{'attn': 3\} do not fit .* unexpected keyword .*'attn'"):
        load_model(str(tmp_path), {"attn": 3}, None)


# --- add_adapter ---


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("r", 0, "`r` should be a positive integer"),
        ("lora_dropout", 2.0, "between 0 and 1"),
        ("bias", "some", "Requested bias: some, is not implemented"),
        ("target_modules", ["no_proj"], "no_proj"),
    ],
)
def test_what_peft_refuses_is_said_of_the_config(base, field, value, words):
    config = LoraConfig(**{"target_modules": "all-linear", field: value})
    with pytest.raises(ValueError, match=rf"peft_config cannot be put on Qwen2ForCausalLM .*LoraConfig.*{words}"):
        add_adapter(base, config)


def test_no_adapter_asked_for(base):
    assert add_adapter(base, None) is base


def test_a_fresh_adapter_is_all_that_trains(base):
    model = add_adapter(base, LoraConfig(r=3, target_modules="all-linear"))
    assert isinstance(model, PeftModel)
    assert base_model_of(model) is base
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_a_trainable_peft_model_is_taken_as_it_is(base):
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))
    assert add_adapter(model, None) is model


def test_two_adapters_are_refused(base):
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))
    with pytest.raises(ValueError, match="a PeftModel already"):
        add_adapter(model, LoraConfig(r=3, target_modules="all-linear"))


@pytest.mark.parametrize("config", [{"r": 8}, "lora", LoraConfig])
def test_something_else_than_a_config_is_refused(base, config):
    with pytest.raises(TypeError, match=r"must be a peft\.PeftConfig"):
        add_adapter(base, config)


@pytest.mark.parametrize("own", [False, True], ids=["by config", "by PeftModel"])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2), "PREFIX_TUNING"),
    ],
)
def test_prompt_learning_is_refused(base, config, name, own):
    with pytest.raises(ValueError, match=f"{name} is prompt learning"):
        add_adapter(get_peft_model(base, config), None) if own else add_adapter(base, config)


def test_a_head_trained_in_full_is_not_an_adapter_on_it(base):
    model = add_adapter(base, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert any("lm_head" in name and p.requires_grad for name, p in model.named_parameters())


def test_an_adapter_loaded_for_inference_is_refused(base, make_model, tmp_path):
    get_peft_model(base, LoraConfig(r=3, target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        add_adapter(PeftModel.from_pretrained(make_model("qwen2"), tmp_path), None)
    model = PeftModel.from_pretrained(make_model("qwen2"), tmp_path, is_trainable=True)
    assert add_adapter(model, None) is model


# --- the rest ---


def test_dropout_is_disabled_everywhere(make_model):
    model = make_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.2)
    model = get_peft_model(model, LoraConfig(r=3, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True))
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("kind", "field"), [("qwen2", "attention_dropout"), ("opt", "dropout"), ("gpt_neox", "attention_dropout")]
)
def test_dropout_that_is_kept_as_a_number_is_disabled(make_model, kind, field):
    model = make_model(kind, **{field: 0.5}).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert getattr(model.config, field) == 0.5  # which a saved model would carry


@pytest.mark.parametrize(("limit", "expected"), [(77, 77), (0, None)])
def test_the_context_limit_is_the_config_s(base, limit, expected):
    base.config.max_position_embeddings = limit
    assert context_limit(base) == expected


def test_a_config_without_a_limit(make_model):
    model = make_model("mamba", state_size=4)
    del model.config.max_position_embeddings  # which only the fixture gave it
    assert context_limit(model) is None


@pytest.mark.parametrize("full", [False, True])
def test_no_gradient_loss_gives_zeros_to_everything_that_trains(base, full):
    model = base if full else get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))
    loss = no_gradient_loss(model)
    assert loss.shape == ()
    assert loss.item() == 0.0
    loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
        else:
            assert parameter.grad is None


def test_an_optimizer_moves_as_on_computed_zeros(base):
    """Momentum and weight decay go on; gradients that were accumulated before stay."""
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    twin = copy.deepcopy(model)
    ids = torch.tensor([[5, 6, 7]])
    results = []
    for policy, empty in ((model, no_gradient_loss), (twin, lambda policy: policy(ids).logits.sum() * 0.0)):
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        policy(ids).logits.sum().backward()
        empty(policy).backward()  # accumulated on top
        optimizer.step()
        optimizer.zero_grad()
        before = [p.detach().clone() for p in policy.parameters() if p.requires_grad]
        empty(policy).backward()  # a step of its own
        optimizer.step()
        after = [p.detach().clone() for p in policy.parameters() if p.requires_grad]
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        results.append(after)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
