"""Merging: the arithmetic, every kind of adapter, what is written, and what is refused before or after."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from saved_adapters import CHAT_TEMPLATE, save_adapter, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import trl_grpo_ext.export.merge as merging
from trl_grpo_ext.export import MergeCheckError, merge_adapter
from trl_grpo_ext.export import room as memory

TIED = {"tie_word_embeddings": True}
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folders(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> Callable[..., SimpleNamespace]:
    """`folders(dtype=..., kind=..., over={...}, **lora)`: a saved base, a saved adapter, and where to merge to."""

    def make(
        dtype: torch.dtype = torch.float32, kind: str = "qwen2", over: dict[str, Any] | None = None, **lora: Any
    ) -> SimpleNamespace:
        base = save_base(make_model(kind, **(over or {})).to(dtype), tiny_tokenizer, tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's about tied embeddings: that is what some tests are for
            adapter, model = save_adapter(base, tmp_path / "adapter", **lora)
        return SimpleNamespace(base=base, adapter=adapter, model=model, output=tmp_path / "merged")

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[70, 90, 110, 80, 75]])).logits.float()


def product(model: PeftModel, layer: str) -> torch.Tensor:
    """The update of a LoRA layer, s B A, in float64."""
    module = model.get_base_model().get_submodule(layer)
    lora_a, lora_b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
    return (lora_b @ lora_a * 8 / 4).detach()  # s = alpha / r = 8 / 4


# --- the arithmetic, and what is written ---


def test_the_merged_weight_is_the_base_plus_the_scaled_product(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders()
    report = merge_adapter(f.adapter, f.output)
    before = AutoModelForCausalLM.from_pretrained(f.base).get_submodule(QUERY).weight
    merged = AutoModelForCausalLM.from_pretrained(f.output)
    expected = before.double() + product(f.model, QUERY)
    assert torch.allclose(merged.get_submodule(QUERY).weight.double(), expected, rtol=0, atol=1e-7)
    assert torch.allclose(logits(merged), logits(f.model), atol=1e-4)
    assert report.difference.max < 1e-4
    assert report.adapter_effect.mean > 0.1
    assert report.merged_weights == 14  # 2 layers of q, k, v, o, gate, up, down
    assert (report.tolerance, report.dtype, report.base_dtype) == (1e-4, "float32", "float32")
    assert report.update_error == report.update_lost == 0.0


def test_bf16_rounds_each_weight_once(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders(torch.bfloat16)
    report = merge_adapter(f.adapter, f.output)
    before = AutoModelForCausalLM.from_pretrained(f.base).get_submodule(QUERY).weight
    merged = AutoModelForCausalLM.from_pretrained(f.output).get_submodule(QUERY).weight
    module = f.model.get_base_model().get_submodule(QUERY)
    update = (module.lora_B["default"].weight @ module.lora_A["default"].weight) * 2.0
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (before.float() + update).to(torch.bfloat16))
    assert report.dtype == "bfloat16" and report.tolerance is None
    assert 1e-4 < report.difference.max < 1.0  # reported, and bf16's own
    assert 0 < report.update_error < 0.1


def test_an_embedding_is_rounded_once_where_peft_rounds_twice(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders(torch.bfloat16, target_modules=["embed_tokens", "q_proj"])
    merge_adapter(f.adapter, f.output)
    before = AutoModelForCausalLM.from_pretrained(f.base).model.embed_tokens.weight.double()
    layer = f.model.get_base_model().model.embed_tokens
    update = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T.double() * 2.0
    ours = AutoModelForCausalLM.from_pretrained(f.output).model.embed_tokens.weight
    theirs = f.model.merge_and_unload().model.embed_tokens.weight
    assert torch.equal(ours, (before + update).float().to(torch.bfloat16))
    error = [float((weight.double() - before - update).detach().norm()) for weight in (ours, theirs)]
    assert error[0] < error[1]


def test_merging_a_bf16_base_in_float32_loses_nothing(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders(torch.bfloat16)
    report = merge_adapter(f.adapter, f.output, dtype="float32")
    assert report.difference.max < 1e-4 and report.dtype == "float32"
    assert AutoModelForCausalLM.from_pretrained(f.output).dtype == torch.float32


def test_a_float32_base_can_be_written_in_bf16(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders()
    report = merge_adapter(f.adapter, f.output, dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(f.output)
    before = AutoModelForCausalLM.from_pretrained(f.base)
    # One rounding of the float32 sum, not one of the base and one of the sum
    expected = (before.get_submodule(QUERY).weight.double() + product(f.model, QUERY)).float().bfloat16()
    assert torch.equal(merged.get_submodule(QUERY).weight, expected)
    assert torch.equal(merged.model.norm.weight, before.model.norm.weight.bfloat16())
    assert (report.base_dtype, report.dtype) == ("float32", "bfloat16")


def test_the_folder_is_a_plain_model(folders: Callable[..., SimpleNamespace], tiny_tokenizer: Any) -> None:
    f = folders()
    tokenizer = AutoTokenizer.from_pretrained(f.base)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(f.adapter)  # the adapter's tokenizer goes before the base's
    model = AutoModelForCausalLM.from_pretrained(f.base)
    model.generation_config.eos_token_id = [2, 9]
    model.generation_config.save_pretrained(f.base)
    merge_adapter(f.adapter, f.output)
    assert {path.name for path in f.output.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge_report.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert AutoTokenizer.from_pretrained(f.output).chat_template == CHAT_TEMPLATE
    merged = AutoModelForCausalLM.from_pretrained(f.output)
    assert merged.generation_config.eos_token_id == [2, 9]
    assert set(merged.state_dict()) == set(model.state_dict())
    report = json.loads((f.output / "merge_report.json").read_text())
    assert report["difference"]["max"] < 1e-4 and report["base"] == str(f.base) and report["prompts"] == 6
    assert [path.name for path in f.output.parent.iterdir() if path.name.startswith(".")] == []


# --- kinds of adapters ---


@pytest.mark.parametrize(
    ("lora", "kind", "over"),
    [
        ({"use_dora": True}, "qwen2", {}),
        ({"use_rslora": True}, "qwen2", {}),
        ({"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}, "qwen2", {}),
        ({"init_lora_weights": "pissa"}, "qwen2", {}),
        ({"modules_to_save": ["lm_head"]}, "qwen2", {}),
        ({"trainable_token_indices": [5, 70]}, "qwen2", {}),
        ({"trainable_token_indices": [5, 70]}, "qwen2", TIED),
        ({"target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]}, "qwen2", {}),
        (
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
            "mixtral",
            {"num_local_experts": 3},
        ),
        ({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, "gpt2", {"n_head": 4, "n_layer": 2}),
    ],
    ids=[
        "dora",
        "rslora",
        "bias",
        "pissa",
        "modules_to_save",
        "tokens",
        "tied tokens",
        "parameters",
        "experts",
        "conv1d",
    ],
)
def test_other_adapters(
    folders: Callable[..., SimpleNamespace], lora: dict[str, Any], kind: str, over: dict[str, Any]
) -> None:
    f = folders(kind=kind, over=over, **lora)
    report = merge_adapter(f.adapter, f.output, continuation=3)
    merged = AutoModelForCausalLM.from_pretrained(f.output)
    assert report.difference.max < 1e-4 < report.adapter_effect.mean
    assert torch.allclose(logits(merged), logits(f.model), atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"]}, True),
    ],
    ids=["head", "embeddings", "both", "saved embeddings", "both as one", "neither"],
)
def test_tied_embeddings_are_untied_only_if_they_differ(
    folders: Callable[..., SimpleNamespace], lora: dict[str, Any], tied: bool
) -> None:
    f = folders(over=TIED, **lora)
    report = merge_adapter(f.adapter, f.output, continuation=3)
    merged = AutoModelForCausalLM.from_pretrained(f.output)
    before = AutoModelForCausalLM.from_pretrained(f.base).model.embed_tokens.weight
    assert report.difference.max < 1e-4
    assert torch.allclose(logits(merged), logits(f.model), atol=1e-4)
    assert report.tie_word_embeddings == merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()) == tied
    if lora["target_modules"] == ["q_proj", "lm_head"]:
        assert torch.equal(merged.model.embed_tokens.weight, before)
        assert not torch.equal(merged.lm_head.weight, before)


def test_an_adapter_of_a_4_bit_policy_goes_into_the_original_weights(
    folders: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    f = folders(torch.bfloat16)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    policy = AutoModelForCausalLM.from_pretrained(f.base, quantization_config=nf4)
    model = get_peft_model(policy, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(tmp_path / "qlora")
    merge_adapter(tmp_path / "qlora", f.output)
    merged = AutoModelForCausalLM.from_pretrained(f.output).get_submodule(QUERY).weight
    before = AutoModelForCausalLM.from_pretrained(f.base).get_submodule(QUERY).weight
    module = model.get_base_model().get_submodule(QUERY)
    update = (module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float()) * 2.0
    assert torch.equal(merged, (before.float() + update).to(torch.bfloat16))


# --- refused before a weight is read ---


def test_a_4_bit_base_is_refused_by_name(folders: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    f = folders(torch.bfloat16)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(f.base, quantization_config=nf4).save_pretrained(tmp_path / "4bit")
    with pytest.raises(ValueError, match=r"stored quantized \(bitsandbytes 4-bit nf4\).*Pass base=, the 16-bit model"):
        merge_adapter(f.adapter, f.output, base=str(tmp_path / "4bit"))
    assert not f.output.exists()


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
        ({"quant_method": "awq", "bits": 4}, "awq 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_other_quantized_bases_are_refused_by_name(
    folders: Callable[..., SimpleNamespace], quantization: dict[str, Any], name: str
) -> None:
    f = folders()
    config = json.loads((f.base / "config.json").read_text())
    (f.base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ValueError, match=rf"stored quantized \({name}\)"):
        merge_adapter(f.adapter, f.output)


def test_prompt_learning_is_refused(folders: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    f = folders()
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    adapter, _ = save_adapter(f.base, tmp_path / "prompt", config=config)
    with pytest.raises(ValueError, match="peft_type=PROMPT_TUNING adds to the input"):
        merge_adapter(adapter, f.output)


def test_an_activated_lora_is_refused(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders(alora_invocation_tokens=[3, 4])
    with pytest.raises(ValueError, match="alora_invocation_tokens is set"):
        merge_adapter(f.adapter, f.output)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"num_hidden_layers": 1}, "no place for"),
        ({"num_hidden_layers": 3}, "lacks"),
        ({"hidden_size": 48}, "size mismatch|shape"),
    ],
    ids=["fewer layers", "more layers", "wider"],
)
def test_an_adapter_of_another_model_is_refused(
    folders: Callable[..., SimpleNamespace],
    make_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: Any,
    tmp_path: Path,
    over: dict[str, Any],
    message: str,
) -> None:
    f = folders(target_modules=["q_proj", "up_proj"])
    other = save_base(make_model(**over), tiny_tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match=f"does not fit the base model.*({message})"):
        merge_adapter(f.adapter, f.output, base=str(other))
    assert not f.output.exists()


@pytest.mark.parametrize("what", ["adapter", "output", "base", "dtype", "prompts", "long prompt", "tolerance"])
def test_bad_arguments(folders: Callable[..., SimpleNamespace], tmp_path: Path, what: str) -> None:
    f = folders()
    arguments: dict[str, Any] = {"adapter": f.adapter, "output": f.output}
    changed, message = {
        "adapter": ({"adapter": f.base}, "has no adapter_config.json"),
        "output": ({"output": f.base}, "exists already"),
        "base": ({"base": str(tmp_path)}, "has no config.json"),
        "dtype": ({"dtype": "int8"}, "dtype='int8' must be one of"),
        "prompts": ({"prompts": []}, "prompts is empty"),
        "tolerance": ({"tolerance": float("nan")}, "tolerance=nan must be a number of at least 0"),
        "long prompt": (
            {"prompts": ["ok", "x" * 250]},
            "prompt 1 has 250 tokens, and with continuation=16 more than the model's context of 256",
        ),
    }[what]
    with pytest.raises(ValueError, match=message):
        merge_adapter(**(arguments | changed))
    assert not f.output.exists()


def test_a_merge_that_does_not_fit_is_refused_with_figures(
    folders: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    f = folders()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
    with pytest.raises(MemoryError, match=r"merging needs [\d.]+ MiB on cpu and 0\.1 MiB are free"):
        merge_adapter(f.adapter, f.output)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)  # unknown is not refused
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(MemoryError, match="on disk"):
        merge_adapter(f.adapter, f.output)


def test_bytes_needed(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(tie_word_embeddings=True)
    params, table = sum(p.numel() for p in model.parameters()), 259 * 32
    # the base in bf16 and a second table; twice an adapter of 100 numbers, 8 copies of the largest layer (the table),
    # and 4 of 10 tokens' logits, in float32
    expected = 2 * (params + table) + 4 * (2 * 100 + 8 * table + 4 * 10 * 259)
    assert memory.bytes_needed(model.bfloat16(), 100, itemsize=2, tokens=10) == expected
    assert memory.bytes_needed(model, 100, itemsize=4, tokens=10) == expected + 2 * (params + table)


# --- refused once the result is known ---


def test_above_the_tolerance_nothing_is_left(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders()
    there = set(f.output.parent.iterdir())
    with pytest.raises(MergeCheckError, match="more than tolerance=1e-12; nothing was written"):
        merge_adapter(f.adapter, f.output.parent / "new" / "merged", tolerance=1e-12)
    assert set(f.output.parent.iterdir()) == there


def test_a_merge_that_goes_wrong_is_found(
    folders: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check looks at what was written: here the base without the adapter."""
    f = folders()
    real = merging.merge_weights

    def forget(model: PeftModel, *arguments: Any) -> Any:
        model.get_base_model().get_submodule(QUERY).lora_B["default"].weight.data.zero_()
        return real(model, *arguments)

    monkeypatch.setattr(merging, "merge_weights", forget)
    with pytest.raises(MergeCheckError, match=r"tolerance=0\.0001"):
        merge_adapter(f.adapter, f.output)
    assert not f.output.exists()


def test_an_update_that_rounding_swallows_is_refused(folders: Callable[..., SimpleNamespace]) -> None:
    """B of 1e-7 adds some 1e-8 to weights of 0.2, whose bf16 neighbours are 1e-3 away."""
    f = folders(torch.bfloat16, target_modules=["q_proj"], spread=0.0)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f.base), f.adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(1e-3)
    model.save_pretrained(f.adapter)
    with pytest.raises(
        MergeCheckError, match=r"rounding to bfloat16 costs as much as the adapter gives.*dtype='float32'"
    ):
        merge_adapter(f.adapter, f.output)
    assert not f.output.exists()
    report = merge_adapter(f.adapter, f.output, tolerance=1.0)  # on purpose
    assert report.update_lost > 0.5
    report = merge_adapter(f.adapter, f.output.with_name("exact"), dtype="float32")
    assert report.update_lost < 0.01 and report.difference.max < 1e-4


def test_an_untrained_adapter_merges_to_the_base(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders(torch.bfloat16, spread=0.0)
    report = merge_adapter(f.adapter, f.output)
    assert report.difference.max == report.adapter_effect.max == 0.0
    assert (report.merged_weights, report.update_lost, report.update_error) == (0, 0.0, 0.0)


def test_weights_that_float16_cannot_hold_are_refused(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders(torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(f.base)
    model.model.norm.weight.data[3] = 1e6  # float16 ends at 65,504
    model.save_pretrained(f.base)
    with pytest.raises(ValueError, match=r"norm\.weight has values that float16 cannot hold"):
        merge_adapter(f.adapter, f.output, dtype="float16")


def test_a_damaged_adapter_is_refused(folders: Callable[..., SimpleNamespace]) -> None:
    f = folders()
    f.model.get_base_model().get_submodule(QUERY).lora_B["default"].weight.data[0, 0] = torch.nan
    f.model.save_pretrained(f.adapter)
    with pytest.raises((ValueError, FloatingPointError), match="NaN"):
        merge_adapter(f.adapter, f.output)
