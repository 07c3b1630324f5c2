"""The checkpoint of a preference model's training: one safetensors file, replaced atomically at intervals of steps.

It holds weights, optimiser state, generator states and the losses so far. The order of the pairs follows from the seed
and the number of steps done. A checkpoint of another training is refused, with what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from array import array
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.atomic import atomic_file
from ..core.checks import check_integer
from ..core.identity import adapter_settings, as_json, crc_of, start_digest
from ..core.lock import lock_place
from ..core.manifest import DamagedError
from ..core.optional import need
from .models import ComparisonModel, Rows

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Path and interval of the checkpoint; without a path no state is written."""

    path: Path | None
    every: int  # steps
    identity: dict[str, Any]  # what must be equal for a resumed training to be the same training

    @classmethod
    def of(
        cls, path: str | Path | None, every: int, model: ComparisonModel, settings: Any, encoded: Sequence[Rows]
    ) -> Checkpoint:
        check_integer("train_preference_model", "checkpoint_every", every, 1, 10**9)
        if path is None:
            return cls(None, every, {})
        place = Path(path).absolute()
        if not place.parent.is_dir() or place.is_dir():
            raise ValueError(
                f"train_preference_model: checkpoint: expected a file in a folder that is there; got {str(path)!r}"
            )
        identity = {"format": FORMAT, "kind": model.KIND, **dataclasses.asdict(model.input_format)}
        identity |= dataclasses.asdict(settings) | {"tokens of the pairs": _digest(encoded)}
        del identity["micro_batch"]  # may be lowered where memory ran out
        identity |= {"start": start_digest(model, model.adapted), "adapters": adapter_settings(model.body)}
        return cls(place, every, as_json(identity))

    def lock(self) -> AbstractContextManager[None]:
        return nullcontext() if self.path is None else lock_place(self.path)

    def write(
        self, model: ComparisonModel, optimizer: torch.optim.Optimizer, losses: list[float], now: bool = False
    ) -> None:
        """Write the file every `every` steps, after the last step, and if `now` is set."""
        if self.path is None or not (now or len(losses) % self.every == 0 or len(losses) == self.identity["steps"]):
            return
        tensors = {f"noise/{index}": state for index, state in enumerate(_generator_states(model))}
        for name, parameter in model.named_parameters():
            tensors[f"weight/{name}"] = parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        state = json.dumps({"identity": self.identity, "losses": losses})
        text = {"state": state, "checksum": _checksum(state, tensors)}
        with atomic_file(self.path) as work:
            need("safetensors.torch", "train_preference_model: checkpoint").save_file(tensors, work, text)

    def resume(self, model: ComparisonModel, optimizer: torch.optim.Optimizer) -> list[float]:
        """Restore weights, optimiser and generators; return the losses of the steps done, [] where there is no file."""
        if self.path is None or not self.path.exists():
            return []
        state, tensors = self._read()
        known = dict(model.named_parameters())
        states = [tensors.pop(name) for name in sorted(tensors) if name.startswith("noise/")]
        with torch.no_grad():
            for name, tensor in tensors.items():
                kind, _, parameter = name.partition("/")
                if kind == "weight":
                    known[parameter].copy_(tensor)
                else:  # AdamW counts its steps on the CPU
                    device = "cpu" if kind == "step" else known[parameter].device
                    optimizer.state[known[parameter]][kind] = tensor.to(device)
        _set_generator_states(model, states)
        losses: list[float] = state["losses"]
        return losses

    def _read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        assert self.path is not None
        safe_open = need("safetensors", "train_preference_model: checkpoint").safe_open
        try:
            with safe_open(self.path, framework="pt") as file:
                text = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state, sound = json.loads(text["state"]), text["checksum"] == _checksum(text["state"], tensors)
        except Exception as error:  # of safetensors' own kind, or of JSON's
            raise ValueError(
                f"train_preference_model: checkpoint: expected a file that it wrote; got {self.path}: {error}"
            ) from error
        if not sound:
            raise DamagedError(
                f"train_preference_model: checkpoint: {self.path}: expected the CRC-32 of what was written; got "
                "another: the file is damaged (without it the training starts over)"
            )
        differing = [name for name, value in self.identity.items() if state["identity"].get(name) != value]
        if differing:
            name = differing[0]
            raise ValueError(
                f"train_preference_model: checkpoint: {self.path}: expected a checkpoint of this training; its {name} "
                f"is {state['identity'].get(name)!r}, here {self.identity[name]!r}"
            )
        return state, tensors


def _digest(encoded: Sequence[Rows]) -> str:
    digest = hashlib.sha256()
    for pair in encoded:
        for row in pair:
            digest.update(array("q", [len(row), *row]).tobytes())
    return digest.hexdigest()[:16]


def _checksum(state: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the CRC-32 of all that the file holds."""
    total = zlib.crc32(state.encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(name.encode(), total)
        total = crc_of(tensor, total)
    return f"{total:08x}"


def _generator_states(model: ComparisonModel) -> list[torch.Tensor]:
    device = model.head.weight.device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_generator_states(model: ComparisonModel, states: list[torch.Tensor]) -> None:
    device = model.head.weight.device
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
