"""nash_pg_loss: the oracle, both layouts, both inputs (logits, hidden states), and every refusal.

test_nash_pg_loss_theory.py tests which KL modes are unbiased.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch

import nlhf_kernels
from nlhf_kernels import Head
from nlhf_kernels.ops.linear_logprobs import chunks, products
from nlhf_kernels.ops.nash_pg_loss.linear import whole_sequences
from nlhf_kernels.ops.nash_pg_loss.oracle import nash_pg_loss as oracle
from nlhf_kernels.ops.nash_pg_loss.weights import KL_MODES
from tests.support.backends import DEVICE, call, device_of, every_backend
from tests.support.poison import poisoned_allocations
from tests.support.tolerances import assert_accurate

B, T, D, V = 5, 7, 12, 83
every_mode = pytest.mark.parametrize("kl", KL_MODES)


def problem(dtype=torch.float32, device=DEVICE, batch=B, length=T):
    """Return hidden, weight, targets (with early ends, a hole, an empty sequence), preference, the reference's two."""
    generator = torch.Generator().manual_seed(11)

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*sizes, generator=generator)).to(device, dtype)

    targets = torch.randint(V, (batch, length), generator=generator)
    targets[0, length // 2 :] = -100
    targets[1, :2] = -100
    if batch > 3:
        targets[2, 3], targets[3] = -100, -100
    preference = torch.rand(batch, generator=generator).to(device)
    hidden, weight = normal(batch, length, D), normal(V, D, scale=0.5)
    return hidden, weight, targets.to(device), preference, normal(batch, length, D), normal(V, D, scale=0.5)


def _example(**settings):
    def make(device):
        hidden, weight, targets, preference, reference_hidden, reference_weight = problem(device=device)
        logits = (hidden @ weight.t()).requires_grad_()
        return (logits, targets, preference, reference_hidden @ reference_weight.t()), {"tau": 0.3, **settings}

    return make


EXAMPLES = [_example(kl=kl) for kl in KL_MODES] + [_example(kl="exact", entropy=True, normalizer=3.0)]
SETTINGS = {"tau": 0.3, "baseline": 0.4, "normalizer": 7.0}


def by_oracle(inputs, dtype, kl, **settings):
    hidden, weight, targets, preference, reference_hidden, reference_weight = inputs
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    logits = (leaves[0] @ leaves[1].t()).to(torch.promote_types(dtype, torch.float32))
    reference = (reference_hidden.to(dtype) @ reference_weight.to(dtype).t()).to(logits.dtype)
    loss = oracle(list(logits), list(targets), preference.to(logits.dtype), list(reference), kl=kl, **settings)
    return loss, torch.autograd.grad(loss * 3, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
@every_backend
def test_from_logits(backend, kl, dtype) -> None:
    inputs = problem(dtype, device_of(backend))
    hidden, weight, targets, preference, reference_hidden, reference_weight = inputs
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logits = leaves[0] @ leaves[1].t()
    result = call(
        "nash_pg_loss", backend, logits, targets, preference, reference_hidden @ reference_weight.t(), kl=kl, **SETTINGS
    )
    assert_loss(result.loss, torch.autograd.grad(result.loss * 3, leaves), inputs, kl)


@pytest.mark.parametrize("rows", [1, 2 * T + 2, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
@every_backend
def test_from_hidden_states(backend, kl, dtype, rows) -> None:
    """Gradients are right for chunks of one row (every sequence computed twice), of two sequences, and of all."""
    inputs = problem(dtype, device_of(backend))
    result, gradients = from_hidden(backend, inputs, rows, kl=kl, **SETTINGS)
    assert_loss(result.loss, gradients, inputs, kl)


def from_hidden(backend, inputs, rows=1000, scale=3.0, **settings):
    hidden, weight, targets, preference, reference_hidden, reference_weight = inputs
    if backend != "torch":
        reasons = nlhf_kernels.explain("linear_logprobs", hidden, weight, targets).reasons[backend]
        if reasons:
            pytest.skip("; ".join(reasons))
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    both = 2 if settings.get("kl") == "exact" else 1
    result = nlhf_kernels.linear_nash_pg_loss(
        leaves[0],
        leaves[1],
        targets,
        preference,
        reference_hidden,
        reference_weight,
        chunk_bytes=rows * both * V * hidden.element_size(),
        backend=backend,
        **settings,
    )
    return result, torch.autograd.grad(result.loss * scale, leaves)


def assert_loss(loss, gradients, inputs, kl, settings=SETTINGS) -> None:
    truth, true_gradients = by_oracle(inputs, torch.float64, kl, **settings)
    pytorch, pytorch_gradients = by_oracle(inputs, inputs[0].dtype, kl, **settings)
    assert_accurate(loss, truth, pytorch.to(loss.dtype), constant=4)
    for ours, true, theirs in zip(gradients, true_gradients, pytorch_gradients, strict=True):
        assert_accurate(ours, true, theirs)


@every_mode
def test_the_upstream_gradient_scales_everything(kl) -> None:
    """Gradients scale with the upstream gradient, as in mixed precision or a sum of losses."""
    inputs = problem()
    for rows in (2, 1000):
        _, one = from_hidden("torch", inputs, rows, scale=1.0, kl=kl, tau=0.2)
        _, many = from_hidden("torch", inputs, rows, scale=-7.5, kl=kl, tau=0.2)
        for single, multiple in zip(one, many, strict=True):
            torch.testing.assert_close(multiple, -7.5 * single)


@every_mode
def test_packed_equals_padded(kl) -> None:
    hidden, weight, targets, preference, reference_hidden, reference_weight = problem()
    lengths = torch.tensor([3, 7, 5, 0, 1])
    kept = torch.arange(T) < lengths[:, None]
    targets = targets.clamp(min=0)
    padded = nlhf_kernels.linear_nash_pg_loss(
        hidden, weight, targets, preference, reference_hidden, reference_weight, tau=0.3, kl=kl, mask=kept.to(DEVICE)
    )
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed_args = [tensor[kept] for tensor in (hidden, targets, reference_hidden)]
    for offsets_as_given in (offsets, offsets.int().to(DEVICE)):
        packed = nlhf_kernels.linear_nash_pg_loss(
            packed_args[0],
            weight,
            packed_args[1],
            preference,
            packed_args[2],
            reference_weight,
            tau=0.3,
            kl=kl,
            cu_seqlens=offsets_as_given,
        )
        torch.testing.assert_close(packed.loss, padded.loss)
        torch.testing.assert_close(packed.weights, padded.weights[kept])
    logits = packed_args[0] @ weight.t(), packed_args[2] @ reference_weight.t()
    again = nlhf_kernels.nash_pg_loss(
        logits[0], packed_args[1], preference, logits[1], tau=0.3, kl=kl, cu_seqlens=offsets
    )
    torch.testing.assert_close(again.loss, padded.loss)


@pytest.mark.parametrize("kl", [mode for mode in KL_MODES if mode != "exact"])
def test_reference_logprobs_replace_the_reference(kl) -> None:
    """Log-probabilities from the rollout give the loss without a reference pass; masked positions are ignored."""
    inputs = problem()
    hidden, weight, targets, preference, *_ = inputs
    full, gradients = from_hidden("torch", inputs, kl=kl, tau=0.3)
    given = torch.where(targets == -100, torch.nan, full.reference_logprobs)
    with mock.patch.object(chunks, "logits_into", wraps=products.logits_into) as made:
        shorter, same = from_hidden(
            "torch", (hidden, weight, targets, preference, None, None), kl=kl, tau=0.3, reference_logprobs=given
        )
    assert made.call_count == 1, "one product for the policy, none for a reference"
    assert torch.equal(shorter.loss, full.loss)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))
    from_logits = nlhf_kernels.nash_pg_loss(
        hidden @ weight.t(), targets, preference, tau=0.3, kl=kl, reference_logprobs=given
    )
    torch.testing.assert_close(from_logits.loss, full.loss)


def test_whole_sequences_are_not_computed_twice() -> None:
    """Products per chunk: one for the reference, one for the policy, two for gradients; one more for long sequences."""
    hidden, weight, targets, *rest = problem(device=torch.device("cpu"))
    for rows, runs, again in ((2 * T, 3, 0), (T - 1, 5, 10)):
        with mock.patch.object(chunks, "logits_into", wraps=products.logits_into) as made:
            from_hidden("torch", (hidden, weight, targets.clamp(min=0), *rest), rows, tau=0.3)
        reference = -(-B * T // rows)
        assert made.call_count == reference + (runs if not again else 2 * again), rows


@every_mode
def test_every_mode_takes_the_same_products(kl) -> None:
    """Chunks of equal rows take two products for the models' logits and two for the gradients, whatever the price."""
    hidden, weight, targets, *rest = problem(device=torch.device("cpu"))
    with (
        mock.patch.object(chunks, "logits_into", wraps=products.logits_into) as logits,
        mock.patch.object(chunks, "add_weight_gradient", wraps=products.add_weight_gradient) as of_weight,
        mock.patch.object(torch, "mm", wraps=torch.mm) as mm,
    ):
        from_hidden("torch", (hidden, weight, targets.clamp(min=0), *rest), 2 * T, tau=0.3, kl=kl)
    runs = 3
    assert (logits.call_count, of_weight.call_count, mm.call_count) == (2 * runs, runs, 3 * runs)


def test_planning_of_chunks() -> None:
    assert list(whole_sequences([0, 3, 5, 9, 30, 31], 8)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(whole_sequences([0, 0, 0], 1)) == [(0, 2)]


@every_mode
def test_micro_batches_add_up_to_the_batch(kl) -> None:
    """Micro-batches normalized by the whole batch's number of sequences sum to the batch's gradients."""
    inputs = problem()
    _, whole = from_hidden("torch", inputs, kl=kl, tau=0.3)
    parts = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        hidden, weight, targets, preference, reference_hidden, reference_weight = inputs
        micro = (hidden[rows], weight, targets[rows], preference[rows], reference_hidden[rows], reference_weight)
        normalizer = torch.tensor(float(B), device=DEVICE)
        parts.append(from_hidden("torch", micro, kl=kl, tau=0.3, normalizer=normalizer)[1])
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole[0])
    torch.testing.assert_close(sum(part[1] for part in parts), whole[1])


@every_mode
def test_masked_places_count_nothing_and_get_no_gradient(kl) -> None:
    hidden, weight, targets, preference, reference_hidden, reference_weight = problem()
    ignored = targets == -100
    dirty = hidden.masked_fill(ignored.unsqueeze(-1), 1e3), reference_hidden.masked_fill(ignored.unsqueeze(-1), -1e3)
    clean, clean_gradients = from_hidden("torch", problem(), kl=kl, tau=0.3)
    masked = targets.masked_fill(ignored, 5)
    with poisoned_allocations():
        result, gradients = from_hidden(
            "torch",
            (dirty[0], weight, masked, preference, dirty[1], reference_weight),
            kl=kl,
            tau=0.3,
            mask=(~ignored).long(),
        )
    torch.testing.assert_close(result.loss, clean.loss)
    assert (gradients[0][ignored] == 0).all() and (result.weights[ignored] == 0).all()
    torch.testing.assert_close(gradients[1], clean_gradients[1])


@every_mode
def test_a_broken_sequence_stays_alone(kl) -> None:
    hidden, weight, targets, preference, reference_hidden, reference_weight = problem()
    hidden[1, 4, 0] = torch.nan
    leaves = hidden.requires_grad_(), weight
    result = nlhf_kernels.linear_nash_pg_loss(
        leaves[0], weight, targets, preference, reference_hidden, reference_weight, tau=0.3, kl=kl
    )
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    others = [0, 2, 3, 4]
    assert result.loss.isnan() and result.weights[1].isnan().any()
    assert result.weights[others].isfinite().all() and gradient[others].isfinite().all()


def test_metrics_are_detached_and_complete() -> None:
    inputs = problem()
    result, _ = from_hidden("torch", inputs, kl="exact", tau=0.3, entropy=True)
    hidden, weight, targets, _, reference_hidden, reference_weight = inputs
    log_p, log_q = (hidden @ weight.t()).log_softmax(-1), (reference_hidden @ reference_weight.t()).log_softmax(-1)
    kept = targets != -100
    for got, expected in (
        (result.policy_logprobs, log_p.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)),
        (result.reference_logprobs, log_q.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)),
        (result.kl, (log_p.exp() * (log_p - log_q)).sum(-1)),
        (result.entropy, -(log_p.exp() * log_p).sum(-1)),
    ):
        torch.testing.assert_close(got, torch.where(kept, expected, 0), rtol=1e-4, atol=1e-5)
        assert not got.requires_grad and got.shape == targets.shape
    assert result.loss.shape == () and result.loss.requires_grad


def test_frozen_parts_pay_nothing() -> None:
    hidden, weight, targets, preference, reference_hidden, reference_weight = problem()
    hidden.requires_grad_()
    with mock.patch.object(chunks, "add_weight_gradient", wraps=products.add_weight_gradient) as of_weight:
        frozen_head = nlhf_kernels.linear_nash_pg_loss(
            hidden, weight, targets, preference, reference_hidden, reference_weight, tau=0.3
        )
        frozen_head.loss.backward()
        assert of_weight.call_count == 0 and hidden.grad is not None
        weight.requires_grad_()
        with torch.no_grad(), mock.patch.object(torch, "mm", wraps=torch.mm) as mm:
            evaluated = nlhf_kernels.linear_nash_pg_loss(
                hidden, weight, targets, preference, reference_hidden, reference_weight, tau=0.3
            )
        assert mm.call_count == 2 and of_weight.call_count == 0 and not evaluated.loss.requires_grad


def test_compiles_checkpoints_and_runs_backward_twice() -> None:
    hidden, weight, targets, preference, reference_hidden, reference_weight = problem()
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def loss(hidden, weight):
        head = Head(weight, None, 0.5, 10.0)
        return nlhf_kernels.linear_nash_pg_loss(
            hidden, head, targets, preference, reference_hidden, reference_weight, tau=0.3, kl="exact", chunk_bytes=4000
        ).loss

    total = loss(*leaves)
    expected = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    checkpointed = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    recomputed = torch.autograd.grad(checkpointed, leaves)
    for gradients in (again, compiled, recomputed):
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("kl", ["to_go", "exact"])
def test_sequences_of_131072_tokens(kl) -> None:
    """Sums over 131072 tokens and indices past 16 bits are right; the sequence exceeds any chunk."""
    tokens, vocabulary = 131_072, 5
    generator = torch.Generator().manual_seed(0)
    hidden, reference_hidden = (torch.randn(tokens + 3, 2, generator=generator) for _ in range(2))
    weight = torch.randn(vocabulary, 2, generator=generator)
    targets = torch.randint(vocabulary, (tokens + 3,), generator=generator)
    offsets, preference = torch.tensor([0, 3, tokens + 3]), torch.tensor([0.2, 0.9])
    result = nlhf_kernels.linear_nash_pg_loss(
        hidden.requires_grad_(),
        weight,
        targets,
        preference,
        reference_hidden,
        weight,
        tau=0.01,
        kl=kl,
        cu_seqlens=offsets,
        chunk_bytes=vocabulary * 4 * 30_000,
    )
    log_p, log_q = (
        (rows.detach().double() @ weight.double().t()).log_softmax(-1) for rows in (hidden, reference_hidden)
    )
    terms = (log_p - log_q).gather(1, targets[:, None]).squeeze(1)
    if kl == "exact":
        terms = (log_p.exp() * (log_p - log_q)).sum(1)
    suffix = terms[3:].flip(0).cumsum(0).flip(0) - (terms[3:] if kl == "exact" else 0)
    expected = 0.9 - 0.5 - 0.01 * suffix
    torch.testing.assert_close(result.weights[3:].double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.autograd.grad(result.loss, hidden)[0].isfinite().all()


@every_mode
def test_an_advantage_is_preference_less_baseline(kl) -> None:
    """Holds from logits and from hidden states, and for advantages that are not from probabilities."""
    hidden, weight, targets, preference, reference_hidden, reference_weight = problem()
    options = {"tau": 0.3, "kl": kl}
    models = {"reference_hidden": reference_hidden, "reference_head": reference_weight}
    linear = partial(nlhf_kernels.linear_nash_pg_loss, hidden, weight, targets, **models, **options)
    logits = hidden @ weight.t(), reference_hidden @ reference_weight.t()
    from_logits = partial(nlhf_kernels.nash_pg_loss, logits[0], targets, reference_logits=logits[1], **options)
    baseline = torch.linspace(0.1, 0.9, B, device=DEVICE)
    for loss in (linear, from_logits):
        expected = loss(preference=preference, baseline=baseline)
        result = loss(advantage=preference.double() - baseline.double())
        assert torch.equal(result.loss, expected.loss) and torch.equal(result.weights, expected.weights)
        far = loss(advantage=preference + 7)
        moved = (expected.weights + baseline[:, None] + 7).masked_fill(targets == -100, 0)
        torch.testing.assert_close(far.weights, moved)


def test_the_biased_mode_is_what_trl_computed() -> None:
    """Equals TRL up to 1.13: tau (log_ratio log pi).sum - (P - 1/2) (log pi).sum, averaged over sequences."""
    preference = problem()[3]
    result, _ = from_hidden("torch", problem(), kl="token", tau=0.3)
    ratio = result.policy_logprobs - result.reference_logprobs
    kl_loss = (ratio * result.policy_logprobs).sum(1)
    score = (preference - 0.5) * result.policy_logprobs.sum(1)
    torch.testing.assert_close(result.loss.detach(), (0.3 * kl_loss - score).mean())


LOGITS, TARGETS, PREFERENCE = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.2, 0.9])
GOOD = {"policy_logits": LOGITS, "targets": TARGETS, "preference": PREFERENCE, "reference_logits": LOGITS, "tau": 0.1}
BAD = {
    "targets: expected shape .*; got \\(2, 4\\)": {"targets": torch.zeros(2, 4, dtype=torch.int64)},
    r"targets: expected token ids in \[0, 4\)": {"targets": TARGETS + 4},
    r"mask: expected shape .*; got \(3, 2\)": {"mask": torch.ones(3, 2)},
    r"preference: expected shape \(sequences\) with sequences=2; got \(3,\)": {"preference": torch.rand(3)},
    r"preference: expected probabilities in \[0, 1\]; got 1.5": {"preference": torch.tensor([0.5, 1.5])},
    r"preference: expected probabilities in \[0, 1\]; got nan": {"preference": torch.tensor([torch.nan, 0.5])},
    r"tau: expected a finite number in \[0": {"tau": -0.1},
    "kl: expected one of sequence, to_go, exact, token; got 'full'": {"kl": "full"},
    "reference_logprobs: expected either them or the reference model's; got neither": {"reference_logits": None},
    "reference_logprobs: expected either them or the reference model's; got both": {
        "reference_logprobs": torch.zeros(2, 3)
    },
    "kl: 'exact' needs the reference model": {
        "kl": "exact",
        "reference_logits": None,
        "reference_logprobs": torch.zeros(2, 3),
    },
    "reference_logprobs: expected shape": {"reference_logits": None, "reference_logprobs": torch.zeros(2)},
    r"baseline: expected shape \(sequences\)": {"baseline": torch.zeros(3)},
    "advantage: expected either it or preference; got neither": {"preference": None},
    "advantage: expected either it or preference; got both": {"advantage": torch.zeros(2)},
    "baseline: expected with preference only; got it with advantage": {
        "preference": None,
        "advantage": torch.zeros(2),
        "baseline": 0.5,
    },
    r"advantage: expected shape \(sequences\) with sequences=2; got \(3,\)": {
        "preference": None,
        "advantage": torch.zeros(3),
    },
    "advantage: expected a constant": {"preference": None, "advantage": torch.zeros(2, requires_grad=True)},
    "preference: expected a constant": {"preference": torch.zeros(2, requires_grad=True)},
    "baseline: expected a constant": {"baseline": torch.zeros((), requires_grad=True)},
    r"normalizer: expected a finite number in \(0": {"normalizer": 0.0},
    r"reference_logits: expected shape .*; got \(2, 3, 5\)": {"reference_logits": torch.zeros(2, 3, 5)},
    "policy_logits: expected shape": {"policy_logits": torch.zeros(2, 4)},
    r"temperature: expected a finite number in \(0": {"temperature": 0},
    "temperature: expected a number; got Tensor": {"temperature": torch.ones(())},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message) -> None:
    with pytest.raises((ValueError, TypeError), match="(nash_pg_loss|logprobs): " + message):
        nlhf_kernels.nash_pg_loss(**{**GOOD, **BAD[message]})


@pytest.mark.parametrize("temperature", [0.0, -1.0, torch.nan, torch.inf, "1", torch.ones(())])
def test_bad_temperature_is_named(temperature) -> None:
    hidden, weight, targets, preference, reference_hidden, reference_weight = problem()
    with pytest.raises((ValueError, TypeError), match="linear_nash_pg_loss: temperature: expected a (finite )?number"):
        nlhf_kernels.linear_nash_pg_loss(
            hidden, weight, targets, preference, reference_hidden, reference_weight, tau=0.1, temperature=temperature
        )


@every_mode
def test_no_sequences(kl) -> None:
    hidden, weight, targets, preference, reference_hidden, reference_weight = problem()
    logits = (torch.zeros(0, 3, 4, requires_grad=True), TARGETS[:0], PREFERENCE[:0], LOGITS[:0])
    states = (hidden[:0].requires_grad_(), weight.requires_grad_(), targets[:0], preference[:0], reference_hidden[:0])
    for result, leaf in (
        (nlhf_kernels.nash_pg_loss(*logits, tau=0.1, kl=kl), logits[0]),
        (nlhf_kernels.linear_nash_pg_loss(*states, reference_weight, tau=0.1, kl=kl), weight),
    ):
        assert result.loss == 0 and result.policy_logprobs.shape[0] == 0
        assert (torch.autograd.grad(result.loss, leaf)[0] == 0).all()


@pytest.mark.parametrize("offsets", [[0, 2], [0, 4, 3, 6], [1, 6], [0]])
def test_bad_offsets_are_named(offsets) -> None:
    given = {**GOOD, "policy_logits": LOGITS.view(6, 4), "reference_logits": LOGITS.view(6, 4)}
    given |= {"targets": TARGETS.view(6), "preference": torch.rand(max(len(offsets) - 1, 1))}
    with pytest.raises(ValueError, match="nash_pg_loss: cu_seqlens: expected"):
        nlhf_kernels.nash_pg_loss(**given, cu_seqlens=torch.tensor(offsets))
