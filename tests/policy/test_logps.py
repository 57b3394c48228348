"""What the scorer reads from a model beyond its log-probs: the head, the exact KL, masks."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax

from trl_grpo_ext.attention import use_group_attention
from trl_grpo_ext.policy import CompletionScorer, GroupPart, exact_kl, head_spec, make_reference, pack_row
from trl_grpo_ext.policy.logps import completion_mask, unpack

CPU = torch.device("cpu")
TEMPERATURE = 0.7
PROMPTS = [[5, 6, 7], [8]]
COMPLETIONS = [[9, 10], [11, 12, 13, 14, 15], [16]]
PROMPT_OF = [0, 0, 1]
PARTS = [GroupPart(0, (0, 1)), GroupPart(1, (2,))]

HEADS = {
    "qwen2": {},
    "phi": {},  # a bias
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_s_spec_gives_the_model_s_logits(make_model, kind):
    model = make_model(kind, **HEADS[kind])
    if kind == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.tensor([[5, 6, 7, 8]])
    spec = head_spec(model)
    hidden = model.base_model(ids).last_hidden_state
    logits = (hidden @ spec.weight.T + (0 if spec.bias is None else spec.bias)) * spec.logit_scale
    if spec.final_logit_softcapping is not None:
        logits = (logits / spec.final_logit_softcapping).tanh() * spec.final_logit_softcapping
    torch.testing.assert_close(logits, model(ids).logits)


def test_a_detached_head_keeps_its_values_when_parameters_are_exchanged(make_model):
    model = make_model("phi")
    kept = head_spec(model).detached()
    expected = kept.weight.clone(), kept.bias.clone()
    assert not kept.weight.requires_grad
    reference = make_reference(model)
    with torch.no_grad():
        model.lm_head.weight += 1
        model.lm_head.bias += 1
    with reference.active():
        inside = head_spec(model).detached()
    assert torch.equal(inside.weight, expected[0])
    assert torch.equal(inside.bias, expected[1])
    assert torch.equal(head_spec(model).weight, expected[0] + 1)


@pytest.mark.parametrize("kind", ["qwen2", "cohere"])
@pytest.mark.parametrize("path", ["packed", "padded"])
def test_exact_kl_is_that_of_the_whole_distributions(make_model, kind, path):
    plain = make_model(kind, **HEADS[kind])
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    base = copy.deepcopy(plain)
    assert use_group_attention(base)
    scorer = CompletionScorer(base, TEMPERATURE)
    torch.manual_seed(0)
    policy = get_peft_model(base, config)

    def score():
        if path == "packed":
            return scorer.packed(policy, pack_row(PARTS, PROMPTS, COMPLETIONS, CPU))
        prompts = [PROMPTS[p] for p in PROMPT_OF]
        return scorer.padded(policy, prompts, COMPLETIONS, pad_token_id=0, device=CPU)

    scores = score()
    with torch.no_grad(), policy.disable_adapter():
        ref_hidden = score().hidden
        ref_head = head_spec(base).detached()
    kl = exact_kl(scores, ref_hidden, head_spec(base), ref_head, TEMPERATURE)
    assert kl.shape == (3, 5)
    adapted = get_peft_model(copy.deepcopy(plain), config)
    adapted.load_state_dict(policy.state_dict())
    for i, completion in enumerate(COMPLETIONS):
        prompt = PROMPTS[PROMPT_OF[i]]
        ids = torch.tensor([[*prompt, *completion]])
        own, theirs = (
            log_softmax(model(ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE, dim=-1) for model in (adapted, plain)
        )
        expected = (own.exp() * (own - theirs)).sum(-1)
        torch.testing.assert_close(kl[i, : len(completion)], expected, rtol=1e-4, atol=1e-5)
        assert not kl[i, len(completion) :].any()


def test_masks_and_rows_by_hand():
    lengths = torch.tensor([2, 3, 1])
    assert completion_mask(lengths).tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    assert unpack(values, lengths).tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]


def test_the_model_is_its_old_self_between_calls(make_model):
    """The hook on the backbone acts on the scorer's own calls only, after an error too."""
    model = make_model("qwen2")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    use_group_attention(model)
    scorer = CompletionScorer(model, TEMPERATURE)
    row = pack_row(PARTS, PROMPTS, COMPLETIONS, CPU)
    scorer.packed(model, row)
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(IndexError):
        scorer.padded(model, [[999]], [[5, 6]], pad_token_id=0, device=CPU)  # no such token
    assert torch.equal(model(ids).logits, expected)
