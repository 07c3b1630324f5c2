"""mixture_sample: the next token of every row from the geometric mixture of two models, with its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...core import torch_op
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
from ...core.vocabulary import VocabularySlice, is_dtensor, same_slice, slice_of
from ..row_uniforms.op import row_uniforms
from .settings import MixtureSettings, Number, mixture_settings
from .slices import SliceOfDraw

_HERE = "nlhf_kernels.ops.mixture_sample"
MAX_MODELS = 4
Integer = int | torch.Tensor  # () or (R,) int64


class MixtureSample(NamedTuple):
    """A token per row; log-probabilities are None where they were not asked for."""

    tokens: torch.Tensor  # (R,) int64
    policy_logprob: torch.Tensor | None  # (R,) float32, at temperature 1, unfiltered
    reference_logprob: torch.Tensor | None  # likewise
    mixture_logprob: torch.Tensor | None  # (R,) float32, of what was sampled from: after temperature and filters
    ok: torch.Tensor  # (R,) bool; False: the row's logits are no distribution, its token is 0


class LogLinearSample(NamedTuple):
    """A token per row; log-probabilities are None where they were not asked for."""

    tokens: torch.Tensor  # (R,) int64
    logprobs: tuple[torch.Tensor | None, ...]  # of (R,) float32, one per model, at temperature 1, unfiltered
    mixture_logprob: torch.Tensor | None  # (R,) float32, after temperature and filters
    ok: torch.Tensor  # (R,) bool; False: the row's logits are no distribution, its token is 0


class PackedSample(NamedTuple):
    """What `sample_packed` returns."""

    tokens: torch.Tensor  # (R,) int64
    logprobs: torch.Tensor  # (models + 1, R) float32: a row per model, then the mixture's; undefined where unwanted
    ok: torch.Tensor  # (R,) bool


class MixtureSampleProblem(NamedTuple):
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    vocabulary: int
    filtered: bool


def _describe_call(logits: Sequence[torch.Tensor], filtered: bool) -> MixtureSampleProblem:
    first = logits[0]
    return MixtureSampleProblem(first.device, tuple(model.dtype for model in logits), first.shape[1], filtered)


def _describe(
    policy_logits: torch.Tensor, reference_logits: torch.Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    logits = [policy_logits] if reference_logits is None else [policy_logits, reference_logits]
    logits = [model[:, : kwargs.get("vocab_size")] for model in logits]
    settings = kwargs.get("settings")
    filtered = settings.filtered if settings else _filters(**kwargs)
    return _describe_call(logits, filtered)


def _filters(top_k: Number = 0, top_p: Number = 1.0, min_p: Number = 0.0, **_: Any) -> bool:
    return any(isinstance(value, torch.Tensor) or value != off for value, off in ((top_k, 0), (top_p, 1), (min_p, 0)))


#: Microseconds of cuda and triton, rows x vocabulary, three log-probabilities; then with top-k and top-p:
#:   1 x 128256 bf16   20.5  12.8    65   52        256 x 151936 bf16   125   82    369  681
#:  16 x 128256 bf16   22.9  16.5    69   74         24 x  49155 bf16  32.7 16.4     93   81  (rows not aligned)
#:  64 x 128256 bf16   33.7  28.0    89  169         64 x 262144 bf16  47.8 43.2    120  307
#:  64 x 151936 fp32   46.7  37.3   121  238         32 x 151936 bf16  28.0 21.8     77  119
#: The number of rows does not decide, although triton wins with filters where there is one: a row's token must not
#: depend on the batch, and two backends may round differently.
_MEASURED = "medians of captured graphs on one H200, torch 2.11, triton 3.6, 2026-11-26, kernels of 765053e"

OP = register(
    Op(
        name="mixture_sample",
        backends=(
            Backend("torch", f"{_HERE}.oracle:mixture_sample"),
            Backend("triton", f"{_HERE}.triton_kernels:mixture_sample"),
            Backend("cuda", f"{_HERE}.native:mixture_sample_cuda"),
            Backend("cpu", f"{_HERE}.native:mixture_sample_cpu"),
        ),
        order={"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")},
        describe=_describe,
        measured=(
            Measured("cuda", "no filter", lambda problem: not problem.filtered, ("triton", "cuda", "torch"), _MEASURED),
            Measured("cuda", "with filters", lambda problem: problem.filtered, ("cuda", "triton", "torch"), _MEASURED),
        ),
    )
)


def _run(logits: Sequence[torch.Tensor], settings: torch.Tensor, filtered: bool, *arguments: Any) -> Any:
    *rest, backend = arguments
    _check_operands(logits, settings, *rest)
    return OP.resolve(backend, _describe_call(logits, filtered)).run(logits, settings, filtered, *rest)


def _check_operands(
    logits: Sequence[torch.Tensor],
    settings: torch.Tensor,
    bias: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    seed: torch.Tensor,
    row_ids: torch.Tensor,
    step: torch.Tensor,
    stream: int,
    wanted: int,
) -> None:
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
        check_memory(OP.name, "row_ids", row_ids, (rows,), INTEGERS, device)
        check_memory(OP.name, "seed", seed, (rows,) if seed.ndim else (), INTEGERS, device)
        check_memory(OP.name, "step", step, (rows,) if step.ndim else (), INTEGERS, device)
    check_integer(OP.name, "stream", stream, 0, 255)
    check_integer(OP.name, "wanted", wanted, 0, (2 << len(logits)) - 1)


def _fake(logits: Sequence[torch.Tensor], *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, first = logits[0].shape[0], logits[0]
    return (
        first.new_empty(rows, dtype=torch.int64),
        first.new_empty((len(logits) + 1, rows), dtype=torch.float32),
        first.new_empty(rows, dtype=torch.bool),
    )


_operator = torch_op.define(
    "mixture_sample",
    "(Tensor[] logits, Tensor settings, bool filtered, Tensor? bias, Tensor? uniforms, Tensor seed, Tensor row_ids,"
    " Tensor step, int stream, int wanted, str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)


def mixture_sample(
    policy_logits: torch.Tensor,  # (R, V) float32, bfloat16 or float16
    reference_logits: torch.Tensor | None = None,  # (R, V), its dtype and row stride its own; None: the policy alone
    beta: Number | None = None,  # number or (R,); needed with a reference, unless `settings` are given
    *,
    temperature: Number = 1.0,
    top_k: Number = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    settings: MixtureSettings | None = None,
    seed: Integer | None = None,
    row_ids: torch.Tensor | None = None,  # (R,) int64
    step: Integer | None = None,
    stream: int = 0,
    uniforms: torch.Tensor | None = None,  # (R,) float64 in [0, 1]
    bias: torch.Tensor | None = None,  # (V,) or (R, V) float32
    vocab_size: int | None = None,
    logprobs: Sequence[str] | None = None,
    backend: str | None = None,
) -> MixtureSample:
    """Draw each row's next token from softmax(((1 - beta) z_policy + beta z_reference + bias) / temperature).

    beta 0 never looks at the reference's values and beta 1 never at the policy's; beta outside [0, 1] is contrastive
    decoding or guidance. temperature 0 takes the likeliest token. Filters act on the mixture in transformers' order:
    top_k (0: off), top_p (1: off), min_p (0: off). bias is added before the temperature; -inf forbids a token.
    vocab_size leaves columns beyond it out of everything (padded heads).

    The draw is the uniform of (seed, row id, step, stream) alone, see `row_uniforms`, or your own `uniforms`. With
    tensors for seed, row_ids and step a captured graph advances as they change.

    logprobs names what is computed: any of "policy", "reference", "mixture"; None means all there are. Per-row
    tensors of settings can be packed once, `settings=mixture_settings([1 - beta, beta], ...)`, instead of per call.

    Logits may be DTensors whose columns tensor-parallel processes share (README.md, "Slices of the vocabulary").
    """
    op = "mixture_sample"
    names = ("policy", "mixture") if reference_logits is None else ("policy", "reference", "mixture")
    wanted = _wanted(op, names, logprobs)
    logits = {"policy_logits": policy_logits}
    if reference_logits is not None:
        logits["reference_logits"] = reference_logits
    if settings is None:
        if (beta is None) is not (reference_logits is None):
            raise ValueError(f"{op}: beta: expected with reference_logits and not without; got {beta!r}")
        weights = [1.0] if beta is None else _weights(op, beta)
        settings = _settings(op, policy_logits, weights, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, rows, ok = _sample(
        op, logits, settings, bias, uniforms, (seed, row_ids, step), stream, vocab_size, wanted, backend
    )
    given = [rows[index] if wanted >> index & 1 else None for index in range(len(names))]
    if reference_logits is None:
        given.insert(1, None)
    return MixtureSample(tokens, given[0], given[1], given[2], ok)


def log_linear_sample(
    logits: Sequence[torch.Tensor],  # of (R, V), one to four models
    weights: Sequence[Number] | None = None,  # a number or (R,) per model, any sum; needed unless `settings` are given
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
    """`mixture_sample` for softmax((sum_m weights[m] z_m + bias) / temperature): contrastive decoding (2, -1), proxy
    tuning (1, 1, -1), classifier-free guidance. A model of weight 0 is not looked at. logprobs names model indices and
    "mixture"; None means all."""
    op = "log_linear_sample"
    if not 1 <= len(logits) <= MAX_MODELS:
        raise ValueError(f"{op}: logits: expected 1 to {MAX_MODELS} models; got {len(logits)}")
    wanted = _wanted(op, (*range(len(logits)), "mixture"), logprobs)
    if settings is None:
        if weights is None or len(weights) != len(logits):
            got = None if weights is None else len(weights)
            raise ValueError(f"{op}: weights: expected one per model, {len(logits)}; got {got}")
        settings = _settings(op, logits[0], weights, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    named = {f"logits[{m}]": model for m, model in enumerate(logits)}
    tokens, rows, ok = _sample(
        op, named, settings, bias, uniforms, (seed, row_ids, step), stream, vocab_size, wanted, backend
    )
    given = [rows[index] if wanted >> index & 1 else None for index in range(len(logits) + 1)]
    return LogLinearSample(tokens, tuple(given[:-1]), given[-1], ok)


def _weights(op: str, beta: Number) -> list[Number]:
    if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.Tensor)):
        raise TypeError(f"{op}: beta: expected a number or a tensor of one per row; got {type(beta).__name__}")
    if not isinstance(beta, torch.Tensor):
        check_number(op, "beta", beta)
    return [1 - beta, beta]


def _settings(op: str, first: torch.Tensor, weights: Sequence[Number], **named: Number) -> MixtureSettings:
    """Packed for the rows and the device of `first`, whose own check comes later."""
    known = isinstance(first, torch.Tensor) and first.ndim > 0
    device, rows = (first.device, first.shape[0]) if known else (torch.device("cpu"), None)
    return mixture_settings(weights, device=device, rows=rows, op=op, **named)


def _wanted(op: str, names: Sequence[int | str], logprobs: Sequence[int | str] | None) -> int:
    """Bit i: the log-probability of names[i]."""
    if logprobs is None:
        return (1 << len(names)) - 1
    wanted = 0
    for name in logprobs:
        if name not in names:
            raise ValueError(f"{op}: logprobs: expected any of {', '.join(map(str, names))}; got {name!r}")
        wanted |= 1 << list(names).index(name)
    return wanted


def _sample(
    op: str,
    named: dict[str, torch.Tensor],
    settings: MixtureSettings,
    bias: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    counter: tuple[Integer | None, torch.Tensor | None, Integer | None],
    stream: int,
    vocab_size: int | None,
    wanted: int,
    backend: str | None,
) -> PackedSample:
    """Check the rest and sample."""
    named, bias, part = _local(op, named, bias, vocab_size)
    if part is not None:
        vocab_size = None  # the columns beyond are left out already
    sizes: Sizes = {}
    first = next(iter(named.values()))
    for name, value in named.items():
        check_tensor(op, name, value, ("rows", "vocabulary"), FLOATS, sizes, first.device)
    if part is None:
        check_not_empty(op, next(iter(named)), sizes, "vocabulary")
    logits = [_columns(op, model, vocab_size) for model in named.values()]
    sizes["vocabulary"] = logits[0].shape[1]
    if bias is not None:
        shape = ("rows", "vocabulary") if isinstance(bias, torch.Tensor) and bias.ndim == 2 else ("vocabulary",)
        check_tensor(op, "bias", bias, shape, (torch.float32,), sizes, first.device)
        bias = _rows_contiguous(bias)
    packed = _packed(op, settings, sizes["rows"], len(logits), first.device)
    uniforms, seed, row_ids, step = _draw(op, uniforms, counter, sizes, first.device)
    check_integer(op, "stream", stream, 0, 255)
    return sample_packed(
        logits, MixtureSettings(packed, settings.filtered), seed=seed, row_ids=row_ids, step=step, stream=stream,
        uniforms=uniforms, bias=bias, wanted=wanted, backend=backend, part=part,
    )  # fmt: skip


def _local(
    op: str, named: dict[str, Any], bias: Any, vocab_size: int | None
) -> tuple[dict[str, Any], Any, VocabularySlice | None]:
    """Logits and bias as plain tensors, of this process's slice where several share the vocabulary."""
    if not any(map(is_dtensor, named.values())):
        return named, bias, None
    parts = {
        name: slice_of(model, 1) if is_dtensor(model) and model.ndim == 2 else None for name, model in named.items()
    }
    part = next(iter(parts.values()))
    for name, other in parts.items():
        if other is None or not same_slice(other, part):
            raise ValueError(
                f"{op}: {name}: expected, as of every model or of none, a DTensor (rows, vocabulary) whose columns one "
                "mesh dimension named 'tp' shares; got another layout"
            )
    assert part is not None
    stop = (
        part.stop if vocab_size is None else min(part.stop, check_integer(op, "vocab_size", vocab_size, 1, part.total))
    )
    width = max(0, stop - part.first)
    if isinstance(bias, torch.Tensor):
        columns = part.total if vocab_size is None else vocab_size
        if bias.shape[-1:] != (columns,):
            raise ValueError(
                f"{op}: bias: expected {columns} columns, of the whole vocabulary; got {tuple(bias.shape)}"
            )
        bias = bias[..., part.first : part.first + width]
    return {name: model.detach().to_local()[:, :width] for name, model in named.items()}, bias, part


def sample_packed(
    logits: Sequence[torch.Tensor],  # of (R, V), one to four models; elements of a row side by side
    settings: MixtureSettings,  # packed for one row, or for these rows
    *,
    seed: torch.Tensor,  # () or (R,) int64; this and the next two are not read where there are uniforms
    row_ids: torch.Tensor,  # (R,) int64
    step: torch.Tensor,  # () or (R,) int64
    stream: int = 0,
    uniforms: torch.Tensor | None = None,  # (R,) float64 in [0, 1]
    bias: torch.Tensor | None = None,  # (V,) or (R, V) float32
    wanted: int,  # bit m: the log-probability under model m; bit len(logits): under the mixture
    backend: str | None = None,
    part: VocabularySlice | None = None,
) -> PackedSample:
    """Sample with packed settings, from tensors laid out as the operator takes and checks them.

    With `part`, logits (and bias) are this process's slice of a vocabulary that tensor-parallel processes share; all of
    them get the same sample. A filter is refused there.

    For callers that sample step after step, as the rollout engine does; `mixture_sample` and `log_linear_sample` bring
    their arguments into this form.
    """
    if part is not None:
        return _sample_slice(logits, settings, (seed, row_ids, step), stream, uniforms, bias, wanted, backend, part)
    return PackedSample(
        *_operator(
            logits, settings.packed, settings.filtered, bias, uniforms, seed, row_ids, step, stream, wanted,
            backend or "",
        )
    )  # fmt: skip


def _sample_slice(
    logits: Sequence[torch.Tensor],
    settings: MixtureSettings,
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    stream: int,
    uniforms: torch.Tensor | None,
    bias: torch.Tensor | None,
    wanted: int,
    backend: str | None,
    part: VocabularySlice,
) -> PackedSample:
    if settings.filtered:
        raise ValueError(
            f"{OP.name}: top_k, top_p, min_p: expected none over logits that processes share: a threshold needs the "
            "values of the whole vocabulary (gather the logits: `full_tensor()`); got a filter"
        )
    if uniforms is None:
        seed, row_ids, step = counter
        uniforms = row_uniforms(seed, row_ids, step, stream=stream, backend=backend)

    def draw(inside: torch.Tensor) -> torch.Tensor:
        tokens, _, _ = _operator(logits, settings.packed, False, bias, inside, *counter, stream, 0, backend or "")
        return tokens  # type: ignore[no-any-return]

    return PackedSample(*SliceOfDraw(logits, settings.packed, bias, uniforms, wanted, part, draw).run())


def _packed(op: str, settings: MixtureSettings, rows: int, models: int, device: torch.device) -> torch.Tensor:
    if not isinstance(settings, MixtureSettings):
        raise TypeError(f"{op}: settings: expected MixtureSettings; got {type(settings).__name__}")
    packed = check_tensor(op, "settings.packed", settings.packed, ("sets", "columns"), (torch.float32,), {}, device)
    if packed.shape[1] != 4 + models or packed.shape[0] not in (1, rows):
        expected = f"({rows} or 1 rows, 4 + {models} columns)"
        raise ValueError(f"{op}: settings: expected packed for {expected}; got {tuple(packed.shape)}")
    return packed.contiguous()


def _draw(
    op: str,
    uniforms: torch.Tensor | None,
    counter: tuple[Integer | None, torch.Tensor | None, Integer | None],
    sizes: Sizes,
    device: torch.device,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """uniforms, seed, row_ids, step as the operator takes them."""
    seed, row_ids, step = counter
    if uniforms is not None:
        check_tensor(op, "uniforms", uniforms, ("rows",), (torch.float64,), sizes, device)
        unused = torch.empty(0, dtype=torch.int64, device=device)
        return uniforms.contiguous(), unused, unused, unused
    if seed is None or row_ids is None or step is None:
        raise ValueError(f"{op}: seed, row_ids, step: expected all three, or uniforms; got one that is None")
    seed, step = _as_tensor(op, "seed", seed, device), _as_tensor(op, "step", step, device)
    check_is_tensor(op, "row_ids", row_ids)
    check_counter(op, seed, row_ids, step, sizes, device)
    return None, seed.contiguous(), row_ids.contiguous(), step.contiguous()


def _as_tensor(op: str, name: str, value: Integer, device: torch.device) -> torch.Tensor:
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.full((), value, dtype=torch.int64, device=device)
    check_is_tensor(op, name, value)
    return value  # type: ignore[return-value]


def _columns(op: str, model: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
    """The columns that count, as rows of contiguous elements; the rows may lie further apart."""
    model = model.detach() if model.requires_grad else model
    if vocab_size is not None:
        check_integer(op, "vocab_size", vocab_size, 1, model.shape[1])
        model = model[:, :vocab_size]
    return _rows_contiguous(model)


def _rows_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride()[-1] == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()
