"""mixture_sample: the next token of every row from the geometric mixture of two models, with its log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ...core import torch_op
from ...core.calls import Calls
from ...core.checks import (
    FLOATS,
    INTEGERS,
    Sizes,
    check_counter,
    check_integer,
    check_is_tensor,
    check_memory,
    check_not_empty,
    check_number,
    check_tensor,
)
from ...core.registry import Backend, Measured, Op, register
from ...core.vocabulary import VocabularySlice
from ..row_uniforms.op import row_uniforms
from .layout import MAX_MODELS, MixtureSampleInputs, empty_sample
from .settings import MixtureSettings, Number, has_filter, mixture_settings
from .slices import SliceOfDraw, local_logits

_HERE = "nlhf_kernels.ops.mixture_sample"
_INT64 = range(-(2**63), 2**63)
Integer = int | torch.Tensor  # () or (R,) int64


class MixtureSample(NamedTuple):
    """A token per row; log-probabilities are None where not requested.

    Args:
        tokens ((R,) int64): the sample.
        policy_logprob ((R,) float32): at temperature 1, unfiltered.
        reference_logprob ((R,) float32): likewise.
        mixture_logprob ((R,) float32): under the sampled distribution, after temperature and filters.
        ok ((R,) bool): False where the row's logits are no distribution; its token is 0.
    """

    tokens: torch.Tensor
    policy_logprob: torch.Tensor | None
    reference_logprob: torch.Tensor | None
    mixture_logprob: torch.Tensor | None
    ok: torch.Tensor


class LogLinearSample(NamedTuple):
    """A token per row; log-probabilities are None where not requested.

    Args:
        tokens ((R,) int64): the sample.
        logprobs (of (R,) float32): one per model, at temperature 1, unfiltered.
        mixture_logprob ((R,) float32): under the sampled distribution, after temperature and filters.
        ok ((R,) bool): False where the row's logits are no distribution; its token is 0.
    """

    tokens: torch.Tensor
    logprobs: tuple[torch.Tensor | None, ...]
    mixture_logprob: torch.Tensor | None
    ok: torch.Tensor


class PackedSample(NamedTuple):
    """What `sample_packed` returns."""

    tokens: torch.Tensor  # (R,) int64
    logprobs: torch.Tensor  # (models + 1, R) float32: a row per model, then the mixture's; undefined where unasked
    ok: torch.Tensor  # (R,) bool


class MixtureSampleProblem(NamedTuple):
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    vocabulary: int
    filtered: bool


def _describe(
    policy_logits: torch.Tensor,
    reference_logits: torch.Tensor | None = None,
    beta: Number | None = None,
    *,
    top_k: Number = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    settings: MixtureSettings | None = None,
    vocab_size: int | None = None,
    **_: object,
) -> MixtureSampleProblem:
    logits = [policy_logits] if reference_logits is None else [policy_logits, reference_logits]
    vocabulary = policy_logits[:, :vocab_size].shape[1]
    filtered = has_filter(top_k, top_p, min_p) if settings is None else settings.filtered
    return MixtureSampleProblem(policy_logits.device, tuple(model.dtype for model in logits), vocabulary, filtered)


#: Microseconds of cuda and triton, rows x vocabulary, three log-probabilities; then with top-k and top-p:
#:   1 x 128256 bf16   20.5  12.8    65   52        256 x 151936 bf16   125   82    369  681
#:  16 x 128256 bf16   22.9  16.5    69   74         24 x  49155 bf16  32.7 16.4     93   81  (rows not aligned)
#:  64 x 128256 bf16   33.7  28.0    89  169         64 x 262144 bf16  47.8 43.2    120  307
#:  64 x 151936 fp32   46.7  37.3   121  238         32 x 151936 bf16  28.0 21.8     77  119
#: The choice ignores the number of rows, although triton is faster with filters for one row: a row's token must not
#: depend on the batch, and two backends may round differently.
_MEASURED = "medians of captured graphs on one H200, torch 2.11, triton 3.6, 2026-11-26, kernels of 765053e"

OP = register(
    Op(
        name="mixture_sample",
        backends=(
            Backend("torch", f"{_HERE}.oracle:mixture_sample"),
            Backend("triton", f"{_HERE}.triton_kernels:mixture_sample", preparation=f"{_HERE}.triton_kernels:prepare"),
            Backend("cuda", f"{_HERE}.native:mixture_sample_cuda", preparation=f"{_HERE}.native:prepare_cuda"),
            Backend("cpu", f"{_HERE}.native:mixture_sample_cpu", preparation=f"{_HERE}.native:prepare_cpu"),
        ),
        order={"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")},
        describe=_describe,
        measured=(
            Measured("cuda", "no filter", lambda problem: not problem.filtered, ("triton", "cuda", "torch"), _MEASURED),
            Measured("cuda", "with filters", lambda problem: problem.filtered, ("cuda", "triton", "torch"), _MEASURED),
        ),
    )
)


def _check_operands(inputs: MixtureSampleInputs) -> MixtureSampleProblem:
    logits, settings, _, bias, uniforms, seed, row_ids, step, stream, logprob_mask, _ = inputs
    if not 1 <= len(logits) <= MAX_MODELS:
        raise ValueError(f"{OP.name}: logits: expected 1 to {MAX_MODELS} models; got {len(logits)}")
    shape, device = logits[0].shape, logits[0].device
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"{OP.name}: logits: expected (rows, vocabulary), at least one token; got {tuple(shape)}")
    rows, vocabulary = shape
    for model in logits:
        check_memory(OP.name, "logits", model, shape, FLOATS, device, "rows")
    sets = rows if settings.ndim and settings.shape[0] == rows else 1
    check_memory(OP.name, "settings", settings, (sets, 4 + len(logits)), (torch.float32,), device)
    if bias is not None:
        expected = shape if bias.ndim == 2 else (vocabulary,)
        check_memory(OP.name, "bias", bias, expected, (torch.float32,), device, "rows")
    if uniforms is not None:
        check_memory(OP.name, "uniforms", uniforms, (rows,), (torch.float64,), device)
    else:
        if seed is None or row_ids is None or step is None:
            raise ValueError(f"{OP.name}: seed, row_ids, step: expected all three, or uniforms; got one that is None")
        check_counter(OP.name, seed, row_ids, step, {"rows": rows}, device)
        if not (row_ids.is_contiguous() and seed.is_contiguous() and step.is_contiguous()):
            for name, tensor in (("row_ids", row_ids), ("seed", seed), ("step", step)):
                check_memory(OP.name, name, tensor, tensor.shape, INTEGERS, device)
    most = (2 << len(logits)) - 1
    if not (0 <= stream <= 255 and 0 <= logprob_mask <= most):
        check_integer(OP.name, "stream", stream, 0, 255)
        check_integer(OP.name, "logprob_mask", logprob_mask, 0, most)
    return MixtureSampleProblem(device, tuple([model.dtype for model in logits]), vocabulary, inputs.filtered)


_calls = Calls(OP, MixtureSampleInputs, _check_operands)
_operator: Callable[[MixtureSampleInputs], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = torch_op.define(
    "mixture_sample", MixtureSampleInputs, "(Tensor, Tensor, Tensor)", _calls.run, empty_sample,
    run_known=_calls.run_known,
)  # fmt: skip


def mixture_sample(
    policy_logits: torch.Tensor,
    reference_logits: torch.Tensor | None = None,
    beta: Number | None = None,
    *,
    temperature: Number = 1.0,
    top_k: Number = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    settings: MixtureSettings | None = None,
    seed: Integer | None = None,
    row_ids: torch.Tensor | None = None,
    step: Integer | None = None,
    stream: int = 0,
    uniforms: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    logprobs: Sequence[str] | None = None,
    backend: str | None = None,
) -> MixtureSample:
    """Draw each row's next token from softmax(((1 - beta) z_policy + beta z_reference + bias) / temperature).

    The draw is a function of (seed, row id, step, stream) alone, see `row_uniforms`, or of `uniforms`. With tensors for
    seed, row_ids and step a captured graph advances as they change. Filters act on the mixture, in transformers' order:
    top_k, top_p, min_p. Logits may be DTensors whose columns tensor-parallel processes share (README.md, "Slices of the
    vocabulary").

    Args:
        policy_logits ((R, V) float32, bfloat16 or float16): z_policy; rows may lie further apart than V.
        reference_logits ((R, V), its dtype its own): z_reference; None samples from the policy alone.
        beta (number or (R,)): weight of the reference; needed with reference_logits, unless `settings` are given. 0
            never reads the reference's values, 1 never the policy's; outside [0, 1] it is contrastive decoding.
        temperature (number or (R,)): 0 takes the likeliest token.
        top_k (number or (R,)): 0 keeps all tokens.
        top_p (number or (R,)): 1 keeps all tokens.
        min_p (number or (R,)): 0 keeps all tokens.
        settings: beta, temperature and filters, packed once by `mixture_settings([1 - beta, beta], ...)`.
        seed (number, () or (R,) int64): of all rows, or of each.
        row_ids ((R,) int64): identifies the rows.
        step (number, () or (R,) int64): the decoding step.
        stream: distinguishes independent draws for one row, 0 to 255.
        uniforms ((R,) float64 in [0, 1]): instead of seed, row_ids and step.
        bias ((V,) or (R, V) float32): added before the temperature; -inf forbids a token.
        vocab_size: columns that count; those beyond it, of padded heads, are left out of everything.
        logprobs: what is computed, any of "policy", "reference", "mixture"; None means all there are.
        backend: see `use_backend`; None leaves the choice to it.
    """
    op = "mixture_sample"
    names = ("policy", "mixture") if reference_logits is None else ("policy", "reference", "mixture")
    logprob_mask = _logprob_mask(op, names, logprobs)
    logits = {"policy_logits": policy_logits}
    if reference_logits is not None:
        logits["reference_logits"] = reference_logits
    if settings is None:
        if (beta is None) is not (reference_logits is None):
            raise ValueError(f"{op}: beta: expected with reference_logits and not without; got {beta!r}")
        weights = [1.0] if beta is None else _weights(op, beta)
        settings = _settings(op, policy_logits, weights, temperature, top_k, top_p, min_p)
    sample = _sample(
        op, logits, settings, bias, uniforms, seed, row_ids, step, stream, vocab_size, logprob_mask, backend
    )
    policy, *reference, mixture = _asked(sample, logprob_mask)
    return MixtureSample(sample.tokens, policy, reference[0] if reference else None, mixture, sample.ok)


def log_linear_sample(
    logits: Sequence[torch.Tensor],
    weights: Sequence[Number] | None = None,
    *,
    temperature: Number = 1.0,
    top_k: Number = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    settings: MixtureSettings | None = None,
    seed: Integer | None = None,
    row_ids: torch.Tensor | None = None,
    step: Integer | None = None,
    stream: int = 0,
    uniforms: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    logprobs: Sequence[int | str] | None = None,
    backend: str | None = None,
) -> LogLinearSample:
    """Draw each row's next token from softmax((sum_m weights[m] z_m + bias) / temperature).

    Contrastive decoding is weights (2, -1), proxy tuning (1, 1, -1); classifier-free guidance has such weights too.

    Args:
        logits (of (R, V) float32, bfloat16 or float16): z_m of one to four models, each of its own dtype.
        weights (numbers or (R,)): one per model, of any sum; needed unless `settings` are given. A model of weight 0 is
            not read.
        temperature, top_k, top_p, min_p (number or (R,)): as for `mixture_sample`.
        settings: weights, temperature and filters packed once by `mixture_settings`, instead of them.
        seed, row_ids, step, stream, uniforms: what the draw is a function of, as for `mixture_sample`.
        bias ((V,) or (R, V) float32): added before the temperature; -inf forbids a token.
        vocab_size: columns that count; those beyond it, of padded heads, are left out of everything.
        logprobs: what is computed, indices of models and "mixture"; None means all.
        backend: see `use_backend`; None leaves the choice to it.
    """
    op = "log_linear_sample"
    if not 1 <= len(logits) <= MAX_MODELS:
        raise ValueError(f"{op}: logits: expected 1 to {MAX_MODELS} models; got {len(logits)}")
    names = (*range(len(logits)), "mixture")
    logprob_mask = _logprob_mask(op, names, logprobs)
    if settings is None:
        if weights is None or len(weights) != len(logits):
            got = None if weights is None else len(weights)
            raise ValueError(f"{op}: weights: expected one per model, {len(logits)}; got {got}")
        settings = _settings(op, logits[0], weights, temperature, top_k, top_p, min_p)
    named = {f"logits[{m}]": model for m, model in enumerate(logits)}
    sample = _sample(
        op, named, settings, bias, uniforms, seed, row_ids, step, stream, vocab_size, logprob_mask, backend
    )
    *values, mixture = _asked(sample, logprob_mask)
    return LogLinearSample(sample.tokens, tuple(values), mixture, sample.ok)


def _logprob_mask(op: str, names: Sequence[int | str], logprobs: Sequence[int | str] | None) -> int:
    """Return the mask whose bit i requests the log-probability of names[i]."""
    if logprobs is None:
        return (1 << len(names)) - 1
    mask = 0
    for name in logprobs:
        if name not in names:
            raise ValueError(f"{op}: logprobs: expected any of {', '.join(map(str, names))}; got {name!r}")
        mask |= 1 << list(names).index(name)
    return mask


def _asked(sample: PackedSample, logprob_mask: int) -> list[torch.Tensor | None]:
    """Return the log-probabilities, (R,) each; None where they were not asked for."""
    return [row if logprob_mask >> index & 1 else None for index, row in enumerate(sample.logprobs.unbind())]


def _weights(op: str, beta: Number) -> list[Number]:
    if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.Tensor)):
        raise TypeError(f"{op}: beta: expected a number or a tensor of one per row; got {type(beta).__name__}")
    if not isinstance(beta, torch.Tensor):
        check_number(op, "beta", beta)
    return [1 - beta, beta]


def _settings(
    op: str,
    first: torch.Tensor,
    weights: Sequence[Number],
    temperature: Number,
    top_k: Number,
    top_p: Number,
    min_p: Number,
) -> MixtureSettings:
    """Pack settings for the rows and the device of `first`, which is checked later."""
    known = isinstance(first, torch.Tensor) and first.ndim > 0
    device, rows = (first.device, first.shape[0]) if known else (torch.device("cpu"), None)
    return mixture_settings(
        weights, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, device=device, rows=rows, op=op
    )


def _sample(
    op: str,
    named_logits: dict[str, Any],
    settings: MixtureSettings,
    bias: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    seed: Integer | None,
    row_ids: torch.Tensor | None,
    step: Integer | None,
    stream: int,
    vocab_size: int | None,
    logprob_mask: int,
    backend: str | None,
) -> PackedSample:
    """Check the arguments under the caller's names, bring tensors into the operator's layout, sample."""
    if vocab_size is None and isinstance(settings, MixtureSettings):
        # What the operator has taken before as it is passes the checks below, and needs no other layout.
        logits = [*named_logits.values()]
        if uniforms is None and type(logits[0]) is torch.Tensor:
            device = logits[0].device
            seed, step = (_filled(x, device) if type(x) is int and x in _INT64 else x for x in (seed, step))
        counter: tuple[Any, Any, Any] = (seed, row_ids, step) if uniforms is None else (None, None, None)
        packed, filtered = settings
        inputs = MixtureSampleInputs(
            logits, packed, filtered, bias, uniforms, *counter, stream, logprob_mask, backend or ""
        )  # fmt: skip
        result = torch_op.past_dispatcher(_calls.run_known, inputs)
        if result is not NotImplemented:
            return PackedSample(*result)
    named_logits, bias, part = local_logits(op, named_logits, bias, vocab_size)
    if part is not None:
        vocab_size = None  # the columns beyond are left out already
    sizes: Sizes = {}
    first = next(iter(named_logits.values()))
    for name, value in named_logits.items():
        check_tensor(op, name, value, ("rows", "vocabulary"), FLOATS, sizes, first.device)
    if part is None:
        check_not_empty(op, next(iter(named_logits)), sizes, "vocabulary")
    rows, device = sizes["rows"], first.device
    logits = [_columns(op, model, vocab_size) for model in named_logits.values()]
    sizes["vocabulary"] = logits[0].shape[1]
    if bias is not None:
        shape = ("rows", "vocabulary") if isinstance(bias, torch.Tensor) and bias.ndim == 2 else ("vocabulary",)
        check_tensor(op, "bias", bias, shape, (torch.float32,), sizes, device)
        bias = _rows_contiguous(bias)
    settings = _checked_settings(op, settings, rows, len(logits), device)
    check_integer(op, "stream", stream, 0, 255)
    if uniforms is not None:
        check_tensor(op, "uniforms", uniforms, ("rows",), (torch.float64,), sizes, device)
        return sample_packed(
            logits, settings, uniforms=uniforms.contiguous(), bias=bias, logprob_mask=logprob_mask, backend=backend,
            part=part,
        )  # fmt: skip
    if seed is None or row_ids is None or step is None:
        raise ValueError(f"{op}: seed, row_ids, step: expected all three, or uniforms; got one that is None")
    seed, step = _as_tensor(op, "seed", seed, device), _as_tensor(op, "step", step, device)
    check_is_tensor(op, "row_ids", row_ids)
    check_counter(op, seed, row_ids, step, sizes, device)
    return sample_packed(
        logits, settings, seed=seed.contiguous(), row_ids=row_ids.contiguous(), step=step.contiguous(), stream=stream,
        bias=bias, logprob_mask=logprob_mask, backend=backend, part=part,
    )  # fmt: skip


def _columns(op: str, model: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
    """Return the first `vocab_size` columns with contiguous elements in each row; rows may lie further apart."""
    model = model.detach() if model.requires_grad else model
    if vocab_size is not None:
        check_integer(op, "vocab_size", vocab_size, 1, model.shape[1])
        model = model[:, :vocab_size]
    return _rows_contiguous(model)


def _rows_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride()[-1] == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def _checked_settings(
    op: str, settings: MixtureSettings, rows: int, models: int, device: torch.device
) -> MixtureSettings:
    if not isinstance(settings, MixtureSettings):
        raise TypeError(f"{op}: settings: expected MixtureSettings; got {type(settings).__name__}")
    packed = check_tensor(op, "settings.packed", settings.packed, ("sets", "columns"), (torch.float32,), {}, device)
    if packed.shape[1] != 4 + models or packed.shape[0] not in (1, rows):
        expected = f"({rows} or 1 rows, 4 + {models} columns)"
        raise ValueError(f"{op}: settings: expected packed for {expected}; got {tuple(packed.shape)}")
    return MixtureSettings(packed.contiguous(), settings.filtered)


def _filled(value: int, device: torch.device) -> torch.Tensor:
    return torch.full((), value, dtype=torch.int64, device=device)


def _as_tensor(op: str, name: str, value: Integer, device: torch.device) -> torch.Tensor:
    if isinstance(value, int) and not isinstance(value, bool):
        return _filled(check_integer(op, name, value, _INT64[0], _INT64[-1]), device)
    check_is_tensor(op, name, value)
    return value  # type: ignore[return-value]


def sample_packed(
    logits: list[torch.Tensor],
    settings: MixtureSettings,
    *,
    seed: torch.Tensor | None = None,
    row_ids: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    stream: int = 0,
    uniforms: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logprob_mask: int,
    backend: str | None = None,
    part: VocabularySlice | None = None,
) -> PackedSample:
    """Sample with packed settings, from tensors laid out as the operator takes and checks them.

    For callers that sample step after step, as the rollout engine does. `mixture_sample` and `log_linear_sample` bring
    their arguments into this form.

    Args:
        logits (of (R, V)): of one to four models; elements of a row side by side.
        settings: packed for one row, or for these rows.
        seed (() or (R,) int64): this, row_ids and step, or uniforms.
        row_ids ((R,) int64): contiguous, as the rest.
        step (() or (R,) int64): the decoding step.
        stream: 0 to 255.
        uniforms ((R,) float64): in [0, 1].
        bias ((V,) or (R, V) float32): added before the temperature.
        logprob_mask: bit m asks for the log-probability under model m, bit len(logits) for the mixture's.
        backend: see `use_backend`; None leaves the choice to it.
        part: this process's slice of a vocabulary that tensor-parallel processes share, whose columns logits and bias
            are. All of them get the same sample. A filter is refused there.
    """
    packed, filtered = settings
    inputs = MixtureSampleInputs(
        logits, packed, filtered, bias, uniforms, seed, row_ids, step, stream, logprob_mask, backend or ""
    )
    return PackedSample(*(_operator(inputs) if part is None else _sample_slice(inputs, part)))


def _sample_slice(
    inputs: MixtureSampleInputs, part: VocabularySlice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if inputs.filtered:
        raise ValueError(
            f"{OP.name}: top_k, top_p, min_p: expected none over logits that processes share: a threshold needs the "
            "values of the whole vocabulary (gather the logits: `full_tensor()`); got a filter"
        )
    uniforms = inputs.uniforms
    if uniforms is None:
        seed, row_ids, step = inputs.seed, inputs.row_ids, inputs.step
        assert seed is not None and row_ids is not None and step is not None, "without uniforms all three are given"
        uniforms = row_uniforms(seed, row_ids, step, stream=inputs.stream, backend=inputs.backend)

    def draw(inside: torch.Tensor) -> torch.Tensor:
        tokens, _, _ = _operator(inputs._replace(uniforms=inside, logprob_mask=0))
        return tokens

    return SliceOfDraw(inputs._replace(uniforms=uniforms), uniforms, part, draw).run()
