"""preference_loss: IPO and DPO against their equations, their known solutions, soft preferences, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.ops.preference_loss.oracle import preference_loss as oracle
from tests.support.backends import DEVICE
from tests.support.tolerances import assert_accurate

TAUS = (0.1, 0.5, 1.0, 10.0)


def problem(pairs: int = 6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    first, second = (5 * torch.randn(pairs, generator=generator) for _ in range(2))
    return first.to(DEVICE, dtype), second.to(DEVICE, dtype), torch.rand(pairs, generator=generator).to(DEVICE, dtype)


EXAMPLES = [
    lambda device: (tuple(tensor.to(device) for tensor in problem()), {"tau": 0.3}),
    lambda device: (
        tuple(tensor.to(device).requires_grad_(i < 2) for i, tensor in enumerate(problem())),
        {"tau": 0.3, "kind": "dpo"},
    ),
]


@pytest.mark.parametrize("kind", ["ipo", "dpo"])
@pytest.mark.parametrize("tau", TAUS)
def test_against_the_equations(kind, tau) -> None:
    first, second, preference = problem()

    def run(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (first, second)]
        loss = function(*leaves, preference.to(dtype))
        return loss, torch.autograd.grad(loss * 2, leaves)

    loss, gradients = run(lambda *a: nlhf_kernels.preference_loss(*a, tau=tau, kind=kind).loss, torch.float32)
    truth, true_gradients = run(lambda *a: oracle(*a, tau=tau, kind=kind), torch.float64)
    pytorch, pytorch_gradients = run(lambda *a: oracle(*a, tau=tau, kind=kind), torch.float32)
    assert_accurate(loss, truth, pytorch)
    for ours, true, theirs in zip(gradients, true_gradients, pytorch_gradients, strict=True):
        assert_accurate(ours, true, theirs)


def test_without_a_preference_the_first_is_preferred() -> None:
    first, second, _ = problem()
    hard = nlhf_kernels.preference_loss(first, second, tau=0.2)
    assert torch.equal(hard.loss, nlhf_kernels.preference_loss(first, second, torch.ones_like(first), tau=0.2).loss)
    torch.testing.assert_close(hard.loss, ((first - second - 2.5) ** 2).mean())


def test_a_lost_game_is_the_won_one_with_the_responses_exchanged() -> None:
    first, second, preference = problem()
    for kind in ("ipo", "dpo"):
        there = nlhf_kernels.preference_loss(first, second, preference, tau=0.3, kind=kind)
        back = nlhf_kernels.preference_loss(second, first, 1 - preference, tau=0.3, kind=kind)
        torch.testing.assert_close(there.loss, back.loss)
        torch.testing.assert_close(there.margin, -back.margin)


def test_extreme_margins_stay_finite() -> None:
    first = torch.tensor([3e4, -3e4, 0.0], device=DEVICE, requires_grad=True)
    loss = nlhf_kernels.preference_loss(first, torch.zeros_like(first), tau=10.0, kind="dpo").loss
    assert loss.isfinite() and torch.autograd.grad(loss, first)[0].isfinite().all()


def test_lengths_and_normalizer() -> None:
    first, second, preference = problem()
    lengths = torch.arange(1, 7, device=DEVICE), torch.arange(7, 1, -1, device=DEVICE)
    result = nlhf_kernels.preference_loss(first, second, preference, tau=0.4, lengths=lengths)
    torch.testing.assert_close(result.margin, first / lengths[0] - second / lengths[1])
    parts = [
        nlhf_kernels.preference_loss(first[rows], second[rows], preference[rows], tau=0.4, normalizer=6.0).loss
        for rows in (slice(0, 1), slice(1, 6))
    ]
    whole = nlhf_kernels.preference_loss(first, second, preference, tau=0.4).loss
    torch.testing.assert_close(sum(parts), whole)


def solve(logits_of_loss, actions: int, steps: int = 400) -> torch.Tensor:
    """Return the policy that minimises a loss over logits, by L-BFGS in float64."""
    logits = torch.zeros(actions, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=steps, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = logits_of_loss(logits.log_softmax(0) - torch.full_like(logits, -math.log(actions)))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize(("tau", "expected"), [(0.1, 0.9933), (0.5, 0.7311), (1.0, 0.6225), (10.0, 0.5125)])
def test_ipo_on_two_actions(tau, expected) -> None:
    """If y1 always wins and the reference is uniform, IPO gives pi(y1) = sigmoid(1 / (2 tau))."""
    policy = solve(lambda ratio: nlhf_kernels.preference_loss(ratio[:1], ratio[1:], tau=tau).loss, 2)
    assert float(policy[0]) == pytest.approx(1 / (1 + math.exp(-1 / (2 * tau))), abs=1e-6)
    assert float(policy[0]) == pytest.approx(expected, abs=6e-5)


def test_dpo_on_two_actions_forgets_the_reference() -> None:
    """For every tau, further optimisation moves pi(y1) closer to 1."""
    for tau in TAUS:
        logit = torch.zeros((), dtype=torch.float64, requires_grad=True)
        margins = []
        for _ in range(3000):
            loss = nlhf_kernels.preference_loss(logit[None], -logit[None], tau=tau, kind="dpo").loss
            (gradient,) = torch.autograd.grad(loss, logit)
            with torch.no_grad():
                logit -= gradient / tau**2
            margins.append(float(logit.detach()))
        assert margins[-1] > margins[1000] > margins[100] and tau * 2 * margins[-1] > 5


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.1, (0.964, 0.034, 0.001)),
        (0.5, (0.563, 0.289, 0.148)),
        (1.0, (0.448, 0.321, 0.230)),
        (10.0, (0.345, 0.333, 0.322)),
    ],
)
def test_ipo_on_three_actions(tau, expected) -> None:
    """With data (a, b), (b, c), (a, c), neighbouring logits differ by 1 / (3 tau)."""
    won, lost = torch.tensor([0, 1, 0]), torch.tensor([1, 2, 2])
    policy = solve(lambda ratio: nlhf_kernels.preference_loss(ratio[won], ratio[lost], tau=tau).loss, 3)
    assert policy.tolist() == pytest.approx(expected, abs=6e-4)


def test_online_ipo_settles_where_self_play_does() -> None:
    """Expected over y, y' from the policy itself (held fixed), the gradient is
    -(4 / tau) E[grad log pi(y) (P(y > pi) - 1/2 - tau (l(y) - E l))], l = log pi / mu."""
    torch.manual_seed(0)
    actions, tau = 4, 0.5
    scores = torch.randn(actions, actions, dtype=torch.float64)
    preference = torch.sigmoid(scores - scores.t())
    mu = torch.randn(actions, dtype=torch.float64).log_softmax(0)
    logits = torch.randn(actions, dtype=torch.float64, requires_grad=True)
    log_pi = logits.log_softmax(0)
    pi, ratio = log_pi.detach().exp(), log_pi - mu
    y, y_prime = (index.reshape(-1) for index in torch.meshgrid(*[torch.arange(actions)] * 2, indexing="ij"))
    loss = torch.stack(
        [
            pi[a]
            * pi[b]
            * nlhf_kernels.preference_loss(ratio[a, None], ratio[b, None], preference[a, b, None], tau=tau).loss
            for a, b in zip(y, y_prime, strict=True)
        ]
    ).sum()
    log_ratio = ratio.detach()
    advantage = preference @ pi - 0.5 - tau * (log_ratio - (pi * log_ratio).sum())
    expected = -(4 / tau) * torch.autograd.grad((pi * log_pi * advantage).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def linear_problem():
    generator = torch.Generator().manual_seed(2)
    hidden, reference_hidden = (torch.randn(6, 5, 8, generator=generator).to(DEVICE) for _ in range(2))
    weight, reference_weight = (torch.randn(31, 8, generator=generator).to(DEVICE) for _ in range(2))
    targets = torch.randint(31, (6, 5), generator=generator)
    targets[0, 3:], targets[4, :2] = -100, -100
    return (
        hidden,
        weight,
        targets.to(DEVICE),
        torch.rand(3, generator=generator).to(DEVICE),
        reference_hidden,
        reference_weight,
    )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", ["ipo", "dpo"])
def test_from_hidden_states(kind, per_token) -> None:
    hidden, weight, targets, preference, reference_hidden, reference_weight = linear_problem()
    kept = targets != -100

    def by_hand(dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
        index = targets.clamp(min=0).unsqueeze(2)
        log_pi = (leaves[0] @ leaves[1].t()).log_softmax(-1).gather(2, index).squeeze(2)
        log_mu = (
            (reference_hidden.to(dtype) @ reference_weight.to(dtype).t()).log_softmax(-1).gather(2, index).squeeze(2)
        )
        ratios = torch.where(kept, log_pi - log_mu, 0).sum(1) / (kept.sum(1) if per_token else 1)
        loss = oracle(ratios[:3], ratios[3:], preference.to(dtype), tau=0.4, kind=kind)
        return loss, torch.autograd.grad(loss * 3, leaves)

    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    options = {"tau": 0.4, "kind": kind, "per_token": per_token}
    result = nlhf_kernels.linear_preference_loss(
        *leaves, targets, preference, reference_hidden, reference_weight, chunk_bytes=31 * 4 * 7, **options
    )
    gradients = torch.autograd.grad(result.loss * 3, leaves)
    (truth, true_gradients), (pytorch, pytorch_gradients) = by_hand(torch.float64), by_hand(torch.float32)
    assert_accurate(result.loss, truth, pytorch, constant=2)
    for ours, true, theirs in zip(gradients, true_gradients, pytorch_gradients, strict=True):
        assert_accurate(ours, true, theirs)
    scored = nlhf_kernels.linear_logprobs(hidden, weight, targets, reference_hidden, reference_weight)
    given = torch.where(kept, scored.reference, torch.nan)
    shorter = nlhf_kernels.linear_preference_loss(
        hidden, weight, targets, preference, reference_logprobs=given, **options
    )
    torch.testing.assert_close(shorter.loss, result.loss)
    lengths = kept.sum(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed = nlhf_kernels.linear_preference_loss(
        hidden[kept],
        weight,
        targets[kept],
        preference,
        reference_hidden[kept],
        reference_weight,
        cu_seqlens=offsets,
        **options,
    )
    torch.testing.assert_close(packed.loss, result.loss)


FIRST, SECOND, PREFERENCE = (tensor.cpu() for tensor in problem())
BAD = {
    r"first: expected shape \(pairs\); got \(6, 1\)": ((FIRST[:, None], SECOND), {}),
    r"second: expected shape \(pairs\) with pairs=6; got \(5,\)": ((FIRST, SECOND[:5]), {}),
    r"preference: expected probabilities in \[0, 1\]; got -": ((FIRST, SECOND, PREFERENCE - 1), {}),
    "preference: expected a constant": ((FIRST, SECOND, PREFERENCE.clone().requires_grad_()), {}),
    r"tau: expected a finite number in \(0": ((FIRST, SECOND), {"tau": 0.0}),
    "kind: expected one of ipo, dpo; got 'kto'": ((FIRST, SECOND), {"kind": "kto"}),
    "lengths: expected dtype int64": ((FIRST, SECOND), {"lengths": (FIRST, SECOND)}),
    "normalizer: expected a finite number": ((FIRST, SECOND), {"normalizer": -1.0}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message) -> None:
    args, kwargs = BAD[message]
    with pytest.raises((ValueError, TypeError), match="^preference_loss: " + message):
        nlhf_kernels.preference_loss(*args, **{"tau": 0.5, **kwargs})


def test_bad_input_of_the_linear_form_is_named() -> None:
    hidden, weight, targets, preference, reference_hidden, _ = linear_problem()
    with pytest.raises(ValueError, match="linear_preference_loss: hidden: expected B preferred responses"):
        nlhf_kernels.linear_preference_loss(hidden[:5], weight, targets[:5], None, reference_hidden[:5], tau=0.1)
    with pytest.raises(ValueError, match="linear_preference_loss: reference_logprobs: expected either"):
        nlhf_kernels.linear_preference_loss(hidden, weight, targets, preference, tau=0.1)
    given = torch.zeros(targets.shape, dtype=hidden.dtype, device=hidden.device, requires_grad=True)
    with pytest.raises(ValueError, match="linear_preference_loss: reference_logprobs: expected a constant"):
        nlhf_kernels.linear_preference_loss(hidden, weight, targets, preference, tau=0.1, reference_logprobs=given)
