"""linear_nash_pg_loss in float16: its gradients neither vanish nor overflow where plain float16 does not."""

from __future__ import annotations

import math

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.ops.nash_pg_loss.weights import KL_MODES
from tests.test_nash_pg_loss import by_oracle, problem


def test_float16_gradients_do_not_fall_below_what_it_holds() -> None:
    """Gradients survive where p * weight / sequences is below float16's smallest number for most tokens."""
    inputs = problem(torch.float16)
    settings = {"tau": 0.05, "normalizer": 4096.0}
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
    result = nlhf_kernels.linear_nash_pg_loss(*leaves, *inputs[2:], **settings)
    (gradient,) = torch.autograd.grad(result.loss * 4096, leaves[1])
    _, true = by_oracle(inputs, torch.float64, "sequence", **settings)
    error = (gradient.double() - true[1] * 4096 / 3).norm() / (true[1] * 4096 / 3).norm()
    assert error < 5e-3


@pytest.mark.parametrize("kl", KL_MODES)
@pytest.mark.parametrize("chunk_bytes", [None, 700])
def test_float16_gradients_do_not_overflow_where_plain_ones_do_not(kl, chunk_bytes) -> None:
    """Gradients stay finite for a weight of 4,000 after small ones; scaled by 64 it would overflow."""
    inputs = problem(torch.float16)
    settings = {"tau": 0.3, "baseline": torch.tensor([0.5, 0.1, 0.5, 0.5, 4000.0]), "normalizer": 256.0}
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
    hidden, weight, targets, preference, reference_hidden, reference_weight = (*leaves, *inputs[2:])
    plain = nlhf_kernels.nash_pg_loss(
        hidden @ weight.t(), targets, preference, reference_hidden @ reference_weight.t(), kl=kl, **settings
    )
    expected = torch.autograd.grad(plain.loss, leaves)
    result = nlhf_kernels.linear_nash_pg_loss(*leaves, *inputs[2:], kl=kl, chunk_bytes=chunk_bytes, **settings)
    gradients = torch.autograd.grad(result.loss, leaves)
    for one, other in zip(gradients, expected, strict=True):
        assert one.isfinite().all()
        assert (one - other).norm() < 5e-3 * other.norm()


def test_float16_sums_over_a_chunk_do_not_overflow() -> None:
    """A token that is the target 4,096 times gets a finite gradient; its sum exceeds float16 before the division."""
    hidden = torch.full((1, 4096, 4), 8.0, dtype=torch.float16)
    weight = torch.zeros(16, 4, dtype=torch.float16, requires_grad=True)
    targets = torch.full((1, 4096), 3)
    given = torch.full((1, 4096), -math.log(16))
    result = nlhf_kernels.linear_nash_pg_loss(
        hidden, weight, targets, torch.tensor([1.0]), reference_logprobs=given, tau=0.1, normalizer=4096.0
    )
    (gradient,) = torch.autograd.grad(result.loss, weight)
    torch.testing.assert_close(gradient[3], torch.full((4,), -0.5 * 8 * 15 / 16, dtype=torch.float16))
