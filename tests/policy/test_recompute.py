"""How many layers are recomputed is a matter of memory and never of results."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_grpo_ext.attention import use_group_attention
from trl_grpo_ext.policy import CompletionScorer, GroupPart, RecomputeBudget, is_default_checkpointing, pack_row

CPU = torch.device("cpu")
LAYERS = 3


@pytest.fixture
def policy(make_model):
    """A model in training, its scorer, and its budget at a share of 0.5."""
    base = make_model("qwen2", num_hidden_layers=LAYERS)
    assert use_group_attention(base)
    scorer = CompletionScorer(base, 1.0)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model, scorer, RecomputeBudget(model, base, scorer, 0.5)


def kept_layers(model):
    return [not layer.gradient_checkpointing for layer in model.get_base_model().model.layers]


def update(model, scorer):
    row = pack_row([GroupPart(0, (0, 1))], [[5, 6, 7]], [[8, 9], [10, 11, 12, 13]], CPU)
    calls = []
    layers = model.get_base_model().model.layers
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(layers)
    ]
    loss = scorer.packed(model, row).logps.sum()
    loss.backward()
    for hook in hooks:
        hook.remove()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return loss.detach(), grads, [calls.count(i) for i in range(LAYERS)]


def test_weighing_leaves_nothing_behind(make_model):
    base = make_model("qwen2", num_hidden_layers=LAYERS)
    assert use_group_attention(base)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear")).train()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    seen = []
    for module in base.modules():  # every output, and with it whatever its graph keeps
        module.register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out)) if torch.is_tensor(out) else None)
    RecomputeBudget(model, base, CompletionScorer(base, 1.0))
    gc.collect()
    assert len(seen) > 2 * LAYERS
    assert [ref for ref in seen if ref() is not None] == []


def test_results_are_the_same_however_many_layers_are_kept(policy):
    model, scorer, budget = policy
    assert budget.apply(1, 0) == 0
    loss, grads, calls = update(model, scorer)
    assert calls == [2, 2, 2]
    seen = {0}
    for padded in range(1, 200):
        kept = budget.apply(10, padded)
        if kept in seen:
            continue
        seen.add(kept)
        own_loss, own_grads, calls = update(model, scorer)
        assert calls == [1] * kept + [2] * (LAYERS - kept)
        assert torch.equal(own_loss, loss)
        assert all(torch.equal(a, b) for a, b in zip(own_grads, grads, strict=True))
    assert seen == {0, 1, 2, 3}


def test_more_padding_saved_is_more_layers_kept(policy):
    model, _, budget = policy
    counts = [budget.apply(100, padded) for padded in range(0, 1000, 10)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == LAYERS
    assert kept_layers(model) == [True] * LAYERS
    counts = [budget.apply(packed, 1000) for packed in range(10, 1000, 10)]
    assert counts == sorted(counts, reverse=True)


def test_the_count_by_hand(policy):
    model, _, budget = policy
    # h = 10 bytes of a layer's input and a = 110 of all its activations per token, L = 3 layers
    budget._input_bytes, budget._activation_bytes, budget._unfused_bytes = 10.0, 110.0, 110.0
    budget._weight_bytes = 0.0
    # All checkpointed: 3 * 10 + 110 = 140 bytes a token. Allowed: 0.5 * 400 padded tokens * 140 = 28,000 bytes.
    # The packed row of 100 tokens holds 14,000 + k * 100 * (110 - 10), so k = 1.4 -> 1
    assert budget.apply(100, 400) == 1
    assert kept_layers(model) == [True, False, False]
    # 0.5 * 500 * 140 = 35,000 = 14,000 + 2.1 * 10,000
    assert budget.apply(100, 500) == 2
    # 0.5 * 485 * 140 = 33,950 = 14,000 + 1.995 * 10,000: only whole layers
    assert budget.apply(100, 485) == 1
    # 0.5 * 200 * 140 = 14,000: all of it is taken
    assert budget.apply(100, 200) == 0
    # Less than that is nothing to keep, and not a negative count
    assert budget.apply(100, 50) == 0
    assert kept_layers(model) == [False] * LAYERS
    # 0.5 * 10,000 * 140 is room for 68 layers; there are 3
    assert budget.apply(100, 10_000) == LAYERS
    # Layers that kept 160 bytes before they were fused: 0.5 * 400 * (30 + 160) = 38,000 = 14,000 + 2.4 * 10,000
    budget._unfused_bytes = 160.0
    assert budget.apply(100, 400) == 2
    # Casts of weights, 12,000 bytes a kept layer: 38,000 = 14,000 + 1.09 * (10,000 + 12,000)
    budget._weight_bytes = 12_000.0
    assert budget.apply(100, 400) == 1


def test_activations_are_weighed_without_a_trace(policy):
    model, _, budget = policy
    assert budget._input_bytes == 32 * 4  # hidden size, float32
    # At least what its four norms' and matrices' inputs are: h, h, attention, h, intermediate
    assert budget._activation_bytes > (4 * 32 + 48) * 4
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_casts_of_weights_under_autocast_are_weighed(make_model):
    base = make_model("qwen2", num_hidden_layers=LAYERS)
    assert use_group_attention(base)
    scorer = CompletionScorer(base, 1.0)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    budget = RecomputeBudget(model, base, scorer, autocast=autocast)
    # Frozen weights of 32 hidden, 2 key-value heads of 8 and 48 intermediate, in two bytes each:
    # q and o 32 * 32, k and v 32 * 16, gate, up and down 32 * 48, in all 2,048 + 1,024 + 4,608 = 7,680
    # The adapter's are cast too, at most rank 3 * (in + out), 3 * 464, and a mask is shared by the layers
    assert 2 * 7_680 < budget._weight_bytes < 2 * (7_680 + 3 * 464) + 1_000
    plain = RecomputeBudget(model, base, scorer)
    assert plain._weight_bytes < 0.1 * budget._weight_bytes
    assert budget._activation_bytes < plain._activation_bytes

    # What it says of a row of another shape is what the row keeps
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    prompt, completions = list(range(3, 80)), [list(range(5, 5 + n)) for n in (90, 61, 118)]
    row = pack_row([GroupPart(0, (0, 1, 2))], [prompt], completions, CPU)
    with autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scorer.packed(model, row)
    predicted = LAYERS * (row.layout.num_tokens * budget._activation_bytes + budget._weight_bytes)
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.15)


def test_weight_does_not_depend_on_the_depth(make_model):
    found = []
    for layers in (2, 6):
        base = make_model("qwen2", num_hidden_layers=layers, vocab_size=7)
        assert use_group_attention(base)
        scorer = CompletionScorer(base, 1.0)
        found.append(RecomputeBudget(base, base, scorer, 0.5)._activation_bytes)
    # What does not belong to a layer (the head, the embeddings) is shared between more of them
    assert found[1] <= found[0] <= 1.3 * found[1]


@pytest.mark.parametrize(
    ("on", "kwargs", "expected"),
    [(True, None, True), (True, {}, True), (False, None, False), (True, {"use_reentrant": True}, False)],
)
def test_only_checkpointing_that_nobody_configured_is_replaced(on, kwargs, expected):
    class Args:
        gradient_checkpointing = on
        gradient_checkpointing_kwargs = kwargs

    assert is_default_checkpointing(Args()) is expected
