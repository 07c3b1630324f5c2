"""The state of decoding that all models of a rollout share: slots filled, attention mask, slot ranges, positions.

The tensors are allocated once and updated in place, one column a step. The host counts in `filled`; the device counts
in `cursor` and `step`, so that a captured graph advances by itself.
"""

from __future__ import annotations

import torch

from .layers import oracle
from .request import Prompts


class DecodeState:
    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.mask = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.starts = torch.zeros(rows, dtype=torch.int64, device=device)  # each row's first slot after its padding
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)  # the slot the next token is written to
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # index of the next new token
        self.rows, self.filled, self.padded, self.bucket = rows, 0, False, 0
        self.recorded = False  # whether steps are replayed from graphs
        self.store_slot = oracle.store_slot  # how caches write a step's keys and values

    def reset(self, prompts: Prompts, fan_out: torch.Tensor, recorded: bool) -> None:
        """Begin a rollout. `fan_out` (rows,) is each row's prompt."""
        self.rows, self.filled, self.padded, self.bucket = len(fan_out), prompts.width, prompts.padded, 0
        self.recorded = recorded
        self.mask.zero_()
        self.mask[: self.rows, : prompts.width] = prompts.mask[fan_out]
        self.positions[: self.rows, 0] = prompts.mask.sum(1)[fan_out]
        self.starts[: self.rows] = prompts.width - self.positions[: self.rows, 0]
        self.cursor.fill_(prompts.width)
        self.step.zero_()

    @property
    def static(self) -> bool:
        """Whether steps have static shapes: they read all slots of a bucket, filled or not."""
        return self.bucket > 0

    @property
    def visible_slots(self) -> int:
        """Slots that the current step reads, its own among them."""
        return self.bucket or self.filled + 1

    @property
    def filled_slots(self) -> int | torch.Tensor:
        """Slots filled before the current step: a number, or a scalar on the device where shapes are static."""
        return self.cursor[0] if self.static else self.filled

    def open_slot(self) -> None:
        """Unmask the slot of the token that the models read next."""
        self.mask[: self.rows].index_fill_(1, self.cursor, 1)

    def advance(self) -> None:
        """Move on to the next slot, once the models have read a token."""
        self.cursor.add_(1)
        self.positions[: self.rows].add_(1)

    def attention_mask(self) -> torch.Tensor | None:  # (rows, visible_slots)
        """None where nothing is masked: models then choose their fastest attention."""
        return self.mask[: self.rows, : self.visible_slots] if self.padded or self.static else None

    def slot_ranges(self) -> tuple[torch.Tensor | None, torch.Tensor]:  # (rows,), (rows,)
        """The mask as ranges of slots: where each row's range starts (None: all at 0), and where it ends."""
        starts = self.starts[: self.rows] if self.padded or self.static else None  # a graph serves padded prompts too
        return starts, (self.cursor + 1).expand(self.rows).contiguous()

    def compact(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order, at the front of the same storage."""
        self.rows = len(rows)
        for per_row in (self.mask, self.positions, self.starts):
            per_row[: self.rows] = per_row[rows]
