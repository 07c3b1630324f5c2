"""Parameters that play beside the policy's: a moving average of them (Nash-EMA), snapshots of them (mirror prox).

They are tensors by the names of the policy's trained parameters, updated in place: the engine plays with them as they
are, a checkpoint holds them under those names. What is frozen (a base under adapters) is shared, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine.models import twin

Tensors = dict[str, torch.Tensor]


def trained(model: Any) -> Tensors:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class Played:
    """The policy as rollouts see it: the same weights, in a twin that nothing of training touches (wrappers, autocast,
    gradient checkpointing). Where training computes in another dtype than the weights', a copy of them in that dtype,
    made anew before every rollout."""

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        weights = dict(model.named_parameters())
        self.dtype = dtype or next(iter(weights.values())).dtype
        cast = {name: value.detach() if dtype is None else value.detach().to(dtype) for name, value in weights.items()}
        self.model = twin(model, cast, "NashTrainer").eval()
        pairs = [(value, weights[name]) for name, value in self.model.named_parameters()]
        self._cast = [(cast, value) for cast, value in pairs if cast.dtype != value.dtype]
        self._shared = [(same, value) for same, value in pairs if same.dtype == value.dtype]

    @torch.no_grad()
    def refresh(self) -> bool:
        """Before every rollout. Whether weights lie elsewhere than before: what preparing a model for several
        processes may do, once."""
        for cast, value in self._cast:
            cast.copy_(value)
        moved = [(same, value) for same, value in self._shared if same.data_ptr() != value.data_ptr()]
        for same, value in moved:
            same.data = value.data
        return bool(moved)


class Average:
    """average <- decay average + (1 - decay) policy, after each update. In float32, played in the rollouts' dtype:
    in bfloat16 a step of 1 - decay = 0.001 would round to nothing."""

    def __init__(self, model: Any, dtype: torch.dtype | None, decay: float) -> None:
        self.decay, self.model = decay, model
        weights = trained(model)
        self.average = {name: value.detach().float().clone() for name, value in weights.items()}
        self.played = {  # the same tensors where dtypes are
            name: value.to(dtype or weights[name].dtype) for name, value in self.average.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        for name, value in trained(self.model).items():
            self.average[name].lerp_(value.float(), 1 - self.decay)
        self._play()

    def state(self) -> Tensors:
        return self.average

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        _fill(self.average, state)
        self._play()

    def _play(self) -> None:
        _fill(self.played, self.average)


class Snapshots:
    """Mirror prox in two half steps of `refresh` updates. In the first, opponent and anchor are the policy as it was at
    its beginning; in the second the opponent is what the first half has found, the anchor stays. Then anew."""

    def __init__(self, model: Any, dtype: torch.dtype | None, refresh: int) -> None:
        self.refresh, self.model = refresh, model
        self.anchor = {name: value.detach().clone() for name, value in trained(model).items()}
        self.played = {name: value.to(dtype or value.dtype, copy=True) for name, value in self.anchor.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """`step` updates have been made."""
        if step % self.refresh:
            return
        fresh = trained(self.model)
        _fill(self.played, fresh)
        if step // self.refresh % 2 == 0:
            _fill(self.anchor, fresh)

    def state(self) -> Tensors:
        parts = {"played": self.played, "anchor": self.anchor}
        return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        _fill(self.state(), state)


Opponent = Average | Snapshots


def save(opponent: Opponent, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in opponent.state().items()}, path)


def load(opponent: Opponent, path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(path)
    if state.keys() != opponent.state().keys():
        raise ValueError(f"NashTrainer: {path}: expected the opponent of this run; got one with other parameters")
    opponent.load(state)


def _fill(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if value is not values[name]:
            value.copy_(values[name])
