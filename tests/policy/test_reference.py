"""The reference policy: the base, or a frozen snapshot, and never a second model."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from trl_grpo_ext.attention import use_group_attention
from trl_grpo_ext.policy import (
    AdapterOff,
    CompletionScorer,
    GroupPart,
    LivingReference,
    Snapshot,
    make_reference,
    pack_row,
)

CPU = torch.device("cpu")


def adapted(model, seed=1, **overrides):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**({"r": 3, "target_modules": "all-linear"} | overrides)))


def logps(model, scorer):
    row = pack_row([GroupPart(0, (0, 1))], [[5, 6, 7]], [[8, 9], [10, 11, 12, 13]], CPU)
    with torch.no_grad():
        return scorer.packed(model, row).logps


def move(model):
    """A training step's worth of change in every trainable parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1


@pytest.fixture
def base(make_model):
    model = make_model("qwen2")
    assert use_group_attention(model)
    return model


def test_a_fresh_adapter_is_switched_off(base):
    scorer = CompletionScorer(base, 1.0)
    expected = logps(base, scorer)
    model = adapted(base)
    reference = make_reference(model)
    assert isinstance(reference, AdapterOff)
    assert torch.equal(logps(model, scorer), expected)
    move(model)
    moved = logps(model, scorer)
    assert not torch.allclose(moved, expected, atol=1e-2)
    with reference.active():
        assert torch.equal(logps(model, scorer), expected)
    assert torch.equal(logps(model, scorer), moved)


def test_the_adapter_is_on_again_after_an_error(base):
    model = adapted(base)
    scorer = CompletionScorer(base, 1.0)
    reference = make_reference(model)
    move(model)
    moved = logps(model, scorer)
    with pytest.raises(RuntimeError, match="inside"), reference.active():
        raise RuntimeError("inside")
    assert torch.equal(logps(model, scorer), moved)


@pytest.mark.parametrize(
    "overrides",
    [
        {"init_lora_weights": False},  # as if trained
        {"init_lora_weights": "pissa"},  # starts away from zero, and moves the base by as much
        {"modules_to_save": ["lm_head"]},  # trains more than LoRA's own matrices
        {"bias": "all"},
    ],
    ids=["trained", "pissa", "modules_to_save", "bias"],
)
def test_anything_but_a_zero_adapter_is_its_own_reference(base, overrides):
    model = adapted(base, **overrides)
    scorer = CompletionScorer(base, 1.0)
    expected = logps(model, scorer)
    reference = make_reference(model)
    assert isinstance(reference, Snapshot)
    move(model)
    moved = logps(model, scorer)
    assert not torch.allclose(moved, expected, atol=1e-2)
    with reference.active():
        assert torch.equal(logps(model, scorer), expected)
    assert torch.equal(logps(model, scorer), moved)


def test_an_embedding_adapter_that_is_zero_is_switched_off(base):
    model = adapted(base, target_modules=["embed_tokens", "q_proj"])
    assert isinstance(make_reference(model), AdapterOff)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_embedding_A" in name)[0, 0] = 1.0
    assert isinstance(make_reference(model), Snapshot)


def test_one_number_of_b_is_enough_to_be_trained(base):
    model = adapted(base)
    with torch.no_grad():
        [p for name, p in model.named_parameters() if "lora_B" in name][-1].view(-1)[-1] = 1e-6
    assert isinstance(make_reference(model), Snapshot)


def test_full_fine_tuning_keeps_a_copy(base):
    scorer = CompletionScorer(base, 1.0)
    expected = logps(base, scorer)
    reference = make_reference(base)
    assert isinstance(reference, Snapshot)
    move(base)
    moved = logps(base, scorer)
    with reference.active():
        assert torch.equal(logps(base, scorer), expected)
    assert torch.equal(logps(base, scorer), moved)


def test_gradients_and_an_optimizer_keep_working_around_a_snapshot(base):
    model = adapted(base, init_lora_weights=False)
    scorer = CompletionScorer(base, 1.0)
    twin, reference = copy.deepcopy(model), make_reference(model)
    results = []
    for policy, snapshot in ((model, reference), (twin, None)):
        scorer = CompletionScorer(policy.get_base_model(), 1.0)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            row = pack_row([GroupPart(0, (0,))], [[5, 6, 7]], [[8, 9]], CPU)
            scorer.packed(policy, row).logps.sum().backward()
            if snapshot is not None:
                with snapshot.active():  # between backward and step, and forward passes that leave no trace
                    logps(policy, scorer)
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_snapshot_is_in_no_export(base, tmp_path):
    model = adapted(base, init_lora_weights=False)
    plain_keys, parameters = set(model.state_dict()), len(list(model.parameters()))
    reference = make_reference(model)
    assert set(model.state_dict()) == plain_keys
    assert len(list(model.parameters())) == parameters
    move(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], p) for name, p in trained.items())
    assert all(not torch.equal(a, b) for a, b in zip(reference.values, trained.values(), strict=True))


def test_a_snapshot_is_one_adapter_in_size(base):
    model = adapted(base, init_lora_weights=False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in make_reference(model).values) == trainable


def test_restore_brings_an_earlier_run_s_reference_back(base, tmp_path):
    model = adapted(base, init_lora_weights=False)
    scorer = CompletionScorer(base, 1.0)
    expected = logps(model, scorer)
    first = make_reference(model)
    model.save_pretrained(tmp_path)
    torch.save(first.values, tmp_path / "reference.pt")

    move(model)  # the run went on, was interrupted, and continues from here
    moved = logps(model, scorer)
    second = make_reference(model)
    second.restore(torch.load(tmp_path / "reference.pt", weights_only=True))
    with second.active():
        assert torch.equal(logps(model, scorer), expected)
    assert torch.equal(logps(model, scorer), moved)


def test_restore_refuses_another_adapter_s_values(base, make_model):
    reference = make_reference(adapted(base, init_lora_weights=False))
    before = [value.clone() for value in reference.values]
    other = make_reference(adapted(make_model("qwen2"), r=5, init_lora_weights=False))
    with pytest.raises(ValueError, match="does not fit the policy"):
        reference.restore(other.values)
    with pytest.raises(ValueError, match="does not fit the policy"):
        reference.restore(reference.values[:-1])
    assert all(torch.equal(a, b) for a, b in zip(reference.values, before, strict=True))


def test_a_loaded_adapter_is_its_own_reference(base, make_model, tmp_path):
    model = adapted(base, init_lora_weights=False)
    expected = logps(model, CompletionScorer(base, 1.0))
    model.save_pretrained(tmp_path)
    again = make_model("qwen2")
    assert use_group_attention(again)
    loaded = PeftModel.from_pretrained(again, tmp_path, is_trainable=True)
    reference = make_reference(loaded)
    assert isinstance(reference, Snapshot)
    move(loaded)
    scorer = CompletionScorer(again, 1.0)
    with reference.active():
        torch.testing.assert_close(logps(loaded, scorer), expected)


# --- a reference that follows the policy ---


def trainable(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


POLICIES = {
    "fresh": lambda base: adapted(base),
    "trained": lambda base: adapted(base, init_lora_weights=False),
    "DoRA": lambda base: adapted(base, use_dora=True),
    "modules_to_save": lambda base: adapted(base, modules_to_save=["lm_head"]),
    "full": lambda base: base,
}


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("mixes", [False, True])
def test_after_a_hard_sync_the_reference_is_the_policy(base, kind, mixes):
    model = POLICIES[kind](base)
    scorer = CompletionScorer(base, 1.0)
    before = logps(model, scorer)
    reference = LivingReference(model, mixes=mixes)
    for _ in range(2):
        move(model)
        with reference.active():
            assert torch.allclose(logps(model, scorer), before, atol=1e-6)
        reference.sync(1.0)
        before = logps(model, scorer)
        with reference.active():
            assert torch.equal(logps(model, scorer), before)
    move(model)
    with reference.active():
        assert torch.equal(logps(model, scorer), before)  # a copy, not the parameters themselves


@pytest.mark.parametrize("kind", POLICIES)
def test_a_soft_sync_is_the_average_of_parameters(base, kind):
    """r1 = 0.75 r0 + 0.25 p1, r2 = 0.75 r1 + 0.25 p2, with p1 = p0 + 0.1, p2 = p0 + 0.2 and r0 = p0.

    So r1 = p0 + 0.025 and r2 = p0 + 0.75 * 0.025 + 0.25 * 0.2 = p0 + 0.06875.
    """
    model = POLICIES[kind](base)
    start = trainable(model)
    reference = LivingReference(model, mixes=True)
    for distance in (0.025, 0.06875):
        move(model)
        moved = trainable(model)
        reference.sync(0.25)
        assert len(reference.current.values) == len(start)
        for value, first in zip(reference.current.values, start, strict=True):
            torch.testing.assert_close(value, first + distance, rtol=0, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(trainable(model), moved, strict=True))  # the policy stays


@pytest.mark.parametrize("mixes", [False, True])
def test_it_costs_one_adapter_at_most(base, mixes):
    model = adapted(base)
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    reference = LivingReference(model, mixes=mixes)

    def held():
        return sum(value.nbytes for value in reference.current.values) if reference.current is not None else 0

    if not mixes:
        assert isinstance(reference.current, AdapterOff)  # nothing yet
        reference.sync(1.0)
    storages = [value.untyped_storage().data_ptr() for value in reference.current.values]
    for alpha in (1.0, 0.5, 0.25):
        reference.sync(alpha)
    assert held() == size
    assert [value.untyped_storage().data_ptr() for value in reference.current.values] == storages  # in place
    assert not {p.untyped_storage().data_ptr() for p in model.parameters()} & set(storages)


def test_an_average_needs_the_start(base):
    reference = LivingReference(adapted(base), mixes=False)
    with pytest.raises(ValueError, match="mixes=True"):
        reference.sync(0.5)
