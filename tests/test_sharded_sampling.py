"""Sampling from vocabulary-sharded logits: the same token for the same uniform, with few collectives."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.core.registry import get_op
from nlhf_kernels.core.vocabulary import VocabularySlice
from nlhf_kernels.ops.mixture_sample.layout import MixtureSampleInputs
from nlhf_kernels.ops.mixture_sample.op import MixtureSample, MixtureSampleProblem
from nlhf_kernels.ops.mixture_sample.settings import mixture_settings
from nlhf_kernels.ops.mixture_sample.slices import SliceOfDraw
from tests.support import processes
from tests.support.backends import device_of, every_backend
from tests.support.capture import capturing
from tests.support.mixture import assert_right, logits_pair, uniforms_for

WIDE = 301  # vocabulary size, divisible by no number of processes used here

# ---- in one process: every slice's part of a draw --------------------------------------------------------------------


def drawn(backend: str, count: int, logits, weights, uniforms, bias=None, vocab_size=None, **options) -> MixtureSample:
    """Draw from `count` slices as separate processes would, and assert that all results agree."""
    device, total = uniforms.device, logits[0].shape[1]
    packed = mixture_settings(weights, device=device, **options).packed
    logprob_mask = (2 << len(logits)) - 1
    made = []
    for rank in range(count):
        part = VocabularySlice(None, rank, count, total)
        stop = part.stop if vocab_size is None else max(part.first, min(part.stop, vocab_size))
        own = [model[:, part.first : stop].contiguous() for model in logits]
        if reasons := get_op("mixture_sample").why_not(
            backend, MixtureSampleProblem(device, tuple(model.dtype for model in own), max(1, part.width), False)
        ):
            pytest.skip("; ".join(reasons))
        own_bias = None if bias is None else bias[..., part.first : stop].contiguous()

        def draw(inside, own=own, own_bias=own_bias):
            settings = nlhf_kernels.MixtureSettings(packed, False)
            options = {"settings": settings, "uniforms": inside, "bias": own_bias, "backend": backend}
            return nlhf_kernels.log_linear_sample(own, **options).tokens

        inputs = MixtureSampleInputs(own, packed, False, own_bias, uniforms, None, None, None, 0, logprob_mask, backend)
        made.append(SliceOfDraw(inputs, uniforms, part, draw))
    sums = torch.stack([slice_.sums() for slice_ in made])
    candidates = torch.stack([slice_.candidates(sums) for slice_ in made])
    (tokens, logprobs, ok), *others = (slice_.sample(sums, candidates) for slice_ in made)
    assert all(torch.equal(tokens, other[0]) for other in others)
    reference = logprobs[1] if len(logits) == 2 else None
    return MixtureSample(tokens, logprobs[0], reference, logprobs[-1], ok)


@every_backend
@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
def test_draws_of_slices_match_float64(backend, count, dtypes) -> None:
    """Draws match float64 for several numbers of slices, including empty ones (eight slices of nine tokens)."""
    device = device_of(backend)
    rows, vocabulary = (24, WIDE) if count < 8 else (8, 9)
    policy, reference = logits_pair(rows, vocabulary, device, dtypes)
    uniforms = uniforms_for(rows, device)
    result = drawn(backend, count, [policy, reference], [0.7, 0.3], uniforms, temperature=0.8)
    assert_right(result, policy, reference, 0.3, uniforms, temperature=0.8)
    whole = nlhf_kernels.mixture_sample(policy, reference, 0.3, uniforms=uniforms, temperature=0.8, backend="torch")
    assert torch.equal(result.tokens, whole.tokens), "token by token, as unsliced"


def test_two_thousand_tokens_are_those_of_the_oracle() -> None:
    """On the default backend of a CPU: in 2,000 draws one may differ, where its uniform is a tie (assert_right)."""
    policy, reference = logits_pair(2000, WIDE, torch.device("cpu"))
    uniforms = uniforms_for(2000, torch.device("cpu"))
    result = drawn("torch", 4, [policy, reference], [0.6, 0.4], uniforms)
    whole = nlhf_kernels.mixture_sample(policy, reference, 0.4, uniforms=uniforms, backend="torch")
    assert (result.tokens != whole.tokens).sum() <= 1
    assert_right(result, policy, reference, 0.4, uniforms)


@every_backend
def test_settings_per_row_bias_and_padded_heads(backend) -> None:
    """Draws agree for greedy rows, beta 0 and 1, forbidden tokens, and padding columns."""
    device = device_of(backend)
    policy, reference = logits_pair(6, WIDE, device)
    uniforms = uniforms_for(6, device)
    beta = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.3, 0.3], device=device)
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.3, 0.0, 2.0], device=device)
    bias = torch.zeros(WIDE, device=device)
    bias[:200] = -torch.inf  # only the last of three slices holds allowed tokens
    padding = torch.full_like(policy, torch.nan)
    pair = [torch.cat([model, padding], 1) for model in (policy, reference)]
    wide_bias = torch.cat([bias, torch.zeros(WIDE, device=device)])
    settings = {"bias": wide_bias, "vocab_size": WIDE, "temperature": temperature}
    result = drawn(backend, 3, pair, [1 - beta, beta], uniforms, **settings)
    assert_right(result, policy, reference, beta, uniforms, bias=bias, temperature=temperature)
    assert (result.tokens >= 200).all()


@every_backend
@pytest.mark.parametrize("fault", ["nan", "inf", "all -inf", "one nan"])
def test_a_faulty_row_is_reported_and_alone(backend, fault) -> None:
    device = device_of(backend)
    policy, reference = logits_pair(5, WIDE, device)
    uniforms = uniforms_for(5, device)
    value = {"nan": torch.nan, "inf": torch.inf, "all -inf": -torch.inf, "one nan": torch.nan}[fault]
    policy[2, slice(None) if fault in ("nan", "all -inf") else slice(WIDE - 1, WIDE)] = value
    result = drawn(backend, 3, [policy, reference], [0.5, 0.5], uniforms)
    assert result.ok.tolist() == [True, True, False, True, True]
    assert result.tokens[2] == 0 and result.policy_logprob[2].isnan() and result.mixture_logprob[2].isnan()
    fine = [0, 1, 3, 4]
    whole = nlhf_kernels.mixture_sample(policy[fine], reference[fine], 0.5, uniforms=uniforms[fine], backend="torch")
    assert torch.equal(result.tokens[fine], whole.tokens)


def test_a_log_probability_of_minus_infinity_is_one() -> None:
    """A token that the reference forbids, drawn at beta = 0, has reference log-probability -inf."""
    policy, reference = logits_pair(4, WIDE, torch.device("cpu"))
    reference[:] = -torch.inf
    reference[:, 0] = 0
    result = drawn("torch", 3, [policy, reference], [1.0, 0.0], uniforms_for(4, torch.device("cpu")))
    assert result.ok.all() and (result.reference_logprob == -torch.inf).all()


def test_a_draw_asks_nothing_of_the_host() -> None:
    """A draw uses no list as an index and reads no value, which graph capture would refuse."""
    logits = [torch.empty(6, 12, device="meta") for _ in range(2)]
    packed, uniforms = torch.empty(6, 6, device="meta"), torch.empty(6, dtype=torch.float64, device="meta")
    bias, tokens = torch.empty(12, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    inputs = MixtureSampleInputs(logits, packed, False, bias, uniforms, None, None, None, 0, 0b111, "torch")
    with capturing():
        draw = SliceOfDraw(inputs, uniforms, VocabularySlice(None, 1, 2, 24), lambda inside: tokens)
        sums = torch.stack([draw.sums(), draw.sums()])
        draw.sample(sums, torch.stack([draw.candidates(sums), draw.candidates(sums)]))


# ---- in four processes -----------------------------------------------------------------------------------------------


def shared(logits: torch.Tensor, dim: int = 1, name: str = "tp"):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if name not in _meshes:
        _meshes[name] = init_device_mesh("cpu", (4,), mesh_dim_names=(name,))
    return distribute_tensor(logits, _meshes[name], [Shard(dim)])


_meshes: dict = {}


def samples_are_the_whole_logits() -> None:
    """Tokens and log-probabilities equal those of whole logits, by counter and by uniforms, on both CPU backends."""
    policy, reference = logits_pair(40, WIDE, torch.device("cpu"), (torch.bfloat16, torch.float32))
    counter = {"seed": 5, "row_ids": torch.arange(40) * 3, "step": torch.tensor(2), "stream": 1}
    bias = torch.zeros(WIDE)
    bias[7] = -torch.inf
    for backend in ("torch", "cpu"):
        for options in (counter, {"uniforms": uniforms_for(40, "cpu")}):
            options = {"temperature": 0.9, "backend": backend, "bias": bias, **options}
            result = nlhf_kernels.mixture_sample(shared(policy), shared(reference), 0.3, **options)
            whole = nlhf_kernels.mixture_sample(policy, reference, 0.3, **options)
            assert torch.equal(result.tokens, whole.tokens) and result.ok.all()
            for got, expected in zip(result[1:4], whole[1:4], strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    padded = [shared(torch.cat([model, torch.full_like(model, 30.0)], 1)) for model in (policy, reference)]
    result = nlhf_kernels.mixture_sample(*padded, 0.3, vocab_size=WIDE, **options)
    assert torch.equal(result.tokens, whole.tokens), "columns beyond vocab_size are left out"
    one = nlhf_kernels.log_linear_sample([shared(policy)], [1.0], logprobs=["mixture"], **counter)
    assert one.logprobs == (None,)
    assert torch.equal(one.tokens, nlhf_kernels.log_linear_sample([policy], [1.0], **counter).tokens)


def a_draw_is_two_collectives() -> None:
    policy, reference = (shared(model) for model in logits_pair(6, WIDE, torch.device("cpu")))
    uniforms = uniforms_for(6, "cpu")
    assert processes.collectives(lambda: nlhf_kernels.mixture_sample(policy, reference, 0.3, uniforms=uniforms)) == 2


def bad_input_is_named() -> None:
    policy, reference = logits_pair(8, WIDE, torch.device("cpu"))
    draw = {"uniforms": uniforms_for(8, "cpu")}
    raises = partial(pytest.raises, ValueError)
    with raises(match=r"top_k, top_p, min_p: expected none over logits that processes share: a threshold needs the"):
        nlhf_kernels.mixture_sample(shared(policy), shared(reference), 0.3, top_p=0.9, **draw)
    for layouts in (
        (shared(policy), reference),
        (policy, shared(reference)),
        (shared(policy, 0), shared(reference, 0)),
    ):
        with raises(match="mixture_sample: .*_logits: expected, as of every model or of none, a DTensor"):
            nlhf_kernels.mixture_sample(*layouts, 0.3, **draw)
    with raises(match="policy_logits: expected, as of every model"):
        nlhf_kernels.mixture_sample(shared(policy, name="fsdp"), shared(reference, name="fsdp"), 0.3, **draw)
    with raises(match=r"bias: expected 301 columns, of the whole vocabulary; got \(300,\)"):
        nlhf_kernels.mixture_sample(shared(policy), shared(reference), 0.3, bias=torch.zeros(300), **draw)


CHECKS = [samples_are_the_whole_logits, a_draw_is_two_collectives, bad_input_is_named]


@pytest.fixture(scope="module")
def reports():
    return processes.run_checks("tests.test_sharded_sampling", 4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_four_processes(reports, check) -> None:
    processes.assert_passed(reports, check)


if __name__ == "__main__":
    processes.main(CHECKS)
