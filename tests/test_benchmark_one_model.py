"""The comparison at one model's log-probabilities: a tiny run, faults of single rivals, and how rivals are called."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import one_model
from benchmarks.harness.results import Speedup, read_rows
from benchmarks.harness.runner import Settings, open_run
from benchmarks.harness.timing import TimingPlan
from benchmarks.rivals import scores
from tests.support import rivals

CPU = torch.device("cpu")


def test_every_contender_has_a_time_or_a_reason(tmp_path) -> None:
    out = tmp_path / "rows.jsonl"
    assert one_model.main(["--preset", "tiny", "--device", "cpu", "--out", str(out)]) == 0
    rows = {(row.key.shape.rpartition("=")[2], row.key.implementation): row for row in read_rows(out)}
    assert set(rows) == {(job, name) for job, names in one_model.CONTENDERS.items() for name in names}
    for (_, name), row in rows.items():
        if name in (*one_model.OURS.values(), "eager"):
            assert row.status == "ok" and row.timing.median_us > 0 and row.memory.peak_bytes > 0
            assert row.accuracy.error <= row.accuracy.allowed
            assert row.floor.flops == 3 * 2 * 12 * 16 * 999, "logits, gradients of hidden states and head"
        else:
            assert row.status == "unavailable" and "needs a GPU" in row.reasons
        assert row.chosen == (name in one_model.OURS.values()) == (row.kind == "backend")


def test_a_rival_that_fails_costs_its_own_row(monkeypatch) -> None:
    faults = {"ours": "", "eager": "slow", "fast": "fast", "killed": "killed", "wrong": "wrong", "nan": "nan",
              "absent": "absent", "late": "compiles"}  # fmt: skip
    contenders = {name: one_model.Contender(fault) for name, fault in faults.items()}
    monkeypatch.setattr(one_model, "CONTENDERS", {"tokens": contenders})
    monkeypatch.setattr(one_model, "OURS", {"tokens": "ours"})
    monkeypatch.setattr(one_model, "Worker", rivals.make_scorer)
    context = open_run(Settings(CPU, "tiny"), [])
    context.ceilings.matmul_flops_per_s["float32"] = 1e9
    plan = TimingPlan(budget_s=0.0, min_repeats=2, max_repeats=2, warmups=1, batch_s=0.0, flush_bytes=0)
    run = partial(one_model.run_shape, one_model.SHAPES["tiny"][0], context, plan)
    rows = {row.key.implementation: row for row in run([name for name in faults if name != "late"])}
    assert {name: row.status for name, row in rows.items()} == {
        "ours": "ok", "eager": "ok", "fast": "ok", "killed": "failed", "wrong": "red", "nan": "red",
        "absent": "unavailable",
    }  # fmt: skip
    assert rows["killed"].reasons == ("its process ended with SIGKILL",)
    assert rows["wrong"].reasons[0].startswith("error 0.5, allowed ")
    assert rows["absent"].reasons == ("ModuleNotFoundError: No module named 'cutlass'",)
    assert rows["fast"].speedup == Speedup(2.0, None) and rows["ours"].timing.repeats == 2
    late = run(["late"], patience=0.0)  # ours is waited for all the same
    assert [(row.key.implementation, row.status) for row in late] == [("ours", "ok"), ("late", "failed")]
    assert late[1].reasons == ("not ready in time",)


def test_a_card_that_is_no_hopper_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    contender = one_model.Contender(one_model.eager, packages=("torch", "no_such_module"), install="x", hopper=True)
    assert contender.why_not(torch.device("cuda")) == (
        "no_such_module: not installed (pip install 'x')",
        "needs compute capability 9.0; got 8.0",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not one_model.Contender(one_model.eager, packages=("torch",), hopper=True).why_not(torch.device("cuda"))


# ---- how rivals are called -------------------------------------------------------------------------------------------


def negative_log_likelihood(hidden, weight, targets, reduction="none"):
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction=reduction)


def scaled(x, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1):
    assert (temperature, ignore_index) == (1.0, -100)
    return negative_log_likelihood(x, weight, target)


def fused(x, weight, target, ignore_index=-100, reduction="mean"):
    return negative_log_likelihood(x, weight, target, reduction)


def linear_cross_entropy_func(x, weight, bias, target, ignore_index=-100, reduction="mean", inplace_backward=False):
    assert bias is None and inplace_backward
    return negative_log_likelihood(x, weight, target, reduction)


def chunked_linear_cross_entropy(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):
    return negative_log_likelihood(x, weight, target, reduction)


class LigerFusedLinearCrossEntropyLoss:
    def __init__(self, reduction="mean", accum_dtype=None):
        assert reduction == "none"

    def __call__(self, lin_weight, _input, target, bias=None):
        return negative_log_likelihood(_input, lin_weight, target)


_CUTE = "liger_kernel.ops.cutedsl.ops"
CALLS = {
    "liger_sm90": (
        f"{_CUTE}.fused_scaled_cross_entropy_sm90",
        {"LigerFusedScaledCrossEntropySM90Function": SimpleNamespace(apply=scaled)},
    ),
    "liger_sm90_sum": (
        f"{_CUTE}.fused_linear_cross_entropy_sm90",
        {"LigerFusedLinearCrossEntropySM90Function": SimpleNamespace(apply=fused)},
    ),
    "liger_triton": (
        "liger_kernel.transformers.fused_linear_cross_entropy",
        {"LigerFusedLinearCrossEntropyLoss": LigerFusedLinearCrossEntropyLoss},
    ),
    "quack": ("quack.linear_cross_entropy", {"linear_cross_entropy_func": linear_cross_entropy_func}),
    "quack_sum": ("quack.linear_cross_entropy", {"chunked_linear_cross_entropy": chunked_linear_cross_entropy}),
}


@pytest.mark.parametrize("name", CALLS)
def test_rivals_are_called_as_their_sources_say(name, monkeypatch) -> None:
    """Functions with the names and parameters of the packages' sources, computed by PyTorch, give eager's scores."""
    path, contents = CALLS[name]
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(".".join(parts[:count])))
    for attribute, value in contents.items():
        setattr(sys.modules[path], attribute, value)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(3, 4, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (3, 4), generator=generator)
    expected = one_model.eager(hidden, weight, targets)
    expected = expected.sum() if name.endswith("sum") else expected
    torch.testing.assert_close(getattr(scores, name)(hidden, weight, targets), expected)


@pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="QuACK is not installed")
def test_quack_has_these_parameters() -> None:
    module = pytest.importorskip("quack.linear_cross_entropy")
    for name, stand_in in (
        ("linear_cross_entropy_func", linear_cross_entropy_func),
        ("chunked_linear_cross_entropy", chunked_linear_cross_entropy),
    ):
        assert list(inspect.signature(getattr(module, name)).parameters) == list(inspect.signature(stand_in).parameters)
