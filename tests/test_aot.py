"""Every Triton kernel compiles for every GPU generation served, with the argument attributes of a real launch."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from nlhf_kernels.core.registry import ops

pytest.importorskip("triton")


def test_every_kernel_compiles_for_every_architecture_without_spilling(tmp_path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.aot"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
    rooms = [op.name for op in ops() if "triton" not in op.absent and not op.built_on]
    for name in (*rooms, "engine_layers"):
        for architecture in (80, 90, 100, 120):
            assert re.search(rf"^{name} .* sm_{architecture}:", result.stdout, re.M), (name, architecture)
    spilled = [line for line in result.stdout.splitlines() if re.search(r", [1-9]\d* bytes of stack", line)]
    assert not spilled, "\n".join(spilled)
