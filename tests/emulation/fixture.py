"""The emulated `_cuda`, built once a session."""

from __future__ import annotations

import ctypes
import importlib.util
from types import ModuleType
from typing import NamedTuple

import pytest

from .build import build_module

ROOMY, CRAMPED = 0, 1  # the emulated devices, see emulator.h


class Emulation(NamedTuple):
    module: ModuleType  # `_cuda`
    library: ctypes.CDLL  # the same file: the emulator's switches and the kernels of planted.cpp


@pytest.fixture(scope="session")
def built_emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    path = build_module(tmp_path_factory.mktemp("cuda_emulation"))
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    library.emulation_last_fault.restype = ctypes.c_char_p
    library.planted_bfloat16.restype = library.planted_half.restype = ctypes.c_float
    library.planted_bfloat16.argtypes = library.planted_half.argtypes = [ctypes.c_float]
    return Emulation(module, library)


@pytest.fixture
def emulation(built_emulation: Emulation) -> Emulation:
    built_emulation.library.emulation_set_device(ROOMY)
    built_emulation.library.emulation_set_seed(ctypes.c_uint64(20240501))  # blocks and threads in a shuffled order
    return built_emulation
