"""The same numbers as `trl.GRPOTrainer`, from a real one: its `_compute_loss` and its advantages.

One trainer serves every case: what `_compute_loss` reads from the trainer is set before each call. On our side the
log-probs come from a plain padded forward pass and `log_softmax`.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from trl_grpo_ext.objective import AGGREGATIONS, AGGREGATORS, StepNormalizer, grpo_loss

P, G = 2, 3
B = P * G
TEMPERATURE = 0.7
MAX_COMPLETION_LENGTH = 9
EPSILON_LOW, EPSILON_HIGH, DELTA = 0.1, 0.15, 1.3


def score_a(score_a, **kwargs):
    return score_a


def score_b(score_b, **kwargs):
    return score_b


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, make_model, tiny_tokenizer):
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=B,
        num_generations=G,
        max_completion_length=MAX_COMPLETION_LENGTH,
        temperature=TEMPERATURE,
        reward_weights=[1.0, 2.0],
    )
    rows = Dataset.from_list([{"prompt": "ab", "score_a": 0.0, "score_b": 0.0}] * P)
    trainer = GRPOTrainer(
        make_model("qwen2"), [score_a, score_b], args=args, train_dataset=rows, processing_class=tiny_tokenizer
    )
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def batch(trainer):
    """B padded rows of unequal length and the log-probs of policies near the current one."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = trainer.model.config.vocab_size
    lengths, prompt_lengths = torch.tensor([7, 1, 4, 5, 2, 6]), torch.tensor([3, 3, 3, 5, 5, 5])
    completion_mask = (torch.arange(7) < lengths.unsqueeze(1)).long()
    prompt_mask = (torch.arange(5) >= 5 - prompt_lengths.unsqueeze(1)).long()
    tokens = torch.randint(3, vocabulary, (B, 12), generator=generator)
    batch = {
        "prompt_ids": tokens[:, :5] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": tokens[:, 5:] * completion_mask,
        "completion_mask": completion_mask,
        # Not centred: a loss of about 0 would be no test of a relative error.
        "advantages": torch.tensor([1.5, -0.7, 0.4, -1.2, 0.9, 0.3]),
        "num_items_in_batch": completion_mask.sum(),
    }
    with torch.no_grad():
        logps = plain_logps(trainer.model, batch)
    # A shift for each completion, so that the sequence-level ratios leave the clip too, and noise for each token.
    shift = torch.tensor([-0.5, 0.3, 0.2, -0.4, 0.02, -0.3]).unsqueeze(1)
    batch["old_per_token_logps"] = logps + shift + 0.2 * torch.randn(B, 7, generator=generator)
    batch["ref_per_token_logps"] = logps + 0.6 * torch.randn(B, 7, generator=generator)
    return batch


def plain_logps(model, batch):
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -length - 1 : -1]
    logps = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    return logps.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def configure(trainer, case, accumulation=1):
    trainer.loss_type = case.aggregation
    trainer.importance_sampling_level = case.level
    trainer.beta = case.beta
    trainer.epsilon_low, trainer.epsilon_high = EPSILON_LOW, EPSILON_HIGH
    trainer.args.delta = case.delta
    trainer.args.use_bias_correction_kl = case.corrected
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.args.steps_per_generation = accumulation
    trainer._metrics["train"].clear()


def our_loss(model, batch, case, norm):
    logps = plain_logps(model, batch)
    return grpo_loss(
        logps,
        batch.get("old_per_token_logps", logps.detach()),
        batch["advantages"],
        batch["completion_mask"],
        norm=norm,
        ref_logps=batch["ref_per_token_logps"],
        beta=case.beta,
        epsilon_low=EPSILON_LOW,
        epsilon_high=EPSILON_HIGH,
        delta=case.delta,
        level=case.level,
        use_bias_correction_kl=case.corrected,
        aggregation=case.aggregation,
    )


def normalizer(batch):
    tokens = batch["completion_mask"].sum().item()
    return StepNormalizer(
        num_sequences=B, num_tokens=tokens, dapo_tokens=tokens, max_completion_length=MAX_COMPLETION_LENGTH
    )


KL_SETTINGS = [(0.0, True), (0.04, False), (0.04, True)]
CASES = [
    SimpleNamespace(
        aggregation=aggregation, level=level, clipped=clipped, delta=DELTA if clipped else None, beta=beta, corrected=kl
    )
    for aggregation, level, clipped, (beta, kl) in itertools.product(
        AGGREGATIONS, ["token", "sequence"], [False, True], KL_SETTINGS
    )
]


def name_of(case):
    kl = f"kl{'-corrected' if case.corrected else ''}" if case.beta else "no_kl"
    return f"{case.aggregation}-{case.level}-{'clipped' if case.clipped else 'on_policy'}-{kl}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_gradient_and_metrics(trainer, batch, case):
    model = trainer.model
    inputs = batch if case.clipped else {k: v for k, v in batch.items() if k != "old_per_token_logps"}
    configure(trainer, case)

    expected = trainer._compute_loss(model, inputs)
    expected_gradient = gradients(model, expected)
    terms = our_loss(model, inputs, case, normalizer(batch))
    gradient = gradients(model, terms.loss)

    torch.testing.assert_close(terms.loss.detach(), expected.detach(), rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()

    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name, ours in {
        "clip_ratio/low_mean": terms.is_low_clipped,
        "clip_ratio/high_mean": terms.is_high_clipped,
        "clip_ratio/region_mean": terms.is_low_clipped | terms.is_high_clipped,
    }.items():
        mask = torch.ones(B, 1) if case.level == "sequence" else batch["completion_mask"]
        assert metrics[name] == pytest.approx((ours * mask).sum().item() / mask.sum().item())
    if case.beta:
        mean_kl = (terms.per_token_kl * batch["completion_mask"]).sum() / batch["completion_mask"].sum()
        assert metrics["kl"] == pytest.approx(mean_kl.item(), rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_clipped_cases_reach_every_branch(trainer, batch, level):
    case = SimpleNamespace(aggregation="grpo", level=level, delta=DELTA, beta=0.0, corrected=True)
    terms = our_loss(trainer.model, batch, case, normalizer(batch))
    mask = batch["completion_mask"].bool()
    ratio, negative = terms.ratio.expand_as(mask), (batch["advantages"] < 0).unsqueeze(1)
    assert (terms.is_low_clipped & mask).any()
    assert (terms.is_high_clipped & mask).any()
    assert ((ratio > DELTA) & negative & mask).any()  # where delta changes the loss
    assert ((ratio > 1 - EPSILON_LOW) & (ratio < 1 + EPSILON_HIGH) & mask).any()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo", "dapo"])
def test_the_step_is_the_same_however_we_deal_it(trainer, batch, aggregation, level):
    """TRL's step of two equal micro-batches, in its order, is the sum of ours, of other rows and sizes.

    Not for bnpo: TRL's depends on the deal.
    """
    case = SimpleNamespace(aggregation=aggregation, level=level, delta=DELTA, beta=0.04, corrected=True)
    configure(trainer, case, accumulation=2)

    def rows(indices):
        return {k: v if v.dim() == 0 else v[indices] for k, v in batch.items()}

    expected = sum(trainer._compute_loss(trainer.model, rows(part)) for part in ([0, 1, 2], [3, 4, 5]))
    norm = normalizer(batch)
    dealt = sum(our_loss(trainer.model, rows(part), case, norm).loss for part in ([4], [5, 0], [1, 3, 2]))
    torch.testing.assert_close(dealt, expected, rtol=1e-5, atol=0)


# --- advantages ---

REWARDS = {
    "plain": ([1.0, 2.0, 6.0, 0.0, 0.0, 3.0], [0.3, -1.0, 0.2, 5.0, 4.0, 0.0]),
    "some_missing": ([1.0, None, 6.0, 0.0, 0.0, None], [0.3, -1.0, None, 5.0, None, 0.0]),
    "unscorable_row": ([1.0, None, 6.0, 0.0, 0.0, 3.0], [0.3, None, 0.2, 5.0, 4.0, None]),
    "one_scored_in_a_group": ([1.0, None, None, 0.0, 0.0, 3.0], [0.3, None, None, 5.0, 4.0, 1.0]),
    "constant_group": ([0.5, 0.5, 0.5, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 5.0, 4.0, 0.0]),
}


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "group"),
    ],
)
def test_advantages(trainer, monkeypatch, aggregation, scale, rewards):
    """Through TRL's own generation and scoring: its reward functions return what the rows say."""
    for name, value in {"beta": 0.0, "scale_rewards": scale, "multi_objective_aggregation": aggregation}.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(trainer.generation_config, "max_new_tokens", 1)  # what is generated does not matter
    trainer._metrics["train"].clear()
    columns = REWARDS[rewards]
    rows = [{"prompt": "ab", "score_a": a, "score_b": b} for a, b in zip(*columns, strict=True)]
    expected = trainer._generate_and_score_completions(rows)["advantages"]

    per_func = torch.tensor([[math.nan if r is None else r for r in column] for column in columns]).T
    ours = AGGREGATORS[aggregation](per_func, torch.tensor([1.0, 2.0]), G, scale=scale)
    torch.testing.assert_close(ours.values, expected, rtol=1e-5, atol=1e-6)
    if rewards != "one_scored_in_a_group":  # TRL's std of one value is NaN, ours 0
        assert trainer._metrics["train"]["frac_reward_zero_std"][-1] == pytest.approx(
            ours.zero_std.float().mean().item()
        )
