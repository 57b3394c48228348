import math

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trl_grpo_ext.objective import KL_ESTIMATORS, full_kl, kl_penalised_rewards

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # log pi - log pi_ref = -ln 2 and ln 2, so pi_ref / pi = 2 and 1/2
        ("k1", [-LN2, LN2]),
        ("k2", [LN2**2 / 2, LN2**2 / 2]),
        ("k3", [2 - LN2 - 1, 0.5 + LN2 - 1]),
    ],
)
def test_estimators_by_hand(name, expected):
    logps, ref_logps = torch.tensor([[0.25, 0.5]]).log(), torch.tensor([[0.5, 0.25]]).log()
    torch.testing.assert_close(KL_ESTIMATORS[name](logps, ref_logps), torch.tensor([expected]))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_estimators_are_zero_where_the_policies_agree(name):
    logps = torch.tensor([[-0.5, -3.0]])
    assert KL_ESTIMATORS[name](logps, logps).tolist() == [[0.0, 0.0]]


LOGITS = torch.tensor([0.3, -1.0, 0.9, 0.2], dtype=torch.float64)
REF_LOGITS = torch.tensor([-0.5, 0.4, 0.6, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_unbiased_estimators(name):
    logps, ref_logps = LOGITS.log_softmax(0), REF_LOGITS.log_softmax(0)
    exact = (logps.exp() * (logps - ref_logps)).sum()
    torch.testing.assert_close((logps.exp() * KL_ESTIMATORS[name](logps, ref_logps)).sum(), exact)


def gradient(function) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    function(logits.log_softmax(0), REF_LOGITS.log_softmax(0)).backward()
    return logits.grad


def reverse_kl(logps, ref_logps):
    return (logps.exp() * (logps - ref_logps)).sum()


def forward_kl(logps, ref_logps):
    return (ref_logps.exp() * (ref_logps - logps)).sum()


@pytest.mark.parametrize(
    ("name", "corrected", "target"),
    [
        ("k1", False, lambda logps, ref_logps: 0.0 * logps.sum()),
        ("k2", False, reverse_kl),
        ("k3", False, forward_kl),
        ("k1", True, reverse_kl),
        ("k3", True, reverse_kl),
    ],
)
def test_what_the_expected_gradient_of_each_estimator_is(name, corrected, target):
    # The expectation over the token is taken exactly, with the sampling probabilities held fixed as in a loss.
    def expected_loss(logps, ref_logps):
        ratio = (logps - logps.detach()).exp() if corrected else 1.0
        return (logps.detach().exp() * KL_ESTIMATORS[name](logps, ref_logps) * ratio).sum()

    torch.testing.assert_close(gradient(expected_loss), gradient(target))


# --- KL in the reward ---


def test_kl_penalised_rewards():
    rewards = torch.tensor([1.0, math.nan, 3.0])
    logps = torch.tensor([[-1.0, -2.0], [-1.0, -1.0], [-1.0, -torch.inf]], requires_grad=True)
    ref_logps = torch.tensor([[-1.5, -4.0], [-1.0, -1.0], [-0.5, 0.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    penalised = kl_penalised_rewards(rewards, logps, ref_logps, mask, beta=0.1)
    # 1 - 0.1 (0.5 + 2); a missing reward stays missing; 3 - 0.1 (-0.5), the padding's -inf not counted
    torch.testing.assert_close(penalised, torch.tensor([0.75, math.nan, 3.05]), equal_nan=True)
    assert not penalised.requires_grad


# --- the exact KL ---

N, H, V = 7, 5, 11


def naive_kl(
    hidden, ref_hidden, head_weight, head_bias, *, ref_head_weight=None, ref_head_bias=None, temperature=1.0,
    logit_scale=1.0, final_logit_softcapping=None,
) -> torch.Tensor:  # fmt: skip
    def log_probs(states, weight, bias):
        logits = logit_scale * (states @ weight.T + (0 if bias is None else bias))
        if final_logit_softcapping is not None:
            logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
        return torch.log_softmax(logits / temperature, dim=-1)

    if ref_head_weight is None:
        ref_head_weight, ref_head_bias = head_weight, head_bias
    reference = log_probs(ref_hidden, ref_head_weight, ref_head_bias).detach()
    policy = log_probs(hidden, head_weight, head_bias)
    return F.kl_div(reference, policy, log_target=True, reduction="none").sum(-1)


def random_inputs(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(3)
    shapes = {"hidden": (N, H), "ref_hidden": (N, H), "head_weight": (V, H), "head_bias": (V,)}
    inputs = {k: torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for k, s in shapes.items()}
    return inputs if bias else {**inputs, "head_bias": None}


def test_full_kl_by_hand():
    # The head is the identity, so the hidden state is the logits: p = (3/4, 1/4), q = (1/2, 1/2).
    hidden, ref_hidden = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    kl = full_kl(hidden, ref_hidden, torch.eye(2), None)
    torch.testing.assert_close(kl, torch.tensor([0.75 * math.log(1.5) + 0.25 * math.log(0.5)]))  # 0.1308


def test_full_kl_gradient_in_closed_form():
    # d KL / d logit_v = p_v (log p_v - log q_v - KL)
    logits = LOGITS.clone().unsqueeze(0).requires_grad_()
    kl = full_kl(logits, REF_LOGITS.unsqueeze(0), torch.eye(4, dtype=torch.float64), None)
    kl.sum().backward()
    logps, ref_logps = logits.detach().log_softmax(-1), REF_LOGITS.log_softmax(-1)
    torch.testing.assert_close(logits.grad, logps.exp() * (logps - ref_logps - kl.item()))


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 256])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("own_reference_head", [True, False])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "logit_scale": 0.3, "final_logit_softcapping": 2.0}])
def test_full_kl_equals_the_naive_computation(chunk_size, bias, own_reference_head, settings):
    ours, naive = random_inputs(bias=bias), random_inputs(bias=bias)
    reference = {}
    if own_reference_head:
        reference = {"ref_head_weight": torch.randn(V, H, generator=torch.Generator().manual_seed(4))}
        reference["ref_head_bias"] = torch.linspace(-1, 1, V) if bias else None
    weights = torch.linspace(0.5, 2.0, N)  # a different upstream gradient at each position

    kl = full_kl(**ours, **reference, **settings, chunk_size=chunk_size)
    expected = naive_kl(**naive, **reference, **settings)
    assert kl.shape == (N,)
    torch.testing.assert_close(kl, expected)
    (kl * weights).sum().backward()
    (expected * weights).sum().backward()
    for name in ("hidden", "head_weight", "head_bias"):
        if ours[name] is not None:
            torch.testing.assert_close(ours[name].grad, naive[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    assert ours["ref_hidden"].grad is None


def test_full_kl_gradcheck():
    inputs = random_inputs(torch.float64)
    ref_hidden, ref_head = inputs.pop("ref_hidden").detach(), torch.ones(V, H, dtype=torch.float64)

    def function(hidden, weight, bias):
        return full_kl(hidden, ref_hidden, weight, bias, ref_head_weight=ref_head, temperature=0.7, chunk_size=3)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_full_kl_is_exactly_zero_at_the_reference():
    inputs = random_inputs()
    kl = full_kl(inputs["hidden"], inputs["hidden"].detach(), inputs["head_weight"], None, chunk_size=3)
    kl.sum().backward()
    assert kl.tolist() == [0.0] * N
    assert inputs["hidden"].grad.abs().max() < 1e-6


def test_full_kl_computes_in_float32_from_bfloat16_and_under_autocast():
    inputs = {k: v.detach().bfloat16() for k, v in random_inputs().items()}
    expected = full_kl(**{k: v.float() for k, v in inputs.items()})
    assert torch.equal(full_kl(**inputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full_kl(**inputs), expected)


def test_full_kl_of_no_positions():
    hidden = torch.zeros(0, H, requires_grad=True)
    kl = full_kl(hidden, torch.zeros(0, H), torch.zeros(V, H), None)
    kl.sum().backward()
    assert kl.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0 must be above 0"),
        ({"chunk_size": 0}, r"chunk_size=0 must be at least 1"),
        ({"ref_hidden": torch.zeros(N - 1, H)}, r"hidden has shape \(7, 5\) and ref_hidden \(6, 5\)"),
        ({"ref_head_bias": torch.zeros(V)}, r"ref_head_bias needs ref_head_weight"),
    ],
)
def test_full_kl_names_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        full_kl(**(random_inputs() | change))


class LargeTensors(TorchDispatchMode):
    """Counts the elements of the storages of at least `threshold` elements that are alive at the same time."""

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self.threshold, self.peak = threshold, 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                size = storage.nbytes() // tensor.element_size()
                if size >= self.threshold:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), size)
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("function", ["full_kl", "naive_kl"])
def test_no_tensor_over_all_positions_and_the_vocabulary(function):
    """In forward and backward a few chunks of logits are alive, never N x V elements; the naive way is the control."""
    positions, width, vocabulary, chunk = 640, 4, 1000, 16
    hidden = torch.randn(positions, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)  # 4,000 elements: below the threshold
    saved: list[int] = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    compute = {
        "full_kl": lambda: full_kl(hidden, torch.randn(positions, width), weight, None, chunk_size=chunk),
        "naive_kl": lambda: naive_kl(hidden, torch.randn(positions, width), weight, None),
    }[function]
    with LargeTensors(threshold=chunk * vocabulary // 2) as large:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kl = compute()
        kl.sum().backward()

    assert weight.grad is not None
    assert large.peak > 0  # the logits have been seen
    frugal = large.peak <= 8 * chunk * vocabulary and sum(saved) < chunk * vocabulary
    assert frugal is (function == "full_kl"), f"alive at once {large.peak}, saved for backward {sum(saved)}"
    assert 8 * chunk * vocabulary < positions * vocabulary
