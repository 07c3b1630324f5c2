"""logprobs: values and gradients against float64, and edge cases that failed in other libraries.

Autograd and refusals are tested in test_logprobs_autograd.py.
"""

from __future__ import annotations

import pytest
import torch

from nlhf_kernels.ops.logprobs.layout import (
    Extra,
    LogprobsBackwardInputs,
    LogprobsInputs,
    Normalizer,
    Settings,
    Transform,
)
from nlhf_kernels.ops.logprobs.op import OP
from tests.support.backends import DEVICE, SIMD_LEVELS, call, device_of, every_backend
from tests.support.poison import poisoned_allocations, surrounded
from tests.support.tolerances import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = Extra.ENTROPY | Extra.KL | Extra.MIXTURE
OUTPUTS = ("policy", "entropy", "kl", "mixture")


def problem(rows: int, vocabulary: int, dtype=torch.float32, device=DEVICE, seed: int = 0, spread: float = 3.0):
    """Return policy logits, targets, reference logits, beta; one row in three is ignored, beta includes 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    policy = spread * torch.randn(rows, vocabulary, generator=generator)
    reference = policy + torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[2::3] = -100
    beta = torch.rand(rows, generator=generator)
    beta[1::4], beta[3::4] = 0.0, 1.0
    return policy.to(device, dtype), targets.to(device), reference.to(device, dtype), beta.to(device)


def _wants_gradient(requires_grad: bool, **settings):
    def make(device):
        policy, targets, reference, beta = problem(3, 37, device=device)
        kwargs = {"reference_logits": reference, **settings}
        if settings.pop("mixture", False):
            kwargs = {"reference_logits": reference, "beta": beta, **settings}
        return (policy.requires_grad_(requires_grad), targets), kwargs

    return make


EXAMPLES = [
    lambda device: (problem(4, 50, torch.bfloat16, device)[:2], {}),
    _wants_gradient(False),
    _wants_gradient(True, entropy=True, kl=True, mixture=True, temperature=0.7),
    _wants_gradient(True),
]


def of_pytorch(policy, targets, reference, beta, temperature: float = 1.0):
    """Compute all outputs by log_softmax and sums in plain PyTorch, at the inputs' precision (at least float32)."""
    real = torch.promote_types(policy.dtype, torch.float32)
    log_p = torch.log_softmax(policy.to(real) / temperature, -1)
    log_q = torch.log_softmax(reference.to(real) / temperature, -1)
    beta = beta.to(real).unsqueeze(1)
    mixture = ((1 - beta) * policy.to(real) + beta * reference.to(real)) / temperature
    kept = targets >= 0
    index = targets.clamp(min=0).unsqueeze(1)
    values = [
        log_p.gather(1, index).squeeze(1),
        -(log_p.exp() * log_p).sum(1),
        (log_p.exp() * (log_p - log_q)).sum(1),
        torch.log_softmax(mixture, -1).gather(1, index).squeeze(1),
        log_q.gather(1, index).squeeze(1),
    ]
    return torch.stack([torch.where(kept, value, 0) for value in values])


def outputs(result) -> torch.Tensor:
    return torch.stack([result.policy, result.entropy, result.kl, result.mixture, result.reference])


def all_of(backend, policy, targets, reference, beta, **settings):
    result = call(
        "logprobs", backend, policy, targets, reference_logits=reference, beta=beta, entropy=True, kl=True, **settings
    )
    return outputs(result)


def upstream_like(values: torch.Tensor, seed: int = 7) -> torch.Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_right(backend, policy, targets, reference, beta, temperature: float = 1.0) -> None:
    """Compare values and gradients (non-uniform upstream) with float64, relative to PyTorch's error."""

    def run(function, dtype=None):
        leaf = policy.detach().to(dtype or policy.dtype).requires_grad_()
        others = [tensor if dtype is None else tensor.to(dtype) for tensor in (reference, beta)]
        values = function(leaf, targets, *others, temperature=temperature)
        loss = (values * upstream_like(values).to(values)).sum()
        return values.detach(), torch.autograd.grad(loss, leaf)[0]

    truth, true_gradient = run(of_pytorch, torch.float64)
    pytorch, pytorch_gradient = run(of_pytorch)
    values, gradient = run(lambda *inputs, **settings: all_of(backend, *inputs, **settings))
    assert_accurate(values, truth, pytorch)
    assert_accurate(gradient, true_gradient, pytorch_gradient)
    assert (values[:, targets == -100] == 0).all() and (gradient[targets == -100] == 0).all()


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 999, 1024, 4097])
@every_backend
def test_values_and_gradients(backend, vocabulary) -> None:
    assert_right(backend, *problem(5, vocabulary, device=device_of(backend)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@every_backend
def test_every_dtype_and_temperature(backend, dtype, temperature) -> None:
    assert_right(backend, *problem(4, 1500, dtype, device_of(backend)), temperature)


@pytest.mark.parametrize("level", SIMD_LEVELS)
def test_every_instruction_level(level) -> None:
    module = pytest.importorskip("nlhf_kernels._cpu")
    best = module.best_level()
    try:
        module.set_level_cap(level)
        assert_right("cpu", *problem(5, 2085, torch.bfloat16, torch.device("cpu")))
        assert_right("cpu", *problem(5, 2085, device=torch.device("cpu")))
    finally:
        module.set_level_cap(best)


@pytest.mark.parametrize("vocabulary", [32000, 151936])
def test_large_vocabularies_on_the_cpu(vocabulary) -> None:
    assert_right("cpu", *problem(3, vocabulary, device=torch.device("cpu")))


@every_backend
def test_a_common_offset_costs_no_digits(backend) -> None:
    """An offset common to all logits is harmless, where log-sum-exp minus logit in float32 would lose three digits."""
    policy, targets, reference, beta = problem(4, 777, device=device_of(backend))
    policy, reference = (policy * 1024).round() / 1024, (reference * 1024).round() / 1024  # 1e4 more stays exact
    near = all_of(backend, policy, targets, reference, beta)
    far = all_of(backend, policy + 8192.0, targets, reference + 8192.0, beta)
    assert_accurate(far, near.double(), near, constant=8)
    for offset in (-3e4, 3e4):
        assert_right(backend, policy + offset, targets, reference + offset, torch.zeros_like(beta))


@every_backend
def test_log_probabilities_are_never_positive(backend) -> None:
    """With one dominant logit, its log-probability is at most 0 in every input precision."""
    policy, targets, reference, beta = problem(30, 400, torch.bfloat16, device_of(backend))
    targets = targets.clamp(min=0)
    policy.scatter_(1, targets.unsqueeze(1), 30.0)
    result = call("logprobs", backend, policy, targets, reference_logits=reference, beta=beta, entropy=True, kl=True)
    assert (result.policy <= 0).all() and (result.reference <= 0).all() and (result.mixture <= 0).all()
    assert (result.entropy >= 0).all() and (result.kl >= 0).all()


@every_backend
def test_equal_models_have_no_divergence(backend) -> None:
    policy, targets, _, beta = problem(6, 300, device=device_of(backend))
    result = call("logprobs", backend, policy, targets, reference_logits=policy, beta=beta, kl=True)
    assert (result.kl <= 1e-6).all() and (result.kl >= 0).all()
    assert torch.equal(result.policy, result.reference)


@every_backend
def test_forbidden_tokens_count_nothing(backend) -> None:
    """-inf is probability 0: in either model or both, at beta 0 and 1, and for whole forbidden tiles."""
    policy, targets, reference, beta = problem(6, 5000, device=device_of(backend))
    policy[:, 40:4500] = reference[:, 40:4500] = -torch.inf
    targets[targets > 0] %= 40
    beta[:] = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.2])
    kept = [*range(40), *range(4500, 5000)]
    leaf = policy.clone().requires_grad_()
    values = all_of(backend, leaf, targets, reference, beta)
    upstream = upstream_like(values).to(values)
    (gradient,) = torch.autograd.grad(values, leaf, upstream)
    small = policy[:, kept].double().requires_grad_()
    truth = of_pytorch(small, targets, reference[:, kept].double(), beta.double())
    (true_gradient,) = torch.autograd.grad(truth, small, upstream.double())
    assert_accurate(values, truth, truth.float())
    assert_accurate(gradient[:, kept], true_gradient, true_gradient.float(), constant=4)
    assert (gradient[:, 40:4500] == 0).all()


@every_backend
def test_a_reference_that_forbids_what_the_policy_plays(backend) -> None:
    policy, targets, reference, _ = problem(2, 90, device=device_of(backend))
    targets[:], reference[0, 5] = 3, -torch.inf
    beta = torch.zeros(2, device=policy.device)  # the mixture is the policy and does not read the reference
    result = call("logprobs", backend, policy, targets, reference_logits=reference, beta=beta, kl=True)
    assert result.kl[0] == torch.inf and result.kl[1].isfinite()
    assert torch.equal(result.mixture, result.policy)


@every_backend
def test_a_broken_row_stays_alone(backend) -> None:
    policy, targets, reference, beta = problem(5, 700, device=device_of(backend))
    targets[:] = 1
    policy[1, 650], policy[3] = torch.nan, -torch.inf
    leaf = policy.requires_grad_()
    values = all_of(backend, leaf, targets, reference, torch.full_like(beta, 0.5))
    (gradient,) = torch.autograd.grad(values[:, [0, 2, 4]].sum(), leaf)
    assert values[0, [1, 3]].isnan().all() and values[:, [0, 2, 4]].isfinite().all()
    assert gradient[[0, 2, 4]].isfinite().all()


@every_backend
def test_strided_rows_and_nothing_read_past_them(backend) -> None:
    policy, targets, reference, beta = problem(4, 201, device=device_of(backend))
    expected = all_of(backend, policy, targets, reference, beta)
    padded = surrounded(torch.full((4, 256), torch.nan, device=policy.device))
    padded[:, :201] = policy
    assert torch.equal(all_of(backend, padded[:, :201], targets, reference, beta), expected)
    assert torch.equal(all_of(backend, surrounded(policy), targets, surrounded(reference), beta), expected)
    assert torch.equal(all_of(backend, policy.t().contiguous().t(), targets, reference, beta), expected)


@every_backend
def test_gradient_through_a_view_of_a_padded_head(backend) -> None:
    policy, targets, reference, beta = problem(4, 256, device=device_of(backend))
    targets = targets.clamp(max=199)
    leaf = policy.requires_grad_()
    all_of(backend, leaf[:, :200], targets, reference[:, :200], beta).sum().backward()
    alone = policy.detach()[:, :200].clone().requires_grad_()
    all_of(backend, alone, targets, reference[:, :200], beta).sum().backward()
    assert torch.equal(leaf.grad[:, :200], alone.grad) and (leaf.grad[:, 200:] == 0).all()


@every_backend
def test_every_element_is_written(backend) -> None:
    policy, targets, reference, beta = problem(5, 130, device=device_of(backend))
    leaf = policy.requires_grad_()
    with poisoned_allocations() as handed_out:
        values = all_of(backend, leaf, targets, reference, beta)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        short = call("logprobs", backend, leaf, targets, reference_logits=reference)
    assert handed_out and values.isfinite().all() and gradient.isfinite().all()
    assert short.policy.isfinite().all() and short.entropy is short.kl is short.mixture is None


@pytest.mark.parametrize("rows", [0, 1])
@every_backend
def test_few_rows(backend, rows) -> None:
    policy, targets, reference, beta = problem(rows, 65, device=device_of(backend))
    values = all_of(backend, policy.requires_grad_(), targets, reference, beta)
    assert values.shape == (5, rows)
    values.sum().backward()
    assert policy.grad.shape == (rows, 65)


@every_backend
def test_all_rows_ignored(backend) -> None:
    policy, targets, reference, beta = problem(3, 65, device=device_of(backend))
    policy.fill_(torch.nan)
    values = all_of(backend, policy.requires_grad_(), torch.full_like(targets, -100), reference, beta)
    values.sum().backward()
    assert (values == 0).all() and (policy.grad == 0).all()


@every_backend
def test_sequences_keep_their_shape(backend) -> None:
    policy, targets, reference, beta = problem(6, 65, device=device_of(backend))
    flat = call("logprobs", backend, policy, targets, reference_logits=reference, beta=beta)
    folded = call(
        "logprobs",
        backend,
        policy.view(2, 3, 65),
        targets.view(2, 3),
        reference_logits=reference.view(2, 3, 65),
        beta=beta.view(2, 3),
    )
    assert torch.equal(folded.policy, flat.policy.view(2, 3)) and torch.equal(folded.mixture.view(-1), flat.mixture)


@pytest.mark.parametrize("output", OUTPUTS)
@every_backend
def test_each_output_has_its_own_gradient(backend, output) -> None:
    """The gradient of each output alone is right: unused outputs contribute nothing."""
    policy, targets, reference, beta = problem(4, 211, device=device_of(backend))
    row = OUTPUTS.index(output)
    leaf, exact = policy.clone().requires_grad_(), policy.double().requires_grad_()
    same = policy.clone().requires_grad_()
    for values, tensor in (
        (all_of(backend, leaf, targets, reference, beta), leaf),
        (of_pytorch(exact, targets, reference.double(), beta.double()), exact),
        (of_pytorch(same, targets, reference, beta), same),
    ):
        weights = torch.arange(1.0, 5.0, device=policy.device).to(values)
        (values[row] * weights).sum().backward()
        tensor.requires_grad_(False)
    assert_accurate(leaf.grad, exact.grad, same.grad)


def test_gradient_of_the_oracle_by_finite_differences() -> None:
    policy, targets, reference, beta = problem(3, 6, torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: all_of("torch", z, targets, reference, beta.double(), temperature=0.8), (policy.requires_grad_(),)
    )


@every_backend
def test_what_a_model_does_to_its_logits_is_inside(backend) -> None:
    """Soft-capping and scaling are right, forward and backward, in the operator that linear_logprobs calls."""
    device = device_of(backend)
    policy, targets, reference, beta = problem(4, 300, device=device, spread=20.0)
    reasons = OP.reasons(OP.describe(policy, targets))[backend]
    if reasons:
        pytest.skip("; ".join(reasons))
    settings = Settings(0.9, Transform(0.5, 8.0), Transform(0.25, 0.0), EVERYTHING)
    entry = OP.backend(backend)

    def by_hand(dtype):
        leaf = policy.to(dtype).requires_grad_()
        capped = torch.tanh(leaf * 0.5 / 8.0) * 8.0
        values = of_pytorch(capped, targets, reference.to(dtype) * 0.25, beta.to(dtype), 0.9)
        return values, torch.autograd.grad(values, leaf, upstream_like(values).to(values))[0]

    inputs = LogprobsInputs(policy, reference, targets, beta, settings, backend)
    values, normalizers = entry.run(inputs)
    order = torch.tensor([0, 4, 1, 2, 3])  # of_pytorch's rows in the order of Output
    (truth, true_gradient), (pytorch, pytorch_gradient) = by_hand(torch.float64), by_hand(torch.float32)
    assert_accurate(values, truth[order], pytorch[order])
    upstream = upstream_like(truth).to(values)[order]
    gradient = torch.empty_like(policy)
    entry.run_backward(LogprobsBackwardInputs(values, normalizers, upstream, inputs), gradient)
    assert_accurate(gradient, true_gradient, pytorch_gradient)
    assert normalizers[Normalizer.POLICY_MAX].max() <= 8.0
