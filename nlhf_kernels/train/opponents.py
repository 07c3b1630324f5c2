"""Weights that rollouts sample from beside the trained ones: the policy's view for rollouts, a moving average of the
policy (Nash-EMA), snapshots of it (mirror prox).

Opponents are tensors under the names of the policy's trainable parameters, updated in place: the engine reads them
directly, and a checkpoint stores them under those names. Frozen weights (a base under adapters) are shared, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine.model_info import clone_with_parameters
from .config import NashConfig
from .sharded import GatheredModel

Tensors = dict[str, torch.Tensor]


def trainable_parameters(model: Any) -> Tensors:
    """Return the parameters of `model` that require a gradient, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class RolloutPolicy:
    """The policy of rollouts: a second module around the same weights, without training's wrappers, autocast and
    activation checkpointing. If rollouts compute in another dtype than the weights', it holds a copy in that dtype,
    which `refresh` updates before every rollout.

    Args:
        model: the trained policy.
        dtype: of rollouts; None: the weights' own.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        weights = dict(model.named_parameters())
        self.dtype = dtype or next(iter(weights.values())).dtype
        rollout_weights = {name: value.detach().to(dtype or value.dtype) for name, value in weights.items()}
        self.model = clone_with_parameters(model, rollout_weights, "NashTrainer").eval()
        pairs = [(value, weights[name]) for name, value in self.model.named_parameters()]
        self._copies = [(copy, value) for copy, value in pairs if copy.dtype != value.dtype]
        self._aliases = [(alias, value) for alias, value in pairs if alias.dtype == value.dtype]

    @torch.no_grad()
    def refresh(self) -> bool:
        """Update to the policy's current weights; return whether some of them moved to other memory.

        Preparing a model for several processes may move its weights, once.
        """
        for copy, value in self._copies:
            copy.copy_(value)
        moved = [(alias, value) for alias, value in self._aliases if alias.data_ptr() != value.data_ptr()]
        for alias, value in moved:
            alias.data = value.data
        return bool(moved)


class Average:
    """A moving average: average <- decay average + (1 - decay) policy, after each update.

    The average is float32 and its copy for rollouts in their dtype: in bfloat16 a step of 1 - decay = 0.001 would
    round to nothing.

    Args:
        model: the trained policy.
        dtype: of rollouts; None: the weights' own.
        decay: share of the average that an update keeps.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None, decay: float) -> None:
        self.decay, self.model = decay, model
        weights = trainable_parameters(model)
        self.average = {name: value.detach().float().clone() for name, value in weights.items()}
        self.rollout_weights = {  # the same tensors where dtypes are
            name: value.to(dtype or weights[name].dtype) for name, value in self.average.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the policy.

        Args:
            step: updates made so far.
        """
        for name, value in trainable_parameters(self.model).items():
            self.average[name].lerp_(value.float(), 1 - self.decay)
        _copy_into(self.rollout_weights, self.average)

    def state(self) -> Tensors:
        """Return the tensors that a checkpoint stores."""
        return self.average

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the average.

        Args:
            state: tensors of `state()`.
        """
        _copy_into(self.average, state)
        _copy_into(self.rollout_weights, self.average)


class Snapshots:
    """Snapshots of mirror prox, which makes two half steps of `refresh` updates each.

    During the first half step the opponent and the anchor are the policy at its beginning; during the second the
    opponent is the result of the first, and the anchor is unchanged. After it both are updated to the policy.

    Args:
        model: the trained policy.
        dtype: of rollouts; None: the weights' own.
        refresh: updates of a half step.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None, refresh: int) -> None:
        self.refresh, self.model = refresh, model
        self.anchor = {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
        self.rollout_weights = {name: value.to(dtype or value.dtype, copy=True) for name, value in self.anchor.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take snapshots at the end of a half step.

        Args:
            step: updates made so far.
        """
        if step % self.refresh:
            return
        current = trainable_parameters(self.model)
        _copy_into(self.rollout_weights, current)
        if step // self.refresh % 2 == 0:
            _copy_into(self.anchor, current)

    def state(self) -> Tensors:
        """Return the tensors that a checkpoint stores."""
        parts = {"opponent": self.rollout_weights, "anchor": self.anchor}
        return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore both snapshots.

        Args:
            state: tensors of `state()`.
        """
        _copy_into(self.state(), state)


Opponent = Average | Snapshots


def gathered_opponent(
    model: Any, dtype: torch.dtype | None, args: NashConfig
) -> tuple[Opponent | None, GatheredModel | None, GatheredModel | None]:
    """Return a split policy's opponent, stored as this process's shards, with two gathered copies: the opponent's for
    rollouts, and mirror prox's anchor for the loss.

    Args:
        model: the split policy.
        dtype: of rollouts; None: the weights' own.
        args: the configuration.
    """
    if args.algorithm_spec.opponent == "average":
        average = Average(model, torch.float32, args.ema_decay)
        return average, GatheredModel(model, dtype, lambda: average.rollout_weights), None
    if args.algorithm_spec.opponent == "snapshot":
        snapshots = Snapshots(model, None, args.refresh_steps)
        answers = GatheredModel(model, dtype, lambda: snapshots.rollout_weights)
        return snapshots, answers, GatheredModel(model, dtype, lambda: snapshots.anchor)
    return None, None, None


def save_opponent(opponent: Opponent, path: Path) -> None:
    """Write an opponent's state as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in opponent.state().items()}, path)


def load_opponent(opponent: Opponent, path: Path) -> None:
    """Restore an opponent's state from `path`; raise where it belongs to other parameters."""
    from safetensors.torch import load_file

    state = load_file(path)
    if state.keys() != opponent.state().keys():
        raise ValueError(f"NashTrainer: {path}: expected the opponent of this run; got one with other parameters")
    opponent.load(state)


def _copy_into(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor is not values[name]:
            tensor.copy_(values[name])
