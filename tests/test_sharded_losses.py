"""Tensor-parallel heads: values and gradients of the whole head, with few collectives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import nlhf_kernels
from nlhf_kernels import Head
from nlhf_kernels.core.registry import get_op
from nlhf_kernels.core.vocabulary import VocabularySlice
from nlhf_kernels.ops.linear_logprobs.chunks import ScoredRows, Side
from nlhf_kernels.ops.linear_logprobs.slices import ChunkedSlice, merge
from nlhf_kernels.ops.logprobs.layout import (
    Extra,
    LogprobsBackwardInputs,
    LogprobsInputs,
    Normalizer,
    Output,
    Settings,
    Transform,
)
from nlhf_kernels.ops.logprobs.op import LogprobsProblem
from nlhf_kernels.ops.logprobs.oracle import logprobs as oracle
from nlhf_kernels.ops.logprobs.oracle import logprobs_backward as oracle_backward
from tests.support import processes
from tests.support.backends import device_of, every_backend
from tests.support.capture import capturing
from tests.support.processes import collectives
from tests.support.tolerances import assert_accurate

EVERYTHING = Extra.ENTROPY | Extra.KL | Extra.MIXTURE
WIDE = 301  # vocabulary size, divisible by no number of processes used here

# ---- in one process: the statistics of slices, merged ----------------------------------------------------------------


def logits_of(kind: str, rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    if kind == "offset":
        logits += 1e4
    if kind == "peaked":
        logits[:, ::7] += 60
    if kind == "forbidden":
        logits[:, : -(-vocabulary // 2)] = -torch.inf  # the first of two slices holds only forbidden tokens
    if kind == "not a number":
        logits[1, -1] = torch.nan
    return logits


def slices_of(
    backend: str, logits: list[torch.Tensor], targets: torch.Tensor, beta: torch.Tensor, settings, count: int
):
    """Return the call of every slice, and its values and normalizers."""
    total = logits[0].shape[1]
    problem = LogprobsProblem(targets.device, (logits[0].dtype,))
    if reasons := get_op("logprobs").why_not(backend, problem):
        pytest.skip("; ".join(reasons))
    chosen = get_op("logprobs").resolve(backend, problem)
    for rank in range(count):
        part = VocabularySlice(None, rank, count, total)
        own = [model[:, part.first : part.stop].contiguous() for model in logits]
        side = Side(logits[0], own[0].t(), None)
        call = ChunkedSlice(side, side, targets, beta, settings, chosen, 1 << 20, ScoredRows(None, len(targets)), part)
        yield call, own, call.score(slice(0, len(targets)), tuple(own))


@pytest.mark.parametrize("kind", ["plain", "offset", "peaked", "forbidden", "not a number"])
@pytest.mark.parametrize("count", [2, 7])
@every_backend
def test_slices_merge_to_the_whole(backend, count, kind) -> None:
    """Merged values, normalizers and slice gradients equal the whole head's, also if the last slice is empty."""
    device = device_of(backend)
    rows, vocabulary = 9, 19 if count == 7 else WIDE
    generator = torch.Generator().manual_seed(1)
    logits = [logits_of(kind, rows, vocabulary, generator).to(device) for _ in range(2)]
    targets = torch.randint(-(-vocabulary // 2), vocabulary, (rows,), generator=generator).to(device)
    targets[3] = -100
    beta = torch.rand(rows, generator=generator).to(device)
    settings = Settings(0.8, Transform(0.5), Transform(1.5), EVERYTHING)
    made = list(slices_of(backend, logits, targets, beta, settings, count))
    owners = made[0][0].part.owners(targets)
    values, normalizers = merge(
        *(torch.stack(parts) for parts in zip(*(m[2] for m in made), strict=True)), owners, settings
    )
    values = values.masked_fill(targets == -100, 0)

    doubles = [model.double() for model in logits]
    in_double = LogprobsInputs(*doubles, targets, beta.double(), settings, "torch")
    in_float = LogprobsInputs(*logits, targets, beta, settings, "torch")
    truth, true_normalizers = oracle(in_double)
    pytorch, pytorch_normalizers = oracle(in_float)
    assert_accurate(values, truth, pytorch, constant=4)

    upstream = torch.randn(values.shape, generator=generator).to(device)
    true_gradient = torch.empty_like(doubles[0])
    oracle_backward(LogprobsBackwardInputs(truth, true_normalizers, upstream.double(), in_double), true_gradient)
    plain = torch.empty_like(logits[0])
    oracle_backward(LogprobsBackwardInputs(pytorch, pytorch_normalizers, upstream, in_float), plain)
    gradients = [
        call.logits_gradient(slice(0, rows), (own[0].clone(), own[1]), values, normalizers, upstream)
        for call, own, _ in made
    ]
    assert_accurate(torch.cat(gradients, 1), true_gradient, plain, constant=4)


def test_a_target_beyond_the_vocabulary_is_nan_of_every_slice() -> None:
    """Every slice gives NaN, as on a GPU, where values are not validated on the host."""
    targets = torch.tensor([0, 9, 10, -7])
    part = VocabularySlice(None, 1, 2, 10)
    call = SimpleNamespace(targets=targets, part=part)
    assert ChunkedSlice._columns_of(call, slice(0, 4), 0).tolist() == [0, 4, 5, 5], "5 is no column of this slice"
    owners = part.owners(targets)
    assert owners.tolist() == [0, 1, -1, -1]
    values, _ = merge(torch.zeros(2, 5, 4), torch.zeros(2, 6, 4), owners, Settings(extras=EVERYTHING))
    assert values[:, 2:].isnan().all() and not values[Output.POLICY, :2].isnan().any()
    assert len(Normalizer) == 6


def test_slices_ask_nothing_of_the_host() -> None:
    """Merging does not synchronize with the device: no value is read, no list is used as an index."""
    meta = torch.device("meta")
    logits = [torch.empty(6, 20, device=meta) for _ in range(2)]
    targets, beta = torch.empty(6, dtype=torch.int64, device=meta), torch.empty(6, device=meta)
    settings = Settings(extras=EVERYTHING)
    with capturing():
        for call, own, scored in slices_of("torch", logits, targets, beta, settings, 3):
            parts = (torch.stack([part, part, part]) for part in scored)
            saved = merge(*parts, call.part.owners(targets), settings)
            call.logits_gradient(slice(0, 6), tuple(own), *saved, torch.empty(5, 6, device=meta))


# ---- in four processes -----------------------------------------------------------------------------------------------


def meshes():
    """Return a mesh over all four processes, and one over pairs."""
    from torch.distributed.device_mesh import init_device_mesh

    return [init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), _pairs()["tp"]]


_made: list = []


def _pairs():
    from torch.distributed.device_mesh import init_device_mesh

    if not _made:
        _made.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp")))
    return _made[0]


def shared(tensor: torch.Tensor, mesh, dim: int = 0, grad: bool = True):
    """Shard a tensor by rows over the mesh, as transformers does with a head."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor.detach().clone(), mesh, [Shard(dim)]).requires_grad_(grad)


def problem(dtype: torch.dtype, rows: int = 24, hidden: int = 16):
    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*sizes)).to(dtype)

    targets = torch.randint(WIDE, (rows,))
    targets[2::5] = -100
    tensors = normal(rows, hidden), normal(WIDE, hidden, scale=0.5), normal(WIDE)
    return *tensors, targets, normal(rows, 8), normal(WIDE, 8, scale=0.5), torch.rand(rows)


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def assert_same(run, leaves: list, sharded: list, dtype: torch.dtype) -> None:
    """Compare values and gradients of `run(*leaves)` with sharded and with whole heads, relative to float64."""

    def outcome(tensors):
        tensors = [
            tensor.detach().clone().requires_grad_() if not hasattr(tensor, "full_tensor") else tensor
            for tensor in tensors
        ]
        values = run(*tensors)
        weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad(values, tensors, weights.to(values.dtype))
        return values.detach(), [whole(gradient) for gradient in gradients]

    truth, true_gradients = outcome([leaf.double() for leaf in leaves])
    pytorch, of_whole = outcome(leaves)
    values, gradients = outcome(sharded)
    assert_accurate(values, truth, pytorch, constant=4)
    for gradient, true, one in zip(gradients, true_gradients, of_whole, strict=True):
        assert gradient.dtype == one.dtype == dtype
        assert_accurate(gradient, true, one, constant=4)


def linear_logprobs_is_the_whole_heads() -> None:
    for mesh in meshes():
        for dtype in (torch.float32, torch.bfloat16):
            for backend in ("torch", "cpu"):
                hidden, weight, bias, *constants = problem(dtype)

                def run(hidden, weight, bias, backend=backend, mesh=mesh, constants=constants):
                    targets, reference_hidden, reference_weight, beta = constants
                    exact = hidden.dtype == torch.float64
                    reference = [constant.to(hidden.dtype) for constant in (reference_hidden, reference_weight)]
                    if hasattr(weight, "full_tensor"):
                        reference[1] = shared(reference[1], mesh, grad=False)
                    result = nlhf_kernels.linear_logprobs(
                        hidden, Head(weight, bias, 0.7, 20.0), targets, reference[0], Head(reference[1], None, 1.5),
                        beta=beta.double() if exact else beta, temperature=0.8, entropy=True, kl=True,
                        chunk_bytes=5 * WIDE * 4, backend="torch" if exact else backend,
                    )  # fmt: skip
                    return torch.stack(list(result))

                leaves = [hidden, weight, bias]
                assert_same(run, leaves, [hidden, shared(weight, mesh), shared(bias, mesh)], dtype)


def the_reference_may_be_laid_out_in_any_way() -> None:
    """A reference head that is replicated, split along the hidden size, or on another mesh gives the same results."""
    mesh, pairs = meshes()
    hidden, weight, _, targets, reference_hidden, reference_weight, _ = problem(torch.float32)
    head = shared(weight, mesh)
    options = {"kl": True, "backend": "torch"}
    expected = nlhf_kernels.linear_logprobs(hidden, weight, targets, reference_hidden, reference_weight, **options)
    for layout in (
        reference_weight,
        shared(reference_weight, mesh, 1, grad=False),
        shared(reference_weight, pairs, grad=False),
    ):
        result = nlhf_kernels.linear_logprobs(hidden, head, targets, reference_hidden, layout, **options)
        torch.testing.assert_close(result.kl, expected.kl)
        torch.testing.assert_close(result.reference, expected.reference)
    result = nlhf_kernels.linear_logprobs(
        hidden, weight, targets, reference_hidden, shared(reference_weight, mesh, grad=False), **options
    )
    assert torch.equal(result.kl, expected.kl), "a whole policy scores with a whole reference"


def nash_pg_loss_is_the_whole_heads() -> None:
    """Holds for every KL mode, for chunks of several sequences, and for sequences longer than a chunk."""
    mesh, pairs = meshes()
    for mode in ("sequence", "to_go", "exact"):
        for dtype, chunk_rows in ((torch.float32, 3), (torch.float32, 13), (torch.bfloat16, 13)):
            hidden, weight, _, *constants = problem(dtype)

            def run(hidden, weight, mode=mode, chunk_rows=chunk_rows, constants=constants):
                targets, reference_hidden, reference_weight, _ = constants
                exact = hidden.dtype == torch.float64
                reference = reference_hidden.to(hidden.dtype).view(3, 8, -1), reference_weight.to(hidden.dtype)
                result = nlhf_kernels.linear_nash_pg_loss(
                    hidden.view(3, 8, -1), weight, targets.view(3, 8), torch.tensor([0.9, 0.2, 0.6]), *reference,
                    tau=0.05, kl=mode, entropy=True, chunk_bytes=chunk_rows * WIDE * 4,
                    backend="torch" if exact else "cpu",
                )  # fmt: skip
                assert result.entropy.isfinite().all()
                return result.loss[None]

            for shared_by in (mesh, pairs):
                assert_same(run, [hidden, weight], [hidden, shared(weight, shared_by)], dtype)


def preference_loss_is_the_whole_heads() -> None:
    mesh, _ = meshes()
    hidden, weight, _, targets, reference_hidden, reference_weight, _ = problem(torch.float32)

    def run(hidden, weight):
        exact = hidden.dtype == torch.float64
        reference = [
            constant.to(hidden.dtype).detach() for constant in (reference_hidden.view(4, 6, -1), reference_weight)
        ]
        return nlhf_kernels.linear_preference_loss(
            hidden.view(4, 6, -1),
            weight,
            targets.view(4, 6),
            None,
            *reference,
            tau=0.1,
            backend="torch" if exact else "cpu",
        ).loss[None]

    assert_same(run, [hidden, weight], [hidden, shared(weight, mesh)], torch.float32)


def all_processes_get_the_same_bits() -> None:
    mesh, _ = meshes()
    hidden, weight, _, targets, _, _, _ = problem(torch.float32)
    hidden.requires_grad_()
    scored = nlhf_kernels.linear_logprobs(hidden, shared(weight, mesh), targets, entropy=True)
    (scored.policy.sum() + scored.entropy.sum()).backward()
    for tensor in (scored.policy, scored.entropy, hidden.grad):
        parts = [torch.empty_like(tensor) for _ in range(4)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous())
        assert all(torch.equal(part, parts[0]) for part in parts)


def collectives_are_few() -> None:
    """linear_logprobs: one per pass over all rows, however chunked, and one for the hidden states' gradient. The
    loss: one per run of whole sequences, one for the reference, one for the gradient (none if the trunk is frozen)."""
    mesh, _ = meshes()
    hidden, weight, _, targets, reference_hidden, reference_weight, _ = problem(torch.float32)
    head, reference = shared(weight, mesh), shared(reference_weight, mesh, grad=False)
    chunk = {"chunk_bytes": 3 * -(-WIDE // 4) * 4}

    def score(leaf, **options):
        result = nlhf_kernels.linear_logprobs(leaf, head, targets, reference_hidden, reference, **chunk, **options)
        (result.policy.sum()).backward()

    trained = hidden.clone().requires_grad_()
    assert collectives(lambda: score(trained)) == 2 + 1, "policy, reference; gradient"
    assert collectives(lambda: score(trained, kl=True, entropy=True)) == 1 + 1, "both models at once; gradient"
    assert collectives(lambda: score(hidden)) == 2, "nobody asks for the gradient of hidden states"

    def loss(rows: int, **options):
        result = nlhf_kernels.linear_nash_pg_loss(
            trained.view(6, 4, -1), head, targets.view(6, 4), torch.full((6,), 0.7), tau=0.1,
            chunk_bytes=rows * -(-WIDE // 4) * 4, **options,
        )  # fmt: skip
        result.loss.backward()

    known = {"reference_logprobs": torch.zeros(6, 4)}
    assert collectives(lambda: loss(100, **known)) == 1 + 1
    assert collectives(lambda: loss(8, **known)) == 3 + 1, "three runs of two sequences (20 of 24 rows are scored)"
    models = {"reference_hidden": reference_hidden.view(6, 4, -1), "reference_head": reference}
    assert collectives(lambda: loss(100, **models)) == 2 + 1


def other_layouts_are_gathered_once() -> None:
    mesh, _ = meshes()
    hidden, weight, _, targets, _, _, _ = problem(torch.float32)
    across = shared(weight, mesh, 1)
    leaf = hidden.clone().requires_grad_()
    result = []
    options = {"chunk_bytes": 3 * WIDE * 4, "backend": "torch"}
    assert collectives(lambda: result.append(nlhf_kernels.linear_logprobs(leaf, across, targets, **options))) == 1
    expected = nlhf_kernels.linear_logprobs(leaf, weight, targets, **options)
    assert torch.equal(result[0].policy, expected.policy)
    (gradient,) = torch.autograd.grad(result[0].policy.sum(), across)
    weight.requires_grad_()
    (true,) = torch.autograd.grad(nlhf_kernels.linear_logprobs(hidden, weight, targets, **options).policy.sum(), weight)
    torch.testing.assert_close(gradient.full_tensor(), true)
    _raises("head.weight: expected the whole tensor", hidden, shared(weight, _pairs()["fsdp"]), targets)
    frozen = shared(weight, _pairs()["fsdp"], grad=False)
    torch.testing.assert_close(nlhf_kernels.linear_logprobs(hidden, frozen, targets, **options).policy, expected.policy)


def bad_input_is_named() -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, pairs = meshes()
    hidden, weight, bias, targets, reference_hidden, reference_weight, _ = problem(torch.float32)
    head = shared(weight, mesh)
    replicated = distribute_tensor(hidden, mesh, [Replicate()])
    _raises("hidden: expected a plain tensor, equal in all processes", replicated, head, targets)
    _raises(
        "head.bias: expected a DTensor sharded as head.weight; got a plain tensor", hidden, Head(head, bias), targets
    )
    _raises("head.bias: expected a DTensor sharded as", hidden, Head(head, shared(bias, pairs)), targets)
    _raises(
        r"reference_head.weight: expected 301 tokens, as head.weight; got \(300, 8\)",
        hidden, head, targets, reference_hidden, reference_weight[:-1],
    )  # fmt: skip
    _raises(r"targets: expected token ids in \[0, 301\)", hidden, head, targets.clamp(min=0) + 300)


def _raises(message: str, *arguments) -> None:
    with pytest.raises((TypeError, ValueError), match="^linear_logprobs: " + message):
        nlhf_kernels.linear_logprobs(*arguments)


CHECKS = [
    linear_logprobs_is_the_whole_heads,
    the_reference_may_be_laid_out_in_any_way,
    nash_pg_loss_is_the_whole_heads,
    preference_loss_is_the_whole_heads,
    all_processes_get_the_same_bits,
    collectives_are_few,
    other_layouts_are_gathered_once,
    bad_input_is_named,
]


@pytest.fixture(scope="module")
def reports():
    return processes.run_checks("tests.test_sharded_losses", 4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_four_processes(reports, check) -> None:
    processes.assert_passed(reports, check)


if __name__ == "__main__":
    processes.main(CHECKS)
