"""The batch that is decoded: the rows of each player, and the removal of rows that have ended.

The rows of players that use the policy's parameters come first, then those of the opponent's, so that each model reads
one contiguous span. Tensors keep their storage when rows leave, as captured graphs need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..ops import MixtureSettings, mixture_settings
from .request import Player, RolloutSettings, mixture_weights, noise_row_ids

OP = "rollout"
Span = tuple[int, int]  # rows [start, stop) of the batch
MIN_SHARE_TO_COMPACT = 8  # compact once an eighth of the batch has ended: it costs a copy of the caches


@dataclass(frozen=True)
class PlayerRows:
    """The rows [start, stop) of one player in the batch."""

    player: int  # its index in the request
    source: str  # of the parameters: policy or opponent
    stream: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        return self.stop - self.start

    def within(self, span: Span) -> slice:
        """The same rows, counted from the start of a model's span."""
        return slice(self.start - span[0], self.stop - span[0])


class PlayerTensors(NamedTuple):
    """A player's rows of the batch's tensors, as views that last until rows leave."""

    settings: MixtureSettings
    row_ids: torch.Tensor
    output_rows: torch.Tensor
    tokens: torch.Tensor


class Batch:
    def __init__(self, rows: int, device: torch.device) -> None:
        self.output_rows = torch.zeros(rows, dtype=torch.int64, device=device)  # (R,) row of the output buffers
        self.fan_out = torch.zeros(rows, dtype=torch.int64, device=device)  # (R,) prompt, before any row has left
        self.row_ids = torch.zeros(rows, dtype=torch.int64, device=device)  # (R,) what the noise depends on
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # (R,) sampled last, read next
        self.columns = 5  # of `packed`: 4 + models
        self.packed_by_columns: dict[int, torch.Tensor] = {}  # (R, columns) each: the sampler takes whole rows
        self.filtered = False
        self.players: tuple[PlayerRows, ...] = ()
        self.player_tensors: tuple[PlayerTensors, ...] = ()
        #: The rows of each model; (0, 0) for a model that no row needs any more.
        self.spans: dict[str, Span] = {}

    def assign(
        self, players: Sequence[Player], prompts: int, settings: RolloutSettings, has_reference: bool, processed: bool
    ) -> torch.Tensor:
        """Assign rows to players and set their sampling parameters. Returns each row's prompt, (rows,).

        `processed`: logits processors make the scores that are sampled; the sampler takes them as one more model, of
        weight 1, and the others with weight 0 for their log-probabilities.
        """
        device = self.output_rows.device
        order = sorted(range(len(players)), key=lambda index: players[index].parameters == "opponent")
        players_rows, prompt_of_rows, start = [], [], 0
        for index in order:
            player = players[index]
            rows = slice(start, start + prompts * player.samples)
            weights = mixture_weights(OP, player, prompts, device)[: 2 if has_reference else 1]
            if processed:
                columns = [torch.as_tensor(weight, dtype=torch.float32, device=device) for weight in weights]
                self.mixture_weights = torch.stack([column.expand(rows.stop - rows.start) for column in columns], 1)
                weights = [*[0.0] * len(weights), 1.0]
            filters = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            packed, self.filtered = mixture_settings(weights, **filters, device=device, op=OP)
            self.columns = packed.shape[1]
            self.packed[rows] = packed
            self.row_ids[rows] = noise_row_ids(OP, player, prompts, device)
            players_rows.append(PlayerRows(index, player.parameters, player.stream, rows.start, rows.stop))
            prompt = torch.arange(prompts, dtype=torch.int64, device=device)
            prompt_of_rows.append(prompt.repeat_interleave(player.samples))
            start = rows.stop
        self._place(players_rows)
        self.output_spans = {player.player: player.rows for player in players_rows}
        torch.arange(start, dtype=torch.int64, device=device, out=self.output_rows[:start])
        return torch.cat(prompt_of_rows, out=self.fan_out[:start])

    @property
    def packed(self) -> torch.Tensor:  # (R, columns), see `mixture_settings`
        if self.columns not in self.packed_by_columns:
            shape = len(self.output_rows), self.columns
            device = self.output_rows.device
            self.packed_by_columns[self.columns] = torch.zeros(shape, dtype=torch.float32, device=device)
        return self.packed_by_columns[self.columns]

    @property
    def rows(self) -> int:
        return self.players[-1].stop

    def compact(self, remaining: Sequence[Sequence[int]]) -> torch.Tensor:
        """Keep these rows of the batch, given player by player. Returns them as one tensor."""
        rows = torch.tensor([row for rows in remaining for row in rows], dtype=torch.int64, device=self.row_ids.device)
        for per_row in (self.output_rows, self.row_ids, self.packed, self.tokens):
            per_row[: len(rows)] = per_row[rows]
        players, start = [], 0
        for player, player_rows in zip(self.players, remaining, strict=True):
            players.append(replace(player, start=start, stop=start + len(player_rows)))
            start += len(player_rows)
        self._place(players)
        return rows

    def _place(self, players: Sequence[PlayerRows]) -> None:
        """Let the rows be those of `players`."""
        self.players, self.spans = tuple(players), {"reference": (0, players[-1].stop)}
        for source in ("policy", "opponent"):
            present = [player for player in players if player.source == source and player.size]
            self.spans[source] = (present[0].start, present[-1].stop) if present else (0, 0)
        per_row = (self.row_ids, self.output_rows, self.tokens)
        self.player_tensors = tuple(
            PlayerTensors(
                MixtureSettings(self.packed[player.rows], self.filtered), *(tensor[player.rows] for tensor in per_row)
            )
            for player in players
        )


def remaining_rows(
    players: Sequence[PlayerRows], is_open: Sequence[bool], powers_of_two: bool
) -> list[list[int]] | None:
    """Return the rows of the batch that go on, player by player; None where too few have ended to compact.

    `is_open`: one per row of the batch. `powers_of_two`: sizes are powers of two, filled up with rows that have ended,
    so that a few captured graphs serve every size.
    """
    remaining = []
    for player in players:
        rows = range(player.start, player.stop)
        player_rows = [row for row in rows if is_open[row]]
        if powers_of_two and player_rows:
            size = min(1 << (len(player_rows) - 1).bit_length(), player.size)
            ended = [row for row in rows if not is_open[row]]
            player_rows = sorted(player_rows + ended[: size - len(player_rows)])
        remaining.append(player_rows)
    after, before = sum(map(len, remaining)), sum(player.size for player in players)
    return remaining if after > 0 and (before - after) * MIN_SHARE_TO_COMPACT >= before else None
