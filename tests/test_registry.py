"""The registry: auto takes the first usable backend, an explicit one never falls back, errors contain the reasons."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.cli import info
from nlhf_kernels.core import capabilities, settings
from nlhf_kernels.core.registry import Backend, BackendUnavailable, Measured, Op, get_op, ops


class ToyProblem(NamedTuple):
    device: torch.device
    size: int


def toy(limits=lambda problem: [], order=("cpu", "torch")) -> Op:
    here = f"{__name__}:"
    return Op(
        name="toy",
        backends=(Backend("torch", here + "run_torch"), Backend("cpu", here + "run_cpu", limits)),
        order={"cpu": order},
        describe=lambda size: ToyProblem(torch.device("cpu"), size),
        absent={"triton": "a loop over a list gains nothing from it", "cuda": "likewise"},
    )


def run_torch() -> str:
    return "torch"


def run_cpu() -> str:
    return "cpu"


@pytest.fixture(autouse=True)
def _with_native_module(monkeypatch) -> None:
    monkeypatch.setattr(capabilities, "native_missing", lambda name: "" if name == "_cpu" else "not built")


def test_auto_takes_the_first_that_can() -> None:
    op = toy(lambda problem: ["size: at most 3"] if problem.size > 3 else [])
    on_cpu = lambda size: op.resolve(None, ToyProblem(torch.device("cpu"), size)).run()  # noqa: E731
    assert on_cpu(3) == "cpu"
    assert on_cpu(4) == "torch"


def test_auto_logs_its_choice_once_per_problem(caplog) -> None:
    op = toy()
    with caplog.at_level(logging.INFO, logger="nlhf_kernels"):
        for size in (1, 1, 2):
            op.resolve(None, ToyProblem(torch.device("cpu"), size))
    assert [record.getMessage().count("auto chose cpu") for record in caplog.records] == [1, 1]


def test_explicit_backend_raises_with_every_reason() -> None:
    op = toy(lambda problem: [f"size: at most 3; got {problem.size}"])
    with pytest.raises(BackendUnavailable) as raised:
        op.resolve("cpu", ToyProblem(torch.device("cpu"), 4))
    message = str(raised.value)
    for part in ("'cpu' cannot run", "size: at most 3; got 4", "gains nothing from it", "torch      can run"):
        assert part in message
    with pytest.raises(BackendUnavailable, match="gains nothing"):
        op.resolve("triton", ToyProblem(torch.device("cpu"), 1))


def test_precedence_argument_scope_process() -> None:
    op, problem = toy(), ToyProblem(torch.device("cpu"), 1)
    try:
        nlhf_kernels.set_backend("torch")
        assert op.resolve(None, problem).name == "torch"
        with nlhf_kernels.use_backend("cpu"):
            assert op.resolve(None, problem).name == "cpu"
            assert op.resolve("torch", problem).name == "torch"
            with nlhf_kernels.use_backend("auto"):
                assert op.resolve(None, problem).name == "cpu"
        assert op.resolve(None, problem).name == "torch"
    finally:
        nlhf_kernels.set_backend("auto")


def test_scope_ends_with_an_exception_and_stays_in_its_thread() -> None:
    seen = []
    with pytest.raises(ZeroDivisionError), nlhf_kernels.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(settings.requested(None).backend))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert seen == ["auto"]
    assert settings.requested(None).backend == "auto"


@pytest.mark.parametrize(
    "function", [nlhf_kernels.set_backend, lambda name: nlhf_kernels.use_backend(name).__enter__()]
)
@pytest.mark.parametrize("value", ["tritn", "", None, 3])
def test_unknown_backend_is_refused(function, value) -> None:
    with pytest.raises(ValueError, match=r"expected one of auto, torch, triton, cuda, cpu; got"):
        function(value)


def test_an_op_must_account_for_all_four_backends() -> None:
    with pytest.raises(ValueError, match="a backend or a reason for each"):
        Op("half", (Backend("torch", "x:y"),), {}, lambda: None)
    with pytest.raises(ValueError, match="must end with torch"):
        toy(order=("torch", "cpu"))


def test_the_order_follows_measurements_per_problem() -> None:
    """GPU samplers are tried in the order of their measured speeds; unusable ones are skipped."""
    op = get_op("mixture_sample")
    problem = op.describe(torch.zeros(1, 5)).__class__(torch.device("cuda", 0), (torch.bfloat16,) * 2, 128_256, False)
    for filtered, order in ((False, ("triton", "cuda", "torch")), (True, ("cuda", "triton", "torch"))):
        found, words = op.order_of(problem._replace(filtered=filtered))
        assert found == order
        assert words.startswith(" > ".join(order)) and "H200" in words and "2026-11-26" in words
    games = get_op("mirror_descent")
    problem = games.describe(torch.zeros(1, 5))._replace(device=torch.device("cuda", 0))
    assert "H200" in games.order_of(problem)[1] and "H200" not in games.order_of(problem._replace(actions=2048))[1]
    explanation = nlhf_kernels.explain("mixture_sample", torch.zeros(1, 5), top_k=3)
    assert "order of auto: cpu > torch\n" in str(explanation)
    small = Measured("cpu", "small", lambda problem: problem.size < 3, ("torch",), "here")
    measured = replace(toy(), measured=(small,))
    assert [measured.resolve(None, ToyProblem(torch.device("cpu"), size)).name for size in (2, 3)] == [
        "torch",
        "cpu",
    ]
    with pytest.raises(ValueError, match="must end with torch"):
        replace(toy(), measured=(replace(small, order=("cpu",)),))


def test_decisions_do_not_grow_without_end(monkeypatch) -> None:
    monkeypatch.setattr("nlhf_kernels.core.registry._MAX_DECISIONS", 10)
    op = toy()
    for size in range(100):
        op.resolve(None, ToyProblem(torch.device("cpu"), size))
    assert len(op._decisions) <= 10


def test_explain_does_not_run_and_names_its_choice() -> None:
    args = torch.tensor(1), torch.arange(3), torch.tensor(2)
    explanation = nlhf_kernels.explain("row_uniforms", *args, backend="torch")
    assert explanation.chosen == "torch"
    assert "-> torch      can run" in str(explanation)
    assert "requested: torch (the argument backend)" in str(explanation)
    refused = nlhf_kernels.explain("row_uniforms", *args, backend="cuda")
    assert refused.chosen is None
    assert refused.reasons["cuda"]
    with pytest.raises(ValueError, match="op: expected one of .*row_uniforms.*; got 'row_uniform'"):
        nlhf_kernels.explain("row_uniform", *args)
    with pytest.raises(ValueError, match="explain: backend: expected one of"):
        nlhf_kernels.explain("row_uniforms", *args, backend="gpu")


def test_every_public_op_is_registered() -> None:
    for op in ops():
        assert get_op(op.name) is op
        assert op.name in nlhf_kernels.__all__


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        ("80-real 90-real 100-real 120", (8, 0), True),
        ("80-real 90-real 100-real 120", (8, 6), True),
        ("80-real 90-real 100-real 120", (9, 0), True),
        ("80-real 90-real 100-real 120", (12, 1), True),
        ("80-real 90-real 100-real 120", (7, 5), False),
        ("80-real 90-real 100-real 120", (11, 0), False),
        ("90-real", (8, 0), False),
        ("90a-real", (9, 0), True),
        ("80-virtual", (9, 0), True),
        ("80", (12, 0), True),
    ],
)
def test_compiled_architectures_are_held_against_the_gpu(monkeypatch, architectures, capability, fits) -> None:
    monkeypatch.setattr(capabilities, "native", lambda name: built_cuda(architectures))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = misfit()
    assert (reason == "") is fits
    if not fits:
        assert f"sm_{capability[0]}{capability[1]}" in reason


def built_cuda(architectures: str = "90", driver: int = 13000) -> SimpleNamespace:
    """Simulate the build and driver information of the module `_cuda`."""
    facts = {"cuda_version": "13.0", "architectures": architectures}
    return SimpleNamespace(build_info=lambda: facts, driver_version=lambda: driver)


def misfit() -> str:
    capabilities._cuda_module_misfit.cache_clear()
    try:
        return capabilities._cuda_module_misfit(0)
    finally:
        capabilities._cuda_module_misfit.cache_clear()


@pytest.mark.parametrize(("driver", "says"), [(12080, "the driver serves CUDA 12.8"), (0, "there is no driver")])
def test_a_driver_that_is_too_old_or_missing_is_a_reason(monkeypatch, driver, says) -> None:
    monkeypatch.setattr(capabilities, "native", lambda name: built_cuda(driver=driver))
    assert f"built with CUDA 13.0, {says}: update it or rebuild" in misfit()


def test_the_driver_says_its_version_through_the_module() -> None:
    if reason := capabilities._load_native("_cuda")[1]:
        pytest.skip(reason)
    version = capabilities._load_native("_cuda")[0].driver_version()
    assert version >= 12000 if torch.cuda.is_available() else version >= 0


def test_a_check_that_fails_is_noted_and_lets_the_op_run(monkeypatch, caplog) -> None:
    """A failing check is logged and the op still runs; a module without the function simulates the failure."""
    monkeypatch.setattr(capabilities, "failed_checks", {})
    monkeypatch.setattr(capabilities, "native", lambda name: SimpleNamespace(build_info=lambda: {"cuda_version": "13"}))
    assert misfit() == ""
    (noted,) = capabilities.failed_checks.items()
    assert noted == (
        "whether _cuda fits the GPU",
        "AttributeError: 'types.SimpleNamespace' object has no attribute 'driver_version'",
    )
    assert "could not check whether _cuda fits the GPU" in caplog.text
    assert "could not check whether _cuda fits the GPU: AttributeError" in info._backends().caption


IMPORT_WITHOUT = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import torch, nlhf_kernels
args = torch.tensor(1), torch.arange(3), torch.tensor(2)
print(nlhf_kernels.explain("row_uniforms", *args))
print(nlhf_kernels.row_uniforms(*args).shape[0])
"""


def test_package_works_without_triton_and_native_modules() -> None:
    blocked = ["triton", "nlhf_kernels._cpu", "nlhf_kernels._cuda", "transformers"]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT.format(blocked=blocked)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("3\n")
    assert "triton does not import" in result.stdout
    assert "the native module _cpu is missing" in result.stdout
    assert "-> torch" in result.stdout


def test_import_touches_neither_triton_nor_the_gpu() -> None:
    code = "import sys, torch, nlhf_kernels; print('triton' in sys.modules, torch.cuda.is_initialized())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print('triton' in sys.modules, False)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == before.stdout


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NLHF_KERNELS_BACKEND", "gpu", "NLHF_KERNELS_BACKEND: expected one of auto, torch"),
        ("NLHF_KERNELS_SIMD", "sse", "NLHF_KERNELS_SIMD: expected one of baseline, avx2, avx512; got 'sse'"),
    ],
)
def test_bad_environment_is_refused_at_import(variable, value, message) -> None:
    import os

    result = subprocess.run(
        [sys.executable, "-c", "import nlhf_kernels"],
        capture_output=True,
        text=True,
        env={**os.environ, variable: value},
    )
    assert result.returncode != 0
    assert message in result.stderr


def test_environment_chooses_backend_and_simd_level() -> None:
    import os

    code = (
        "import torch, nlhf_kernels as n; from nlhf_kernels.core import capabilities as c;"
        "a = torch.tensor(1), torch.arange(3), torch.tensor(2);"
        "print(n.explain('row_uniforms', *a).chosen, c.native_missing('_cpu') or c.native('_cpu').active_level())"
    )
    environment = {**os.environ, "NLHF_KERNELS_BACKEND": "torch", "NLHF_KERNELS_SIMD": "baseline"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split()[0] == "torch"
    if "missing" not in result.stdout:
        assert result.stdout.split()[1] == "baseline"
