"""Short texts that identify objects for comparison: weights by checksum, functions by name and source."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import types
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .vocabulary import is_dtensor

THREADS = 4  # crc32 releases the GIL
_NOT_OF_ADAPTERS = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
)  # fmt: skip


def weights_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a digest of all names, shapes, dtypes and bytes, whatever the device and the sharding.

    For sharded weights it is collective: all processes must call it.
    """
    named = [(name, _Digested(value, crc_of(value)) if is_dtensor(value) else value) for name, value in weights]
    with ThreadPoolExecutor(THREADS) as pool:
        checksums = pool.map(
            lambda item: item[1].checksum if isinstance(item[1], _Digested) else crc_of(item[1]), named
        )
    lines = [f"{n} {tuple(v.shape)} {v.dtype} {c:08x}" for (n, v), c in zip(named, checksums, strict=True)]
    return digest("\n".join(sorted(lines)))


class _Digested:
    """The shape, dtype and checksum of a sharded weight. Such weights are gathered one at a time."""

    def __init__(self, value: torch.Tensor, checksum: int) -> None:
        self.shape, self.dtype, self.checksum = value.shape, value.dtype, checksum


def start_digest(model: torch.nn.Module, adapted: bool) -> str:
    """Return the digest of a training's initial weights; with adapters only the base's, as a checkpoint holds the
    adapters."""
    named = model.named_parameters()
    return weights_digest((name, value) for name, value in named if not (adapted and value.requires_grad))


def adapter_settings(model: Any) -> dict[str, Any]:
    """Return the settings that decide what peft's adapters compute, by the adapters' names."""
    found = {}
    for adapter, config in getattr(model, "peft_config", {}).items():
        values = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
        found[adapter] = {name: value for name, value in values.items() if name not in _NOT_OF_ADAPTERS}
    return found


def as_json(identity: dict[str, Any]) -> dict[str, Any]:
    """Return `identity` as it will be read back from a checkpoint."""
    read: dict[str, Any] = json.loads(json.dumps(identity, default=lambda value: type(value).__name__))
    return read


def describe(value: Any) -> str:
    """Describe a function, a model or an object that is called. An attribute `identity` replaces what is derived.

    The closure of a function and the functions it calls are not included.
    """
    known = getattr(value, "identity", None)
    if isinstance(known, str):
        return known
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__name__} {weights_digest(value.named_parameters())}"
    if isinstance(value, types.MethodType):
        return f"{value.__name__} of {describe(value.__self__)}"
    if isinstance(value, functools.partial):
        return f"{describe(value.func)} {digest(repr((value.args, value.keywords)))}"
    kind = value if isinstance(value, types.FunctionType | type) else type(value)
    try:
        source = digest(inspect.getsource(kind))
    except (OSError, TypeError):
        source = "without source"
    return f"{kind.__module__}.{kind.__qualname__} {source}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def crc_of(tensor: torch.Tensor, before: int = 0) -> int:
    """Return the CRC-32 of a tensor's bytes, after others whose CRC-32 is `before`; collective for a sharded one."""
    tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, before)
