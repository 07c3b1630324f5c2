"""Where a rollout stands: how much has been written, and the masks, ranges and positions that every model of it shares.

They are made once and advanced in place, a column a step. On the host `filled` says how far; on the device `cursor` and
`step` say the same, so that a captured graph advances by itself.
"""

from __future__ import annotations

import torch

from .request import Prompts


class Clock:
    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.mask = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.starts = torch.zeros(rows, dtype=torch.int64, device=device)  # the padding on the left of each row
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)  # the slot the next token is written to
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # index of the next new token
        self.rows, self.filled, self.padded, self.bucket = rows, 0, False, 0
        self.recorded = False  # whether steps are replayed from graphs

    def start(self, prompts: Prompts, fan_out: torch.Tensor, recorded: bool) -> None:
        """`fan_out` (rows,): each row's prompt."""
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
        """Shapes stand still while the text stays within the bucket."""
        return self.bucket > 0

    @property
    def visible(self) -> int:
        """Slots that the step being taken reads, its own among them."""
        return self.bucket or self.filled + 1

    @property
    def seen(self) -> int | torch.Tensor:
        return self.cursor[0] if self.static else self.filled

    def open_slot(self) -> None:
        """The slot of the token about to be read becomes visible."""
        self.mask[: self.rows].index_fill_(1, self.cursor, 1)

    def close_slot(self) -> None:
        """The token has been read; the next one stands a place further."""
        self.cursor.add_(1)
        self.positions[: self.rows].add_(1)

    def read_mask(self) -> torch.Tensor | None:  # (rows, visible)
        """None where nothing needs masking: models then take their fastest attention."""
        return self.mask[: self.rows, : self.visible] if self.padded or self.static else None

    def read_ranges(self) -> tuple[torch.Tensor | None, torch.Tensor]:  # (rows,), (rows,)
        """The same as ranges of slots: where each row's begins (None: all at 0), and where it ends."""
        starts = self.starts[: self.rows] if self.padded or self.static else None  # a graph serves padded prompts too
        return starts, (self.cursor + 1).expand(self.rows).contiguous()

    def keep(self, rows: torch.Tensor) -> None:
        self.rows = len(rows)
        for kept in (self.mask, self.positions, self.starts):
            kept[: self.rows] = kept[rows]
