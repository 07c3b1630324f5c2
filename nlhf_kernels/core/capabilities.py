"""What this machine can run: Triton, the native modules and the devices, each with the reason where it cannot."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import settings

log = logging.getLogger("nlhf_kernels")

PACKAGE = Path(__file__).resolve().parent.parent
BUILD_FACTS = PACKAGE / "_native_build.json"  # written by setup.py: what was built, what was left out and why

#: Checks that raised -> the error. `nlhf-kernels info` prints them.
failed_checks: dict[str, str] = {}


def _check(what: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Cache a check's results. A check that raises unexpectedly is recorded and counts as passed: an op that can run
    must not fail because a check did."""

    def decorate(check: Callable[..., str]) -> Callable[..., str]:
        @cache
        @wraps(check)
        def checked(*arguments: Any) -> str:
            try:
                return check(*arguments)
            except Exception as error:
                failed_checks[what] = f"{type(error).__name__}: {error}"
                log.warning("could not check %s (%s); going on without", what, failed_checks[what])
                return ""

        return checked

    return decorate


@cache
def build_facts() -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(BUILD_FACTS.read_text())
    except (OSError, ValueError) as error:
        return {"reason": f"no record of a native build ({error.__class__.__name__}); reinstall nlhf-kernels"}
    return facts


@cache
def _load_native(name: str) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(f"nlhf_kernels.{name}")
    except ImportError as error:
        facts = build_facts()
        reason = facts.get(name, {}).get("reason") or facts.get("reason") or f"it does not load: {error}"
        return None, f"the native module {name} is missing: {reason}"
    if name == "_cpu":
        module.set_level_cap(settings.simd_level)
    return module, ""


@cache
def native(name: str) -> ModuleType:
    """Return the native module `_cpu` or `_cuda`; only backends whose `why_not` is empty call this."""
    module, reason = _load_native(name)
    if module is None:
        raise ImportError(reason)
    return module


def native_missing(name: str) -> str:
    """Return why the native module cannot be used; empty where it can."""
    return _load_native(name)[1]


@_check("Triton's version")
def triton_missing() -> str:
    """Return why Triton cannot be used; empty where it can."""
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton"
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 2):
        return f"triton {version} is too old; 3.2 or newer is needed"
    return ""


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


@_check("whether _cuda fits the GPU")
def _cuda_module_misfit(index: int) -> str:
    """Return why the compiled `_cuda` does not fit GPU `index`: too old a driver, or no code for its architecture."""
    module = native("_cuda")
    info = module.build_info()
    driver = module.driver_version()  # 1000 * major + 10 * minor of the newest CUDA that it supports; 0: no driver
    if driver // 1000 < _version(info["cuda_version"])[0]:
        serves = f"the driver serves CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "there is no driver"
        return f"_cuda was built with CUDA {info['cuda_version']}, {serves}: update it or rebuild"
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    for entry in info["architectures"].split():
        architecture, _, kind = entry.partition("-")
        number = int("".join(filter(str.isdigit, architecture)))
        same_major = number // 10 == major and number <= capability
        if (kind != "virtual" and same_major) or (kind != "real" and number <= capability):
            return ""
    return (
        f"_cuda holds no code for sm_{capability} (it has {info['architectures']}); "
        f"reinstall with CUDAARCHS={capability}"
    )


def machine_reasons(backend: str, device: torch.device) -> list[str]:
    """Return why `backend` cannot run on `device` of this machine, whatever the problem; empty where it can."""
    if backend == "torch":
        return []
    if backend == "cpu":
        reasons = [native_missing("_cpu")]
        if device.type != "cpu":
            reasons.append(f"the tensors are on {device}, the backend runs on cpu")
    elif backend == "cuda":
        reasons = [native_missing("_cuda")]
        if device.type != "cuda":
            reasons.append(f"the tensors are on {device}, the backend runs on cuda")
        elif not any(reasons):
            reasons.append(_cuda_module_misfit(device.index or 0))
    else:
        reasons = [triton_missing()]
        if device.type != "cuda" and not settings.triton_interpret:
            reasons.append(f"the tensors are on {device}; Triton needs a GPU, or TRITON_INTERPRET=1 set before import")
    return [reason for reason in reasons if reason]
