"""From logits to tokens: the inverse CDF by hand, and filters that are transformers' own."""

import itertools
import math

import pytest
import torch
from transformers import GenerationConfig

from trl_grpo_ext.rollout import SamplingParams
from trl_grpo_ext.rollout.sampling import TokenSampler, inverse_cdf

LAST = 1 - 2**-53  # the largest uniform there is


def picked(probs, uniforms):
    return inverse_cdf(torch.tensor([probs] * len(uniforms)), torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_the_inverse_cdf_by_hand():
    # Slices [0, 1/4), [1/4, 3/4), [3/4, 1): a boundary belongs to the token above it
    below = math.nextafter(0.25, 0), math.nextafter(0.75, 0)
    assert picked([0.25, 0.5, 0.25], [0.0, 0.1, below[0], 0.25, 0.5, below[1], 0.75, LAST]) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_tokens_of_probability_zero_are_never_drawn():
    # Slices [0, 1/2) of token 1 and [1/2, 1) of token 4
    assert picked([0.0, 0.5, 0.0, 0.0, 0.5, 0.0], [0.0, 0.49, 0.5, LAST]) == [1, 1, 4, 4]


def test_one_token_has_it_all():
    assert picked([0.0, 1.0, 0.0], [0.0, 0.5, LAST]) == [1, 1, 1]


def test_probabilities_need_not_add_up_to_one_exactly():
    # Softmax in float32 rounds: the sum is scaled away, slices are [0, 1/3), [1/3, 1)
    assert picked([0.25, 0.5], [0.0, 0.33, 0.34, LAST]) == [0, 0, 1, 1]
    assert picked([0.3, 0.6, 0.3, 0.0], [0.24, 0.26, 0.74, 0.76, LAST]) == [0, 1, 1, 2, 2]


def test_every_row_has_its_own_uniform_and_distribution():
    probs = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.9, 0.1]])
    assert inverse_cdf(probs, torch.tensor([0.6, 0.05, 0.6], dtype=torch.float64)).tolist() == [1, 0, 0]


def test_the_tail_of_a_large_vocabulary_is_reached():
    """After the first token float32 sums step by 2^-23, so 1,000 tokens of 2^-27 would never move them."""
    tail, small = 1000, 2.0**-27
    probs = torch.full((1, tail + 1), small)
    probs[0, 0] = 1.0
    total = 1 + tail * small
    for token in (1, 500, tail):
        middle = torch.tensor([(1 + (token - 0.5) * small) / total], dtype=torch.float64)
        assert inverse_cdf(probs, middle).tolist() == [token]
    assert inverse_cdf(probs, torch.tensor([LAST], dtype=torch.float64)).tolist() == [tail]


def test_nan_is_still_an_index():
    assert picked([math.nan, 0.5, 0.5], [0.0, 0.5, LAST]) == [2, 2, 2]


# --- TokenSampler ---

V = 13
GRID = 20_000


@pytest.fixture(scope="module")
def logits():
    return torch.randn(V, generator=torch.Generator().manual_seed(0))


def distribution(params, logits, prompt=(1,), drawn=()):
    """Probabilities that a sampler draws with, measured: how many of evenly spread uniforms pick each token."""
    uniforms = ((torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID)[:, None].repeat(1, len(drawn) + 1)
    sampler = TokenSampler(params, uniforms, [list(prompt)] * GRID, V)
    rows = torch.arange(GRID)
    for position, token in enumerate(drawn):
        certain = torch.full((GRID, V), -1e9)
        certain[:, token] = 1e9
        assert sampler.draw(certain, rows, position)[0].unique().tolist() == [token]
    tokens, _ = sampler.draw(logits.expand(GRID, V).clone(), rows, len(drawn))
    return torch.bincount(tokens, minlength=V) / GRID


def of_generate(make_model, logits, ids, **settings):
    """Probabilities that `generate` would draw with, by the processors it would make."""
    model = make_model("qwen2", vocab_size=V)
    config = GenerationConfig(do_sample=True, **({"top_k": 0, "top_p": 1.0} | settings))
    processors = model._get_logits_processor(generation_config=config, input_ids_seq_length=len(ids), device="cpu")
    return processors(torch.tensor([ids]), logits[None].clone())[0].softmax(-1)


FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_k of more than there are": {"top_k": 50},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition_penalty below 1": {"repetition_penalty": 0.5},
    "suppress_tokens": {"suppress_tokens": (0, 7)},
    "top_k before top_p": {"top_k": 4, "top_p": 0.6},
    "temperature before top_p": {"temperature": 2.5, "top_p": 0.6},
    "penalty before top_k": {"repetition_penalty": 3.0, "top_k": 3},
    "suppressed before top_k": {"suppress_tokens": (7, 5, 9), "top_k": 2},
    "all": {
        "temperature": 1.4,
        "top_k": 6,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
        "suppress_tokens": (4,),
    },
}


@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS)
def test_filters_are_those_of_generate(make_model, logits, settings):
    best = int(logits.argmax())
    prompt, drawn = [best, 3, 3], [8, 6]
    theirs = dict(settings)
    if "suppress_tokens" in theirs:
        theirs["suppress_tokens"] = list(theirs["suppress_tokens"])
    expected = of_generate(make_model, logits, prompt + drawn, **theirs)
    found = distribution(SamplingParams(**settings), logits, prompt, drawn)
    assert (found - expected).abs().max() <= 1.01 / GRID
    assert ((found == 0) == (expected < 0.5 / GRID)).all()


def test_the_filters_do_something(make_model, logits):
    """Each set of filters above gives another distribution, or the test would not tell them apart."""
    found = {name: distribution(SamplingParams(**settings), logits, [1, 3]) for name, settings in FILTERS.items()}
    for (name, a), (other, b) in itertools.combinations(found.items(), 2):
        if {name, other} != {"none", "top_k of more than there are"}:
            assert (a - b).abs().max() > 10 / GRID, (name, other)


def test_only_a_row_s_own_tokens_are_penalised():
    params = SamplingParams(repetition_penalty=4.0, greedy=True)
    sampler = TokenSampler(params, torch.empty(3, 0), [[0], [1], [2]], 3)
    logits = torch.tensor([[1.0, 0.9, 0.8]]).repeat(3, 1)
    # Row 0 has seen token 0: (0.25, 0.9, 0.8); row 1: (1, 0.225, 0.8); row 2: (1, 0.9, 0.2)
    assert sampler.draw(logits, torch.tensor([0, 1, 2]), 0)[0].tolist() == [1, 0, 0]
    # Rows 2 and 0 are left: row 2 has seen (0, 2), row 0 (0, 1)
    assert sampler.draw(logits[:2], torch.tensor([2, 0]), 1)[0].tolist() == [1, 2]


def test_every_row_draws_with_its_own_uniform_of_the_position():
    uniforms = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
    sampler = TokenSampler(SamplingParams(), uniforms, [[0]] * 3, 2)
    logits = torch.zeros(2, 2)  # one half each
    assert sampler.draw(logits, torch.tensor([0, 1]), 0)[0].tolist() == [0, 1]
    assert sampler.draw(logits, torch.tensor([2, 0]), 1)[0].tolist() == [0, 1]


def test_greedy_is_the_most_likely_token_that_is_allowed(logits):
    order = logits.argsort(descending=True).tolist()
    for suppressed, expected in (((), order[0]), ((order[0],), order[1]), (tuple(order[:4]), order[4])):
        sampler = TokenSampler(SamplingParams(greedy=True, suppress_tokens=suppressed), torch.empty(1, 0), [[0]], V)
        assert sampler.draw(logits[None].clone(), torch.tensor([0]), 0)[0].tolist() == [expected]


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 1.0),
        ({"temperature": 0.6}, 0.6),
        ({"temperature": 0.6, "logps_temperature": 1.5}, 1.5),
        ({"logps_temperature": 0.6}, 0.6),
        ({"greedy": True, "temperature": 0.6}, 0.6),
        ({"greedy": True, "logps_temperature": 0.6}, 0.6),
        ({"top_k": 2, "temperature": 0.6, "repetition_penalty": 2.0, "top_p": 0.5, "min_p": 0.3}, 0.6),
        ({"suppress_tokens": (0, 1, 2), "temperature": 0.6}, 0.6),
    ],
)
def test_log_probs_are_those_of_the_whole_distribution(logits, settings, temperature):
    uniforms = torch.rand(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampler = TokenSampler(SamplingParams(**settings), uniforms, [[1, 2]] * 40, V)
    tokens, logps = sampler.draw(logits.expand(40, V).clone(), torch.arange(40), 0)
    torch.testing.assert_close(logps, (logits / temperature).log_softmax(-1)[tokens])


def test_low_precision_logits_are_sampled_in_float32():
    logits = torch.tensor([[1.0, 2.0, 3.0]]).bfloat16()
    sampler = TokenSampler(SamplingParams(temperature=0.7), torch.tensor([[0.5]], dtype=torch.float64), [[0]], 3)
    tokens, logps = sampler.draw(logits, torch.tensor([0]), 0)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, (logits.float() / 0.7).log_softmax(-1)[0, tokens])


# --- SamplingParams ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        SamplingParams(**{name: value})


def test_values_at_the_edge_are_accepted():
    edge = SamplingParams(max_new_tokens=1, temperature=1e-3, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=0.1)
    assert (edge.temperature, edge.repetition_penalty) == (1e-3, 0.1)
    assert SamplingParams(min_p=1.0).min_p == 1.0


def test_defaults_draw_from_the_whole_distribution(logits):
    assert (distribution(SamplingParams(), logits) - logits.softmax(-1)).abs().max() <= 1.01 / GRID
