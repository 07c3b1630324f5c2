"""Key/value caches that are allocated once: a prompt's entries are fanned out to its rows, a step writes one column.

Built on transformers' public cache classes. Sliding layers keep every position and leave the window to the mask, as
the model itself makes it: one kind of layer, right for full, sliding and chunked attention alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .clock import Clock


class LayerShape(NamedTuple):
    """What one layer stores per row and position, as seen in a forward pass of one token."""

    heads: int
    key_dim: int
    value_dim: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype  # another where a model's own autocast leaves rotated keys in float32

    @property
    def bytes(self) -> int:
        return self.heads * (self.key_dim * self.key_dtype.itemsize + self.value_dim * self.value_dtype.itemsize)


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The part of a cache layer that transformers asks for and none of ours uses."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("a rollout's cache is allocated before the first token")

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class ProbeLayer(_Layer):  # type: ignore[no-untyped-call]
    """Remembers the shape of what a model stores, and stores nothing."""

    shape: LayerShape | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        heads, key_dim, value_dim = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        self.shape = LayerShape(heads, key_dim, value_dim, key_states.dtype, value_states.dtype)
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return _query_length(query_length), 0

    def get_seq_length(self, *_: Any) -> int:
        return 0


class FarLayer(ProbeLayer):  # type: ignore[no-untyped-call]
    """Claims to hold `seen` tokens, and gives the new one in the place of each."""

    def __init__(self, seen: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        super().update(key_states, value_states)
        return tuple(new.expand(-1, -1, self.seen + 1, -1) for new in (key_states, value_states))

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.seen + _query_length(query_length), 0

    def get_seq_length(self, *_: Any) -> int:
        return self.seen


class StaticRows(_Layer):
    """(rows, heads, length, dim) of keys and of values. What a step reads is a view, never a copy."""

    def __init__(self, shape: LayerShape | None, rows: int, length: int, clock: Clock, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock, self.rows = clock, rows
        self.fan_out: torch.Tensor | None = None  # (rows,): each row's prompt, while prompts are read
        if shape is not None:  # a layer that reads another's entries stores none
            slots = rows, shape.heads, length
            self.keys = torch.zeros(*slots, shape.key_dim, dtype=shape.key_dtype, device=device)
            self.values = torch.zeros(*slots, shape.value_dim, dtype=shape.value_dtype, device=device)
        self.is_initialized = True

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Tells transformers' masks not to look at values, which a captured graph could not."""
        return self.clock.static

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        assert self.keys is not None and self.values is not None
        if self.fan_out is not None:
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                if kept.dtype != new.dtype:
                    raise ValueError(
                        f"rollout: expected keys and values of {kept.dtype}, as when the engine was made; "
                        f"got {new.dtype}"
                    )
                torch.index_select(new, 0, self.fan_out, out=kept[: self.rows, :, : new.shape[2]])
            return key_states, value_states
        keys, values = self.keys[: self.rows], self.values[: self.rows]
        keys.index_copy_(2, self.clock.cursor, key_states)
        values.index_copy_(2, self.clock.cursor, value_states)
        return keys[:, :, : self.clock.visible], values[:, :, : self.clock.visible]

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return (_query_length(query_length) if self.fan_out is not None else self.clock.visible), 0

    def get_seq_length(self, *_: Any) -> Any:
        return 0 if self.fan_out is not None else self.clock.seen

    def keep(self, rows: torch.Tensor) -> None:
        """Only `rows` go on, at the front of the same storage. Beyond what was written there is nothing to move."""
        for kept in (self.keys, self.values):
            if kept is not None:
                kept[: len(rows), :, : self.clock.filled] = kept[rows, :, : self.clock.filled]
        self.rows = len(rows)


class StaticRowsCache(Cache):
    """One model's layers. Each model has a cache of its own: there is no way to hand one to two."""

    def __init__(
        self, shapes: tuple[LayerShape | None, ...], rows: int, length: int, clock: Clock, device: torch.device
    ) -> None:
        self.kept = [StaticRows(shape, rows, length, clock, device) for shape in shapes]
        self.clock = clock
        super().__init__(layers=list(self.kept))

    def start(self, fan_out: torch.Tensor) -> None:
        """The next forward reads prompts; row r of this cache answers prompt fan_out[r]."""
        if self.clock.recorded:
            self._clear()
        for layer in self.kept:
            layer.rows, layer.fan_out = len(fan_out), fan_out

    def begin_steps(self) -> None:
        for layer in self.kept:
            layer.fan_out = None

    def keep(self, rows: torch.Tensor) -> None:
        for layer in self.kept:
            layer.keep(rows)

    def _clear(self) -> None:
        """Recorded steps read masked slots too, and a NaN from an earlier rollout would poison them at weight 0."""
        for layer in self.kept:
            for kept in (layer.keys, layer.values):
                if kept is not None:
                    kept.zero_()


def _query_length(given: Any) -> int:
    """A number, or, before transformers 5.19, the positions that are written."""
    return len(given) if isinstance(given, torch.Tensor) else int(given)
