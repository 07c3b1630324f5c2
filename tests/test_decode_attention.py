"""decode_attention: every backend against float64, and independence of a row's result from its batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.ops.decode_attention import oracle
from nlhf_kernels.ops.decode_attention.op import DecodeAttentionInputs
from tests.support.backends import DEVICE, SIMD_LEVELS, call, device_of, every_backend, every_rival
from tests.support.poison import poisoned_allocations, surrounded
from tests.support.tolerances import assert_accurate

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]


def inputs(rows, heads, kv_heads, positions, dim, dtype=F32, value_dim=None, seed=0, device=DEVICE):
    """Return query, keys, values, and ranges; one range ends at the cache's end, one starts at its beginning."""
    generator = torch.Generator().manual_seed(seed + positions + dim)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(device)  # noqa: E731
    tensors = (
        draw(rows, heads, dim),
        draw(rows, kv_heads, positions, dim),
        draw(rows, kv_heads, positions, value_dim or dim),
    )
    ends = torch.randint(1, positions + 1, (rows,), generator=generator)
    ends[0] = positions
    starts = (torch.rand(rows, generator=generator) * ends).long()
    starts[-1] = 0
    return tensors, {"starts": starts.to(device), "ends": ends.to(device)}


def in_float64(tensors, ranges, scale=None, window=None, softcap=None, sinks=None):
    """Run the oracle in float64; `test_the_oracle_is_attention` compares it with PyTorch's attention."""
    query, keys, values = (tensor.double() for tensor in tensors)
    sinks = None if sinks is None else sinks.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    starts, ends = ranges["starts"], ranges["ends"]
    return oracle.decode_attention(
        DecodeAttentionInputs(query, keys, values, starts, ends, scale, window or 2**62, softcap or 0.0, sinks, "torch")
    )


def assert_right(backend, tensors, ranges, constant=1.0, **options):
    result = call("decode_attention", backend, *tensors, **ranges, **options)
    pytorch = nlhf_kernels.decode_attention(*tensors, **ranges, **options, backend="torch")
    assert_accurate(result, in_float64(tensors, ranges, **options), pytorch, constant=constant)
    return result


def _example(device, dtype, heads, kv_heads, positions, dim, with_sinks=False, **options):
    tensors, ranges = inputs(2, heads, kv_heads, positions, dim, dtype, device=device)
    if with_sinks:
        options["sinks"] = torch.ones(heads, dtype=dtype, device=device)
    return tensors, {**ranges, **options}


EXAMPLES = [
    partial(_example, dtype=F32, heads=4, kv_heads=2, positions=20, dim=64),
    partial(_example, dtype=BF16, heads=14, kv_heads=2, positions=600, dim=64),
    partial(_example, dtype=BF16, heads=4, kv_heads=4, positions=40, dim=128, softcap=20.0, with_sinks=True),
    partial(_example, dtype=F16, heads=8, kv_heads=1, positions=40, dim=128, softcap=20.0),
    partial(_example, dtype=BF16, heads=2, kv_heads=1, positions=600, dim=256, window=520, with_sinks=True),
    partial(_example, dtype=F32, heads=8, kv_heads=1, positions=600, dim=256),
    partial(_example, dtype=F32, heads=16, kv_heads=1, positions=40, dim=128, softcap=20.0),
    partial(_example, dtype=F32, heads=1, kv_heads=1, positions=40, dim=80),
    partial(_example, dtype=F32, heads=4, kv_heads=2, positions=40, dim=1),  # Triton specializes strides of 1
    partial(_example, dtype=BF16, heads=4, kv_heads=2, positions=40, dim=1),
    partial(_example, dtype=BF16, heads=1, kv_heads=1, positions=1, dim=1, window=1, with_sinks=True),
]

SHAPES = [  # rows, heads, kv_heads, positions
    (1, 1, 1, 1),
    (1, 8, 8, 17),
    (3, 8, 2, 130),
    (2, 7, 1, 64),
    (2, 16, 2, 33),
    (1, 40, 2, 50),  # groups of query heads larger than one program handles
]


@pytest.mark.parametrize("heads", [6, 2])
def test_the_oracle_is_attention(heads) -> None:
    """The oracle equals PyTorch's scaled_dot_product_attention in float64 with the equivalent mask."""
    tensors, ranges = inputs(4, heads, 2, 30, 16)
    query, keys, values = (tensor.double() for tensor in tensors)
    slot = torch.arange(30, device=DEVICE)
    live = (slot >= ranges["starts"][:, None]) & (slot < ranges["ends"][:, None])
    near = slot >= ranges["ends"][:, None] - 5
    for window, mask in ((None, live), (5, live & near)):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2), keys, values, attn_mask=mask[:, None, None], enable_gqa=True
        )
        torch.testing.assert_close(in_float64(tensors, ranges, window=window), expected.squeeze(2))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_match_float64(backend, dtype, shape) -> None:
    tensors, ranges = inputs(*shape, 64, dtype, device=device_of(backend))
    tensors = tuple(surrounded(tensor) for tensor in tensors)
    with poisoned_allocations() as handed_out:
        assert_right(backend, tensors, ranges)
    assert handed_out or backend == "torch"


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (20, 7), (32, 32), (80, 80), (96, 96), (128, 64), (256, 256)])
def test_head_sizes(backend, dtype, dim, value_dim) -> None:
    tensors, ranges = inputs(2, 4, 2, 40, dim, dtype, value_dim, device=device_of(backend))
    assert_right(backend, tensors, ranges)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_caches(backend, dtype) -> None:
    """Results are right with many splits: of the whole cache, of a part, of fewer slots than splits."""
    tensors, ranges = inputs(3, 4, 1, 4097, 32, dtype, device=device_of(backend))
    ranges["starts"][1], ranges["ends"][1] = 700, 1500
    ranges["starts"][2], ranges["ends"][2] = 4090, 4095
    with poisoned_allocations():
        assert_right(backend, tensors, ranges)
        assert_right(backend, tensors, ranges, window=1000, sinks=torch.randn(4, device=device_of(backend)))


@pytest.mark.parametrize("simd_level", SIMD_LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [1, 3, 16, 65, 200])
@pytest.mark.parametrize("dim", [8, 33, 80])
def test_simd_levels_match_float64(simd_level, dtype, positions, dim) -> None:
    tensors, ranges = inputs(3, 10, 2, positions, dim, dtype, device=torch.device("cpu"))
    tensors = tuple(surrounded(tensor) for tensor in tensors)
    assert_right("cpu", tensors, ranges)
    assert_right("cpu", tensors, ranges, softcap=2.0, sinks=torch.randn(10))


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 9}, {"window": 10**6}, {"softcap": 0.5}, {"softcap": 50.0}, {"scale": 3.0},
     {"scale": 0.0}, {"scale": -0.2}, {"window": 20, "softcap": 5.0, "scale": 0.3}],
    ids=str,
)  # fmt: skip
def test_options(backend, dtype, options) -> None:
    tensors, ranges = inputs(3, 8, 2, 70, 64, dtype, device=device_of(backend))
    assert_right(backend, tensors, ranges, **options)
    sinks = torch.randn(8, device=device_of(backend)).to(dtype) * 3
    assert_right(backend, tensors, ranges, **options, sinks=sinks)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [90, 600])
def test_nothing_outside_the_range_is_looked_at(backend, dtype, positions) -> None:
    device = device_of(backend)
    tensors, ranges = inputs(4, 8, 2, positions, 32, dtype, device=device)
    clean = call("decode_attention", backend, *tensors, **ranges, window=50)
    slot = torch.arange(positions, device=device)
    first = torch.maximum(ranges["starts"], ranges["ends"] - 50)
    dead = (slot < first[:, None]) | (slot >= ranges["ends"][:, None])
    for poison in (torch.nan, torch.inf, -torch.inf):
        broken = [cache.masked_fill(dead[:, None, :, None], poison) for cache in tensors[1:]]
        assert torch.equal(call("decode_attention", backend, tensors[0], *broken, **ranges, window=50), clean)


@every_backend
@pytest.mark.parametrize("positions", [40, 600])
def test_an_empty_range_gives_zeros(backend, positions) -> None:
    device = device_of(backend)
    tensors, _ = inputs(5, 4, 2, positions, 32, device=device)
    column = lambda *values: torch.tensor(values, device=device)  # noqa: E731
    ranges = {"starts": column(0, 7, 9, -3, 20), "ends": column(0, 7, 4, -1, 30)}
    with poisoned_allocations():
        for sinks in (None, torch.zeros(4, device=device)):
            result = call("decode_attention", backend, *tensors, **ranges, sinks=sinks)
            assert (result[:4] == 0).all()
            assert (result[4] != 0).all()


@every_backend
def test_a_range_may_reach_before_the_cache_and_start_below_zero(backend) -> None:
    device = device_of(backend)
    tensors, ranges = inputs(3, 4, 2, 40, 32, device=device)
    whole = {"ends": torch.full_like(ranges["ends"], 40)}
    expected = call("decode_attention", backend, *tensors, **whole)
    negative = torch.full_like(ranges["ends"], -(2**40))
    assert torch.equal(call("decode_attention", backend, *tensors, **whole, starts=negative), expected)


@every_backend
def test_a_cache_that_rolled_holds_the_last_positions(backend) -> None:
    """In a cache of 30 slots, slot 0 is position max(ends - 30, 0) of its row."""
    device = device_of(backend)
    (query, keys, values), _ = inputs(3, 4, 2, 100, 32, device=device)
    starts, ends = torch.tensor([5, 80, 0], device=device), torch.tensor([70, 100, 20], device=device)
    expected = call("decode_attention", backend, query, keys, values, starts=starts, ends=ends, window=30)
    shift = (ends - 30).clamp(min=0)
    slots = (torch.arange(30, device=device) + shift[:, None])[:, None, :, None].expand(3, 2, 30, 32)
    rolled = [cache.gather(2, slots) for cache in (keys, values)]
    for window in (None, 30):
        result = call("decode_attention", backend, query, *rolled, starts=starts, ends=ends, window=window)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_caches_are_read_where_they_lie(backend, dtype) -> None:
    """Caches of any outer strides are accepted: positions before heads, part of a longer cache, unaligned heads. The
    CPU kernel guarantees equal bits; the oracle's products and Triton's order of summation depend on the layout."""
    device = device_of(backend)
    (query, keys, values), ranges = inputs(3, 6, 2, 50, 64, dtype, device=device)
    expected = assert_right(backend, (query, keys, values), ranges)

    def assert_same(query, keys, values, expected) -> None:
        result = assert_right(backend, (query, keys, values), ranges)
        assert backend != "cpu" or torch.equal(result, expected)

    longer = lambda cache: torch.cat([torch.full_like(cache, torch.nan), cache], 2)[:, :, 50:]  # noqa: E731
    wider = lambda cache: torch.nn.functional.pad(cache, (1, 4), value=torch.nan)[..., 1:65]  # noqa: E731
    turned = lambda cache: cache.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    for change in (longer, wider, turned):
        moved = change(keys), change(values)
        assert not any(cache.is_contiguous() for cache in moved)
        assert_same(query, *moved, expected)
    shared = keys[:1].expand(3, -1, -1, -1), values[:, :1].expand(-1, 2, -1, -1)
    copied = tuple(cache.contiguous() for cache in shared)
    assert_same(query, *shared, call("decode_attention", backend, query, *copied, **ranges))
    apart = torch.stack([query, query], -1)[..., 0]
    assert_same(apart, keys, values, expected)


@every_backend
def test_large_scores_do_not_overflow(backend) -> None:
    """With scores of +-3e4, the result is the value of the largest score, at any position."""
    device = device_of(backend)
    (query, keys, values), ranges = inputs(2, 4, 2, 600, 32, device=device)
    ranges = {"starts": torch.zeros_like(ranges["starts"]), "ends": torch.full_like(ranges["ends"], 600)}
    query, keys = torch.ones_like(query), keys.sign() * 1000.0
    for place in (0, 311, 599):
        best = keys.clone()
        best[:, :, place] = 2000.0
        result = call("decode_attention", backend, query, best, values, **ranges, scale=0.5)
        torch.testing.assert_close(result, values[:, :, place].repeat_interleave(2, 1), rtol=0, atol=1e-6)


@every_backend
def test_a_common_offset_changes_nothing(backend) -> None:
    """Whole numbers keep every score exact in float32: an offset of 2^14 does not change the result."""
    device = device_of(backend)
    (query, keys, values), ranges = inputs(2, 4, 2, 80, 33, device=device)
    query, keys = torch.ones_like(query), (keys * 2).round()
    moved = keys.clone()
    keys[..., 0], moved[..., 0] = 0, 2**14
    expected = call("decode_attention", backend, query, keys, values, **ranges, scale=1.0)
    assert torch.equal(call("decode_attention", backend, query, moved, values, **ranges, scale=1.0), expected)


@every_backend
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("positions", [40, 600])
def test_a_fault_stays_where_it_is(backend, fault, positions) -> None:
    device = device_of(backend)
    (query, keys, values), ranges = inputs(3, 4, 2, positions, 32, device=device)
    ranges = {"ends": torch.full_like(ranges["ends"], positions)}
    good = call("decode_attention", backend, query, keys, values, **ranges)
    broken = keys.clone()
    broken[1, 0, 33, 3] = fault * float(query[1, 0, 3].sign())
    result = call("decode_attention", backend, query, broken, values, **ranges)
    assert result[1, 0].isnan().all()
    assert torch.equal(result[[0, 2]], good[[0, 2]])
    assert torch.equal(result[1, 2:], good[1, 2:])


@every_backend
@pytest.mark.parametrize("positions", [70, 900])
def test_a_row_does_not_depend_on_its_batch(backend, positions) -> None:
    """A row gives the same bits alone, in another order, and beside rows of other lengths."""
    if backend == "torch":
        pytest.skip("its products are PyTorch's, which may add in another order in another batch")
    tensors, ranges = inputs(6, 4, 2, positions, 32, device=device_of(backend))
    together = call("decode_attention", backend, *tensors, **ranges)
    rows = torch.tensor([4, 1, 5], device=together.device)
    some = call("decode_attention", backend, *(t[rows] for t in tensors), **{n: r[rows] for n, r in ranges.items()})
    assert torch.equal(some, together[rows])
    alone = call("decode_attention", backend, *(t[2:3] for t in tensors), **{n: r[2:3] for n, r in ranges.items()})
    assert torch.equal(alone, together[2:3])


@every_rival
def test_ends_move_under_a_call_that_stands(backend) -> None:
    """`ends` updated in place between calls is read anew by every call."""
    tensors, ranges = inputs(2, 4, 2, 20, 32, device=device_of(backend))
    ranges["starts"].zero_()
    ranges["ends"].fill_(5)
    for _ in range(3):
        ranges["ends"].add_(1)
        assert_right(backend, tensors, ranges)


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads()
    tensors, ranges = inputs(5, 8, 2, 700, 64, BF16, device=torch.device("cpu"))
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call("decode_attention", "cpu", *tensors, **ranges))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@every_backend
def test_no_rows(backend) -> None:
    device = device_of(backend)
    query, cache = torch.empty(0, 4, 16, device=device), torch.empty(0, 2, 9, 16, device=device)
    ends = torch.empty(0, dtype=torch.int64, device=device)
    assert call("decode_attention", backend, query, cache, cache, ends=ends).shape == (0, 4, 16)


def test_gradients_are_not_recorded() -> None:
    tensors, ranges = inputs(2, 4, 2, 9, 16)
    tensors = tuple(tensor.requires_grad_() for tensor in tensors)
    assert not nlhf_kernels.decode_attention(*tensors, **ranges).requires_grad


def test_triton_says_how_large_a_head_it_takes() -> None:
    tensors, ranges = inputs(1, 2, 1, 3, 264)
    assert "at most 256 elements each; got 264" in str(nlhf_kernels.explain("decode_attention", *tensors, **ranges))


LONG = torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [[0.0]]}, TypeError, "query: expected a tensor; got list"),
        ({"query": torch.zeros(2, 4, 8, dtype=torch.float64)}, TypeError, "query: expected dtype float32 or bfloat16"),
        ({"query": torch.zeros(2, 3, 8)}, ValueError, "query: expected a multiple of 2 heads; got 3"),
        ({"query": torch.zeros(2, 0, 8)}, ValueError, "query: expected a multiple of 2 heads; got 0"),
        ({"keys": torch.zeros(2, 2, 5, 9)}, ValueError, "keys: expected shape .* with rows=2, .*dim=8; got"),
        ({"keys": torch.zeros(2, 2, 5, 8, dtype=BF16)}, TypeError, "keys: expected dtype float32; got bfloat16"),
        (
            {"keys": torch.zeros(2, 2, 0, 8), "values": torch.zeros(2, 2, 0, 8)},
            ValueError,
            "keys: expected at least one of positions; got 0",
        ),
        ({"keys": torch.zeros(2, 2, 8, 5).mT}, ValueError, "keys: expected a last dimension of stride 1.* got strides"),
        ({"values": torch.zeros(2, 2, 4, 8)}, ValueError, "values: expected shape .*positions=5.*; got"),
        ({"values": torch.zeros(2, 2, 8, 5).mT}, ValueError, "values: expected a last dimension of stride 1"),
        ({"ends": torch.ones(3, dtype=torch.int64)}, ValueError, "ends: expected shape"),
        ({"ends": torch.ones(2)}, TypeError, "ends: expected dtype int64; got float32"),
        ({"ends": LONG.to("meta")}, ValueError, "ends: expected a tensor on cpu"),
        ({"starts": torch.ones(1, dtype=torch.int64)}, ValueError, "starts: expected shape"),
        ({"starts": 0}, TypeError, "starts: expected a tensor"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks: expected shape \(heads\) with heads=4; got \(2,\)"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number; got nan"),
        ({"window": 0}, ValueError, "window: expected an integer in .1, .*; got 0"),
        ({"window": 2.0}, TypeError, "window: expected an integer; got float"),
        ({"softcap": 0.0}, ValueError, r"softcap: expected a finite number in \(0.0, inf\); got 0.0"),
    ],
)
def test_bad_input_is_named(change, error, message) -> None:
    cache = torch.zeros(2, 2, 5, 8)
    good = {"query": torch.zeros(2, 4, 8), "keys": cache, "values": cache, "ends": LONG}
    with pytest.raises(error, match=message):
        nlhf_kernels.decode_attention(**{**good, **change})


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_captured_graph_advances() -> None:
    tensors, ranges = inputs(3, 8, 2, 600, 64, BF16)
    ranges["starts"].zero_()
    ranges["ends"].fill_(300)
    nlhf_kernels.decode_attention(*tensors, **ranges, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = nlhf_kernels.decode_attention(*tensors, **ranges, backend="triton")
    for end in (301, 600):
        ranges["ends"].fill_(end)
        graph.replay()
        assert torch.equal(result, nlhf_kernels.decode_attention(*tensors, **ranges, backend="triton"))
