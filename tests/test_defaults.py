"""PyTorch's default dtype and device belong to the caller: whatever they are, results are equal to the bit.

A default dtype other than float32 would make buffers that kernels read as float32 memory; a default device other than
the model's would put them elsewhere. The default device here is meta, on which a forgotten allocation fails at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import nlhf_kernels
from nlhf_kernels import tabular
from nlhf_kernels.core.registry import ops
from nlhf_kernels.core.settings import BACKENDS
from nlhf_kernels.engine import Hooks, Player, RolloutEngine, nash_md
from tests.support.engine import settings, tiny_pair
from tests.support.tiny_models import BETA, one_thread, padded, prompts
from tests.test_operators import backward, examples


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


every_default = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)


def tensors(results: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]


def assert_same_bits(results: object, expected: object) -> None:
    for got, want in zip(tensors(results), tensors(expected), strict=True):
        assert (got.dtype, got.device) == (want.dtype, want.device)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def values_and_gradients(op: str, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    leaves = [leaf for leaf in tensors((args, kwargs)) if leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    result = getattr(nlhf_kernels, op)(*args, **kwargs)
    backward(result)
    return [*tensors(result), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("op", [op.name for op in ops()])
def test_rooms_on_every_backend(op) -> None:
    for args, kwargs in examples(op)[:1]:
        for backend in BACKENDS:
            if nlhf_kernels.explain(op, *args, **kwargs).reasons[backend]:
                continue

            with nlhf_kernels.use_backend(backend):
                expected = values_and_gradients(op, args, kwargs)
                with defaults(torch.bfloat16, "meta"):
                    got = values_and_gradients(op, args, kwargs)
            assert_same_bits(got, expected)


@every_default
@pytest.mark.parametrize("with_hooks", [False, True])
def test_rollouts(with_hooks, dtype) -> None:
    models = tiny_pair("llama")
    batch = padded(prompts((1, 6, 9, 3, 5)))
    players = (Player(BETA, stream=1, samples=2),) if with_hooks else nash_md(BETA, samples=2)
    hooks = Hooks(processors=[lambda ids, scores: scores * 0.5]) if with_hooks else None
    asked = settings(20, end_ids=range(3, 12), min_new_tokens=2, temperature=0.9, top_p=0.95)

    def rollout() -> list:
        result = RolloutEngine(*models).rollout(**batch, players=players, settings=asked, hooks=hooks)
        return [vars(responses) for responses in result]

    with one_thread():
        expected = rollout()
        with defaults(dtype, "meta"):
            got = rollout()
    assert_same_bits(got, expected)


@every_default
def test_games_are_exact(dtype) -> None:
    make = (tabular.dice_game, lambda: tabular.random_games(2, 3), lambda: tabular.diversity_game(0.1))
    expected = [game() for game in make]
    assert float(expected[0][0, 0, 1]) == 5 / 9, "not its neighbour in float32"
    with defaults(dtype, "meta"):
        got = [game() for game in make]
    assert_same_bits(got, expected)
