"""Run checks in several processes over gloo: one launch runs many checks, each reported by its name.

A test file lists its checks, functions without arguments, and ends with `processes.main(CHECKS)`: its children are
`python -m tests.test_X`. Every process runs every check, in order; a failed check is reported with its traceback.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240  # seconds, for all checks of a file


def run_checks(module: str, processes: int) -> dict[str, list[str]]:
    """Start the processes and return each check's report by process: "" or a traceback."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        shared |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        children = [
            subprocess.Popen(
                [sys.executable, "-m", module, folder],
                cwd=ROOT,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            errors = [child.communicate(timeout=TIMEOUT)[1] for child in children]
        finally:
            for child in children:
                child.kill()
        written = [path for rank in range(processes) if (path := Path(folder, f"{rank}.json")).exists()]
        reports = [json.loads(path.read_text()) for path in written]
    failed = [f"process {rank}:\n{error}" for rank, error in enumerate(errors) if children[rank].returncode]
    assert not failed or any(text for report in reports for text in report.values()), "\n".join(failed)
    return {name: [report.get(name, "not reached") for report in reports] for name in reports[0]}


def assert_passed(reports: dict[str, list[str]], check: Callable[[], None]) -> None:
    failed = [f"process {rank}: {text}" for rank, text in enumerate(reports[check.__name__]) if text]
    assert not failed, "\n".join(failed)


def collectives(run: Callable[[], object]) -> int:
    """Count the collectives in which `run()` takes part. PyTorch's CommDebugMode miscounts transformers' modules."""
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(issubclass(kind, DTensor) for kind in types):
                return NotImplemented  # dispatched again as the collectives and products it consists of
            sends = not any(part in func.__name__ for part in ("wait_tensor", "wrap_tensor"))
            self.count += sends and func.namespace in ("c10d", "_c10d_functional")
            return func(*args, **(kwargs or {}))

    with Counting() as mode:
        run()
    return mode.count


def main(checks: Sequence[Callable[[], None]]) -> None:
    import torch

    from nlhf_kernels.core.processes import leave_process_group

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    report: dict[str, str] = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            check()
            report[check.__name__] = ""
        except Exception:
            report[check.__name__] = traceback.format_exc()
            break  # the other processes may still wait in this check, so a further one could deadlock
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(report))
    leave_process_group()
