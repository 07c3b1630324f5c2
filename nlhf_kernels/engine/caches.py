"""Key/value caches that are allocated once: a prompt's entries are written to all its rows, a step writes one column.

Built on transformers' public cache classes. Sliding layers keep every position and leave the window to the mask that
the model makes, so that one kind of layer is right for full, sliding and chunked attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .decode_state import DecodeState


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
    """The methods of a cache layer that transformers requires and that are never called here."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("a rollout's cache is allocated before the first token")

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class ProbeLayer(_Layer):  # type: ignore[no-untyped-call]
    """Records the shape of what a model stores, and stores nothing."""

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
    """Reports `length` filled slots; keys and values are the new token's, repeated."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        super().update(key_states, value_states)
        return tuple(new.expand(-1, -1, self.length + 1, -1) for new in (key_states, value_states))

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.length + _query_length(query_length), 0

    def get_seq_length(self, *_: Any) -> int:
        return self.length


class StaticRowsLayer(_Layer):
    """(rows, heads, length, dim) of keys and of values. What a step reads is a view, never a copy."""

    def __init__(
        self, shape: LayerShape | None, rows: int, length: int, state: DecodeState, device: torch.device
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state, self.rows = state, rows
        self.fan_out: torch.Tensor | None = None  # (rows,): each row's prompt, during prefill
        if shape is not None:  # a layer that reads another's entries stores none
            slots = rows, shape.heads, length
            self.keys = torch.zeros(*slots, shape.key_dim, dtype=shape.key_dtype, device=device)
            self.values = torch.zeros(*slots, shape.value_dim, dtype=shape.value_dtype, device=device)
        self.is_initialized = True

    @property
    def storage(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """True keeps transformers' masks from reading tensor values on the host, which graph capture forbids."""
        return self.state.static

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        assert self.keys is not None and self.values is not None
        if self.fan_out is not None:
            for stored, new in ((self.keys, key_states), (self.values, value_states)):
                if stored.dtype != new.dtype:
                    raise ValueError(
                        f"rollout: expected keys and values of {stored.dtype}, as when the engine was made; "
                        f"got {new.dtype}"
                    )
                torch.index_select(new, 0, self.fan_out, out=stored[: self.rows, :, : new.shape[2]])
            return key_states, value_states
        keys, values = self.keys[: self.rows], self.values[: self.rows]
        self.state.store_slot(keys, values, key_states, value_states, self.state.cursor)
        return keys[:, :, : self.state.visible_slots], values[:, :, : self.state.visible_slots]

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return (_query_length(query_length) if self.fan_out is not None else self.state.visible_slots), 0

    def get_seq_length(self, *_: Any) -> Any:
        return 0 if self.fan_out is not None else self.state.filled_slots

    def compact(self, rows: torch.Tensor) -> None:
        """Keep these rows, at the front of the same storage. Slots beyond the filled ones need no copy."""
        for stored in self.storage:
            stored[: len(rows), :, : self.state.filled] = stored[rows, :, : self.state.filled]
        self.rows = len(rows)


class StaticRowsCache(Cache):
    """One model's layers. Each model has a cache of its own."""

    def __init__(
        self, shapes: tuple[LayerShape | None, ...], rows: int, length: int, state: DecodeState, device: torch.device
    ) -> None:
        self.static_layers = [StaticRowsLayer(shape, rows, length, state, device) for shape in shapes]
        self.state = state
        super().__init__(layers=list(self.static_layers))

    def assign(self, rows: int) -> None:
        """Hold this many rows from now on."""
        for layer in self.static_layers:
            layer.rows = rows

    def begin_prefill(self, fan_out: torch.Tensor, masked_slots: bool) -> None:
        """The next forward pass reads prompts; row r of this cache answers prompt fan_out[r].

        `masked_slots`: whether steps of static shapes read slots that are masked. These are then set to 0, because a
        NaN from an earlier rollout would reach the output at weight 0.
        """
        for layer in self.static_layers:
            layer.fan_out = fan_out
            for stored in layer.storage if self.state.recorded and masked_slots else ():
                stored.zero_()

    def end_prefill(self) -> None:
        for layer in self.static_layers:
            layer.fan_out = None

    def compact(self, rows: torch.Tensor) -> None:
        for layer in self.static_layers:
            layer.compact(rows)


def _query_length(length: Any) -> int:
    """A number, or, before transformers 5.19, the positions that are written."""
    return len(length) if isinstance(length, torch.Tensor) else int(length)
