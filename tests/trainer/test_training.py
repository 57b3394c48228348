"""Training does what it says: the adapter moves and nothing else does, ratios, references, KL, rewards, exports."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import trl_grpo_ext.trainer as trainer_module
from trl_grpo_ext import GRPOTrainer
from trl_grpo_ext.policy import AdapterOff, Snapshot


def weights_hash(tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    """Of names and bytes, so that one flipped bit shows."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def base_hash(model: nn.Module) -> str:
    """The same for a bare model and for one with adapters."""
    named = (
        (name.removeprefix("base_model.model.").replace(".base_layer", ""), parameter)
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    )
    return weights_hash(named)


def adapter_hash(model: nn.Module) -> str:
    return weights_hash((name, p) for name, p in model.named_parameters() if "lora_" in name)


def full_logps(model: nn.Module, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """`(C, V)` by a plain forward pass of one row."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]


def token_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    return full_logps(model, prompt, completion).gather(1, torch.tensor(completion)[:, None])[:, 0]


def logged(trainer: GRPOTrainer, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def recorded_terms(monkeypatch):
    """What every call of `grpo_loss` in the trainer returned."""
    calls = []

    def grpo_loss(*args, **kwargs):
        calls.append(original(*args, **kwargs))
        return calls[-1]

    original = trainer_module.grpo_loss
    monkeypatch.setattr(trainer_module, "grpo_loss", grpo_loss)
    return calls


# --- weights ---


def test_base_weights_are_untouched_and_the_saved_adapter_reproduces_the_policy(
    make_trainer, make_model, tmp_path, tiny_tokenizer
):
    original = base_hash(make_model())
    trainer = make_trainer(beta=0.04, optim="adamw_torch", learning_rate=0.01, max_steps=3)
    assert base_hash(trainer.model) == original
    fresh = adapter_hash(trainer.model)

    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))

    assert base_hash(trainer.model) == original
    assert adapter_hash(trainer.model) != fresh
    saved = {path.name for path in (tmp_path / "adapter").rglob("*")}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    assert not {name for name in saved if "ref" in name or "optimizer" in name or "grpo_state" in name}

    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    prompts = [tiny_tokenizer(text)["input_ids"] for text in ("ab", "question")]
    rollouts = trainer._sampler.generate(prompts, 3, seed=5)
    for b, completion in enumerate(rollouts.completion_ids):
        with torch.no_grad():
            plain = token_logps(loaded, prompts[b // 3], completion)
            base = token_logps(make_model(), prompts[b // 3], completion)
        torch.testing.assert_close(rollouts.logps[b, : len(completion)], plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base, plain, atol=1e-2)  # the adapter is what makes them agree


def test_an_adapter_that_was_trained_before_is_its_own_reference(make_trainer, make_model, lora):
    config = lora()
    config.init_lora_weights = False  # B is drawn, so the adapter does something from the start
    policy = get_peft_model(make_model(), config)
    ids = [3, 4, 5, 6, 7]
    with torch.no_grad(), policy.disable_adapter():
        off = token_logps(policy, ids[:2], ids[2:])
    with torch.no_grad():
        assert not torch.allclose(off, token_logps(policy, ids[:2], ids[2:]), atol=0.1)

    trainer = make_trainer(model=policy, beta=0.5, learning_rate=0.05, max_steps=3)
    assert isinstance(trainer._reference, Snapshot)
    initial = adapter_hash(policy)
    trainer.train()

    first, *later = logged(trainer, "kl")
    assert abs(first) < 1e-8
    assert min(later) > 1e-5
    assert base_hash(trainer.model) == base_hash(make_model())
    assert adapter_hash(trainer.model) != initial
    with trainer._reference.active():
        assert adapter_hash(trainer.model) == initial


def test_the_reference_of_a_fresh_adapter_costs_nothing(make_trainer):
    assert isinstance(make_trainer(beta=0.04)._reference, AdapterOff)
    assert make_trainer(beta=0.0)._reference is None


def test_full_fine_tuning_moves_every_weight_and_keeps_its_reference(make_trainer, make_model):
    trainer = make_trainer(model=make_model(), beta=0.1, max_steps=3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    unmoved = {name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])}
    assert unmoved == set()
    assert logged(trainer, "kl")[0] < 1e-8 < logged(trainer, "kl")[-1]
    with trainer._reference.active():
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


# --- ratios ---


@pytest.mark.parametrize(
    ("fields", "stale"),
    [
        # Which of the steps train on completions of an earlier policy
        ({"num_iterations": 2, "max_steps": 4}, [False, True, False, True]),
        (
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 3},
            [False, True, False],
        ),
        ({"num_iterations": 1, "max_steps": 2}, [False, False]),
    ],
)
def test_ratios_differ_from_1_where_the_policy_moved_since_it_sampled(
    make_trainer, recorded_terms, monkeypatch, fields, stale
):
    trainer = make_trainer(learning_rate=0.5, **fields)
    compute_loss, ratios = trainer.compute_loss, [[] for _ in stale]

    def recording(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(model, inputs, **kwargs)
        if inputs["micro_batch"] is not None:
            ratios[trainer.state.global_step].append(recorded_terms[-1].ratio.flatten())
        return loss

    monkeypatch.setattr(trainer, "compute_loss", recording)
    trainer.train()

    assert all(torch.cat(step).isfinite().all() for step in ratios)
    assert [bool(((torch.cat(step) - 1).abs() > 1e-3).any()) for step in ratios] == stale
    assert all(map(math.isfinite, logged(trainer, "loss")))
    assert [value > 0 for value in logged(trainer, "clip_ratio/region_mean")] == stale


# --- KL ---

ESTIMATORS = {
    "k1": lambda logp, ref: logp - ref,
    "k2": lambda logp, ref: (logp - ref) ** 2 / 2,
    "k3": lambda logp, ref: (ref - logp).exp() - (ref - logp) - 1,
}


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_loss_gradient_and_metric_of_each_kl_estimator(make_trainer, estimator, packing, monkeypatch):
    """Against plain forward passes of one completion at a time, where the adapter has moved."""
    temperature, beta = 0.8, 0.7
    trainer = make_trainer(
        beta=beta,
        kl_estimator=estimator,
        use_bias_correction_kl=False,
        temperature=temperature,
        attention_packing=packing,
        gradient_checkpointing=False,
        learning_rate=0.5,
    )
    compute_loss, expected_kl, errors = trainer.compute_loss, [], []

    def naive(model: nn.Module, batch: Any) -> tuple[torch.Tensor, float]:
        loss, total, tokens = torch.zeros(()), 0.0, sum(map(len, batch.completion_ids))
        for prompt, completion, advantage in zip(
            batch.prompt_ids, batch.completion_ids, batch.advantages.tolist(), strict=True
        ):
            with torch.no_grad(), trainer.accelerator.unwrap_model(model).disable_adapter():
                ref = full_logps(model, prompt, completion, temperature)
            policy = full_logps(model, prompt, completion, temperature)
            index = torch.tensor(completion)[:, None]
            logp = policy.gather(1, index)[:, 0]
            if estimator == "full":
                kl = (policy.exp() * (policy - ref)).sum(-1)
            else:
                kl = ESTIMATORS[estimator](logp, ref.gather(1, index)[:, 0])
            loss = loss + (-(logp - logp.detach()).exp() * advantage + beta * kl).sum() / tokens
            total += float(kl.detach().sum())
        return loss, total / tokens

    def checked(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(model, inputs, **kwargs)
        parameters = [p for p in model.parameters() if p.requires_grad]
        naive_loss, kl = naive(model, inputs["micro_batch"])
        expected_kl.append(kl)
        ours = torch.autograd.grad(loss, parameters, retain_graph=True)
        theirs = torch.autograd.grad(naive_loss, parameters)
        pairs = [torch.cat([g.flatten() for g in gradients]) for gradients in (ours, theirs)]
        errors.append(((pairs[0] - pairs[1]).norm() / pairs[1].norm()).item())
        torch.testing.assert_close(loss, naive_loss, rtol=1e-4, atol=1e-6)
        return loss

    monkeypatch.setattr(trainer, "compute_loss", checked)
    trainer.train()

    assert len(errors) == 2 and max(errors) < 1e-5
    assert logged(trainer, "kl") == pytest.approx(expected_kl, rel=1e-3, abs=1e-6)
    assert abs(expected_kl[1]) > 1e-4


def test_kl_in_reward_is_charged_to_the_advantages_and_not_to_the_loss(make_trainer, reward, recorded_terms):
    beta = 0.3
    trainer = make_trainer(beta=beta, kl_in_reward=True, kl_estimator="k1", learning_rate=0.5)
    trainer.train()

    experience = trainer._experience  # of the second step: drawn after the policy had moved
    lengths = [len(ids) for ids in experience.completion_ids]
    penalties = [
        beta * float((experience.old_logps[b, :n] - experience.ref_logps[b, :n]).sum()) for b, n in enumerate(lengths)
    ]
    assert max(map(abs, penalties)) > 1e-2
    rewards = torch.tensor(reward(completion_ids=experience.completion_ids)) - torch.tensor(penalties)
    groups = rewards.view(-1, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(experience.advantages, expected.flatten(), rtol=1e-4, atol=1e-4)
    assert all(terms.per_token_kl is None for terms in recorded_terms)
    total = sum(penalties) / beta / sum(lengths)  # the metric is the KL per token
    assert logged(trainer, "kl")[1] == pytest.approx(total, rel=1e-4)


# --- rewards ---


def test_rewards_get_their_arguments(make_trainer, make_model, tiny_tokenizer):
    """Columns, ids, the trainer's state; functions that await, that log, that are models."""
    seen: list[SimpleNamespace] = []

    def recorder(prompts, completions, completion_ids, solution, trainer_state, log_extra, log_metric, **kwargs):
        seen.append(
            SimpleNamespace(
                prompts=prompts, completions=completions, ids=completion_ids, solution=solution, rest=set(kwargs)
            )
        )
        seen[-1].step = trainer_state.global_step
        log_metric("longest", max(map(len, completion_ids)))
        return [float(len(ids)) for ids in completion_ids]

    async def patient(completions, **kwargs):
        await asyncio.sleep(0)
        return [float(len(completion)) / 10 for completion in completions]

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=tiny_tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    judge = AutoModelForSequenceClassification.from_config(config)
    rows = Dataset.from_list(
        [{"prompt": text, "solution": i, "level": {"hard": i}} for i, text in enumerate(["ab", "question", "x?"])]
    )
    trainer = make_trainer(
        reward_funcs=[recorder, patient, judge],
        reward_processing_classes=[None, None, tiny_tokenizer],
        train_dataset=rows.select(range(2)),
        reward_weights=[1.0, 0.5, 2.0],
        shuffle_dataset=False,
    )
    trainer.train()

    assert [call.step for call in seen] == [0, 1]
    for call in seen:
        assert call.prompts == ["ab"] * 3 + ["question"] * 3
        assert call.solution == [0] * 3 + [1] * 3
        assert call.rest == {"level"}
        assert call.completions == tiny_tokenizer.batch_decode(call.ids, skip_special_tokens=True)
    last = trainer.state.log_history[-2]
    judged = next(name for name in last if name.startswith("rewards/") and name.split("/")[1] not in SYNC_NAMES)
    texts = [p + c for p, c in zip(seen[1].prompts, seen[1].completions, strict=True)]
    with torch.no_grad():
        scores = [judge(**tiny_tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert last[f"rewards/{judged.split('/')[1]}/mean"] == pytest.approx(sum(scores) / 6, rel=1e-4)
    lengths = [len(ids) for ids in seen[1].ids]
    assert last["rewards/recorder/mean"] == pytest.approx(sum(lengths) / 6)
    patience = sum(len(c) for c in seen[1].completions) / 60
    assert last["rewards/patient/mean"] == pytest.approx(patience)
    assert last["reward"] == pytest.approx(sum(lengths) / 6 + 0.5 * patience + 2.0 * sum(scores) / 6, rel=1e-4)
    assert last["longest"] == max(lengths)


SYNC_NAMES = {"recorder", "patient"}
THINKING_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def test_a_reasoning_block_that_the_template_opened_reaches_the_reward(make_trainer, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = THINKING_TEMPLATE
    seen = []

    def recorder(prompts, completions, completion_ids, **kwargs):
        seen.append((prompts, completions, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    rows = Dataset.from_list([{"prompt": conversation}, {"prompt": conversation[1:]}])
    trainer = make_trainer(
        reward_funcs=recorder, train_dataset=rows, processing_class=tokenizer, shuffle_dataset=False, max_steps=1
    )
    trainer.train()

    ((prompts, completions, ids),) = seen
    assert prompts == [conversation] * 3 + [conversation[1:]] * 3
    for completion, tokens in zip(completions, ids, strict=True):
        ((message),) = completion
        assert message["role"] == "assistant"
        assert message["content"] == "<think>\n" + tokenizer.decode(tokens, skip_special_tokens=True)
    text = "<user>2+2?\n<assistant><think>\n"
    assert trainer._experience.prompt_ids[1] == tokenizer(text, add_special_tokens=False)["input_ids"]


# --- what is written ---


def test_completions_are_logged_as_parquet(make_trainer, reward, tmp_path, capsys):
    def first_token(completion_ids, log_extra, **kwargs):
        log_extra("first", [ids[0] for ids in completion_ids])
        return reward(completion_ids)

    trainer = make_trainer(reward_funcs=first_token, log_completions=True, num_completions_to_print=2)
    trainer.train()

    experience = trainer._experience
    files = sorted((tmp_path / "out" / "completions").iterdir())
    assert [file.name for file in files] == ["completions_00001.parquet", "completions_00002.parquet"]
    table = load_dataset("parquet", data_files=str(files[-1]), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.column_names == ["step", "prompt", "completion", "first_token", "first", "advantage"]
    assert table["step"][:] == [2] * 6
    assert table["first"][:] == [ids[0] for ids in experience.completion_ids]
    assert table["first_token"][:] == pytest.approx(reward(experience.completion_ids))
    assert table["advantage"][:] == pytest.approx(experience.advantages.tolist())
    assert "first_token" in capsys.readouterr().out  # printed, too


def test_training_is_the_same_every_time(make_trainer):
    """Rollouts hang on the seed alone, not on the global random state."""
    runs = []
    for disturbance in (1, 2):
        trainer = make_trainer(temperature=0.9, top_p=0.9)
        torch.manual_seed(disturbance)
        trainer.train()
        runs.append((adapter_hash(trainer.model), logged(trainer, "loss")))
    assert runs[0] == runs[1]
    other = make_trainer(temperature=0.9, top_p=0.9, seed=4)
    other.train()
    assert adapter_hash(other.model) != runs[0][0]


@pytest.mark.parametrize("fields", [{}, {"steps_per_generation": 1, "gradient_accumulation_steps": 2}])
def test_no_two_completions_share_their_noise(make_trainer, fields):
    """One prompt again and again, and a policy that never moves: only the noise can tell completions apart."""
    drawn = []

    def recorder(completion_ids, **kwargs):
        drawn.extend(map(tuple, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    rows = Dataset.from_dict({"prompt": ["ab"] * 4})
    trainer = make_trainer(reward_funcs=recorder, train_dataset=rows, learning_rate=0.0, max_steps=3, **fields)
    trainer.train()
    long = [ids for ids in drawn if len(ids) > 3]  # short ones may well be equal
    assert len(drawn) >= 18 and len(set(long)) == len(long) > 12


def test_masked_truncated_completions_are_in_no_micro_batch(make_trainer, monkeypatch):
    trainer = make_trainer(mask_truncated_completions=True, beta=0.04, max_completion_length=2, max_steps=1)
    compute_loss, batches = trainer.compute_loss, []
    monkeypatch.setattr(
        trainer, "compute_loss", lambda m, i, **k: (batches.append(i["micro_batch"]), compute_loss(m, i, **k))[1]
    )
    trainer.train()
    kept = {i for i, ids in enumerate(trainer._experience.completion_ids) if ids[-1] == 2}
    trained = {i for batch in batches if batch is not None for i in batch.indices}
    assert trained == kept and len(kept) < 6
