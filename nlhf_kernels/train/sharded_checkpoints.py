"""Checkpoints of split models: every process writes its part with torch.distributed.checkpoint, and any number reads.

`sharded/` in a checkpoint holds the trained weights, the optimizer's state and the opponent's, under names that do not
depend on the layout; `groups.json` holds the optimizer's settings by parameter. Reading reshards to the new layout.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.vocabulary import is_dtensor
from .opponents import Opponent, trainable_parameters
from .setup import OP
from .sharded import local, reshard

FOLDER, GROUPS = "sharded", "groups.json"


def is_sharded(checkpoint: str | Path | None) -> bool:
    """Return whether a checkpoint is of split models.

    Args:
        checkpoint: its folder, or None.
    """
    return checkpoint is not None and (Path(checkpoint) / FOLDER).is_dir()


def save_sharded(folder: Path, model: Any, optimizer: Any, opponent: Opponent | None) -> None:
    """Write a checkpoint's `sharded/`. All processes must call.

    Args:
        folder: of the checkpoint, while it has no name yet.
        model: the policy.
        optimizer: its optimizer.
        opponent: or None.
    """
    dcp = _dcp()
    reshard(model)
    state = dict(_tensors(model, optimizer, opponent))
    dcp.save({name: _as_blocks(value) for name, value in state.items()}, checkpoint_id=folder / FOLDER)
    if torch.distributed.get_rank() == 0:
        (folder / GROUPS).write_text(json.dumps(_settings(model, optimizer)) + "\n")


@torch.no_grad()
def load_sharded(folder: Path, model: Any, optimizer: Any = None, opponent: Opponent | None = None) -> None:
    """Read a checkpoint's `sharded/` into what is given, however many processes wrote it. All processes must call.

    Args:
        folder: of the checkpoint.
        model: the policy.
        optimizer: its optimizer; None: the weights alone.
        opponent: or None.
    """
    dcp = _dcp()
    reshard(model)
    metadata = dcp.FileSystemReader(folder / FOLDER).read_metadata().state_dict_metadata
    if optimizer is not None:
        _make_state(model, optimizer, metadata)
        _restore_settings(model, optimizer, json.loads((folder / GROUPS).read_text()))
    targets: dict[str, Any] = dict(_tensors(model, optimizer, opponent))
    missing = sorted(targets.keys() - metadata.keys())
    if missing:
        raise ValueError(f"{OP}: {folder}: expected all of this run's state; it has no {missing[0]}")
    blocks = {name: _as_blocks(value) for name, value in targets.items()}
    dcp.load(blocks, checkpoint_id=folder / FOLDER)
    for name, target in targets.items():
        block = blocks[name]
        if block is not target:
            local(target).copy_(local(block.redistribute(placements=target.placements)))


def _dcp() -> Any:
    """Import torch.distributed.checkpoint (a second), without its warning in a single process."""
    import torch.distributed.checkpoint

    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    return torch.distributed.checkpoint


def _tensors(model: Any, optimizer: Any, opponent: Opponent | None) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in trainable_parameters(model).items():
        yield f"model/{name}", parameter.detach()
        state = {} if optimizer is None else _inner(optimizer).state.get(parameter, {})
        for kind, value in sorted(state.items()):
            if not isinstance(value, torch.Tensor) or (value.ndim and value.shape != parameter.shape):
                raise ValueError(
                    f"{OP}: optim: expected an optimizer whose state has its parameters' shapes, for split models; got "
                    f"{kind} of {type(_inner(optimizer)).__name__}"
                )
            yield f"optimizer/{name}/{kind}", value
    for name, value in ({} if opponent is None else opponent.state()).items():
        yield f"opponent/{name}", value


def _inner(optimizer: Any) -> Any:
    """Return PyTorch's optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _as_blocks(value: torch.Tensor) -> Any:
    """Return a DTensor whose part on every process is one block, as torch.distributed.checkpoint describes parts.

    Under tensor parallelism and FSDP2 together a process's part may be strided: parts of parts along one dimension.
    """
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Replicate, Shard

    plain = tuple(part if type(part) in (Replicate, Shard) else Shard(part.dim) for part in value.placements)
    return value if plain == tuple(value.placements) else value.redistribute(placements=plain)


def _make_state(model: Any, optimizer: Any, metadata: Mapping[str, Any]) -> None:
    """Create the state that an optimizer lacks before its first step, as buffers to read the checkpoint into."""
    state = _inner(optimizer).state
    for name, parameter in trainable_parameters(model).items():
        prefix = f"optimizer/{name}/"
        for key in (key for key in metadata if key.startswith(prefix)):
            dtype, size = metadata[key].properties.dtype, metadata[key].size
            if len(size):
                state[parameter][key.removeprefix(prefix)] = torch.zeros_like(parameter, dtype=dtype).detach()
            else:
                device = "cpu" if not _inner(optimizer).defaults.get("fused") else local(parameter).device
                state[parameter][key.removeprefix(prefix)] = torch.zeros((), dtype=dtype, device=device)


def _settings(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return the current settings (learning rate and the like) of every parameter's group."""
    names = {id(value): name for name, value in trainable_parameters(model).items()}
    return {
        names[id(parameter)]: {key: value for key, value in group.items() if key != "params"}
        for group in _inner(optimizer).param_groups
        for parameter in group["params"]
    }


def _restore_settings(model: Any, optimizer: Any, settings: Mapping[str, Any]) -> None:
    names = {id(value): name for name, value in trainable_parameters(model).items()}
    for group in _inner(optimizer).param_groups:
        for parameter in group["params"][:1]:
            group.update({key: value for key, value in settings[names[id(parameter)]].items() if key != "foreach"})
