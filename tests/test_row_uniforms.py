"""The randomness contract: published vectors, every backend to the bit, and uniforms that are uniform."""

from __future__ import annotations

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.core import rng
from tests.support.backends import DEVICE, SIMD_LEVELS, call, device_of, every_rival
from tests.support.poison import poisoned_allocations, surrounded
from tests.support.statistics import assert_plausible, chi_square_p, uniform_p


def _example(rows: int = 5, device: torch.device = DEVICE, per_row: bool = False):
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randint(-(2**63), 2**63 - 1, shape, generator=generator).to(device)  # noqa: E731
    shape = (rows,) if per_row else ()
    return (draw(*shape), draw(rows), draw(*shape)), {"stream": 3}


EXAMPLES = [lambda device: _example(5, device), lambda device: _example(300, device, per_row=True)]

# Random123's kat_vectors file, philox4x32 10: counter, key -> words
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((rng.WORD,) * 4, (rng.WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _signed(high: int, low: int) -> int:
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_oracle_gives_the_published_vectors(counter, key, words) -> None:
    as_tensors = lambda values: tuple(torch.tensor(value) for value in values)  # noqa: E731
    assert tuple(int(word) for word in rng.philox_4x32(as_tensors(counter), as_tensors(key))) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda", "cpu"])
def test_backends_give_the_published_vectors(backend, counter, key, words) -> None:
    """Through the contract's layout, where it can express the vector: block 0 leaves the low 24 bits of word 3 zero."""
    if counter[3] & 0xFFFFFF:
        counter = (*counter[:3], 0)  # the published answer no longer applies; the oracle, checked above, does
        as_tensors = lambda values: tuple(torch.tensor(value) for value in values)  # noqa: E731
        words = tuple(int(word) for word in rng.philox_4x32(as_tensors(counter), as_tensors(key)))
    device = device_of(backend)
    seed = torch.tensor(_signed(key[1], key[0]), device=device)
    row_ids = torch.tensor([_signed(counter[1], counter[0])], device=device)
    step = torch.tensor(counter[2], device=device)
    uniform = call("row_uniforms", backend, seed, row_ids, step, stream=counter[3] >> 24)
    assert float(uniform) == (((words[1] << 32 | words[0]) >> 12) + 0.5) / 2**52


@every_rival
@pytest.mark.parametrize("rows", [0, 1, 7, 256, 1000])
@pytest.mark.parametrize("per_row", [False, True])
def test_backends_agree_to_the_bit(backend, rows, per_row) -> None:
    args, kwargs = _example(rows, device_of(backend), per_row)
    expected = nlhf_kernels.row_uniforms(*args, **kwargs, backend="torch")
    with poisoned_allocations() as handed_out:
        result = call("row_uniforms", backend, *(surrounded(tensor) for tensor in args), **kwargs)
    assert handed_out, "the output was expected to come from torch.empty"
    assert torch.equal(result, expected)


@pytest.mark.parametrize("simd_level", SIMD_LEVELS, indirect=True)
def test_simd_levels_agree_to_the_bit(simd_level) -> None:
    args, kwargs = _example(9001, torch.device("cpu"), per_row=True)
    result = call("row_uniforms", "cpu", *args, **kwargs)
    assert torch.equal(result, nlhf_kernels.row_uniforms(*args, **kwargs, backend="torch"))


def test_a_row_depends_on_its_own_numbers_only() -> None:
    """A row's uniform does not depend on the batch, its order or its size."""
    seed, step = torch.tensor(11, device=DEVICE), torch.tensor(4, device=DEVICE)
    row_ids = torch.randperm(1000).to(DEVICE)
    together = nlhf_kernels.row_uniforms(seed, row_ids, step)
    order = torch.randperm(1000).to(DEVICE)
    assert torch.equal(nlhf_kernels.row_uniforms(seed, row_ids[order], step), together[order])
    assert torch.equal(nlhf_kernels.row_uniforms(seed, row_ids[:1], step), together[:1])


def test_every_part_of_the_counter_matters() -> None:
    seed, row_ids, step = (torch.tensor(value, device=DEVICE) for value in (5, [9], 2))
    draws = {float(nlhf_kernels.row_uniforms(seed, row_ids, step))}
    for bit in (0, 31, 32, 62):
        draws.add(float(nlhf_kernels.row_uniforms(seed + 2**bit, row_ids, step)))
        draws.add(float(nlhf_kernels.row_uniforms(seed, row_ids + 2**bit, step)))
    draws |= {float(nlhf_kernels.row_uniforms(seed, row_ids, step + 2**bit)) for bit in (0, 31)}
    draws |= {float(nlhf_kernels.row_uniforms(seed, row_ids, step, stream=stream)) for stream in (1, 2, 128, 255)}
    assert len(draws) == 1 + 8 + 2 + 4


def test_extreme_bits_stay_inside_the_open_interval() -> None:
    ends = rng.open_unit(torch.tensor([0, -1]))  # 64 bits of zero, 64 bits of one
    assert float(ends[0]) == 2.0**-53
    assert float(ends[1]) == 1 - 2.0**-53


def test_uniform_over_rows_steps_and_seeds() -> None:
    n = 200_000
    axes = torch.arange(n, device=DEVICE)
    constant = torch.tensor(3, device=DEVICE)
    for name, args in {
        "rows": (constant, axes, constant),
        "steps": (constant, torch.full_like(axes, 7), axes),
        "seeds": (axes, torch.full_like(axes, 7), constant),
    }.items():
        u = nlhf_kernels.row_uniforms(*args).cpu().numpy()
        assert_plausible(uniform_p(u), f"uniformity over {name}")
        pairs = (u[0::2] * 16).astype(int) * 16 + (u[1::2] * 16).astype(int)
        counts = torch.bincount(torch.from_numpy(pairs), minlength=256).numpy()
        assert_plausible(chi_square_p(counts, [1 / 256] * 256), f"independence of neighbouring {name}")


def test_streams_are_independent() -> None:
    args = torch.tensor(3, device=DEVICE), torch.arange(100_000, device=DEVICE), torch.tensor(0, device=DEVICE)
    u, v = (nlhf_kernels.row_uniforms(*args, stream=stream).cpu() for stream in (0, 1))
    counts = torch.bincount(((u * 16).long() * 16 + (v * 16).long()), minlength=256).numpy()
    assert_plausible(chi_square_p(counts, [1 / 256] * 256), "independence of streams")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": 3}, TypeError, "seed: expected a tensor"),
        ({"seed": torch.tensor(3.0)}, TypeError, "seed: expected dtype int64; got float32"),
        (
            {"seed": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"seed: expected shape \(rows\) with rows=5; got \(4,\)",
        ),
        ({"row_ids": torch.tensor(1)}, ValueError, r"row_ids: expected shape \(rows\); got \(\)"),
        ({"row_ids": torch.zeros(5, dtype=torch.int32)}, TypeError, "row_ids: expected dtype int64; got int32"),
        ({"step": torch.zeros(5, 1, dtype=torch.int64)}, ValueError, "step: expected shape"),
        ({"step": torch.tensor(1, device="meta")}, ValueError, "step: expected a tensor on cpu"),
        (
            {"row_ids": torch.arange(5).to_sparse()},
            TypeError,
            "row_ids: expected a dense tensor; got layout torch.sparse",
        ),
        ({"stream": 256}, ValueError, r"stream: expected an integer in \[0, 255\]; got 256"),
        ({"stream": 1.5}, TypeError, "stream: expected an integer; got float"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, torch"),
    ],
)
def test_bad_input_is_named(change, error, message) -> None:
    good = {"seed": torch.tensor(1), "row_ids": torch.arange(5), "step": torch.tensor(2)}
    with pytest.raises(error, match=message):
        nlhf_kernels.row_uniforms(**{**good, **change})


def test_strided_inputs_are_read_right() -> None:
    row_ids = torch.arange(20, device=DEVICE)[::2]
    seed, step = torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE)
    expected = nlhf_kernels.row_uniforms(seed, row_ids.clone(), step, backend="torch")
    assert torch.equal(nlhf_kernels.row_uniforms(seed, row_ids, step), expected)
