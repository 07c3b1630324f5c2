"""logprobs in Triton: forward reads each row once, with one program; backward is elementwise over chunks of rows.

Equation numbers are those of README.md. Forward distributes a row over lanes. Each lane keeps its own maximum and the
sums relative to it; lanes are reduced once, after the last tile, so that no tile synchronises threads. A tile is
(DEPTH, LANES) elements, a lane's DEPTH in one thread: sums are rescaled to a new maximum once in DEPTH elements.
Maxima start at the lowest finite number: -inf minus that is -inf, where -inf minus -inf would be NaN. Multiply-add
fusion is off: a score must round alike as a term of the sums, as the target's score and in backward. `tl.fma` is used
where rounding may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.native import on_device
from .layout import (
    ELSEWHERE,
    IGNORED,
    Extra,
    LogprobsBackwardInputs,
    LogprobsInputs,
    Normalizer,
    Output,
    Settings,
    Transform,
    empty_outputs,
)

LOG2_E = 1.4426950408889634
_IGNORED, _ELSEWHERE = tl.constexpr(IGNORED), tl.constexpr(ELSEWHERE)
_OUTPUTS, _NORMALIZERS = tl.constexpr(len(Output)), tl.constexpr(len(Normalizer))
_LOWEST = tl.constexpr(-3.4028234663852886e38)
#: Lower bound of (old maximum - new maximum): its product with a lane's sum is finite, its exponential is still 0.
_FAR = tl.constexpr(-1e35)
_LN_2 = tl.constexpr(0.6931471805599453)

_TILE = 4096  # of forward; 16 elements per thread and model: few registers, hence enough warps to hide memory latency
_CHUNK = 8192  # of backward, 32 elements per thread; half of it where an element takes more work
_ELEMENTS_PER_WARP = 512  # up to 8 warps
#: Register limits without spills; 80, three blocks per multiprocessor, where an element takes little work. Without a
#: limit ptxas saves registers by issuing each load just before its use, which serialises the loads' latencies.
_MAX_REGISTERS, _MAX_REGISTERS_LIGHT = 168, 80


class Plan(NamedTuple):
    elements: int  # per program and iteration, a power of two
    warps: int


def _candidates(default: Plan) -> Iterator[Plan]:
    for elements in (2048, 4096, 8192, 16384):
        for warps in (4, 8, 16):
            if elements // warps >= 128:  # 4 elements a thread: a load of 16 bytes of float32
                yield Plan(elements, warps)


_TUNABLE = tuning.Tunable("logprobs", "triton", Plan, _candidates)


def _plan(policy: torch.Tensor, reference: torch.Tensor, default: int, settings: Settings, variant: str) -> Plan:
    """Choose a program's elements and warps, independently of the number of rows."""
    vocabulary = policy.shape[1]
    elements = min(default, max(64, triton.next_power_of_2(vocabulary)))
    workload = tuning.make_workload(0, (vocabulary,), (policy, reference), f"{variant} {settings.extras}")
    default_plan = Plan(elements, min(8, max(1, elements // _ELEMENTS_PER_WARP)))
    return _TUNABLE.plan(policy.device, workload, default_plan)


@triton.jit
def _load(logits, column, inside):
    """Load logits, -inf outside. Each is read once and need not stay in the cache."""
    return tl.load(logits + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")


@triton.jit
def _transformed(x, scale, softcap, FORM: tl.constexpr):
    """Apply equation 1 in float32. FORM as in `_form`."""
    x = x.to(tl.float32)
    if FORM & 1:
        x = x * scale
    if FORM & 2:
        t = tl.exp2(tl.abs(x) * (-2.8853900817779268 / softcap))  # exp(-2 |x| / softcap)
        t = (softcap - softcap * t) / (1 + t)
        x = tl.where(x < 0, -t, t)
    return x


@triton.jit
def _scores(x, inside, scale, softcap, FORM: tl.constexpr):
    """Transform the logits of `_load`; keep -inf beyond the vocabulary."""
    x = _transformed(x, scale, softcap, FORM)
    if FORM:
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def _weighted(x, weight):
    return tl.where(weight == 0, 0.0, weight * x)  # 0 * -inf is NaN


@triton.jit
def _mixed(u, v, b):
    return _weighted(u, 1 - b) + _weighted(v, b)


@triton.jit
def _exp(difference, to_log2):
    """Return exp(difference / temperature). The difference of two scores is exact under a large common offset."""
    return tl.exp2(difference * to_log2)


@triton.jit
def _raised(top, new_top, to_log2):
    """Return top - new_top (<= 0), and the factor that rescales sums from the old maximum to the new."""
    rise = tl.maximum(top - new_top, _FAR)
    return rise, _exp(rise, to_log2)


@triton.jit
def _moved(moment, total, rise, factor):
    """Rescale sum e (x - top) to the new maximum; `total` is sum e. With factor 0 an infinite moment gives 0."""
    return tl.where(factor == 0, 0.0, factor * tl.fma(total, rise, moment))


@triton.jit
def _accumulated(x, top, total, to_log2):
    """Add a tile x (DEPTH, LANES). Return each lane's maximum, sum, rise and factor; x - maximum; its exp."""
    new_top = tl.maximum(top, tl.max(x, axis=0))
    rise, factor = _raised(top, new_top, to_log2)
    difference = x - new_top[None, :]
    e = _exp(difference, to_log2)
    return new_top, tl.fma(total, factor, tl.sum(e, axis=0)), rise, factor, difference, e


@triton.jit
def _reduced(top, total, to_log2):
    """Reduce over lanes. Return the row's maximum and sum, and each lane's rise and factor."""
    new_top = tl.max(top, axis=0)
    rise, factor = _raised(top, new_top, to_log2)
    return new_top, tl.sum(total * factor, axis=0), rise, factor


@triton.jit(do_not_specialize=["rows"])
def logprobs_kernel(
    policy, reference,  # (rows, vocabulary)
    targets,  # (rows,)
    beta,  # () or (rows,)
    values,  # (5, rows)
    normalizers,  # (6, rows)
    rows, vocabulary, policy_stride, reference_stride, beta_stride,
    temperature, to_log2, policy_scale, policy_softcap, reference_scale, reference_softcap,
    HAS_REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, MIXTURE: tl.constexpr,
    POLICY_FORM: tl.constexpr, REFERENCE_FORM: tl.constexpr,
    ALIGNED: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    values += row
    normalizers += row
    if target == _IGNORED:
        for i in tl.static_range(_OUTPUTS):
            tl.store(values + i * rows, 0.0)
        for i in tl.static_range(_NORMALIZERS):
            tl.store(normalizers + i * rows, 0.0)
        return
    policy += row * policy_stride
    reference += row * reference_stride
    if MIXTURE:
        b = tl.load(beta + row * beta_stride)

    depth, lane = tl.arange(0, DEPTH)[:, None], tl.arange(0, LANES)[None, :]
    # Aligned, a lane's elements are one load of 16 bytes; unaligned, loads of one element coalesce over lanes.
    column = lane * DEPTH + depth if ALIGNED else depth * LANES + lane
    u_top = tl.full((LANES,), _LOWEST, tl.float32)
    v_top, y_top = u_top, u_top
    u_sum = tl.zeros((LANES,), tl.float32)
    v_sum, y_sum = u_sum, u_sum
    u_moment, ratio = u_sum, u_sum  # sum e (u - top), sum e ((u - top) - (v - top)) with e = exp(u - top)
    for start in range(0, vocabulary, DEPTH * LANES):
        inside = column < vocabulary - start
        u = _load(policy + start, column, inside)  # both models' loads precede the first use: their latencies overlap
        if HAS_REFERENCE:
            v = _load(reference + start, column, inside)
        u = _scores(u, inside, policy_scale, policy_softcap, POLICY_FORM)
        u_before = u_sum
        u_top, u_sum, u_rise, u_factor, u_down, e = _accumulated(u, u_top, u_sum, to_log2)
        if ENTROPY:
            parts = e * tl.maximum(u_down, _LOWEST)  # 0 where u is -inf
            u_moment = _moved(u_moment, u_before, u_rise, u_factor) + tl.sum(parts, axis=0)
        if HAS_REFERENCE:
            v = _scores(v, inside, reference_scale, reference_softcap, REFERENCE_FORM)
            v_top, v_sum, v_rise, _, v_down, _ = _accumulated(v, v_top, v_sum, to_log2)
        if KL:
            parts = tl.where(e == 0, 0.0, e * (u_down - v_down))
            ratio = _moved(ratio, u_before, u_rise - v_rise, u_factor) + tl.sum(parts, axis=0)
        if MIXTURE:
            y = tl.where(inside, _mixed(u, v, b), float("-inf"))
            y_top, y_sum, _, _, _, _ = _accumulated(y, y_top, y_sum, to_log2)

    scored = (target >= 0) & (target < vocabulary)
    blank = tl.where(scored, 0.0, float("nan"))
    of_reference, entropy, kl, of_mixture = blank, blank, blank, blank
    v_max, v_log, y_max, y_log = 0.0, 0.0, 0.0, 0.0
    u_max, u_total, u_rise, u_factor = _reduced(u_top, u_sum, to_log2)
    u_log = tl.log(u_total)
    u = tl.load(policy + target, mask=scored, other=float("nan"))
    u = _transformed(u, policy_scale, policy_softcap, POLICY_FORM)
    if ENTROPY:
        mean = tl.sum(_moved(u_moment, u_sum, u_rise, u_factor), axis=0) / u_total
        entropy = u_log - mean / temperature + blank
    if HAS_REFERENCE:
        v_max, v_total, v_rise, _ = _reduced(v_top, v_sum, to_log2)
        v_log = tl.log(v_total)
        v = tl.load(reference + target, mask=scored, other=float("nan"))
        v = _transformed(v, reference_scale, reference_softcap, REFERENCE_FORM)
        of_reference = (v - v_max) / temperature - v_log
    if KL:
        mean = tl.sum(_moved(ratio, u_sum, u_rise - v_rise, u_factor), axis=0) / u_total
        kl = mean / temperature - (u_log - v_log) + blank
        kl = tl.where(kl < 0, 0.0, kl)
    if MIXTURE:
        y_max, y_total, _, _ = _reduced(y_top, y_sum, to_log2)
        y_log = tl.log(y_total)
        of_mixture = (_mixed(u, v, b) - y_max) / temperature - y_log
    tl.store(values, (u - u_max) / temperature - u_log)
    tl.store(values + rows, of_reference)
    tl.store(values + 2 * rows, entropy)
    tl.store(values + 3 * rows, kl)
    tl.store(values + 4 * rows, of_mixture)
    tl.store(normalizers, u_max)
    tl.store(normalizers + rows, u_log)
    tl.store(normalizers + 2 * rows, v_max)
    tl.store(normalizers + 3 * rows, v_log)
    tl.store(normalizers + 4 * rows, y_max)
    tl.store(normalizers + 5 * rows, y_log)


@triton.jit
def _log2_probability(scores, normalizers, rows, to_log2):
    """Return log2 of softmax(scores / temperature), from the maximum and the logarithm of the sum."""
    log_sum = tl.load(normalizers + rows) * 1.4426950408889634
    return tl.fma(scores - tl.load(normalizers), to_log2, -log_sum)


@triton.jit
def _scaled(factor, p, of):
    """Return factor * p * of; 0 where factor * p is 0."""
    share = factor * p
    return tl.where(share == 0, 0.0, share * of)


@triton.jit(do_not_specialize=["rows"])
def logprobs_backward_kernel(
    policy, reference,  # (rows, vocabulary)
    targets,  # (rows,)
    beta,  # () or (rows,)
    values,  # (5, rows)
    normalizers,  # (6, rows)
    upstream,  # (5, rows)
    out,  # (rows, vocabulary); may be `policy`: an element is read before it is written, by the same program
    rows, vocabulary, policy_stride, reference_stride, out_stride, beta_stride, chunks,
    temperature, to_log2, policy_scale, policy_softcap, reference_scale, reference_softcap,
    ENTROPY: tl.constexpr, KL: tl.constexpr, MIXTURE: tl.constexpr,
    POLICY_FORM: tl.constexpr, REFERENCE_FORM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    start = program % chunks * CHUNK
    target = tl.load(targets + row)
    values += row
    normalizers += row
    upstream += row
    out += row * out_stride + start
    lane = tl.arange(0, CHUNK)
    inside = lane < vocabulary - start
    if target == _IGNORED:
        tl.store(out + lane, tl.zeros((CHUNK,), out.dtype.element_ty), mask=inside, eviction_policy="evict_first")
        return
    u = _load(policy + row * policy_stride + start, lane, inside)
    if KL or MIXTURE:
        v = _load(reference + row * reference_stride + start, lane, inside)
        v = _transformed(v, reference_scale, reference_softcap, REFERENCE_FORM)
    u = _transformed(u, policy_scale, policy_softcap, POLICY_FORM)
    unit = 1 / temperature  # factors common to a row's gradient are applied to its upstream values
    if POLICY_FORM & 1:
        unit *= policy_scale
    scored = (target >= 0) & (target < vocabulary) | (target == _ELSEWHERE)

    log_p = _log2_probability(u, normalizers, rows, to_log2)
    p = tl.exp2(log_p)
    at_policy = tl.where(scored, tl.load(upstream) * unit, float("nan"))
    at_target = at_policy
    gradient = -at_policy * p  # equation 5, but for the target
    if ENTROPY:
        at_entropy = tl.load(upstream + 2 * rows) * unit
        entropy = tl.load(values + 2 * rows)
        gradient -= _scaled(at_entropy, p, tl.fma(log_p, _LN_2, entropy))  # equation 6
    if KL:
        at_kl = tl.load(upstream + 3 * rows) * unit
        kl = tl.load(values + 3 * rows)
        log_ratio = log_p - _log2_probability(v, normalizers + 2 * rows, rows, to_log2)
        gradient += _scaled(at_kl, p, tl.fma(log_ratio, _LN_2, -kl))  # equation 7
    if MIXTURE:
        b = tl.load(beta + row * beta_stride)
        at_mixture = tl.load(upstream + 4 * rows) * unit
        m = tl.exp2(_log2_probability(_mixed(u, v, b), normalizers + 4 * rows, rows, to_log2))
        gradient -= tl.where(at_mixture == 0, 0.0, (1 - b) * at_mixture * m)  # equation 8, but for the target
        at_target += (1 - b) * at_mixture
    gradient += tl.where(lane == (target - start).to(tl.int32), at_target, 0.0)
    if POLICY_FORM & 2:
        saturation = u * (1 / policy_softcap)
        gradient *= 1 - saturation * saturation
    tl.store(out + lane, gradient.to(out.dtype.element_ty), mask=inside, eviction_policy="evict_first")


def _form(transform: Transform) -> int:
    """Return which steps of equation 1 are needed, as flags: 1 the scale, 2 the softcap."""
    return (transform.scale != 1) * 1 | (transform.softcap != 0) * 2


def _numbers(settings: Settings) -> tuple[float, ...]:
    """Return the kernels' arguments from temperature to reference_softcap."""
    to_log2 = min(LOG2_E / settings.temperature, 3e38)  # finite in float32: infinity times 0 is NaN
    return settings.temperature, to_log2, *settings.policy, *settings.reference


def _light(settings: Settings) -> bool:
    """Return whether an element takes little work: no mixture, no transform."""
    return not (settings.computes(Extra.MIXTURE) or _form(settings.policy) or _form(settings.reference))


def _flags(settings: Settings, has_reference: bool, warps: int) -> dict[str, object]:
    """Return the constexpr arguments and options that both kernels share."""
    return {
        "ENTROPY": settings.computes(Extra.ENTROPY),
        "KL": has_reference and settings.computes(Extra.KL),
        "MIXTURE": has_reference and settings.computes(Extra.MIXTURE),
        "POLICY_FORM": _form(settings.policy),
        "REFERENCE_FORM": _form(settings.reference),
        "enable_fp_fusion": False,
        "maxnreg": _MAX_REGISTERS_LIGHT if _light(settings) else _MAX_REGISTERS,
        "num_warps": warps,
    }


def logprobs(inputs: LogprobsInputs) -> tuple[torch.Tensor, torch.Tensor]:  # values (5, N), normalizers (6, N)
    policy, reference, targets, beta, settings, _ = inputs
    values, normalizers = empty_outputs(inputs)
    rows, vocabulary = policy.shape
    if not rows:
        return values, normalizers
    other = policy if reference is None else reference  # a placeholder that is not read
    models = (policy, other)
    depth = 16 // min(model.element_size() for model in models)
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 for x in models) and vocabulary % 16 == 0
    plan = _plan(policy, other, _TILE, settings, "forward")
    with on_device(policy.device):
        logprobs_kernel[(rows,)](
            policy, other, targets, values if beta is None else beta, values, normalizers,
            rows, vocabulary, policy.stride(0), other.stride(0), 0 if beta is None else beta.ndim,
            *_numbers(settings),
            **_flags(settings, reference is not None, plan.warps), HAS_REFERENCE=reference is not None,
            ALIGNED=aligned, DEPTH=depth, LANES=plan.elements // depth,
        )  # fmt: skip
    return values, normalizers


def logprobs_backward(inputs: LogprobsBackwardInputs, out: torch.Tensor) -> None:
    """Write the gradient (N, V) to `out`, which may be the policy's logits themselves."""
    values, normalizers, upstream, forward = inputs
    policy, reference, targets, beta, settings, _ = forward
    rows, vocabulary = policy.shape
    if not rows:
        return
    other = policy if reference is None else reference
    widest = _CHUNK // 2 if settings.extras or not _light(settings) else _CHUNK
    plan = _plan(policy, other, widest, settings, "backward")
    chunk = plan.elements
    chunks = triton.cdiv(vocabulary, chunk)
    strides = (policy.stride(0), other.stride(0), out.stride(0), 0 if beta is None else beta.ndim)
    with on_device(policy.device):
        logprobs_backward_kernel[(rows * chunks,)](
            policy, other, targets, values if beta is None else beta, values, normalizers, upstream, out,
            rows, vocabulary, *strides, chunks, *_numbers(settings),
            **_flags(settings, reference is not None, plan.warps), CHUNK=chunk,
        )  # fmt: skip
