"""Packed rows give the log-probs and gradients of plain forward passes, one prompt and completion at a time."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax

from trl_grpo_ext.attention import use_group_attention
from trl_grpo_ext.policy import CompletionScorer, GroupPart, deal_rows, pack_row
from trl_grpo_ext.policy import layout as layout_module
from trl_grpo_ext.policy.packing import packed_length

CPU = torch.device("cpu")
TEMPERATURE = 0.7
RELATIVE = 1e-5
# Of the norm of all gradients together: what rounding leaves where the true gradient is 0 (a key's bias, by softmax)
NOISE = 1e-7

FAMILIES = {
    "qwen2": {},  # grouped-query attention, biases on q, k, v
    "llama": {"num_key_value_heads": 1},
    "phi": {"partial_rotary_factor": 0.5},  # biases everywhere, LM head included
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},  # learned positions
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},  # learned positions with an offset
    "gpt_neox": {},
    "gemma": {"head_dim": 12},  # scaled embeddings, heads that do not add up to hidden_size
    "qwen3": {"head_dim": 8},  # norms on q and k
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.2},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2},  # experts
}
# Prompt lengths, and the completion lengths of each prompt's group
SHAPES = {
    "unequal": ([7, 1, 12], [[3, 1, 6], [5, 2], [1, 4, 9, 2]]),
    "one long, many short": ([6, 3], [[41, 1, 2, 1, 3, 2, 2, 1, 4], [1, 1, 2, 7]]),
    "one-token prompts": ([1, 1], [[2, 5], [1, 3, 4]]),
    "one of each": ([1], [[1]]),
    "long prompt": ([30, 2], [[2, 3, 5, 1, 4], [1]]),
}


class Batch:
    """Random prompts and completions of a shape, and a weight per completion token for the loss."""

    def __init__(self, shape, vocabulary=259, seed=0):
        prompt_lengths, groups = SHAPES[shape]
        generator = torch.Generator().manual_seed(seed)

        def draw(length):
            return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

        self.prompts = [draw(n) for n in prompt_lengths]
        self.completions = [draw(n) for lengths in groups for n in lengths]
        self.prompt_of = [p for p, lengths in enumerate(groups) for _ in lengths]
        self.weights = [torch.randn(len(c), generator=generator) for c in self.completions]
        self.parts = [
            GroupPart(p, tuple(i for i, owner in enumerate(self.prompt_of) if owner == p)) for p in range(len(groups))
        ]

    @property
    def lengths(self):
        return [len(p) for p in self.prompts], [len(c) for c in self.completions]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain(model, batch):
    """Per completion: log-probs of a forward pass of its own; and the gradients of the weighted sum of all."""
    logps = []
    for i, completion in enumerate(batch.completions):
        prompt = batch.prompts[batch.prompt_of[i]]
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        own = log_softmax(logits / TEMPERATURE, dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        (own * batch.weights[i]).sum().backward()
        logps.append(own.detach())
    return logps, gradients(model)


def packed(scorer, model, batch, rows):
    logps = [None] * len(batch.completions)
    for parts in rows:
        row = pack_row(parts, batch.prompts, batch.completions, CPU)
        scores = scorer.packed(model, row)
        loss = 0.0
        for s, i in enumerate(row.completions):
            length = len(batch.completions[i])
            assert scores.mask[s].sum() == length
            assert not scores.logps[s, length:].any()
            logps[i] = scores.logps[s, :length]
            loss = loss + (logps[i] * batch.weights[i]).sum()
        loss.backward()
    return [own.detach() for own in logps], gradients(model)


def padded(scorer, model, batch):
    prompts = [batch.prompts[p] for p in batch.prompt_of]
    scores = scorer.padded(model, prompts, batch.completions, pad_token_id=0, device=CPU)
    logps = [scores.logps[i, : len(c)] for i, c in enumerate(batch.completions)]
    sum((own * weights).sum() for own, weights in zip(logps, batch.weights, strict=True)).backward()
    return [own.detach() for own in logps], gradients(model)


def assert_same(result, expected):
    (logps, grads), (expected_logps, expected_grads) = result, expected
    for own, theirs in zip(logps, expected_logps, strict=True):
        torch.testing.assert_close(own, theirs, rtol=RELATIVE, atol=RELATIVE)
    assert grads.keys() == expected_grads.keys()
    floor = NOISE * torch.stack([g.norm() for g in expected_grads.values()]).norm()
    for name, theirs in expected_grads.items():
        assert (grads[name] - theirs).norm() <= RELATIVE * theirs.norm() + floor, name


def scored_copy(model):
    """A copy that the scorer may change, so that `model` stays plain."""
    model = copy.deepcopy(model)
    assert use_group_attention(model)
    return model, CompletionScorer(model, TEMPERATURE)


@pytest.mark.parametrize("kind", FAMILIES)
def test_log_probs_and_gradients_are_those_of_plain_forward_passes(make_model, kind):
    model = make_model(kind, **FAMILIES[kind])
    batch = Batch("unequal")
    expected = plain(model, batch)
    assert len(expected[1]) == len(list(model.parameters()))
    policy, scorer = scored_copy(model)
    assert_same(packed(scorer, policy, batch, [batch.parts]), expected)
    assert_same(padded(scorer, policy, batch), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_lengths(make_model, shape):
    model = make_model("qwen2")
    batch = Batch(shape)
    expected = plain(model, batch)
    policy, scorer = scored_copy(model)
    assert_same(packed(scorer, policy, batch, [batch.parts]), expected)
    assert_same(padded(scorer, policy, batch), expected)


def test_the_shapes_make_several_calls_and_blocks_of_several_completions():
    """Or the tests above would not reach the code that they are for."""
    batch = Batch("one long, many short")
    layout = pack_row(batch.parts, batch.prompts, batch.completions, CPU).layout
    assert len(layout.buckets) > 1
    assert sum(bucket.rows for bucket in layout.buckets) < len(batch.completions)
    assert layout.padding is not None
    batch = Batch("unequal")
    layout = pack_row(batch.parts, batch.prompts, batch.completions, CPU).layout
    assert any(len(set(bucket.groups.tolist())) > 1 for bucket in layout.buckets)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layout_holds_every_token_once(shape):
    batch = Batch(shape)
    layout = pack_row(batch.parts, batch.prompts, batch.completions, CPU).layout
    real = torch.ones(len(layout.index), dtype=torch.bool) if layout.padding is None else ~layout.padding
    assert sorted(layout.index[real].tolist()) == list(range(layout.num_tokens))
    assert layout.index[layout.inverse].tolist() == list(range(layout.num_tokens))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("budget", [1, 14, 25])
def test_split_groups_add_up_to_the_same_gradient(make_model, kind, budget):
    model = make_model(kind, **FAMILIES[kind])
    batch = Batch("unequal")
    rows = [row for row in deal_rows(batch.parts, *batch.lengths, num_rows=6, row_budget=budget) if row]
    assert sum(len(row) for row in rows) > len(batch.parts)  # at least one group is in two rows
    policy, scorer = scored_copy(model)
    assert_same(packed(scorer, policy, batch, rows), plain(model, batch))


def test_gradient_checkpointing_changes_nothing(make_model):
    model = make_model("qwen2")
    batch = Batch("one long, many short")
    expected = plain(model, batch)
    policy, scorer = scored_copy(model)
    policy.train()
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    policy.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    assert_same(packed(scorer, policy, batch, [batch.parts]), expected)
    assert len(calls) == 2  # once forward, once again for the backward


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "phi"])
def test_an_adapter_gets_the_same_gradient(make_model, kind, checkpointing):
    model = make_model(kind, **FAMILIES[kind])
    policy, scorer = scored_copy(model)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    policy = get_peft_model(policy, config).train()
    policy.load_state_dict(model.state_dict())
    batch = Batch("unequal")
    expected = plain(model, batch)
    assert expected[1]
    assert all("lora_" in name for name in expected[1])
    assert_same(packed(scorer, policy, batch, [batch.parts]), expected)


def test_entropy_is_that_of_the_tempered_distribution(make_model):
    model = make_model("qwen2")
    batch = Batch("unequal")
    policy, scorer = scored_copy(model)
    row = pack_row(batch.parts, batch.prompts, batch.completions, CPU)
    with torch.no_grad():
        scores = scorer.packed(policy, row)
        for s, i in enumerate(row.completions):
            prompt, completion = batch.prompts[batch.prompt_of[i]], batch.completions[i]
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            log_probs = log_softmax(logits / TEMPERATURE, dim=-1)
            expected = -(log_probs.exp() * log_probs).sum(-1)
            torch.testing.assert_close(scores.entropy[s, : len(completion)], expected, rtol=1e-5, atol=1e-5)


def test_hidden_states_are_those_of_the_scored_positions(make_model):
    model = make_model("qwen2")
    batch = Batch("unequal")
    policy, scorer = scored_copy(model)
    row = pack_row(batch.parts, batch.prompts, batch.completions, CPU)
    with torch.no_grad():
        hidden = scorer.packed(policy, row).hidden
        expected = [
            model.model(input_ids=torch.tensor([[*batch.prompts[p], *completion]])).last_hidden_state[
                0, len(batch.prompts[p]) - 1 : -1
            ]
            for p, completion in zip(batch.prompt_of, batch.completions, strict=True)
        ]
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_row_by_hand():
    row = pack_row(
        [GroupPart(1, (2, 0)), GroupPart(0, (1,))],
        [[50, 51], [10, 11, 12]],
        [[20, 21], [60], [30, 31, 32]],
        CPU,
    )
    # prompt 1 without its last | 12 and completion 2 without its last | 12 and completion 0 ... | prompt 0 ... | 51
    assert row.input_ids.tolist() == [[10, 11, 12, 30, 31, 12, 20, 50, 51]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1]]
    assert row.labels.tolist() == [[30, 31, 32, 20, 21, 60]]
    assert row.layout.scored.tolist() == [2, 3, 4, 5, 6, 8]
    assert row.completions == (2, 0, 1)
    assert row.lengths.tolist() == [3, 2, 1]
    assert row.layout.num_tokens == 9 == packed_length(3, [3, 2]) + packed_length(2, [1])


def test_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        pack_row([GroupPart(1, (0,))], [[5], []], [[6]], CPU)
    with pytest.raises(ValueError, match="completion 1 has no tokens"):
        pack_row([GroupPart(0, (0, 1))], [[5]], [[6], []], CPU)


# --- deal_rows ---


def dealt(groups, prompt_lengths, completion_lengths, num_rows, budget):
    rows = deal_rows(groups, prompt_lengths, completion_lengths, num_rows, budget)
    sizes = [
        sum(packed_length(prompt_lengths[p.prompt], [completion_lengths[i] for i in p.completions]) for p in row)
        for row in rows
    ]
    return rows, sizes


def random_groups(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    counts = draw(1, 7, 4)
    prompt_lengths = draw(1, 40, 4)
    completion_lengths = draw(1, 30, sum(counts))
    ends = list(itertools.accumulate(counts))
    groups = [GroupPart(p, tuple(range(end - n, end))) for p, (n, end) in enumerate(zip(counts, ends, strict=True))]
    return groups, prompt_lengths, completion_lengths


@pytest.mark.parametrize("seed", range(5))
def test_every_completion_is_dealt_once_into_exactly_so_many_rows(seed):
    groups, prompt_lengths, completion_lengths = random_groups(seed)
    owner = {i: group.prompt for group in groups for i in group.completions}
    for num_rows, budget in itertools.product([1, 2, 3, 7, 30], [1, 20, 60, 150, 10_000]):
        rows, sizes = dealt(groups, prompt_lengths, completion_lengths, num_rows, budget)
        assert len(rows) == num_rows
        seen = sorted(i for row in rows for part in row for i in part.completions)
        assert seen == list(range(len(completion_lengths)))
        assert all(owner[i] == part.prompt for row in rows for part in row for i in part.completions)
        assert all(part.completions for row in rows for part in row)
        filled = [bool(row) for row in rows]
        assert filled == sorted(filled)  # the empty ones come first
        assert filled[-1]
        for group in groups:
            size = packed_length(prompt_lengths[group.prompt], [completion_lengths[i] for i in group.completions])
            pieces = [part for row in rows for part in row if part.prompt == group.prompt]
            if size <= budget:
                assert pieces == [group]
            elif len(group.completions) > 1:
                assert len(pieces) > 1
            for piece in pieces:  # a piece over the budget is a single completion
                length = packed_length(prompt_lengths[piece.prompt], [completion_lengths[i] for i in piece.completions])
                assert length <= budget or len(piece.completions) == 1
        # Longest first onto the least loaded: no two rows are further apart than the largest part
        loads = [size for size in sizes if size]
        parts = [
            packed_length(prompt_lengths[part.prompt], [completion_lengths[i] for i in part.completions])
            for row in rows
            for part in row
        ]
        assert max(loads) - min(loads) <= max(parts)


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_share_one_mask(make_model, monkeypatch, autocast):
    """Attention keeps its mask for the backward: one of its own for each layer would be memory for nothing."""
    model = make_model("qwen2", num_hidden_layers=3)
    model = model if autocast else model.to(torch.bfloat16)
    assert use_group_attention(model)
    batch = Batch("unequal")
    row = pack_row(batch.parts, batch.prompts, batch.completions, CPU)
    seen = []

    def attention(*args, **kwargs):
        seen.append(kwargs.get("attn_mask"))
        return original(*args, **kwargs)

    original = layout_module.scaled_dot_product_attention
    monkeypatch.setattr(layout_module, "scaled_dot_product_attention", attention)
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
        scores = CompletionScorer(model, TEMPERATURE).packed(model, row)
    masks = [mask for mask in seen if mask is not None]
    assert {mask.dtype for mask in masks} == {torch.bfloat16}
    assert len(masks) == 3 * len(row.layout.buckets)
    pointers = {mask.data_ptr() for mask in masks}
    assert len(pointers) == len(row.layout.buckets)
    assert pointers <= saved  # not a copy of it
    assert scores.logps.isfinite().all()


def test_dealt_by_hand():
    # Lengths in a row: (11 - 1) + 4 + 6 = 20, (1 - 1) + 5 + 7 = 12, (3 - 1) + 4 + 2 = 8
    groups = [GroupPart(0, (0, 1)), GroupPart(1, (2, 3)), GroupPart(2, (4, 5))]
    prompts, completions = [11, 1, 3], [4, 6, 5, 7, 4, 2]
    # All 40 tokens fit into one row
    rows, sizes = dealt(groups, prompts, completions, 3, 40)
    assert sizes == [0, 0, 40]
    # 40 tokens are two rows of 20: 20 | 12 + 8
    rows, sizes = dealt(groups, prompts, completions, 3, 20)
    assert sizes == [0, 20, 20]
    assert rows[1] == [groups[0]]
    assert rows[2] == [groups[1], groups[2]]
    # Over 19 only the first: 10 + 4 and 10 + 6, its prefix twice: 16, 14, 12, 8 = 50 tokens in three rows
    rows, sizes = dealt(groups, prompts, completions, 3, 19)
    assert sorted(sizes) == [14, 16, 20]
    # ... which one more row would hold within the budget
    rows, sizes = dealt(groups, prompts, completions, 5, 19)
    assert sorted(sizes) == [0, 8, 12, 14, 16]
