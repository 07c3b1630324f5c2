"""The CUDA sources, compiled as plain C++ and run on the CPU (tests/emulation) to test their logic without a GPU.

The module under test is the real binding over the real launchers and kernels; only the CUDA runtime is replaced.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from nlhf_kernels.core import tuning
from nlhf_kernels.ops.mirror_descent import native as mirror_descent_native
from nlhf_kernels.ops.mirror_descent.op import MirrorDescentInputs
from nlhf_kernels.ops.row_uniforms import native as row_uniforms_native
from nlhf_kernels.ops.row_uniforms.op import RowUniformsInputs
from tests.emulation.build import build_sanitized
from tests.emulation.fixture import CRAMPED, ROOMY, Emulation

MASK32 = 0xFFFFFFFF


def _address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


# --------------------------------------------------------------------------------------------- row_uniforms
def philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high & MASK32, (low >> 32) ^ c[3] ^ k[1], low & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


def expected_uniform(seed: int, row: int, step: int, stream: int) -> float:
    key = [seed & MASK32, seed >> 32 & MASK32]
    words = philox([row & MASK32, row >> 32 & MASK32, step & MASK32, stream << 24], key)
    return ((words[1] << 32 | words[0]) >> 12) * 2.0**-52 + 2.0**-53


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([MASK32] * 4, [MASK32] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_oracle_reproduces_random123(counter: list[int], key: list[int], words: str) -> None:
    assert philox(counter, key) == [int(word, 16) for word in words.split()]


def _uniforms(
    emulation: Emulation, seed: list[int], rows: list[int], step: list[int], stream: int, threads: int = 256
) -> np.ndarray:
    """Return uniforms of shape (rows); a scalar seed or step is shared by all rows through a stride of 0."""
    arrays = [np.array(values, dtype=np.int64) for values in (seed, rows, step)]
    out = np.full(len(rows) + 1, np.nan)
    strides = [0 if len(values) == 1 else 1 for values in (seed, step)]
    pointers = [_address(array) for array in arrays]
    emulation.module.row_uniforms(
        pointers[0], strides[0], pointers[1], pointers[2], strides[1], stream, len(rows), _address(out), threads, 0
    )
    assert math.isnan(out[-1])
    return out[:-1]


def test_row_uniforms_known_answer(emulation: Emulation) -> None:
    bits = 0xE169C58D6627E8D5  # the first two words of the all-zero vector
    assert _uniforms(emulation, [0], [0], [0], 0)[0] == (bits >> 12) * 2.0**-52 + 2.0**-53


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 700])
@pytest.mark.parametrize("per_row", [False, True])
def test_row_uniforms_bit_for_bit(emulation: Emulation, count: int, per_row: bool) -> None:
    random = np.random.default_rng(count)
    low, high = -(2**63), 2**63 - 1
    rows = random.integers(low, high, count).tolist()
    seeds = random.integers(low, high, count if per_row else 1).tolist()
    steps = random.integers(0, 2**32, count if per_row else 1).tolist()
    out = _uniforms(emulation, seeds, rows, steps, stream=3)
    for i, row in enumerate(rows):
        seed, step = (seeds[i], steps[i]) if per_row else (seeds[0], steps[0])
        assert out[i] == expected_uniform(seed, row, step, 3)


def test_row_uniforms_for_any_number_of_threads(emulation: Emulation) -> None:
    rows = list(range(700))
    expected = _uniforms(emulation, [3], rows, [5], 1)
    for threads in (32, 96, 1024):
        np.testing.assert_array_equal(_uniforms(emulation, [3], rows, [5], 1, threads), expected)
    with pytest.raises(RuntimeError, match=r"row_uniforms: CUDA error 1 \(invalid argument\)"):
        _uniforms(emulation, [3], rows, [5], 1, 33)


# ------------------------------------------------------------------------------------------- mirror_descent
def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected_descent(
    log_policy: np.ndarray,  # (G, A)
    preference: np.ndarray,  # (G, A, A)
    log_reference: np.ndarray,  # (G, A)
    tau: np.ndarray,  # (G) or (1)
    step_sizes: np.ndarray,  # (K)
    opponent_is_mixture: bool,
) -> np.ndarray:
    """The definition in float64, normalised in every iteration."""
    x, p, r = (array.astype(np.float64) for array in (log_policy, preference, log_reference))
    b_of_step = step_sizes[:, None] * tau  # in the inputs' precision, which decides whether b is 0 or 1
    for step, b in zip(step_sizes.astype(np.float64), b_of_step.astype(np.float64), strict=True):
        b = np.broadcast_to(b[:, None], x.shape)
        with np.errstate(invalid="ignore"):
            mixture = np.where(b == 0, x, np.where(b == 1, r, (1 - b) * x + b * r))
        opponent = np.exp(log_softmax(mixture if opponent_is_mixture else x))
        x = log_softmax(mixture + step * np.einsum("gij,gj->gi", p, opponent))
    return log_softmax(x) if x.size else x


class Games(NamedTuple):
    log_policy: np.ndarray
    preference: np.ndarray
    log_reference: np.ndarray
    tau: np.ndarray
    step_sizes: np.ndarray


def make_games(games: int, actions: int, iterations: int, dtype: type, tau_per_game: bool = True) -> Games:
    random = np.random.default_rng([games, actions, iterations])
    arrays = [
        log_softmax(random.normal(size=(games, actions))) if games else np.zeros((games, actions)),
        random.uniform(size=(games, actions, actions)),
        log_softmax(random.normal(size=(games, actions))) if games else np.zeros((games, actions)),
        random.uniform(0.05, 0.4, size=games if tau_per_game else 1),
        random.uniform(0.1, 1.0, size=iterations),
    ]
    return Games(*(np.ascontiguousarray(array.astype(dtype)) for array in arrays))


FIXED = 2  # enum class Opponent of mirror_descent.h; 0 and 1 are the policy and the mixture


def descend(
    emulation: Emulation,
    games: Games,
    opponent_is_mixture: bool,
    log_opponent: np.ndarray | None = None,
    plan: tuple[int, int] | None = None,
) -> np.ndarray:
    count, actions = games.log_policy.shape
    out = np.full(count * actions + 1, np.nan, dtype=games.log_policy.dtype)
    is_double = out.dtype == np.float64
    plan = plan or emulation.module.mirror_descent_plan(is_double, count, actions)
    size = emulation.module.mirror_descent_workspace(is_double, count, actions, plan[0])
    workspace = np.full(size + 256, 255, dtype=np.uint8)
    emulation.module.mirror_descent(
        is_double,
        *(_address(array) for array in games[:4]),
        0 if len(games.tau) == 1 else 1,
        _address(games.step_sizes),
        count,
        actions,
        len(games.step_sizes),
        FIXED if log_opponent is not None else int(opponent_is_mixture),
        0 if log_opponent is None else _address(log_opponent),
        _address(out),
        *plan,
        _address(workspace),
        0,
    )
    assert math.isnan(out[-1])
    assert (workspace[size:] == 255).all()
    return out[:-1].reshape(count, actions)


@pytest.mark.parametrize("actions", [7, 33, 100, 300])
def test_mirror_descent_against_a_fixed_opponent(emulation: Emulation, actions: int) -> None:
    """Unnormalised logits of doubled scale match float64; the opponent is their softmax in every iteration."""
    games = make_games(3, actions, 4, np.float64)
    log_opponent = np.ascontiguousarray(games.log_reference * 2 + 1)
    x = games.log_policy
    against = np.einsum("gij,gj->gi", games.preference, np.exp(log_softmax(log_opponent)))
    for step in games.step_sizes:
        b = (step * games.tau)[:, None]
        x = log_softmax((1 - b) * x + b * games.log_reference + step * against)
    np.testing.assert_allclose(descend(emulation, games, False, log_opponent), x, rtol=0, atol=1e-12)


def assert_descends(emulation: Emulation, games: Games, opponent_is_mixture: bool) -> None:
    truth = expected_descent(*games, opponent_is_mixture)
    out = descend(emulation, games, opponent_is_mixture).astype(np.float64)
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(out[~finite], truth[~finite])
    if games.log_policy.dtype == np.float64:
        tolerance = 1e-12
    else:
        # Each iteration rounds numbers of the result's and the step's size; K such errors add up like a random walk.
        largest = np.abs(truth[finite]).max(initial=1.0) + games.step_sizes.max(initial=0.0)
        tolerance = 2 * np.finfo(np.float32).eps * largest * math.sqrt(len(games.step_sizes) + 1)
    np.testing.assert_allclose(out[finite], truth[finite], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("opponent_is_mixture", [False, True])
@pytest.mark.parametrize("actions", [1, 2, 7, 32, 33, 64, 100, 128, 130, 300])
def test_mirror_descent(emulation: Emulation, actions: int, opponent_is_mixture: bool, dtype: type) -> None:
    for games, iterations in [(0, 17), (1, 17), (5, 0), (5, 1), (2, 3)]:
        problem = make_games(games, actions, iterations, dtype, tau_per_game=games != 2)
        assert_descends(emulation, problem, opponent_is_mixture)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("actions", [130, 200])
def test_mirror_descent_same_in_shared_and_global_memory(emulation: Emulation, actions: int, dtype: type) -> None:
    problem = make_games(2, actions, 3, dtype)
    results = []
    for device in (ROOMY, CRAMPED):  # 200 x 200 doubles exceed both limits, so both runs use global memory
        emulation.library.emulation_set_device(device)
        assert_descends(emulation, problem, True)
        results.append(descend(emulation, problem, True))
    np.testing.assert_array_equal(*results)  # the same sums in the same order


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("opponent", ["policy", "mixture", "fixed"])
def test_mirror_descent_by_several_blocks_a_game(emulation: Emulation, opponent: str, dtype: type) -> None:
    """Any number of blocks per game gives the same bits as one block, and agrees with float64."""
    for games, actions, iterations in [(2, 245, 2), (1, 133, 3), (1, 130, 0), (2, 5, 1)]:
        problem = make_games(games, actions, iterations, dtype)
        problem.log_policy[:, 1::7] = -np.inf
        fixed = problem.log_reference.copy() if opponent == "fixed" else None
        results = [descend(emulation, problem, opponent == "mixture", fixed, (parts, 96)) for parts in (2, 5, actions)]
        for out in results:
            np.testing.assert_array_equal(out, results[0])
        if fixed is None:
            truth = expected_descent(*problem, opponent == "mixture")
            np.testing.assert_allclose(results[0], truth, rtol=0, atol=1e-12 if dtype == np.float64 else 3e-6)
        if actions > 230:
            one = descend(emulation, problem, opponent == "mixture", fixed, (1, 96))
            np.testing.assert_array_equal(results[0], one)


def test_mirror_descent_chooses_several_blocks_for_few_large_games(emulation: Emulation) -> None:
    def parts(games: int, actions: int, is_double: bool = False) -> int:
        return emulation.module.mirror_descent_plan(is_double, games, actions)[0]

    assert parts(8, 2048) == 132 // 8
    assert parts(1, 2048) == 2048 // 64, "at least a pass of four rows by each of 16 warps"
    assert parts(64, 512) == 2
    assert parts(1, 230) == 1, "the matrix fits shared memory"
    assert parts(1, 230, True) == 4
    assert parts(1, 128) == parts(132, 2048) == parts(0, 2048) == 1
    emulation.library.emulation_set_device(CRAMPED)
    assert parts(1, 2048) == 1


@pytest.fixture
def emulated_calls(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python wrappers of the CUDA kernels with the emulated module on CPU tensors."""
    for native in (mirror_descent_native, row_uniforms_native):
        monkeypatch.setattr(native.capabilities, "native", lambda name: emulation.module)
        monkeypatch.setattr(native, "cuda_stream", lambda device: 0)
        monkeypatch.setattr(native, "on_device", lambda device: nullcontext())


@pytest.mark.usefixtures("emulated_calls")
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mirror_descent_from_python(parts: int | None, dtype: torch.dtype) -> None:
    tensors = [torch.from_numpy(array).to(dtype) for array in make_games(2, 245, 3, np.float64)]
    tunable = mirror_descent_native._TUNABLE
    plan = nullcontext() if parts is None else tuning.use_plan(tunable, mirror_descent_native.Plan(parts, 64))
    with plan:
        result = mirror_descent_native.mirror_descent_cuda(MirrorDescentInputs(*tensors, "mixture", None, "cuda"))
    truth = torch.from_numpy(expected_descent(*make_games(2, 245, 3, np.float64), True))
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.usefixtures("emulated_calls")
@pytest.mark.parametrize("threads", [None, 64])
def test_row_uniforms_from_python(threads: int | None) -> None:
    arguments = torch.tensor(7), torch.arange(300), torch.tensor(2)
    tunable = row_uniforms_native._TUNABLE
    with nullcontext() if threads is None else tuning.use_plan(tunable, row_uniforms_native.Plan(threads)):
        result = row_uniforms_native.row_uniforms_cuda(RowUniformsInputs(*arguments, 1, "cuda"))
    assert result.tolist() == [expected_uniform(7, row, 2, 1) for row in range(300)]


def test_mirror_descent_refuses_other_plans(emulation: Emulation) -> None:
    problem = make_games(1, 300, 2, np.float32)
    for plan in ((0, 512), (2, 0), (2, 33), (2, 544)):
        with pytest.raises(ValueError, match="mirror_descent: plan: expected parts of at least 1 and threads of 32"):
            descend(emulation, problem, True, plan=plan)


def test_mirror_descent_more_games_than_blocks(emulation: Emulation) -> None:
    emulation.library.emulation_set_device(CRAMPED)  # one multiprocessor: 32 blocks at most
    for games, actions in [(70, 3), (33, 40), (33, 129)]:
        assert_descends(emulation, make_games(games, actions, 2, np.float64), True)


@pytest.mark.parametrize("actions", [7, 64, 128, 130])
@pytest.mark.parametrize("opponent_is_mixture", [False, True])
def test_mirror_descent_ends_of_the_mixture(emulation: Emulation, actions: int, opponent_is_mixture: bool) -> None:
    base = make_games(2, actions, 2, np.float64)
    impossible = base.log_reference.copy()
    impossible[:, ::3] = -np.inf
    only_policy = base._replace(log_reference=impossible, tau=np.zeros(2))  # b = 0
    assert np.isfinite(descend(emulation, only_policy, opponent_is_mixture)).all()
    assert_descends(emulation, only_policy, opponent_is_mixture)

    only_reference = base._replace(  # b = 1: an action of policy probability 0 becomes possible again
        log_policy=impossible, log_reference=base.log_policy, tau=np.full(2, 0.5), step_sizes=np.full(2, 2.0)
    )
    assert np.isfinite(descend(emulation, only_reference, opponent_is_mixture)).all()
    assert_descends(emulation, only_reference, opponent_is_mixture)

    beyond = base._replace(tau=np.full(2, 0.6), step_sizes=np.full(2, 2.0))  # b > 1: padding must stay out of it
    assert_descends(emulation, beyond, opponent_is_mixture)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("actions", [2, 33, 64, 100, 130, 300])
def test_mirror_descent_keeps_impossible_actions_impossible(emulation: Emulation, actions: int, dtype: type) -> None:
    problem = make_games(2, actions, 4, dtype)
    problem.log_policy[:, 1::2] = -np.inf
    for opponent_is_mixture in (False, True):
        out = descend(emulation, problem, opponent_is_mixture)
        assert np.isneginf(out[:, 1::2]).all()
        assert_descends(emulation, problem, opponent_is_mixture)
    problem.log_policy[0] = -np.inf  # not a distribution: NaN, in that game only
    out = descend(emulation, problem, True)
    assert np.isnan(out[0]).all()
    assert not np.isnan(out[1]).any()


@pytest.mark.parametrize("actions", [64, 130])
def test_mirror_descent_survives_logits_far_from_zero(emulation: Emulation, actions: int) -> None:
    problem = make_games(2, actions, 3, np.float64)
    problem.log_policy[0] += 1000.0
    problem.log_policy[1] -= 1000.0
    assert_descends(emulation, problem, True)


@pytest.mark.parametrize("actions", [5, 129])
@pytest.mark.parametrize("opponent_is_mixture", [False, True])
def test_mirror_descent_does_not_drift(emulation: Emulation, actions: int, opponent_is_mixture: bool) -> None:
    """Digits are kept, where an unnormalised log-policy would grow towards 0.5 / tau = 250 and lose them."""
    problem = make_games(1, actions, 300, np.float32)
    problem.preference[:] = 0.5 + 0.002 * (problem.preference - 0.5)
    problem.tau[:], problem.step_sizes[:] = 0.002, 2.0
    assert_descends(emulation, problem, opponent_is_mixture)


def test_too_many_actions_for_the_device_is_an_error(emulation: Emulation) -> None:
    nothing = np.zeros(1)
    emulation.library.emulation_set_device(CRAMPED)
    pointers = [_address(nothing)] * 4
    with pytest.raises(RuntimeError, match=r"mirror_descent: CUDA error 1 \(invalid argument\)"):
        call = (True, *pointers, 0, _address(nothing), 1, 6200, 0, 0, 0, _address(nothing))
        emulation.module.mirror_descent(*call, 1, 512, 0, 0)


def test_build_info(emulation: Emulation) -> None:
    assert emulation.module.build_info() == {"cuda_version": "0.0", "architectures": "none", "compiler": "g++"}


# -------------------------------------------------------------------------------------- the emulator itself
LAUNCH_FAILURE = 719


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ("planted_barrier_in_branch", r"divergent barrier: thread \d+ waits in __syncthreads .*planted.*finished"),
        ("planted_barriers_in_two_branches", "threads meet at different places"),
        ("planted_shuffle_after_return", "(lane 7, which has finished|divergent barrier.*thread 7 has finished)"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_divergence_is_found(emulation: Emulation, planted: str, fault: str, seed: int) -> None:
    emulation.library.emulation_set_seed(ctypes.c_uint64(seed))
    out = np.zeros(64, dtype=np.int32)
    assert getattr(emulation.library, planted)(ctypes.c_void_p(_address(out))) == LAUNCH_FAILURE
    assert re.search(fault, emulation.library.emulation_last_fault().decode())


def test_writing_past_dynamic_shared_memory_is_found(emulation: Emulation) -> None:
    out = np.zeros(64, dtype=np.int32)

    def run(shared_bytes: int) -> int:
        return emulation.library.planted_write_past_shared(
            ctypes.c_void_p(_address(out)), ctypes.c_size_t(shared_bytes)
        )

    assert run(256) == 0
    assert run(255) == LAUNCH_FAILURE
    assert b"outside dynamic shared memory" in emulation.library.emulation_last_fault()
    assert run(200 * 1024) == 0  # the launch helper opts in
    emulation.library.emulation_set_device(CRAMPED)
    assert run(200 * 1024) == 1


def test_shared_memory_starts_poisoned(emulation: Emulation) -> None:
    results = np.zeros((2, 64), dtype=np.float32)
    pointers = [ctypes.c_void_p(_address(row)) for row in results]
    for seed in (0, 5):  # unless poisoned, static memory still holds the first run's values in the second
        emulation.library.emulation_set_seed(ctypes.c_uint64(seed))
        assert emulation.library.planted_neighbour(*pointers, False) == 0
        assert np.isnan(results).any(axis=1).all()
        assert emulation.library.planted_neighbour(*pointers, True) == 0
        np.testing.assert_array_equal(results, np.tile((np.arange(64) + 1) % 64, (2, 1)))


@pytest.mark.parametrize("threads", [32, 128, 1024])
def test_collectives_answer_as_documented(emulation: Emulation, threads: int) -> None:
    deviation = np.full((threads, 12), np.nan)
    assert emulation.library.planted_collectives(ctypes.c_void_p(_address(deviation)), threads) == 0
    np.testing.assert_array_equal(deviation, 0)


def test_blocks_run_in_an_order_drawn_from_the_seed(emulation: Emulation) -> None:
    last = []
    for seed in range(6):
        emulation.library.emulation_set_seed(ctypes.c_uint64(seed))
        numbers = np.zeros(4, dtype=np.int32)
        places = [ctypes.c_void_p(_address(numbers) + 4 * i) for i in range(4)]
        assert emulation.library.planted_last_block(*places, 40) == 0
        assert numbers[2] == 40 * 39 // 2
        last.append(int(numbers[3]))
    assert last[0] == 39  # seed 0: the natural order
    assert len(set(last)) > 2


def test_half_types_round_as_the_hardware(emulation: Emulation) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=500) * 10.0 ** random.integers(-9, 6, 500)
    values = [*values.astype(np.float32).tolist(), 0.0, -0.0, 65519.9, 65520.0, 3e38, math.inf, 2.0**-25, 3 * 2.0**-25]
    exact = torch.tensor(values, dtype=torch.float32)
    for name, dtype in (("planted_bfloat16", torch.bfloat16), ("planted_half", torch.float16)):
        rounded = torch.tensor([getattr(emulation.library, name)(value) for value in values])
        torch.testing.assert_close(rounded, exact.to(dtype).float(), rtol=0, atol=0)
        assert math.isnan(getattr(emulation.library, name)(math.nan))


def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    result = subprocess.run([str(build_sanitized(tmp_path))], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "clean\n", result.stdout + result.stderr
