"""The command that splits the host's time of a call runs every call that it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from nlhf_kernels.core import capabilities

pytest.importorskip("triton")


@pytest.mark.skipif(bool(capabilities.native_missing("_cpu")), reason="the CPU backend is not built")
def test_every_call_has_a_time() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.host_cost", "--batches", "1", "--size", "2"],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    times = {name: float(time) for name, time in re.findall(r"^(.+?) +([\d.]+)$", result.stdout, re.M)}
    for backend in ("triton", "cuda", "cpu"):
        assert times[f"{backend}: operator"] > 0
    for layer in ("rms_norm", "silu_product", "rotate", "store_slot", "decode_attention", "decode_linear"):
        assert times[layer] > 0
