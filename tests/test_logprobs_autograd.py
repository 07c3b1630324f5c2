"""logprobs under autograd and torch.compile: overwriting, double use, checkpointing, strides, refusals."""

from __future__ import annotations

import pytest
import torch

import nlhf_kernels
from tests.support.backends import call, device_of, every_rival
from tests.test_logprobs import all_of, problem, upstream_like


@every_rival
def test_overwriting_gives_the_same_gradient_in_the_same_memory(backend) -> None:
    policy, targets, reference, beta = problem(5, 333, torch.bfloat16, device_of(backend))
    gradients = []
    for overwrite in (False, True):
        leaf = policy.clone().requires_grad_()
        logits = leaf * 1.0
        seen = []
        logits.register_hook(lambda gradient, seen=seen: seen.append(gradient.data_ptr()))
        values = all_of(backend, logits, targets, reference, beta, overwrite_logits=overwrite)
        (values * upstream_like(values).to(values)).sum().backward()
        assert (seen[0] == logits.data_ptr()) is overwrite
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_overwritten_logits_cannot_be_used_again() -> None:
    policy, targets, _, _ = problem(4, 33)
    leaf = policy.requires_grad_()
    total = nlhf_kernels.logprobs(leaf * 1.0, targets, overwrite_logits=True).policy.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    with pytest.raises(ValueError, match="overwrite_logits: expected logits that a model computed"):
        nlhf_kernels.logprobs(leaf, targets, overwrite_logits=True)
    with pytest.raises(ValueError, match="overwrite_logits: expected logits that a model computed"):
        nlhf_kernels.nash_pg_loss(
            leaf[None], targets[None], torch.ones(1), leaf[None].detach(), tau=0.1, overwrite_logits=True
        )


def test_rows_that_share_memory_are_not_overwritten() -> None:
    policy, targets, _, _ = problem(4, 33)
    leaf = policy[:1].clone().requires_grad_()

    def gradient(overwrite: bool) -> torch.Tensor:
        logits = (leaf * 1.0).expand(4, 33)
        total = nlhf_kernels.logprobs(logits, targets, overwrite_logits=overwrite).policy.sum()
        return torch.autograd.grad(total, leaf)[0]

    assert torch.equal(gradient(True), gradient(False))


@every_rival
def test_one_input_used_twice_and_backward_twice(backend) -> None:
    policy, targets, reference, beta = problem(4, 130, device=device_of(backend))
    leaf = policy.requires_grad_()
    one = all_of(backend, leaf, targets, reference, beta)
    two = all_of(backend, leaf, targets, reference, beta, temperature=0.5)
    total = (one + 2 * two).sum()
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total, leaf)
    (alone,) = torch.autograd.grad(all_of(backend, leaf, targets, reference, beta).sum(), leaf)
    (other,) = torch.autograd.grad(all_of(backend, leaf, targets, reference, beta, temperature=0.5).sum(), leaf)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone + 2 * other)


def test_overwriting_compiles_into_one_graph() -> None:
    policy, targets, reference, _ = problem(4, 33)
    leaf = policy.requires_grad_()

    def loss(leaf, overwrite):
        result = nlhf_kernels.logprobs(leaf * 2.0, targets, reference, kl=True, overwrite_logits=overwrite)
        return (result.policy + result.kl).sum()

    (expected,) = torch.autograd.grad(loss(leaf, False), leaf)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, True), leaf)
    assert torch.equal(got, expected)


def test_under_activation_checkpointing_and_autocast() -> None:
    policy, targets, _, _ = problem(4, 64)
    head = torch.randn(64, 64, requires_grad=True, device=policy.device)

    def scored(x):
        with torch.autocast(policy.device.type, torch.bfloat16):
            return nlhf_kernels.logprobs(x @ head, targets).policy

    (plain,) = torch.autograd.grad(scored(policy).sum(), head)
    checkpointed = torch.utils.checkpoint.checkpoint(scored, policy, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(checkpointed.sum(), head)[0], plain)


WEIGHT, SCORED = torch.randn(33, 7), torch.randint(33, (2, 5))
REST = {"preference": torch.tensor([0.2, 0.9]), "reference_logprobs": torch.zeros(2, 5), "tau": 0.1}
DIFFERENTIABLE = {
    "logprobs": lambda x: nlhf_kernels.logprobs(x @ WEIGHT.T, SCORED).policy.sum(),
    "linear_logprobs": lambda x: nlhf_kernels.linear_logprobs(x, WEIGHT, SCORED).policy.sum(),
    "nash_pg_loss": lambda x: nlhf_kernels.nash_pg_loss(x @ WEIGHT.T, SCORED, **REST).loss,
    "linear_nash_pg_loss": lambda x: nlhf_kernels.linear_nash_pg_loss(x, WEIGHT, SCORED, **REST).loss,
}


@pytest.mark.parametrize("function", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_other_derivatives_are_refused_instead_of_zero(function) -> None:
    hidden = torch.randn(2, 5, 7)
    for derivative in (
        lambda: torch.func.jvp(function, (hidden,), (hidden,)),
        lambda: torch.func.grad(function)(hidden),
    ):
        with pytest.raises(
            NotImplementedError, match=r"expected derivatives by backward\(\) or torch.autograd.grad; got"
        ):
            derivative()
    leaf = hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (gradient.square() + leaf).sum().backward()


def test_frozen_policies_record_nothing() -> None:
    policy, targets, reference, _ = problem(4, 64)
    assert nlhf_kernels.logprobs(policy, targets, reference, kl=True).kl.grad_fn is None
    with torch.no_grad():
        assert nlhf_kernels.logprobs(policy.requires_grad_(), targets).policy.grad_fn is None


def test_offsets_past_two_billion_elements() -> None:
    """Rows past element 2^31 are addressed correctly; untouched pages of the storage take no memory."""
    policy, targets, _, _ = problem(2, 100, device=torch.device("cpu"))
    stride = 2**31 + 64
    far = torch.empty(stride + 100, dtype=torch.bfloat16).as_strided((2, 100), (stride, 1))
    far.copy_(policy)
    targets[:] = 5
    near = call("logprobs", "cpu", policy.bfloat16(), targets)
    assert torch.equal(call("logprobs", "cpu", far, targets).policy, near.policy)


POLICY, TARGETS, REFERENCE, _ = problem(3, 8, device=torch.device("cpu"))
BAD = {
    "policy_logits: expected shape": ((POLICY[0], TARGETS), {}),
    r"targets: expected shape \(tokens\) with tokens=3": ((POLICY, TARGETS[:2]), {}),
    "targets: expected dtype int64": ((POLICY, TARGETS.int()), {}),
    r"targets: expected token ids in \[0, 8\) or -100; got 8": ((POLICY, torch.tensor([0, 8, 1])), {}),
    r"targets: expected token ids in \[0, 8\) or -100; got -1": ((POLICY, torch.tensor([0, -1, 1])), {}),
    r"reference_logits: expected shape .*; got \(3, 7\)": ((POLICY, TARGETS, REFERENCE[:, :7]), {}),
    "reference_logits: expected a constant": ((POLICY, TARGETS, REFERENCE.clone().requires_grad_()), {}),
    "kl: expected only with reference_logits": ((POLICY, TARGETS), {"kl": True}),
    "beta: expected only with reference_logits": ((POLICY, TARGETS), {"beta": 0.5}),
    r"beta: expected a number or shape \(3,\); got \(2,\)": ((POLICY, TARGETS, REFERENCE), {"beta": torch.ones(2)}),
    r"temperature: expected a finite number in \(0": ((POLICY, TARGETS), {"temperature": 0.0}),
    "policy_logits: expected at least one of vocabulary": ((POLICY[:, :0], TARGETS), {}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message) -> None:
    args, kwargs = BAD[message]
    with pytest.raises((ValueError, TypeError), match="^logprobs: " + message):
        nlhf_kernels.logprobs(*args, **kwargs)


def test_bad_targets_are_named_inside_a_compiled_graph() -> None:
    compiled = torch.compile(nlhf_kernels.logprobs, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="targets: expected token ids"):
        compiled(POLICY, torch.tensor([0, 9, 1]))
