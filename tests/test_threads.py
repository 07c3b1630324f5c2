"""The CPU kernels' threads with fork, other threads and signals, as documented in docs/threads.md."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.core import capabilities

needs_cpu = pytest.mark.skipif(bool(capabilities.native_missing("_cpu")), reason=capabilities.native_missing("_cpu"))

_CALL = """
import os, sys, torch, nlhf_kernels

def call() -> float:
    logits = torch.ones(8, 50_000)  # worth two threads
    return float(nlhf_kernels.logprobs(logits, torch.arange(8), backend="cpu").policy.sum())
"""
_DATA_LOADER = (
    _CALL
    + """
class Scored(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return call()

torch.set_num_threads(2)
expected = call()
loader = torch.utils.data.DataLoader(Scored(), num_workers=2, multiprocessing_context="fork")
assert [float(value) for value in loader] == [expected] * 3
"""
)
_FORK_OF_ONE_THREAD = (
    _CALL
    + """
torch.set_num_threads(1)
call()
child = os.fork()
if child == 0:
    call()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
)
_FORK_WITH_THREADS_OF_ITS_OWN = (
    _CALL
    + """
torch.set_num_threads(1)
call()
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    call()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
)


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("code", [_DATA_LOADER, _FORK_OF_ONE_THREAD, _FORK_WITH_THREADS_OF_ITS_OWN])
def test_forks_that_work(code) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@needs_cpu
def test_ctrl_c_ends_a_long_call() -> None:
    """Ctrl-C interrupts a call that would take a minute (400 games of 1e9 multiply-adds)."""
    cpu = capabilities.native("_cpu")
    games, actions, iterations = 400, 128, 60_000
    tensors = [torch.zeros(games, actions), torch.full((games, actions, actions), 0.5), torch.zeros(games, actions)]
    tau, step_sizes, out = torch.tensor(0.1), torch.full((iterations,), 0.1), torch.empty(games, actions)
    pointers = [tensor.data_ptr() for tensor in tensors]
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist workers ignore SIGINT
    try:
        interrupt.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            cpu.mirror_descent(
                False, *pointers, tau.data_ptr(), 0, step_sizes.data_ptr(), games, actions, iterations, 1, 0,
                out.data_ptr(), 1,
            )  # fmt: skip
        interrupt.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 20


@needs_cpu
def test_other_threads_run_during_a_call() -> None:
    """The native module releases the GIL during a call."""
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.monotonic())

    args = torch.zeros(64, 128), torch.full((64, 128, 128), 0.5), torch.zeros(64, 128)
    thread = threading.Thread(target=tick)
    thread.start()
    nlhf_kernels.mirror_descent(*args, tau=0.1, step_sizes=torch.full((2000,), 0.1), backend="cpu")
    done.set()
    thread.join()
    assert len(ticks) > 3


PART = 2**27  # elements per thread between two checks for signals (csrc/common/binding.h)


@needs_cpu
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_of_several_parts_gives_what_its_rows_give(threads) -> None:
    """Rows on both sides of the first part's end equal separate calls."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for run, cost in (_sampler(), _scores(), _attention(), _games()):
            end = max(1, int(PART / cost)) * threads
            rows = torch.arange(2 * end + 1)
            some = rows[max(end - 2, 0) : end + 2]
            assert torch.equal(run(rows)[some], run(some)), run.__name__
    finally:
        torch.set_num_threads(before)


def _sampler():
    vocabulary = 600_000
    logits = torch.randn(1, vocabulary)

    def sample(rows: torch.Tensor) -> torch.Tensor:
        options = {"seed": 1, "row_ids": rows, "step": 2, "backend": "cpu", "logprobs": ()}
        return nlhf_kernels.mixture_sample(logits.expand(len(rows), -1), **options).tokens

    return sample, 2 * vocabulary


def _scores():
    vocabulary = 600_000
    logits = torch.randn(1, vocabulary)

    def score(rows: torch.Tensor) -> torch.Tensor:
        return nlhf_kernels.logprobs(logits.expand(len(rows), -1), rows * 100, backend="cpu").policy

    return score, 2 * vocabulary


def _attention():
    heads, positions, dim = 16, 512, 64
    cache = torch.randn(1, 2, positions, dim)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        query = rows[:, None, None] * torch.ones(heads, dim) / 1000
        caches = cache.expand(len(rows), -1, -1, -1)
        return nlhf_kernels.decode_attention(query, caches, caches, ends=rows % positions + 1, backend="cpu")

    return attend, heads * positions * 2 * dim


def _games():
    actions, iterations = 32, 100_000

    def solve(rows: torch.Tensor) -> torch.Tensor:
        log_policy = rows[:, None] * torch.arange(actions) / 100.0
        preference = torch.linspace(0, 1, actions**2).view(actions, actions).expand(len(rows), -1, -1)
        steps = torch.full((iterations,), 0.01)
        return nlhf_kernels.mirror_descent(log_policy, preference, log_policy, tau=0.1, step_sizes=steps, backend="cpu")

    return solve, actions**2 * (iterations + 1)
