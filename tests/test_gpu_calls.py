"""Known calls on a GPU: launches by address do what Triton's own way does, and are taken where they are meant to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.core import upstream
from nlhf_kernels.core.calls import native_calls_missing
from nlhf_kernels.core.triton_launch import TritonCall
from nlhf_kernels.engine.layers import oracle
from tests.support.gpu import nothing_waits

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture
def own_way(monkeypatch) -> list[TritonCall]:
    """The calls that went Triton's own way."""
    made: list[TritonCall] = []
    launch = TritonCall._launch_by_triton

    def recorded(call: TritonCall, *given: Any) -> None:
        made.append(call)
        launch(call, *given)

    monkeypatch.setattr(TritonCall, "_launch_by_triton", recorded)
    return made


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)


def attention(seed: int, width: int = 64) -> Callable[[], Any]:
    query, keys, values = normal(5, 14, width, seed=seed), *normal(2, 5, 2, 700, width, seed=seed + 1)
    ends = torch.arange(1, 6, device="cuda") * 100
    return lambda: nlhf_kernels.decode_attention(query, keys, values, ends=ends, backend="triton")


def product(seed: int) -> Callable[[], Any]:
    x, weight, bias = normal(5, 896, seed=seed), normal(1152, 896, seed=seed + 1), normal(1152, seed=seed + 2)
    return lambda: nlhf_kernels.decode_linear(x, weight, bias, backend="triton")


def sample(seed: int, backend: str = "triton", **options: Any) -> Callable[[], Any]:
    logits, counter = normal(2, 7, 32_001, seed=seed), torch.arange(7, device="cuda")
    step = torch.tensor(seed, device="cuda")
    settings = nlhf_kernels.mixture_settings([0.7, 0.3], device=step.device, **options)
    return lambda: nlhf_kernels.mixture_sample(
        *logits, settings=settings, seed=step, row_ids=counter, step=step, backend=backend
    )


FUNCTIONS = {
    "decode_attention": attention,
    "decode_linear": product,
    "mixture_sample": sample,
    "mixture_sample with filters": lambda seed: sample(seed, top_k=50, top_p=0.9),
    "mixture_sample, cuda": lambda seed: sample(seed, "cuda"),
}


def tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [part for part in result if part is not None]


def test_the_table_is_in_cpp() -> None:
    assert native_calls_missing() == "" or upstream.tensor_exchange() is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_calls_give_the_bits_of_the_first(name, own_way) -> None:
    """With other tensors of the same signature too, on another stream, and without a wait for the device."""
    calls = [FUNCTIONS[name](seed) for seed in (0, 1)]
    expected = [[part.clone() for part in tensors(call())] for call in calls]
    first = len(own_way)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        calls[0]()  # the CUDA sampler makes counters for a new stream, and waits for them
        with nothing_waits():
            results = [tensors(call()) for call in calls * 2]
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        assert all(torch.equal(ours, first) for ours, first in zip(result, expected[index % 2], strict=True))
    by_address = upstream._triton_version() in upstream.TRITON_LAUNCHED_BY_ADDRESS
    assert not by_address or len(own_way) == first


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_calls_are_captured(name) -> None:
    call = FUNCTIONS[name](2)
    expected = [part.clone() for part in tensors(call())]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = tensors(call())
    for part in result:
        part.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, first) for ours, first in zip(result, expected, strict=True))


def layer_calls(seed: int) -> dict[str, tuple[Any, ...]]:
    x, wide = normal(5, 1, 896, seed=seed), normal(5, 1, 2 * 4864, seed=seed + 1)
    heads = normal(5, 1, 18, 64, seed=seed + 2).transpose(1, 2)
    query, key, value = heads.split((14, 2, 2), 1)
    cos, sin = normal(2, 5, 1, 64, seed=seed + 3)
    weight = torch.nn.Parameter(normal(896, seed=seed + 4), requires_grad=False)
    keys, values = torch.zeros(2, 5, 2, 40, 64, dtype=BF16, device="cuda")
    cursor = torch.tensor([7 + seed], device="cuda")
    return {
        "rms_norm": (x, weight, 1e-6),
        "silu_product": tuple(wide.chunk(2, -1)),
        "rotate": (query, key, cos, sin),
        "store_slot": (keys, values, key, value, cursor),
    }


@pytest.mark.parametrize("name", ["rms_norm", "silu_product", "rotate", "store_slot"])
def test_layers_of_known_signatures_equal_their_oracle(name, own_way) -> None:
    pytest.importorskip("triton")
    from nlhf_kernels.engine.layers import triton_kernels

    for seed in range(3):
        arguments = layer_calls(seed)[name]
        ours = getattr(triton_kernels, name)(*arguments)
        if name == "store_slot":
            copies = [torch.zeros_like(cache) for cache in arguments[:2]]
            oracle.store_slot(*copies, *arguments[2:])
            ours, expected = arguments[:2], copies
        else:
            expected = getattr(oracle, name)(*arguments)
        for part, truth in zip(tensors(ours), tensors(expected), strict=True):
            torch.testing.assert_close(part, truth, rtol=1e-2, atol=1e-2)
    by_address = upstream._triton_version() in upstream.TRITON_LAUNCHED_BY_ADDRESS
    assert not by_address or len(own_way) <= 1


def test_addresses_that_are_not_aligned_take_kernels_of_their_own() -> None:
    x, weight = normal(3, 897), normal(896, seed=1)
    from nlhf_kernels.engine.layers import triton_kernels

    for rows in (x[:, :896], x[:, 1:], x[:, :896], x[:, 1:]):
        rows = rows[:1]
        torch.testing.assert_close(
            triton_kernels.rms_norm(rows, weight, 1e-6), oracle.rms_norm(rows, weight, 1e-6), rtol=1e-2, atol=1e-2
        )


def test_hooks_of_triton_see_known_calls() -> None:
    triton = pytest.importorskip("triton")
    if upstream._triton_version() not in upstream.TRITON_LAUNCHED_BY_ADDRESS:
        pytest.skip("this triton launches its own way only")
    call, seen = attention(3), []
    call()
    enter = triton.knobs.runtime.launch_enter_hook
    hook = lambda metadata: seen.append(metadata)  # noqa: E731
    enter.add(hook)
    try:
        call()
    finally:
        enter.remove(hook)
    count = len(seen)
    call()
    assert count >= 1 and len(seen) == count


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gpu_that_is_not_current(name) -> None:
    with torch.cuda.device(1):
        call = FUNCTIONS[name](4)
        expected = [part.clone() for part in tensors(call())]
    for _ in range(2):
        assert all(torch.equal(ours, first) for ours, first in zip(tensors(call()), expected, strict=True))
