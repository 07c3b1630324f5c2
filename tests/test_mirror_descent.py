"""mirror_descent: every backend against the float64 oracle, the oracle against the theory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import nlhf_kernels
from tests.support.backends import DEVICE, SIMD_LEVELS, call, device_of, every_backend, every_rival
from tests.support.poison import poisoned_allocations, surrounded
from tests.support.tolerances import assert_accurate

DTYPES = [torch.float32, torch.float64]


def random_game(games: int, actions: int, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Return log_policy, preference, log_reference of random games with P + P^T = 1."""
    generator = torch.Generator().manual_seed(seed + 1000 * games + actions)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    strength = torch.rand(games, actions, actions, generator=generator, dtype=torch.float64)
    preference = (strength + 1 - strength.mT) / 2
    tensors = (draw(games, actions), preference, draw(games, actions).log_softmax(-1))
    return tuple(tensor.to(device, dtype) for tensor in tensors)


def steps(iterations: int, device: torch.device, dtype: torch.dtype = torch.float64, tau: float = 0.5) -> torch.Tensor:
    """Return the paper's decreasing step sizes 2 / (tau (t + 2)); the first has eta tau = 1."""
    return 2 / (tau * (torch.arange(iterations, device=device, dtype=dtype) + 2))


def _example(device: torch.device, dtype: torch.dtype, actions: int):
    return random_game(3, actions, device, dtype), {"tau": 0.5, "step_sizes": steps(4, device, dtype)}


def _against_a_given_opponent(device: torch.device):
    game, options = _example(device, torch.float32, 20)
    return game, {**options, "opponent": game[2] * 2}


EXAMPLES = [_against_a_given_opponent]
EXAMPLES += [partial(_example, dtype=dtype, actions=actions) for dtype in DTYPES for actions in (20, 64, 128)]


@every_rival
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opponent", ["mixture", "policy"])
@pytest.mark.parametrize(("games", "actions"), [(0, 3), (1, 1), (4, 2), (3, 7), (2, 33), (2, 64), (1, 100), (2, 301)])
@pytest.mark.parametrize("iterations", [0, 1, 17])
def test_backends_match_float64(backend, dtype, opponent, games, actions, iterations) -> None:
    device = device_of(backend)
    exact = random_game(games, actions, device)
    inputs = tuple(surrounded(tensor.to(dtype)) for tensor in exact)
    options = {"tau": 0.5, "opponent": opponent}
    truth = nlhf_kernels.mirror_descent(*exact, step_sizes=steps(iterations, device), backend="torch", **options)
    pytorch = nlhf_kernels.mirror_descent(
        *inputs, step_sizes=steps(iterations, device, dtype), backend="torch", **options
    )
    with poisoned_allocations() as handed_out:
        result = call("mirror_descent", backend, *inputs, step_sizes=steps(iterations, device, dtype), **options)
    assert handed_out
    assert_accurate(result, truth, pytorch, constant=4)
    if dtype == torch.float64:
        torch.testing.assert_close(result, truth, rtol=0, atol=1e-12)


@every_backend
@pytest.mark.parametrize("actions", [3, 40, 64])
def test_a_given_opponent_stays(backend, actions) -> None:
    """Against a fixed opponent, the steps are affine in log pi and equal their closed form, a geometric series."""
    device = device_of(backend)
    log_policy, preference, log_reference = random_game(3, actions, device)
    log_opponent = 2 * log_policy + 1  # unnormalised
    tau, eta, count = 0.4, 0.5, 6
    step_sizes = torch.full((count,), eta, device=device, dtype=torch.float64)
    result = call(
        "mirror_descent", backend, log_policy, preference, log_reference, tau=tau, step_sizes=step_sizes,
        opponent=log_opponent,
    )  # fmt: skip
    against = (preference @ log_opponent.softmax(-1).unsqueeze(-1)).squeeze(-1)
    kept = (1 - eta * tau) ** count
    expected = kept * log_policy + (1 - kept) * (log_reference + against / tau)
    torch.testing.assert_close(result, expected.log_softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("simd_level", SIMD_LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("actions", [1, 15, 16, 17, 63, 64, 65, 128, 257, 300])
def test_simd_levels_match_float64(simd_level, dtype, actions) -> None:
    device = torch.device("cpu")
    exact = random_game(2, actions, device)
    inputs = tuple(tensor.to(dtype) for tensor in exact)
    truth = nlhf_kernels.mirror_descent(*exact, tau=0.5, step_sizes=steps(9, device), backend="torch")
    pytorch = nlhf_kernels.mirror_descent(*inputs, tau=0.5, step_sizes=steps(9, device, dtype), backend="torch")
    result = call("mirror_descent", "cpu", *inputs, tau=0.5, step_sizes=steps(9, device, dtype))
    assert_accurate(result, truth, pytorch, constant=4)


@every_backend
def test_each_game_has_its_own_tau(backend) -> None:
    device = device_of(backend)
    game = random_game(4, 9, device)
    tau = torch.tensor([0.0, 0.1, 0.5, 2.0], device=device, dtype=torch.float64)
    step_sizes = torch.full((5,), 0.3, device=device, dtype=torch.float64)
    together = call("mirror_descent", backend, *game, tau=tau, step_sizes=step_sizes)
    for index, value in enumerate(tau.tolist()):
        alone = tuple(tensor[index : index + 1] for tensor in game)
        expected = nlhf_kernels.mirror_descent(*alone, tau=value, step_sizes=step_sizes, backend="torch")
        torch.testing.assert_close(together[index : index + 1], expected, rtol=0, atol=1e-12)


@every_backend
def test_ends_of_the_mixture_leave_the_other_side_alone(backend) -> None:
    """eta tau = 0 ignores the reference and eta tau = 1 the policy, since 0 * -inf is NaN."""
    device = device_of(backend)
    log_policy, preference, log_reference = random_game(2, 5, device)
    hole = log_policy.clone()
    hole[:, 2] = -torch.inf
    one = torch.ones(1, device=device, dtype=torch.float64)

    free = call("mirror_descent", backend, log_policy, preference, hole, tau=0.0, step_sizes=one)
    assert free.isfinite().all()
    anchored = call("mirror_descent", backend, hole, preference, log_reference, tau=1.0, step_sizes=one)
    assert anchored.isfinite().all()
    between = call("mirror_descent", backend, hole, preference, log_reference, tau=0.5, step_sizes=one)
    assert (between[:, 2] == -torch.inf).all(), "an action of probability 0 keeps it"
    assert torch.allclose(between.exp().sum(-1), torch.ones(2, device=device, dtype=torch.float64))


@every_backend
def test_a_game_without_support_is_nan_alone(backend) -> None:
    device = device_of(backend)
    log_policy, preference, log_reference = random_game(3, 6, device)
    broken = log_policy.clone()
    broken[1] = -torch.inf
    step_sizes = torch.full((3,), 0.4, device=device, dtype=torch.float64)
    result = call("mirror_descent", backend, broken, preference, log_reference, tau=0.5, step_sizes=step_sizes)
    expected = nlhf_kernels.mirror_descent(
        log_policy, preference, log_reference, tau=0.5, step_sizes=step_sizes, backend="torch"
    )
    assert result[1].isnan().all()
    torch.testing.assert_close(result[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)


@every_backend
def test_known_equilibrium_of_the_dice(backend) -> None:
    """On the cyclic game of non-transitive dice, Nash-MD converges to the uniform policy from any start."""
    device = device_of(backend)
    win = 5 / 9
    dice = torch.tensor([[0.5, win, 1 - win], [1 - win, 0.5, win], [win, 1 - win, 0.5]], dtype=torch.float64)
    log_policy = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log().to(device)
    uniform = torch.full((1, 3), -math.log(3), dtype=torch.float64, device=device)
    step_sizes = torch.full((400,), 0.5, dtype=torch.float64, device=device)
    result = call(
        "mirror_descent", backend, log_policy, dice.unsqueeze(0).to(device), uniform, tau=0.2, step_sizes=step_sizes
    )
    torch.testing.assert_close(result, uniform, rtol=0, atol=1e-12)


def test_the_oracle_converges_as_the_theorem_says() -> None:
    """KL(pi*_tau, pi_T) <= 8 / (tau^2 (T + 1)) with the decreasing steps, and KL <= (1 - eta tau) KL + 2 eta^2 a step.

    The equilibrium is found without the algorithm: pi* is the fixed point of log pi = log mu + P pi / tau + const, and
    damping makes that map a contraction.
    """
    tau, device = 0.5, torch.device("cpu")
    log_policy, preference, log_reference = random_game(50, 10, device)
    log_policy = log_reference.clone()
    star = log_reference.clone()
    for _ in range(4000):
        answer = log_reference + (preference @ star.exp().unsqueeze(-1)).squeeze(-1) / tau
        star = (0.9 * star + 0.1 * answer.log_softmax(-1)).log_softmax(-1)
    kl = lambda log_pi: (star.exp() * (star - log_pi)).sum(-1)  # noqa: E731

    before = kl(log_policy)
    for t, step in enumerate(steps(200, device, tau=tau)):
        log_policy = nlhf_kernels.mirror_descent(
            log_policy, preference, log_reference, tau=tau, step_sizes=step.reshape(1), backend="torch"
        )
        after = kl(log_policy)
        assert (after <= (1 - step * tau) * before + 2 * step**2 + 1e-12).all()
        assert (after <= 8 / (tau**2 * (t + 2)) + 1e-12).all()
        before = after
    assert (before < 1e-3).all(), "it does converge, far below the bound"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_policy": [[0.0]]}, TypeError, "log_policy: expected a tensor; got"),
        ({"log_policy": torch.zeros(2, 3, dtype=torch.bfloat16)}, TypeError, "log_policy: expected dtype float32 or f"),
        ({"log_policy": torch.zeros(2, 0)}, ValueError, "preference: expected shape"),
        ({"preference": torch.zeros(2, 3, 4)}, ValueError, "with games=2, actions=3; got"),
        ({"preference": torch.zeros(2, 3, 3, dtype=torch.float64)}, TypeError, "preference: expected dtype float32;"),
        (
            {"log_reference": torch.zeros(3)},
            ValueError,
            r"log_reference: expected shape \(games, actions\); got \(3,\)",
        ),
        ({"step_sizes": torch.zeros(1, device="meta")}, ValueError, "step_sizes: expected a tensor on cpu"),
        ({"step_sizes": 0.1}, TypeError, "step_sizes: expected a tensor"),
        ({"tau": math.nan}, ValueError, r"tau: expected a finite number in \[0.0, inf\); got nan"),
        ({"tau": -1}, ValueError, "tau: expected a finite number"),
        ({"tau": "1"}, TypeError, "tau: expected a number; got str"),
        ({"tau": torch.zeros(3)}, ValueError, "tau: expected shape"),
        ({"opponent": torch.zeros(2, 4)}, ValueError, "opponent: expected shape"),
        ({"opponent": "self"}, ValueError, "opponent: expected one of mixture, policy; got 'self'"),
    ],
)
def test_bad_input_is_named(change, error, message) -> None:
    good = dict(zip(("log_policy", "preference", "log_reference"), random_game(2, 3, torch.device("cpu")), strict=True))
    good = {name: tensor.float() for name, tensor in good.items()} | {"tau": 0.5, "step_sizes": torch.ones(2)}
    with pytest.raises(error, match=message):
        nlhf_kernels.mirror_descent(**{**good, **change})


def test_no_action_is_refused() -> None:
    empty = torch.zeros(2, 0), torch.zeros(2, 0, 0), torch.zeros(2, 0)
    with pytest.raises(ValueError, match="log_policy: expected at least one of actions; got 0"):
        nlhf_kernels.mirror_descent(*empty, tau=0.5, step_sizes=torch.ones(1))


@every_backend
def test_transposed_and_sliced_inputs_are_read_right(backend) -> None:
    device = device_of(backend)
    log_policy, preference, log_reference = random_game(4, 6, device)
    strided = torch.stack([log_policy, log_policy], -1)[..., 0], preference.mT.contiguous().mT, log_reference[:]
    options = {"tau": 0.5, "step_sizes": steps(6, device)[::2]}
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    expected = call("mirror_descent", backend, log_policy, preference, log_reference, **options)
    assert torch.equal(call("mirror_descent", backend, *strided, **options), expected)


def test_inputs_are_left_as_they_were() -> None:
    game = random_game(2, 4, DEVICE)
    copies = [tensor.clone() for tensor in game]
    nlhf_kernels.mirror_descent(*game, tau=0.5, step_sizes=steps(3, DEVICE))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(game, copies, strict=True))


@every_rival
@pytest.mark.parametrize("opponent", ["mixture", "policy"])
def test_many_steps_at_weak_regularisation_keep_their_digits(backend, opponent) -> None:
    """float32 keeps its digits: no constant accumulates over the steps (it would reach 1 / (2 tau) = 256 here)."""
    device, tau, iterations = device_of(backend), 2.0**-9, 300
    exact = random_game(4, 30, device)
    inputs = tuple(tensor.float() for tensor in exact)
    options = {"tau": tau, "opponent": opponent}
    step_sizes = torch.full((iterations,), 0.4, device=device, dtype=torch.float64)
    truth = nlhf_kernels.mirror_descent(*exact, step_sizes=step_sizes, backend="torch", **options)
    pytorch = nlhf_kernels.mirror_descent(*inputs, step_sizes=step_sizes.float(), backend="torch", **options)
    result = call("mirror_descent", backend, *inputs, step_sizes=step_sizes.float(), **options)
    assert_accurate(result, truth, pytorch, constant=4)
