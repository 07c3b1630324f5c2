"""Select Triton's interpreter on a machine without a GPU, before anything imports triton; shared fixtures."""

from __future__ import annotations

import os

import pytest
import torch

from tests.emulation.fixture import built_emulation, emulation  # noqa: F401  (fixtures for every test file)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU that PyTorch sees"))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--failures-at-once") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAtOnce(config))


class _FailuresAtOnce:
    """Print each failure when it happens: a run that is ended by its time limit has no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._print(report, report.when)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._print(report, "collection")

    def _print(self, report: pytest.TestReport | pytest.CollectReport, when: str | None) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        last_line = (report.longreprtext.strip().splitlines() or [""])[-1]  # of a file that does not import
        message = " ".join((last_line if crash is None else crash.message).split())[:300]
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write(f"\nfailed: {report.nodeid} ({when}): {message}\n{report.longreprtext}\n", flush=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures-at-once", action="store_true", help="print each failure when it happens")
    parser.addoption("--kills", type=int, default=4, help="random kills that each run of tests/test_kills.py survives")
    parser.addoption("--fuzz-seconds", type=float, default=20, help="time for the random calls of tests/test_fuzz.py")
    parser.addoption("--fuzz-backends", default="torch,cpu,cuda,triton", help="of these calls, with commas between")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def simd_level(request: pytest.FixtureRequest):
    """Run the CPU kernels at one instruction set (indirect parameter), or skip if this machine lacks it."""
    from nlhf_kernels.core import capabilities, settings

    if reason := capabilities.native_missing("_cpu"):
        pytest.skip(reason)
    cpu = capabilities.native("_cpu")
    cpu.set_level_cap(request.param)
    if cpu.active_level() != request.param:
        pytest.skip(f"this CPU's highest level is {cpu.best_level()}")
    yield request.param
    cpu.set_level_cap(settings.simd_level)
