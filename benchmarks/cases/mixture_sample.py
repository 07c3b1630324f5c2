"""mixture_sample: one token per row from the mixture of two models, with log-probabilities, against PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..harness.case import Baseline, Case, Function, Inputs, Shape, Unavailable, Variant
from ..harness.check import CheckContext, CheckResult, Tensors

BETA = 0.3
TIES = 1 / 500  # share of rows whose token may differ from float64's by rounding, on top of one row
FILTERS = ("top_k", "top_p", "min_p")
LOGPROB_ERROR = 1e-4  # absolute: float32 sums over a vocabulary, whatever the logits' dtype


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    rows, vocabulary = int(shape.sizes["rows"]), int(shape.sizes["vocabulary"])

    def logits() -> torch.Tensor:
        draw = torch.randn(rows, vocabulary, device=device, generator=generator)
        return (3 * draw).to(shape.torch_dtype)

    counter = {"seed": 11, "step": 5}
    kwargs: dict[str, Any] = {name: torch.tensor(value).to(device) for name, value in counter.items()}
    kwargs["row_ids"] = torch.arange(rows, device=device)
    kwargs |= {name: shape.sizes[name] for name in FILTERS if name in shape.sizes}
    return Inputs((logits(), logits(), BETA), kwargs)


def truth(policy: torch.Tensor, reference: torch.Tensor, beta: float, **kwargs: Any) -> Any:
    """Run the library's oracle in float64; its own tests compare it with transformers and with theory.

    The filters select in float32, as in every backend: float64 would break ties between bfloat16 logits differently.
    """
    from nlhf_kernels.ops.mixture_sample import oracle
    from nlhf_kernels.ops.mixture_sample.layout import MixtureSampleInputs
    from nlhf_kernels.ops.mixture_sample.settings import mixture_settings

    filters = {name: kwargs[name] for name in FILTERS if name in kwargs}
    settings = mixture_settings([1 - beta, beta], device=policy.device, **filters)
    bias = None
    if filters:
        packed = settings.packed
        mixed = oracle.mixed_logits([policy.float(), reference.float()], packed[:, oracle.WEIGHTS :], None)
        bias = torch.where(oracle.support(mixed, packed), 0.0, -torch.inf)
    tokens, logprobs, _ = oracle.mixture_sample(
        MixtureSampleInputs(
            [policy, reference], settings.packed, False, bias, None, kwargs["seed"], kwargs["row_ids"], kwargs["step"],
            stream=0, logprob_mask=0b111, backend="torch",
        )
    )  # fmt: skip
    return tokens, *logprobs


def draw_check(result: Tensors, expected: Tensors, context: CheckContext) -> CheckResult:
    """Compare the tokens, allowing for rare ties within rounding, and the log-probabilities of equal tokens."""
    tokens, *logprobs = result[:4]
    if not logprobs:  # the floor's maxima, or FlashInfer's own draws
        return CheckResult(bool(tokens.isfinite().all()), 0.0, 0.0)
    if logprobs[0].dtype == torch.bool:  # `ok`: tokens alone were asked for
        logprobs = []
    elif logprobs[0].ndim == 2:  # from the layers below the public function: one tensor
        logprobs = list(logprobs[0])
    agree = tokens == expected[0]
    if int((~agree).sum()) > 1 + TIES * len(tokens):
        return CheckResult(False, float("inf"), LOGPROB_ERROR)
    errors = [
        (ours[agree] - true[agree].float()).abs() for ours, true in zip(logprobs, expected[1:], strict=bool(logprobs))
    ]
    error = max((float(error.max()) for error in errors if error.numel()), default=0.0)
    return CheckResult(error <= LOGPROB_ERROR, error, LOGPROB_ERROR)


def own_draw_check(result: Tensors, expected: Tensors, context: CheckContext) -> CheckResult:
    """Check a rival with its own random numbers: the form of its result, and that log-probabilities are valid."""
    tokens, *logprobs = result
    good = tokens.shape == expected[0].shape and bool((tokens >= 0).all())
    return CheckResult(good and all(bool((values <= 0).all()) for values in logprobs), 0.0, 0.0)


def _filtered(scores: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Apply transformers' warpers, in generate()'s order."""
    if any(name in kwargs for name in FILTERS):
        from transformers.generation import logits_process as warpers

        kinds = (warpers.TopKLogitsWarper, warpers.TopPLogitsWarper, warpers.MinPLogitsWarper)
        for name, warper in zip(FILTERS, kinds, strict=True):
            scores = warper(kwargs[name])(None, scores) if name in kwargs else scores
    return scores


def eager(policy: torch.Tensor, reference: torch.Tensor, beta: float, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Sample in plain PyTorch: log-softmax of both models in float32, mix, filter, sample, gather."""
    log_pi = policy.float().log_softmax(-1)
    log_mu = reference.float().log_softmax(-1)
    log_mix = _filtered(torch.lerp(log_pi, log_mu, beta), kwargs).log_softmax(-1)
    tokens = torch.multinomial(log_mix.exp(), 1)
    return tokens.squeeze(-1), *(values.gather(-1, tokens).squeeze(-1) for values in (log_pi, log_mu, log_mix))


def geometric_mixture_wrapper(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, **kwargs: Any
) -> torch.Tensor:
    """Run the operations of TRL's wrapper and transformers' sampling loop for a token; no log-probabilities."""
    mixed = torch.nn.functional.log_softmax(beta * reference + (1 - beta) * policy, dim=-1)
    scores = _filtered(mixed.to(copy=True, dtype=torch.float32), kwargs)
    return torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)


def without_logprobs(function: Function) -> Function:
    """Return the call that samples tokens alone, which is to take no longer than a plain read of the logits."""
    return partial(function, logprobs=())


def parts(inputs: Inputs) -> Mapping[str, Callable[[], Any] | Unavailable]:
    """Return the floor, FlashInfer's sampler, and the layers below the public function."""
    return {"floor: logits read": _floor(inputs), "flashinfer, pre-mixed": _flashinfer(inputs), **_layers(inputs)}


def _layers(inputs: Inputs) -> Mapping[str, Callable[[], Any]]:
    """Return the operator and the engine's entrance, with settings packed beforehand."""
    from nlhf_kernels.ops.mixture_sample.op import sample_packed
    from nlhf_kernels.ops.mixture_sample.settings import mixture_settings

    policy, reference, beta = inputs.args
    kwargs = inputs.kwargs
    filters = {name: kwargs[name] for name in FILTERS if name in kwargs}
    packed = mixture_settings([1 - beta, beta], device=policy.device, **filters)
    logits, counter = [policy, reference], {name: kwargs[name] for name in ("seed", "row_ids", "step")}
    operands = (logits, packed.packed, packed.filtered, None, None, *counter.values(), 0, 0b111, "")
    return {
        "torch.ops, packed settings": lambda: torch.ops.nlhf_kernels.mixture_sample.default(*operands),
        "sample_packed": lambda: sample_packed(logits, packed, **counter, logprob_mask=0b111),
    }


def _floor(inputs: Inputs) -> Callable[[], Any] | Unavailable:
    """Return the lower bound of the sampler's launch: a kernel that only reads and reduces both models' logits."""
    from nlhf_kernels.core.capabilities import machine_reasons
    from nlhf_kernels.ops.mixture_sample.native import mixture_sample_floor

    policy, reference, _ = inputs.args
    if reasons := machine_reasons("cuda", policy.device):
        return Unavailable(tuple(reasons))
    return lambda: mixture_sample_floor(policy, reference)


def _flashinfer(inputs: Inputs) -> Callable[[], Any] | Unavailable:
    """Return FlashInfer's sampler, which takes one model's logits: here mixed beforehand, no log-probabilities."""
    policy, reference, beta = inputs.args
    if importlib.util.find_spec("flashinfer") is None:
        return Unavailable(("flashinfer does not import (pip install flashinfer-python)",))
    if policy.device.type != "cuda":
        return Unavailable((f"the tensors are on {policy.device}, flashinfer needs a GPU",))
    from flashinfer import sampling

    mixed = torch.lerp(policy.float(), reference.float(), beta)
    if "top_k" in inputs.kwargs or "top_p" in inputs.kwargs:
        limits = inputs.kwargs.get("top_k", mixed.shape[1]), inputs.kwargs.get("top_p", 1.0)
        return lambda: sampling.top_k_top_p_sampling_from_logits(mixed, *limits)
    return lambda: sampling.sampling_from_logits(mixed)


def bytes_moved(shape: Shape, mode: str) -> float:
    """Count one read of both models' logits."""
    return 2.0 * shape.torch_dtype.itemsize * int(shape.sizes["rows"]) * int(shape.sizes["vocabulary"])


def flops(shape: Shape, mode: str) -> float:
    return 0.0  # no matrix product: exponentials and additions


def _shape(rows: int, vocabulary: int, dtype: str, device: str, **filters: float) -> Shape:
    return Shape({"rows": rows, "vocabulary": vocabulary, **filters}, dtype, devices=(device,))


CASE = Case(
    name="mixture_sample",
    op="mixture_sample",
    shapes={
        "tiny": [
            Shape({"rows": 3, "vocabulary": 999}, "bfloat16"),
            Shape({"rows": 3, "vocabulary": 999, "top_k": 20, "top_p": 0.9}, "float32"),
        ],
        "standard": [
            Shape({"rows": 1, "vocabulary": 1024}, "bfloat16", ("overhead",)),  # kernels shorter than the host's part
            _shape(32, 131_072, "float32", "cpu"),
            _shape(32, 131_072, "bfloat16", "cpu"),
            _shape(32, 131_072, "float32", "cpu", top_k=50, top_p=0.9),
            *(_shape(rows, 128_256, "bfloat16", "cuda") for rows in (1, 16, 64)),
            _shape(64, 151_936, "float32", "cuda"),
            _shape(256, 151_936, "bfloat16", "cuda"),
            _shape(24, 49_152, "bfloat16", "cuda"),
            _shape(24, 49_155, "bfloat16", "cuda"),  # rows that are not 16-byte aligned
            _shape(64, 128_256, "bfloat16", "cuda", top_k=50, top_p=0.9),
            _shape(64, 128_256, "bfloat16", "cuda", min_p=0.1),
        ],
    },
    make=make,
    truth=truth,
    baselines={
        "eager": Baseline(eager, check=own_draw_check),
        "TRL's ops, no logps": Baseline(geometric_mixture_wrapper, check=own_draw_check),
    },
    compiled=lambda: torch.compile(eager),
    bytes_moved=bytes_moved,
    flops=flops,
    check=draw_check,
    parts=parts,
    variants={"no log-probabilities": Variant(without_logprobs, ("forward",))},
)
