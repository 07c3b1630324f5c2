"""The harness's features for the linear ops: third-party rivals, variants, blocked truths, growth."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.cases import all_cases
from benchmarks.harness import check, growth, implementations, modes, results
from benchmarks.harness.case import Baseline, Inputs, Shape, Variant
from benchmarks.harness.library import BackendReport
from benchmarks.rivals import models, scores
from tests.test_benchmarks import CPU, row_with, toy_case

SHAPE = models.linear_shape(12, 4, 8, 50, "float32")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def problem_of(case: Any, shape: Shape) -> modes.Problem:
    return modes.make_problem(case, shape, CPU, generator())


def collected(monkeypatch, mode: str, **changes: Any) -> dict[str, implementations.Implementation]:
    report = BackendReport({"cpu": [], "cuda": ["no GPU"]}, "cpu")
    monkeypatch.setattr(implementations, "backend_report", lambda *call: report)
    monkeypatch.setattr(implementations, "backend_call", lambda function, name: partial(torch.softmax, dim=-1))
    return implementations.collect(toy_case(**changes), Inputs((torch.ones(2, 3),)), mode, (), False)


# --- the harness


def test_a_rival_that_cannot_run_says_why(monkeypatch) -> None:
    absent = Baseline(torch.sigmoid, why_not=lambda inputs: ("needs a GPU",))
    implementations = collected(monkeypatch, "forward", baselines={"eager": Baseline(torch.sigmoid), "absent": absent})
    assert (implementations["absent"].function, implementations["absent"].reasons) == (None, ("needs a GPU",))
    assert implementations["eager"].function is torch.sigmoid


def test_variants_stand_beside_backends_that_run(monkeypatch) -> None:
    variants = {"doubled": Variant(lambda function: lambda x: function(2 * x), ("full",))}
    implementations = collected(monkeypatch, "full", variants=variants)
    assert implementations["cpu, doubled"].kind == "variant"
    assert "cuda, doubled" not in implementations, "the plain row says why"
    assert "cpu, doubled" not in collected(monkeypatch, "forward", variants=variants)


def test_gradients_flow_where_the_truth_lets_them() -> None:
    """Only outputs differentiable in the truth get upstream gradients, even if the implementation has more."""

    def truth(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.detach().exp(), x.square()

    problem = problem_of(toy_case(truth=truth, modes=("full",), gradients_of=(0,)), Shape({"rows": 2, "columns": 3}))
    assert list(problem.upstream) == [1]
    x = problem.inputs.args[0]
    (gradient,) = problem.action(lambda x: (x.exp(), x.square()), "full").run(None)
    torch.testing.assert_close(gradient, 2 * x * problem.upstream[1].float())


def test_a_shape_narrows_what_gets_gradients() -> None:
    case = all_cases()["linear_logprobs"]
    frozen = replace(SHAPE, gradients_of=models.linear_shape(12, 4, 8, 50, "float32", head="frozen").gradients_of)
    for shape, count in ((SHAPE, 2), (frozen, 1)):
        assert len(problem_of(case, shape).action(scores.full_logits, "full").run(None)) == count


def test_errors_of_large_tensors_are_found_block_by_block(monkeypatch) -> None:
    monkeypatch.setattr(check, "BLOCK", 3)
    truth = torch.arange(8.0, dtype=torch.float64)
    assert check.relative_error((truth.float(),), (truth,)) == 0
    assert check.relative_error((truth + 0.7 * (truth == 7),), (truth,)) == pytest.approx(0.1)
    assert check.relative_error((truth / (truth != 4),), (truth,)) == float("inf")


# --- the rivals


def test_blocked_truths_are_the_plain_forms(monkeypatch) -> None:
    """Values and gradients are equal, with blocks that split a sequence, and with only one model given."""
    inputs = models.make_models(SHAPE, CPU, generator())
    double = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    monkeypatch.setattr(scores, "TRUTH_BLOCK", 8 * 50 * 5)
    for tensors, kl in ((double, True), (double[:3], False)):
        results = []
        for function in (scores.true_scores, scores.full_logits):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors[:2]]
            result = function(*leaves, *tensors[2:], kl=kl)
            outputs = [output for output in (result.policy, result.kl) if output is not None]
            upstream = [torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4) for _ in outputs]
            outputs_and_gradients = [part for part in result if part is not None]
            results.append([*outputs_and_gradients, *torch.autograd.grad(outputs, leaves, upstream)])
        for blocked, plain in zip(*results, strict=True):
            torch.testing.assert_close(blocked, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_selective_form_is_the_plain_one(dtype, allowed) -> None:
    logits = torch.randn(2, 5, 40, generator=generator()).to(dtype)
    targets = torch.randint(40, (2, 5), generator=generator())
    ours, plain = scores.selective_from_logits(logits, targets, logits), scores.from_logits(logits, targets, logits)
    torch.testing.assert_close(ours.policy.float(), plain.policy, rtol=0, atol=allowed)
    torch.testing.assert_close(ours.reference.float(), plain.reference, rtol=0, atol=allowed)


def test_matmul_floor_counts_the_products_that_are_needed() -> None:
    unit = 2 * 12 * 8 * 50
    for options, products in (
        ({}, 4),
        ({"head": "frozen"}, 3),
        ({"reference": "logprobs"}, 3),
        ({"head": "frozen", "reference": "logprobs"}, 2),
    ):
        shape = models.linear_shape(12, 4, 8, 50, "float32", **options)
        flops = {mode: models.matmul_flops(shape, mode) for mode in ("forward", "backward", "full")}
        assert flops["full"] == flops["forward"] + flops["backward"] == products * unit


def test_rivals_that_need_a_gpu_say_so() -> None:
    reasons = scores.why_not("liger_kernel")(Inputs((torch.ones(1),), {"kl": "exact"}))
    assert any("needs a GPU" in reason for reason in reasons)
    assert any("KL over the vocabulary" in reason for reason in reasons)


# --- growth


def grown(**sizes: Any) -> list[results.ResultRow]:
    shape = " ".join(f"{name}={value}" for name, value in sizes.items())
    rows = [row_with(float(median), implementation=name, shape=shape) for name, median in (("eager", 9), ("cpu", 3))]
    return [replace(row, run=replace(row.run, preset="growth")) for row in rows]


def test_growth_is_drawn_size_by_size(tmp_path) -> None:
    rows = [row for n in (1, 2, 4) for row in grown(n=n, v=8)] + [row for v in (2, 16) for row in grown(n=4, v=v)]
    blocks = growth.sweeps(rows)
    assert {label: len(block) for label, block in blocks.items()} == {
        "n, at v=8 float32, forward": 6,
        "v, at n=4 float32, forward": 6,
    }
    results.append_rows(tmp_path / "grown.jsonl", rows)
    assert run.main(["--plot", str(tmp_path / "grown.jsonl"), "--plot-dir", str(tmp_path / "plots")]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "growth_toy_cpu1.png",
        "growth_toy_cpu1.svg",
    ]
    assert growth.growth_figure(grown(n=1, v=8), {"cpu": "#000000"}, "here") is None


@pytest.mark.parametrize("name", [name for name, case in all_cases().items() if "growth" in case.shapes])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_growth_varies_one_size_at_a_time(name, device) -> None:
    shapes = [shape for shape in all_cases()[name].shapes["growth"] if device in shape.devices]
    base = row_with(1.0)
    rows = [replace(base, key=replace(base.key, shape=shape.label, dtype=shape.dtype)) for shape in shapes]
    varied = [label.partition(",")[0] for label in growth.sweeps(rows)]
    assert sorted(varied) == sorted(set(varied)) and {"tokens", "vocabulary"} <= set(varied)
    assert all(int(shape.sizes["tokens"]) % int(shape.sizes["length"]) == 0 for shape in shapes)
