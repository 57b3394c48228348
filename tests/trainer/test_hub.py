"""Pushing from the trainer, against a local Hub: at the end, beside training, and when the Hub does not play along."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel
from safetensors.torch import load as load_tensors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trl_grpo_ext import GRPOTrainer, base_fingerprint
from trl_grpo_ext.hub import UploadError, load_run_config, publishing, run_adapter, run_arguments

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "reward_curves.svg", "training_config.yaml"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}

TRAIN = """
import functools, json
from datasets import Dataset
from peft import LoraConfig
import torch
from trl_grpo_ext import GRPOConfig, GRPOTrainer
from trl_grpo_ext.rewards import in_process

SECRET = {token!r}

@in_process
def token_sum(completion_ids, **columns):
    assert SECRET  # of no use, and in the closure
    return [sum((i + 1) * t for i, t in enumerate(ids)) % 11 / 3.0 for ids in completion_ids]

rows = Dataset.from_dict({{"prompt": "ab question cde? x forty-two hi-you why".split()}})
trainer = GRPOTrainer(
    "ada/tiny-base", token_sum,
    GRPOConfig(output_dir="out", hub_model_id="run", push_to_hub=True, hub_token=SECRET, hub_private_repo=True,
        hub_strategy="all_checkpoints", save_strategy="steps", save_steps=1, save_total_limit=1, hub_always_push=True,
        model_init_kwargs={{"token": SECRET, "dtype": "float32"}}, eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=3, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1,
        learning_rate=0.1, optim="sgd", seed=3, per_device_train_batch_size=6, num_generations=3,
        max_completion_length=7, max_steps=2),
    rows, rows.select(range(2)),
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
print(trainer.args, repr(trainer.args))
trainer.train()
trainer.save_model()
model = trainer.model.eval()
ids = torch.arange(5, 45)[None]
with torch.no_grad():
    logps = model(ids).logits.log_softmax(-1)[0, range(39), ids[0, 1:]]
with open("logps.json", "w") as file:
    json.dump(logps.tolist(), file)
"""

LOAD = """
{lines}
import json, sys, torch
assert "trl" not in sys.modules and "trl_grpo_ext" not in sys.modules
ids = torch.arange(5, 45)[None]
with torch.no_grad():
    logps = model.eval()(ids).logits.log_softmax(-1)[0, range(39), ids[0, 1:]]
print(json.dumps({{"logps": logps.tolist(), "eos": tokenizer.eos_token}}))
"""


def test_push_pull_round_trip(
    hub: HubServer,
    run_script: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    make_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Base from the Hub, training, adapter to the Hub, and loaded from there by the card's lines: two processes."""
    make_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    hub.add_repo("ada/tiny-base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    trained = run_script(hub, TRAIN.format(token=TOKEN), home="training", HF_TOKEN=TOKEN)
    assert trained.returncode == 0, trained.stderr

    files = hub.files("ada/run")
    whole = {name.split("/")[0] for name in files}
    assert whole == ADAPTER | {"checkpoint-1", "checkpoint-2"}  # neither tokenizer nor training_args.bin
    assert "checkpoint-1/optimizer.pt" in files  # though save_total_limit=1 had it deleted meanwhile
    assert hub.repos["ada/run"].private
    known = json.loads((tmp_path / "logps.json").read_text())
    assert (
        load_tensors(files["adapter_model.safetensors"]).keys()
        == load_tensors(files["checkpoint-2/adapter_model.safetensors"]).keys()
    )

    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert (card.data.base_model, card.data.library_name) == ("ada/tiny-base", "peft")
    lines = re.search(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    assert lines is not None
    assert lines[1] == (
        "import peft, transformers\n"
        'model = peft.AutoPeftModelForCausalLM.from_pretrained("ada/run")\n'
        'tokenizer = transformers.AutoTokenizer.from_pretrained("ada/tiny-base")'
    )
    loaded = run_script(hub, LOAD.format(lines=lines[1]), home="fresh", HF_TOKEN=TOKEN)
    assert loaded.returncode == 0, loaded.stderr
    found = json.loads(loaded.stdout.splitlines()[-1])
    assert found["eos"] == "<eos>"
    torch.testing.assert_close(torch.tensor(found["logps"]), torch.tensor(known), rtol=0, atol=1e-5)

    # The token went in request headers, and nowhere else
    secret = TOKEN.encode()
    assert len(hub.received) > 20
    assert not any(secret in body for body in hub.received)
    assert not any(secret in data for data in files.values())
    assert TOKEN not in trained.stdout + trained.stderr + loaded.stdout + loaded.stderr
    on_disk = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json"} <= {path.name for path in on_disk}
    assert [path for path in on_disk if secret in path.read_bytes()] == []


def test_checkpoints_are_pushed_beside_training(hub: HubServer, make_trainer: Callable[..., GRPOTrainer]) -> None:
    trainer = make_trainer(
        push_to_hub=True,
        hub_strategy="checkpoint",
        save_strategy="steps",
        save_steps=1,
        hub_always_push=True,
        max_steps=3,
    )
    trainer.train()
    assert trainer.hub_model_id == "ada/out"
    files = hub.files("ada/out")
    assert {name.split("/")[0] for name in files} == ADAPTER | TOKENIZER | {"last-checkpoint"}
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 3
    last = {name: value for name, value in trainer.model.state_dict().items() if "lora_" in name}
    pushed = load_tensors(files["adapter_model.safetensors"])
    assert len(pushed) == len(last) == 28  # 2 layers, 7 linear maps, A and B
    for name, value in last.items():
        assert torch.equal(pushed[name.replace(".default.weight", ".weight")], value)
    commits = [c.message for c in hub.repos["ada/out"].commits.values()]
    assert commits[1:3] == ["Training in progress, step 1", "Training in progress, step 1, checkpoint"]
    assert not list(Path(trainer.args.output_dir).glob(".hub-upload-*"))


def test_end_strategy_pushes_nothing_while_training(hub: HubServer, make_trainer: Callable[..., GRPOTrainer]) -> None:
    trainer = make_trainer(
        push_to_hub=True, hub_strategy="end", hub_revision="dev", save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert hub.files("ada/out") == {}
    trainer.save_model()
    assert hub.files("ada/out") == {}
    assert set(hub.files("ada/out", "dev")) == ADAPTER | TOKENIZER


def test_push_without_asking_for_it_before(hub: HubServer, make_trainer: Callable[..., GRPOTrainer]) -> None:
    trainer = make_trainer(max_steps=1, hub_model_id="ada/mine")
    trainer.train()
    future = trainer.push_to_hub(blocking=False, private=True)
    assert future.result().oid == hub.repos["ada/mine"].at("main").oid
    assert hub.repos["ada/mine"].private


def test_the_card_knows_whose_repository_it_is(hub: HubServer, make_trainer: Callable[..., GRPOTrainer]) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.push_to_hub()
    assert 'from_pretrained(base, "ada/out")' in hub.files("ada/out")["README.md"].decode()
    on_disk = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert 'from_pretrained(base, "owner/name")' in on_disk  # it may be pushed to another
    assert "# out" in on_disk


def test_pull_request(hub: HubServer, make_trainer: Callable[..., GRPOTrainer]) -> None:
    trainer = make_trainer(max_steps=1, hub_model_id="ada/mine", hub_revision="dev")
    commit = trainer.push_to_hub(create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert set(hub.files("ada/mine", "refs/pr/1")) == ADAPTER - {"reward_curves.svg"} | TOKENIZER  # nothing was trained
    assert hub.files("ada/mine") == {}


@pytest.mark.parametrize("how", [401, 403, "cut"])
def test_a_hub_that_refuses_does_not_stop_training(
    how: int | str, hub: HubServer, make_trainer: Callable[..., GRPOTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("POST /api/repos/create", how, times=99)
    trainer = make_trainer(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()  # this one pushes by itself too
    warnings = [record for record in caplog.records if record.name.startswith("trl_grpo_ext")]
    command = f"trl-grpo push {trainer.args.output_dir} --repo-id out"
    assert len(warnings) == 1, [record.getMessage() for record in warnings]
    assert command in warnings[0].getMessage()
    assert "Training is not affected" in warnings[0].getMessage()
    assert trainer.state.global_step == 2
    with pytest.raises(UploadError, match=f"push it later with\n +{command}"):
        trainer.push_to_hub()
    assert {path.name for path in Path(trainer.args.output_dir).iterdir()} >= ADAPTER
    assert not list(Path(trainer.args.output_dir).glob(".hub-upload-*"))


def test_a_hub_that_never_answers_does_not_delay_training(
    hub: HubServer,
    make_trainer: Callable[..., GRPOTrainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client waits without end for an answer; neither the first step nor the end of training do."""
    monkeypatch.setattr(publishing, "LONGEST_WAIT", 0.3)
    hub.fail(".", "silence", times=99)
    started = time.monotonic()
    trainer = make_trainer(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.train()
    assert time.monotonic() - started < 30
    assert hub.requests == ["POST /api/repos/create"]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("trl_grpo_ext")]
    assert len(said) == 1
    assert "has not ended within" in said[0]
    assert not list(Path(trainer.args.output_dir).glob(".hub-upload-*"))  # the checkpoint's never began


def test_no_network(
    hub: HubServer,
    make_trainer: Callable[..., GRPOTrainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    trainer = make_trainer(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("trl_grpo_ext")]
    assert len(said) == 1
    assert "offline" in said[0].lower()
    assert trainer.state.global_step == 2


def test_a_cut_upload_of_a_checkpoint_is_made_again(
    hub: HubServer, make_trainer: Callable[..., GRPOTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("PUT /lfs/", "cut")
    trainer = make_trainer(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=2)
    trainer.train()
    assert [record for record in caplog.records if record.name.startswith("trl_grpo_ext")] == []
    assert set(hub.files("ada/out")) == ADAPTER | TOKENIZER


def test_a_checkpoint_is_pushed_as_it_was(hub: HubServer, make_trainer: Callable[..., GRPOTrainer]) -> None:
    """Though it is deleted, and the files in output_dir written anew, before the upload begins."""
    trainer = make_trainer(push_to_hub=True, hub_strategy="checkpoint", hub_always_push=True, save_only_model=True)
    uploads, gate = trainer._uploads, threading.Event()
    assert uploads is not None
    uploads.submit(lambda: gate.wait(60))  # holds the queue up
    trainer._save_checkpoint(trainer.model, trial=None)
    folder = Path(trainer.args.output_dir)
    expected = (folder / "checkpoint-0" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoint-0")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    trainer.save_model(_internal_call=True)
    assert hub.files("ada/out") == {}
    gate.set()
    uploads.finish(60)
    files = hub.files("ada/out")
    assert files["adapter_model.safetensors"] == expected == files["last-checkpoint/adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() != expected


def test_saved_arguments_hold_no_token(make_trainer: Callable[..., GRPOTrainer]) -> None:
    trainer = make_trainer(hub_token=TOKEN, max_steps=1)
    trainer.save_model()
    saved = torch.load(Path(trainer.args.output_dir) / "training_args.bin", weights_only=False)
    assert saved.hub_token is None
    assert saved.learning_rate == trainer.args.learning_rate
    assert trainer.args.hub_token == TOKEN


def test_run_config_makes_the_run_again(
    make_trainer: Callable[..., GRPOTrainer], make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    first = make_trainer(
        hub_token=TOKEN, beta=0.1, num_iterations=2, steps_per_generation=2, lr_scheduler_type="cosine"
    )
    first.train()
    first.create_model_card()
    record = load_run_config(Path(first.args.output_dir) / "training_config.yaml")
    again = make_trainer(
        args=run_arguments(record, output_dir=str(tmp_path / "again"), report_to="none"),
        model=make_model(),
        peft_config=run_adapter(record),
    )
    again.train()
    weights = [
        {name: value for name, value in trainer.model.state_dict().items() if "lora_" in name}
        for trainer in (first, again)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_card_says_what_was_evaluated(make_trainer: Callable[..., GRPOTrainer], rows: Dataset) -> None:
    held_out = {"easy": rows.select(range(3)), "hard": rows.select(range(3, 5))}
    trainer = make_trainer(eval_dataset=held_out, per_device_eval_batch_size=3, max_steps=1)
    trainer.train()
    results = trainer.evaluate()
    trainer.create_model_card("a name")
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.data.model_name == "a name"
    values = {r.dataset_name: r for r in card.data.eval_results if r.metric_name.startswith("reward ")}
    assert values["easy"].metric_value == pytest.approx(results["eval_easy_reward"], abs=1e-6)
    assert values["hard"].metric_args["prompts"] == 2
    low, high = values["hard"].metric_args["confidence_interval_95"]
    half = 1.959964 * results["eval_hard_reward_std"] / 2**0.5  # 2 prompts, whatever the completions of each
    assert (low, high) == pytest.approx(
        (results["eval_hard_reward"] - half, results["eval_hard_reward"] + half), abs=1e-5
    )
    assert "| hard | token_sum |" in card.text
    assert base_fingerprint(trainer.model) in card.text
    assert (Path(trainer.args.output_dir) / "reward_curves.svg").is_file()


# --- adapter_name_or_path ---


@pytest.fixture
def pushed_adapter(
    hub: HubServer,
    tmp_path: Path,
    make_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    make_trainer: Callable[..., GRPOTrainer],
    lora: Callable[[], LoraConfig],
) -> dict[str, torch.Tensor]:
    """A base in `tmp_path/base`, and on the Hub as ada/first an adapter trained on it, whose weights are returned."""
    make_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(tmp_path / "base"), peft_config=lora(), hub_model_id="ada/first")
    trainer.train()
    trainer.push_to_hub(revision="v1")
    return {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("own_base", [False, True])
def test_training_starts_from_an_adapter_on_the_hub(
    own_base: bool,
    pushed_adapter: dict[str, torch.Tensor],
    make_trainer: Callable[..., GRPOTrainer],
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    trainer = make_trainer(
        model=None if own_base else make_model(),
        adapter_name_or_path="ada/first",
        adapter_revision="v1",
        output_dir=str(tmp_path / "second"),
        max_steps=1,
    )
    assert isinstance(trainer.model, PeftModel)
    before = trainer.model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in pushed_adapter.items())
    assert all(p.requires_grad == ("lora_" in name) for name, p in trainer.model.named_parameters())
    trainer.train()
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in pushed_adapter.items())


def test_training_starts_from_an_adapter_on_disk(
    tmp_path: Path, make_trainer: Callable[..., GRPOTrainer], make_model: Callable[..., PreTrainedModel]
) -> None:
    first = make_trainer(max_steps=1)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    second = make_trainer(model=make_model(), adapter_name_or_path=str(tmp_path / "adapter"))
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, make_trainer: Callable[..., GRPOTrainer], make_model: Callable[..., PreTrainedModel]
) -> None:
    make_trainer(max_steps=1).save_model(str(tmp_path / "adapter"))
    other = make_model(hidden_size=48)
    name = str(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter_name_or_path='{name}' does not fit .*ForCausalLM: .*size mismatch"):
        make_trainer(model=other, adapter_name_or_path=name)
    with pytest.raises(ValueError, match=f"adapter_name_or_path='{tmp_path}' has no adapter that can be read"):
        make_trainer(model="no/model", adapter_name_or_path=str(tmp_path))  # before the base is looked for


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter_name_or_path": "x/y", "peft_config": True}, "adapter_name_or_path='x/y' and peft_config are two"),
        ({"adapter_name_or_path": "x/y", "model": "peft"}, "adapter_name_or_path='x/y' and a PeftModel are two"),
        ({"model": None}, "model=None needs adapter_name_or_path"),
    ],
)
def test_more_or_less_than_one_adapter_is_refused(
    given: dict[str, Any], message: str, make_trainer: Callable[..., GRPOTrainer], lora: Callable[[], LoraConfig]
) -> None:
    arguments = dict(given)
    if arguments.get("model") == "peft":
        arguments["model"] = make_trainer().model
    if arguments.pop("peft_config", False):
        arguments["peft_config"] = lora()
        arguments["model"] = "some/model"
    with pytest.raises(ValueError, match=message):
        make_trainer(**arguments)
