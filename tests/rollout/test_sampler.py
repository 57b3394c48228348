"""Rollouts: the model's own distribution, the same completions however they are batched, and nothing left behind."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax

from trl_grpo_ext.attention import UnsupportedAttention
from trl_grpo_ext.rollout import GroupSampler, Rollouts, SamplingParams, decoder, sampler

V = 23
EOS = 2
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
G = 3
SETTINGS = {"seed": 4, "step": 9, "max_new_tokens": 20}

FAMILIES = {
    "qwen2": {},  # grouped-query attention
    "llama": {"num_key_value_heads": 1},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma": {"head_dim": 12},
    "mixtral": {"num_local_experts": 2},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.2},
}


@pytest.fixture
def tiny(make_model, tiny_tokenizer):
    """`tiny(kind, **overrides)`: a model of few tokens, so that completions end at all lengths, and in evaluation."""

    def make(kind="qwen2", seed=0, **overrides):
        return make_model(kind, seed, **({"vocab_size": V} | FAMILIES.get(kind, {}) | overrides)).eval()

    return make


@pytest.fixture(params=[0, 32], autouse=True, ids=["shared", "copied"])
def copied_prompt(request, monkeypatch):
    """Both ways of keeping prompts: once for a group, and a copy for each completion."""
    monkeypatch.setattr(decoder, "_COPIED_PROMPT", request.param)


@pytest.fixture
def engine(tiny, tiny_tokenizer):
    """`engine(model=None, params=None, **options)`: a sampler, by default on a new Qwen2."""

    def make(model=None, params=None, **options):
        return GroupSampler(tiny() if model is None else model, tiny_tokenizer, params, **options)

    return make


def plain_logps(model, rollouts, temperature=1.0):
    """Log-probs by a padded forward pass over prompts and completions."""
    pairs = [(rollouts.prompt_ids[b // rollouts.num_generations], ids) for b, ids in enumerate(rollouts.completion_ids)]
    longest = max(len(p) + len(c) for p, c in pairs)
    ids = torch.tensor([p + c + [0] * (longest - len(p) - len(c)) for p, c in pairs])
    mask = torch.tensor([[1] * (len(p) + len(c)) + [0] * (longest - len(p) - len(c)) for p, c in pairs])
    with torch.no_grad():
        logps = log_softmax(model(input_ids=ids, attention_mask=mask).logits / temperature, dim=-1)
    out = torch.zeros_like(rollouts.logps)
    for b, (prompt, completion) in enumerate(pairs):
        own = logps[b, len(prompt) - 1 : len(prompt) - 1 + len(completion)]
        out[b, : len(completion)] = own.gather(1, torch.tensor(completion)[:, None])[:, 0]
    return out


def assert_same(rollouts, expected):
    assert rollouts.completion_ids == expected.completion_ids
    assert rollouts.finish_reasons == expected.finish_reasons
    torch.testing.assert_close(rollouts.logps, expected.logps, rtol=1e-5, atol=1e-5)


def part(rollouts, prompts):
    """The rollouts of some prompts, as if only they had been drawn."""
    g = rollouts.num_generations
    chosen = [p * g + i for p in prompts for i in range(g)]
    completions = [rollouts.completion_ids[b] for b in chosen]
    return Rollouts(
        prompt_ids=[rollouts.prompt_ids[p] for p in prompts],
        completion_ids=completions,
        logps=rollouts.logps[chosen, : max(map(len, completions))],
        finish_reasons=[rollouts.finish_reasons[b] for b in chosen],
        num_generations=g,
    )


# --- log-probs ---


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_log_probs_are_those_of_a_forward_pass(tiny, engine, kind, shared):
    model = tiny(kind)
    rollouts = engine(model, shared_prompts=shared).generate(PROMPTS, G, **SETTINGS)
    assert len(set(rollouts.lengths)) > 3  # of several lengths
    assert {"eos", "length"} == set(rollouts.finish_reasons)
    assert rollouts.logps.shape == (len(PROMPTS) * G, max(rollouts.lengths))
    assert rollouts.logps.dtype == torch.float32
    torch.testing.assert_close(rollouts.logps, plain_logps(tiny(kind), rollouts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2}, 0.7),
        ({"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "logps_temperature": 0.9}, 0.9),
        ({"greedy": True, "temperature": 0.7}, 0.7),
    ],
)
def test_log_probs_are_of_the_tempered_distribution_and_unfiltered(tiny, engine, settings, temperature, shared):
    model = tiny()
    rollouts = engine(model, shared_prompts=shared).generate(PROMPTS, G, **SETTINGS, **settings)
    torch.testing.assert_close(rollouts.logps, plain_logps(model, rollouts, temperature), rtol=1e-5, atol=1e-5)


def test_an_adapter_takes_part(tiny, engine):
    torch.manual_seed(0)
    model = get_peft_model(tiny(), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).eval()
    rollouts = engine(model).generate(PROMPTS, G, **SETTINGS)
    expected = plain_logps(model, rollouts)
    torch.testing.assert_close(rollouts.logps, expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (plain_logps(model, rollouts) - expected).abs().max() > 0.1
        assert engine(model).generate(PROMPTS, G, **SETTINGS).completion_ids != rollouts.completion_ids


# --- the same completions however they are drawn ---


@pytest.fixture
def expected(engine):
    return engine().generate(PROMPTS, G, **SETTINGS)


@pytest.mark.parametrize("max_rows", [1, 3, 4, 6, 9, 100])
def test_splitting_a_batch_changes_nothing(engine, expected, max_rows):
    assert_same(engine(max_rows=max_rows).generate(PROMPTS, G, **SETTINGS), expected)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
def test_a_completion_does_not_depend_on_its_company(engine, expected, shared):
    for start in range(len(PROMPTS)):
        for stop in range(start + 1, len(PROMPTS) + 1):
            rollouts = engine(shared_prompts=shared).generate(
                PROMPTS[start:stop], G, first_prompt_index=start, **SETTINGS
            )
            assert_same(rollouts, part(expected, range(start, stop)))


def test_fewer_completions_are_the_first_ones(engine, expected):
    rollouts = engine().generate(PROMPTS, G - 1, **SETTINGS)
    kept = [b for b in range(len(PROMPTS) * G) if b % G < G - 1]
    assert rollouts.completion_ids == [expected.completion_ids[b] for b in kept]


def test_a_shorter_limit_cuts_the_same_completions(engine, expected):
    rollouts = engine().generate(PROMPTS, G, **(SETTINGS | {"max_new_tokens": 4}))
    assert rollouts.completion_ids == [ids[:4] for ids in expected.completion_ids]
    reasons = [reason if length <= 4 else "length" for reason, length in zip(
        expected.finish_reasons, expected.lengths, strict=True)]  # fmt: skip
    assert rollouts.finish_reasons == reasons


@pytest.mark.parametrize("change", [{"seed": 5}, {"step": 10}, {"first_prompt_index": 4}])
def test_another_key_is_another_rollout(engine, expected, change):
    assert engine().generate(PROMPTS, G, **(SETTINGS | change)).completion_ids != expected.completion_ids


def test_the_same_prompt_twice_is_two_groups(engine):
    rollouts = engine().generate([PROMPTS[0]] * 2, G, **SETTINGS)
    assert len({tuple(ids) for ids in rollouts.completion_ids}) == 2 * G


def test_the_global_generator_is_left_alone(engine, expected):
    state = torch.get_rng_state()
    torch.rand(3)
    assert_same(engine().generate(PROMPTS, G, **SETTINGS), expected)
    torch.set_rng_state(state)
    engine().generate(PROMPTS, G, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", FAMILIES)
def test_sharing_prompts_changes_nothing(tiny, engine, kind):
    ours, theirs = (
        engine(tiny(kind), shared_prompts=shared).generate(PROMPTS, G, **SETTINGS) for shared in (True, False)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.5}, {"top_k": 3, "temperature": 1.5}, {"suppress_tokens": (EOS,)}, {"greedy": True}],
)
def test_sharing_prompts_changes_nothing_under_filters(engine, settings):
    ours, theirs = (
        engine(shared_prompts=shared).generate(PROMPTS, G, **SETTINGS, **settings) for shared in (True, False)
    )
    assert_same(ours, theirs)


def test_greedy_is_generate_s_greedy_search(tiny, engine):
    model = tiny()
    rollouts = engine(model, SamplingParams(greedy=True, max_new_tokens=9)).generate(PROMPTS, 2)
    for p, prompt in enumerate(PROMPTS):
        out = tiny().generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )
        assert rollouts.completion_ids[2 * p] == rollouts.completion_ids[2 * p + 1] == out[0, len(prompt) :].tolist()


# --- the decoder's memory ---


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_prompts_read_in_several_passes(engine, expected, monkeypatch, tokens):
    passes = []
    original = decoder._Prefill.__init__

    def watch(self, lengths, device):
        passes.append(lengths)
        original(self, lengths, device)

    monkeypatch.setattr(decoder._Prefill, "__init__", watch)
    monkeypatch.setattr(decoder, "_PREFILL_TOKENS", tokens)
    assert_same(engine().generate(PROMPTS, G, **SETTINGS), expected)
    # 3, 1, 7 and 2 tokens
    assert passes == {1: [[3], [1], [7], [2]], 4: [[3, 1], [7], [2]], 8: [[3, 1], [7], [2]]}[tokens]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_buffers_that_grow(engine, expected, monkeypatch, chunk):
    monkeypatch.setattr(decoder, "_CHUNK", chunk)
    assert_same(engine().generate(PROMPTS, G, **SETTINGS), expected)


@pytest.mark.parametrize("every", [2, 8, 1000])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}])
def test_looking_for_the_ended_less_often(engine, monkeypatch, every, settings):
    expected = engine().generate(PROMPTS, G, **SETTINGS, **settings)
    monkeypatch.setattr(sampler, "_CHECK_EVERY", {"cpu": every})
    assert_same(engine().generate(PROMPTS, G, **SETTINGS, **settings), expected)


@pytest.mark.parametrize("every", [1, 3])
def test_ended_completions_cost_nothing_after_the_next_look(tiny, engine, monkeypatch, every):
    """Prompts are read once; rows of a decode step are those that were alive when last looked at."""
    monkeypatch.setattr(sampler, "_CHECK_EVERY", {"cpu": every})
    model = tiny()
    shapes = []

    def watch(_, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    lengths = engine(model).generate(PROMPTS, G, **SETTINGS).lengths
    looked = [step // every * every for step in range(1, SETTINGS["max_new_tokens"])]
    alive = [sum(length > step for length in lengths) for step in looked]
    assert shapes == [(1, sum(map(len, PROMPTS)))] + [(count, 1) for count in alive if count]


def test_long_completions_of_many_groups(tiny, engine):
    """Groups end at different times, and the buffers are compacted again and again."""
    model = tiny(max_position_embeddings=512)
    prompts = [[5 + (3 * p + i) % 17 for i in range(1 + 5 * p % 7)] for p in range(9)]
    rollouts = engine(model).generate(prompts, 5, max_new_tokens=150)
    assert max(rollouts.lengths) > 64  # more than a chunk
    torch.testing.assert_close(rollouts.logps, plain_logps(model, rollouts), rtol=1e-4, atol=1e-4)


def test_bf16_weights_keep_float32_log_probs(tiny, engine):
    model = tiny().bfloat16()
    rollouts = engine(model).generate(PROMPTS, G, **SETTINGS)
    assert rollouts.logps.dtype == torch.float32
    assert (rollouts.logps - plain_logps(model, rollouts)).abs().max() < 0.15


# --- ends ---


def test_finish_reasons_and_ends(expected):
    for ids, reason in zip(expected.completion_ids, expected.finish_reasons, strict=True):
        assert EOS not in ids[:-1]
        assert (ids[-1] == EOS) == (reason == "eos")
        assert reason == "eos" or len(ids) == SETTINGS["max_new_tokens"]
    for row, length in zip(expected.logps, expected.lengths, strict=True):
        assert not row[length:].any()
        assert (row[:length] < 0).all()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
def test_every_eos_of_the_generation_config_ends_a_completion(tiny, engine, shared):
    model = tiny()
    model.generation_config.eos_token_id = [7, 11]
    rollouts = engine(model, shared_prompts=shared)
    assert rollouts.eos_token_ids == [EOS, 7, 11]  # the tokenizer's as well
    rollouts = rollouts.generate(PROMPTS, 8, **SETTINGS)
    ends = {ids[-1] for ids, reason in zip(rollouts.completion_ids, rollouts.finish_reasons, strict=True)
            if reason == "eos"}  # fmt: skip
    assert ends == {EOS, 7, 11}
    assert not any({EOS, 7, 11} & set(ids[:-1]) for ids in rollouts.completion_ids)


def test_a_prompt_may_contain_eos_and_padding(engine, tiny):
    model = tiny()
    rollouts = engine(model).generate([[EOS, 0, 5], [6, 0], [7]], G, **SETTINGS)
    other = engine(tiny(), shared_prompts=False).generate([[EOS, 0, 5], [6, 0], [7]], G, **SETTINGS)
    assert_same(rollouts, other)
    torch.testing.assert_close(rollouts.logps, plain_logps(model, rollouts), rtol=1e-5, atol=1e-5)


def test_the_first_token_may_be_the_last(engine):
    rollouts = engine().generate(PROMPTS, G, max_new_tokens=1)
    assert rollouts.lengths == [1] * 12
    others = tuple(token for token in range(V) if token != EOS)
    rollouts = engine().generate(PROMPTS, G, max_new_tokens=5, suppress_tokens=others)
    assert rollouts.completion_ids == [[EOS]] * 12
    assert rollouts.finish_reasons == ["eos"] * 12


def test_ids_are_what_was_fed_and_drawn(tiny, engine):
    """Never tokenized again: prompts come back as they went in, and tokens that no text would give are kept."""
    prompts = tuple(tuple(ids) for ids in PROMPTS)
    model = tiny()
    fed = []
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    rollouts = engine(model).generate(prompts, 1, **SETTINGS)
    assert rollouts.prompt_ids == PROMPTS
    assert fed[0].tolist() == [[token for ids in PROMPTS for token in ids]]
    decoded = sorted(token for ids in fed[1:] for token in ids.flatten().tolist())
    assert decoded == sorted(token for ids in rollouts.completion_ids for token in ids[:-1])


# --- the distribution ---

# 99.9 % quantiles of chi-squared with 1, 2, ... degrees of freedom, from a table
CRITICAL = [10.828, 13.816, 16.266, 18.467, 20.515, 22.458, 24.322, 26.124, 27.877, 29.588]


def chi_squared(counts, probs):
    """Pearson's statistic and its critical value, over outcomes expected at least 5 times and the rest together."""
    expected = probs * counts.sum()
    assert not counts[probs == 0].any()
    common = expected >= 5
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    theory = [*expected[common].tolist(), float(expected[~common].sum())]
    if theory[-1] < 5:  # too rare even together
        observed[-2:], theory[-2:] = [sum(observed[-2:])], [sum(theory[-2:])]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, theory, strict=True))
    return statistic, CRITICAL[len(theory) - 2]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 5}, {"repetition_penalty": 2.0}], ids=str
)
def test_completions_are_distributed_as_the_model_says(tiny, engine, settings):
    """4,000 completions of two tokens, vocabulary of 11; the first token, and the second given each common first."""
    vocabulary, count = 11, 4000
    model = tiny(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, initializer_range=0.5)
    prompt = [3, 4, 5]
    ids = engine(model).generate([prompt], count, seed=1, max_new_tokens=2, **settings).completion_ids

    @torch.no_grad()
    def probabilities(context):
        logits = model(torch.tensor([context])).logits[0, -1]
        if penalty := settings.get("repetition_penalty"):
            for token in set(context):
                logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        logits = logits / settings.get("temperature", 1.0)
        if k := settings.get("top_k"):
            logits[logits < logits.sort().values[-k]] = -math.inf
        return logits.softmax(-1).double()

    def counts(tokens):
        return torch.bincount(torch.tensor(tokens), minlength=vocabulary)

    statistic, critical = chi_squared(counts([c[0] for c in ids]), probabilities(prompt))
    assert statistic < critical
    firsts = counts([c[0] for c in ids])
    firsts[EOS] = 0
    for first in firsts.argsort(descending=True)[:3].tolist():
        seconds = counts([c[1] for c in ids if c[0] == first])
        assert seconds.sum() > 100
        statistic, critical = chi_squared(seconds, probabilities([*prompt, first]))
        assert statistic < critical
    # The test can tell: from the distribution of another context these counts are far away
    other = probabilities([*prompt, int(firsts.argmax())])
    assert ((firsts - other * count) ** 2 / (other * count).clamp(min=1)).sum() > 2 * critical


# --- what is left behind, and what is refused ---


def test_training_mode_dropout_and_checkpointing_come_back(tiny, engine):
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = engine(model).generate(PROMPTS, G, **SETTINGS)
    for shared in (True, False):
        model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
        model.transformer.h[1].attn.eval()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        training = [module.training for module in model.modules()]
        config = model.generation_config
        rollouts = engine(model, shared_prompts=shared).generate(PROMPTS, G, **SETTINGS)
        assert_same(rollouts, expected)  # without dropout
        assert [module.training for module in model.modules()] == training
        assert all(block.gradient_checkpointing for block in model.transformer.h)
        assert model.generation_config is config


def test_flags_come_back_after_an_error(tiny, engine):
    model = tiny().train()
    config = model.generation_config
    for shared in (True, False):
        with pytest.raises(IndexError):
            engine(model, shared_prompts=shared).generate([[V + 1]], 1, max_new_tokens=2)
        assert all(module.training for module in model.modules())
        assert model.generation_config is config


def test_nothing_is_kept_for_autograd(engine):
    rollouts = engine().generate(PROMPTS, G, **SETTINGS)
    assert not rollouts.logps.requires_grad


def test_parameters_of_a_call_override_the_sampler_s(engine):
    made = engine(params=SamplingParams(max_new_tokens=3, temperature=0.5))
    assert max(made.generate(PROMPTS, G).lengths) == 3
    assert max(made.generate(PROMPTS, G, max_new_tokens=6).lengths) == 6
    assert made.params == SamplingParams(max_new_tokens=3, temperature=0.5)
    with pytest.raises(ValueError, match="temperature=0"):
        made.generate(PROMPTS, G, temperature=0)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
def test_a_model_that_diverged_is_refused(tiny, engine, shared):
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan  # of the third prompt
    with pytest.raises(FloatingPointError, match="for 3 of 12 completions, the first of prompt 2"):
        engine(model, shared_prompts=shared).generate(PROMPTS, G, max_new_tokens=3, suppress_tokens=(9,))


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 2, "prompt_ids is empty"),
        ([[5], []], 2, r"prompt_ids\[1\] has no tokens"),
        ([[5]], 0, "num_generations=0 must be at least 1"),
    ],
)
def test_nothing_to_do_is_refused(engine, prompts, count, message):
    with pytest.raises(ValueError, match=message):
        engine().generate(prompts, count)


def test_a_tokenizer_and_a_model_without_eos_are_refused(tiny):
    class Tokenizer:
        eos_token_id = pad_token_id = None

    model = tiny()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"Set tokenizer\.eos_token"):
        GroupSampler(model, Tokenizer())
    model.generation_config.eos_token_id = 9
    made = GroupSampler(model, Tokenizer())
    assert made.eos_token_ids == [9]
    assert made.pad_token_id == 9


def test_a_model_off_sdpa_cannot_share(tiny, engine):
    with pytest.raises(ValueError, match="shared_prompts=False"):
        engine(tiny(attn_implementation="eager"))
    rows = engine(tiny(attn_implementation="eager"), shared_prompts=False).generate(PROMPTS, G, **SETTINGS)
    assert_same(rows, engine().generate(PROMPTS, G, **SETTINGS))


def test_architectures_that_cannot_share_say_so(tiny, engine):
    kinds = (
        ("mistral", {"sliding_window": 3}),
        ("phimoe", {"sliding_window": 3, "num_local_experts": 2}),
        ("diffllama", {}),
    )
    for kind, overrides in kinds:
        with pytest.raises(UnsupportedAttention):
            engine(tiny(kind, **overrides)).generate(PROMPTS, G, **SETTINGS)
        model = tiny(kind, **overrides)
        rollouts = engine(model, shared_prompts=False).generate(PROMPTS, G, **SETTINGS)
        torch.testing.assert_close(rollouts.logps, plain_logps(model, rollouts), rtol=1e-5, atol=1e-5)
