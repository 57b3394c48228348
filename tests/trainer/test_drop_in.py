"""Scripts written for TRL run with another import; models come as objects, paths or `PeftModel`s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from trl_grpo_ext import GRPOConfig, GRPOTrainer

TRL_IMPORT = "from trl import GRPOConfig, GRPOTrainer"
SCRIPT = f"""
from datasets import Dataset
from peft import LoraConfig
{TRL_IMPORT}

dataset = Dataset.from_dict({{"prompt": ["ab", "question", "cde?", "x"], "target": [1, 2, 3, 4]}})


def reward_len(completions, target, **kwargs):
    return [-abs(target[i] - len(completion)) for i, completion in enumerate(completions)]


training_args = GRPOConfig(
    output_dir=output_dir,
    per_device_train_batch_size=4,
    num_generations=2,
    max_completion_length=5,
    learning_rate=1e-3,
    beta=0.01,
    scale_rewards=False,
    loss_type="dr_grpo",
    bf16=False,
    use_cpu=True,
    report_to="none",
    max_steps=2,
    logging_steps=1,
    save_steps=2,
)
trainer = GRPOTrainer(
    model=model_path,
    reward_funcs=reward_len,
    args=training_args,
    train_dataset=dataset,
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
)
trainer.train()
trainer.save_model(output_dir)
"""


@pytest.fixture
def model_path(tmp_path, make_model, tiny_tokenizer):
    make_model().save_pretrained(tmp_path / "tiny-model")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny-model")
    return str(tmp_path / "tiny-model")


@pytest.mark.parametrize("package", ["trl", "trl_grpo_ext"])
def test_script_for_trl_runs_with_another_import(package, model_path, tmp_path, make_model):
    """No processing class, the model by its path: both come from the folder."""
    assert TRL_IMPORT in SCRIPT
    names: dict[str, Any] = {"model_path": model_path, "output_dir": str(tmp_path / "out")}
    exec(SCRIPT.replace(TRL_IMPORT, TRL_IMPORT.replace("trl", package)), names)

    trainer = names["trainer"]
    assert type(trainer).__module__.split(".")[0] == package
    assert trainer.state.global_step == 2
    assert trainer.processing_class.eos_token == "<eos>"
    folders = {path.name for path in Path(names["output_dir"]).iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "checkpoint-2"} <= folders
    loaded = PeftModel.from_pretrained(make_model(), names["output_dir"])
    ids = torch.tensor([[3, 4, 5]])
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_config_of_trl_gives_the_same_run(make_trainer, tmp_path, settings):
    fields = settings | {"beta": 0.04, "scale_rewards": False, "gradient_accumulation_steps": 2}
    adapters = []
    for config in (GRPOConfig, TRLGRPOConfig):
        trainer = make_trainer(args=config(output_dir=str(tmp_path / "out"), **fields))
        assert isinstance(trainer.args, GRPOConfig)
        trainer.train()
        adapters.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*adapters, strict=True))


def test_default_args_are_named_after_the_model(make_model, tiny_tokenizer, reward, rows, lora, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.config._name_or_path = "someone/tiny-model"
    trainer = GRPOTrainer(model, reward, train_dataset=rows, processing_class=tiny_tokenizer, peft_config=lora())
    assert trainer.args.output_dir.endswith("tiny-model-GRPO")
    assert trainer.args.num_generations == 8


def test_dtype_of_a_model_given_by_path(make_trainer, model_path, lora):
    for kwargs, dtype in ((None, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)):
        trainer = make_trainer(model=model_path, peft_config=lora(), model_init_kwargs=kwargs)
        assert trainer.model.get_base_model().dtype == dtype
        trainer.train()
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_peft_model_goes_on_training_its_adapter(make_trainer, make_model, lora, model_path, tmp_path):
    first = make_trainer(max_steps=1)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    policy = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    second = make_trainer(model=policy, max_steps=1)
    for (name, mine), (_, theirs) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    second.train()
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)


def test_model_gets_tags_and_a_model_card_that_cites_the_paper(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2402.03300" in card and "trl-grpo-ext" in card


def test_dropout_is_off_where_it_is_asked_to_be(make_trainer, make_model, lora):
    for disable, probability in ((True, 0.0), (False, 0.3)):
        config = lora()
        config.lora_dropout = 0.3
        trainer = make_trainer(
            model=get_peft_model(make_model(), config), disable_dropout=disable, num_iterations=2, max_steps=1
        )
        found = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
        assert probability in found
