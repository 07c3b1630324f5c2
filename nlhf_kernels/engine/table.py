"""Who sits where in the batch: every player's rows lie together, and rows that have ended leave.

The rows of players who play with the policy's parameters come first, then those of the opponent's, so that each model
reads one contiguous span. All tensors keep their storage when rows leave, as captured graphs need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..ops import MixtureSettings, mixture_settings
from .request import Player, RolloutSettings, row_ids, weights

OP = "rollout"
Number = float | torch.Tensor
Span = tuple[int, int]
WORTH_MOVING = 8  # rows leave once an eighth of the batch has ended: moving costs a copy of the caches


@dataclass(frozen=True)
class Seat:
    """One player's rows [start, stop) of the batch."""

    player: int  # as asked for
    source: str  # whose parameters: policy or opponent
    stream: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        return self.stop - self.start


class Table:
    def __init__(self, rows: int, device: torch.device) -> None:
        self.row_of = torch.zeros(rows, dtype=torch.int64, device=device)  # (R,) the ledger's row
        self.row_ids = torch.zeros(rows, dtype=torch.int64, device=device)  # (R,) what the noise depends on
        self.columns = 5  # of `packed`: 4 + models
        self.packed_by_columns: dict[int, torch.Tensor] = {}  # (R, columns) each: the sampler takes whole rows
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # (R,) drawn last, read next
        self.filtered = False
        self.seats: tuple[Seat, ...] = ()

    def start(
        self, players: Sequence[Player], prompts: int, settings: RolloutSettings, mixes: bool, from_scores: bool
    ) -> torch.Tensor:
        """Everyone sits down. Returns each row's prompt, (rows,). `from_scores`: what is drawn from is a further
        model of weight 1, the scores that logits processors made."""
        device = self.row_of.device
        order = sorted(range(len(players)), key=lambda index: players[index].parameters == "opponent")
        seats, prompt_of, start = [], [], 0
        for index in order:
            player = players[index]
            rows = slice(start, start + prompts * player.samples)
            mixed = weights(OP, player, prompts, device)[: 2 if mixes else 1]
            drawn = [*[0.0] * len(mixed), 1.0] if from_scores else mixed
            filters = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            packed, self.filtered = mixture_settings(drawn, **filters, device=device, op=OP)
            self.columns = packed.shape[1]
            self.packed[rows] = packed
            self.row_ids[rows] = row_ids(OP, player, prompts, device)
            if from_scores:
                self.mixing = torch.stack([_column(weight, rows.stop - rows.start, device) for weight in mixed], 1)
            seats.append(Seat(index, player.parameters, player.stream, rows.start, rows.stop))
            prompt = torch.arange(prompts, dtype=torch.int64, device=device)
            prompt_of.append(prompt.repeat_interleave(player.samples))
            start = rows.stop
        self.seats = tuple(seats)
        self.ledger_rows = {seat.player: seat.rows for seat in seats}
        torch.arange(start, dtype=torch.int64, device=device, out=self.row_of[:start])
        return torch.cat(prompt_of)

    @property
    def packed(self) -> torch.Tensor:  # see `mixture_settings`
        if self.columns not in self.packed_by_columns:
            shape = len(self.row_of), self.columns
            self.packed_by_columns[self.columns] = torch.zeros(shape, dtype=torch.float32, device=self.row_of.device)
        return self.packed_by_columns[self.columns]

    @property
    def rows(self) -> int:
        return self.seats[-1].stop

    @property
    def spans(self) -> dict[str, Span]:
        """Where each model's rows lie; (0, 0) for a model that nobody needs any more."""
        spans: dict[str, Span] = {"reference": (0, self.rows)}
        for source in ("policy", "opponent"):
            seats = [seat for seat in self.seats if seat.source == source and seat.size]
            spans[source] = (seats[0].start, seats[-1].stop) if seats else (0, 0)
        return spans

    def settings(self, seat: Seat) -> MixtureSettings:
        return MixtureSettings(self.packed[seat.rows], self.filtered)

    def keep(self, kept: Sequence[Sequence[int]]) -> torch.Tensor:
        """Only these rows stay: positions in the batch, seat by seat. Returns them as one tensor."""
        rows = torch.tensor([row for seat in kept for row in seat], dtype=torch.int64, device=self.row_of.device)
        for column in (self.row_of, self.row_ids, self.packed, self.tokens):
            column[: len(rows)] = column[rows]
        seats, start = [], 0
        for seat, stays in zip(self.seats, kept, strict=True):
            seats.append(replace(seat, start=start, stop=start + len(stays)))
            start += len(stays)
        self.seats = tuple(seats)
        return rows


def who_stays(seats: Sequence[Seat], is_open: Sequence[bool], in_powers: bool) -> list[list[int]] | None:
    """Positions in the batch of the rows that go on, seat by seat; None where it is not worth the move.

    `is_open`: one per row of the batch. `in_powers`: sizes are powers of two, filled up with rows that have ended, so
    that a few captured graphs serve every size.
    """
    kept = []
    for seat in seats:
        rows = range(seat.start, seat.stop)
        stays = [row for row in rows if is_open[row]]
        if in_powers and stays:
            size = min(1 << (len(stays) - 1).bit_length(), seat.size)
            ended = [row for row in rows if not is_open[row]]
            stays = sorted(stays + ended[: size - len(stays)])
        kept.append(stays)
    left, before = sum(map(len, kept)), sum(seat.size for seat in seats)
    return kept if left > 0 and (before - left) * WORTH_MOVING >= before else None


def _column(weight: Number, rows: int, device: torch.device) -> torch.Tensor:  # (rows,)
    return torch.as_tensor(weight, dtype=torch.float32, device=device).expand(rows)
