"""The loop: read, draw, write; now and then look who has ended.

`Workspace` is what rollouts need allocated, and outlives them; `Rollout` is one request in it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..core.settings import requested
from ..ops import log_linear_sample
from .clock import Clock
from .graphs import Graphs
from .hooks import Hooks
from .ledger import Ledger
from .openness import OpenRows
from .readers import Reader
from .request import Player, Prompts, RolloutSettings
from .result import RolloutResult
from .table import Seat, Table, who_stays

CHECK_EVERY = 8  # steps between looks at who has ended; a row decodes about as many tokens in vain


@dataclass(frozen=True)
class Workspace:
    """Everything preallocated. Addresses stay from rollout to rollout."""

    clock: Clock
    ledger: Ledger
    table: Table
    readers: Sequence[Reader]
    seed: torch.Tensor  # () int64
    bias: torch.Tensor  # (V,) float32: -inf at the end tokens, for responses of a minimal length


@dataclass(frozen=True)
class Plan:
    """One request, checked and resolved."""

    prompts: Prompts
    players: Sequence[Player]
    settings: RolloutSettings
    hooks: Hooks
    seed: int
    ends: tuple[int, ...]
    pad: int
    logprobs: tuple[str, ...]  # of policy, reference, mixture
    mixes: bool  # whether there is a reference
    vocabulary: int  # columns of the heads that count
    state: Hashable  # what recorded steps have fixed of the models
    notes: tuple[str, ...]


class Rollout:
    """`graphs` replays recorded steps; None runs every step eagerly."""

    def __init__(self, plan: Plan, space: Workspace, graphs: Graphs | None) -> None:
        self.plan, self.space, self.graphs = plan, space, graphs
        self.open_rows, self.checked, self.row_steps, self.drawn = OpenRows(), 0, 0, 0

    def run(self) -> RolloutResult:
        self._start()
        while self._goes_on() and self.drawn < self.plan.settings.max_new_tokens:
            self._advance()
        return self._result()

    def _start(self) -> None:
        """Everyone sits down, every model reads the prompts, the first tokens are drawn."""
        plan, space = self.plan, self.space
        table, prompts, device = space.table, plan.prompts, space.seed.device
        fan_out = table.start(plan.players, len(prompts.ids), plan.settings, plan.mixes, bool(plan.hooks.processors))
        ends = torch.tensor(plan.ends, dtype=torch.int64, device=device)
        space.clock.start(prompts, fan_out, recorded=self.graphs is not None)
        space.ledger.start(len(fan_out), plan.settings.max_new_tokens, ends)
        space.seed.fill_(plan.seed)
        space.bias.zero_().index_fill_(0, ends, -torch.inf)
        self.prompt_of, self.host_rows = fan_out, list(range(len(fan_out)))  # (rows,); the ledger's row of each row
        logits: dict[str, torch.Tensor] = {}
        for reader in space.readers:
            logits |= reader.start(prompts, fan_out, table.spans)
        self._draw(logits)
        self._count()

    def _advance(self) -> None:
        """One token for every row of the batch."""
        clock, table = self.space.clock, self.space.table
        if self.graphs is None:
            self._step()
        else:
            clock.bucket = self.graphs.bucket(clock.filled + 1)
            key = (tuple((seat.source, seat.stream, seat.start, seat.stop) for seat in table.seats), clock.bucket,
                   self._ends_forbidden(), table.filtered, table.columns, self.plan.logprobs,
                   requested(self.plan.settings.backend).backend, self.plan.state)  # fmt: skip
            self.graphs.run(key, self._step, (clock.cursor, clock.step, clock.positions, table.tokens))
        clock.filled += 1
        self._count()

    def _count(self) -> None:
        self.drawn += 1
        self.row_steps += self.space.table.rows

    def _step(self) -> None:
        """The device's part of a step: the same function eagerly and in a graph."""
        space = self.space
        space.clock.open_slot()
        readers = [reader for reader in space.readers if any(_size(space.table.spans[name]) for name in reader.names)]
        reads = [partial(reader.step, space.table.tokens, space.clock) for reader in readers]
        results = [read() for read in reads] if self.graphs is None else self.graphs.side_by_side(reads)
        logits = {name: columns for result in results for name, columns in result.items()}
        space.clock.close_slot()
        self._draw(logits)

    def _draw(self, logits: dict[str, torch.Tensor]) -> None:
        for seat in self.space.table.seats:
            if seat.size:
                self._draw_for(seat, logits)
        self.space.clock.step.add_(1)

    def _draw_for(self, seat: Seat, logits: dict[str, torch.Tensor]) -> None:
        plan, space, table = self.plan, self.space, self.space.table
        names = [seat.source, "reference"] if plan.mixes else [seat.source]
        models = [logits[name][_within(seat, table.spans[name]), : plan.vocabulary] for name in names]
        indices: dict[str, int | str] = {"policy": 0, "reference": 1, "mixture": "mixture"}
        if plan.hooks.processors:
            models = [*models, plan.hooks.scores(self._text(), models, table.mixing)]
        sample = log_linear_sample(
            models,
            [0.0] * len(models),  # settings hold them
            settings=table.settings(seat),
            seed=space.seed,
            row_ids=table.row_ids[seat.rows],
            step=space.clock.step,
            stream=seat.stream,
            bias=space.bias if self._ends_forbidden() else None,
            logprobs=[indices[name] for name in plan.logprobs],
            backend=plan.settings.backend,
        )
        table.tokens[seat.rows] = sample.tokens
        where = (space.clock.step, table.row_of[seat.rows])
        space.ledger.write(*where, sample.tokens, sample.ok)
        for name in plan.logprobs:
            index = indices[name]
            values = sample.mixture_logprob if isinstance(index, str) else sample.logprobs[index]
            assert values is not None
            space.ledger.write_logprob(name, *where, values)

    def _ends_forbidden(self) -> bool:
        return bool(self.plan.ends) and self.drawn < self.plan.settings.min_new_tokens

    # ---- who has ended -----------------------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        if self.plan.hooks:
            return self._watch()
        if self.drawn - self.checked < CHECK_EVERY or not self.plan.ends:
            return True
        space = self.space
        space.ledger.settle(self.checked, self.drawn)
        self.checked = self.drawn
        self.open_rows.post(space.ledger.open)
        is_open = self.open_rows.read()
        if is_open is None:
            return True
        if any(is_open):
            self._compact(is_open)
        return any(is_open)

    def _compact(self, is_open: Sequence[bool]) -> None:
        """`is_open`: one per row of the ledger."""
        space, table = self.space, self.space.table
        batch = [is_open[row] for row in self.host_rows]
        kept = who_stays(table.seats, batch, in_powers=self.graphs is not None)
        if kept is None:
            return
        self.host_rows = [self.host_rows[row] for seat in kept for row in seat]
        rows = table.keep(kept)
        space.clock.keep(rows)
        for reader in space.readers:
            reader.keep(rows, table.spans)

    def _watch(self) -> bool:
        """With hooks, every token is looked at; a row that has ended goes on with pad tokens, as in transformers."""
        ledger, table, step = self.space.ledger, self.space.table, self.drawn - 1
        closed = ~ledger.open
        table.tokens[: table.rows].masked_fill_(closed, self.plan.pad)
        ledger.tokens[step, : table.rows] = table.tokens[: table.rows]
        if self.plan.hooks.streamer is not None:
            self.plan.hooks.streamer.put(table.tokens[: table.rows].cpu())
        ledger.settle(step, self.drawn)
        self.checked = self.drawn
        if self.plan.hooks.criteria:
            ledger.stop(self.plan.hooks.stopped(self._text()), step)
        return bool(ledger.open.any())

    def _text(self) -> torch.Tensor:  # (B, S + drawn)
        rows = self.space.table.rows
        new = self.space.ledger.tokens[: self.drawn, :rows].T
        return torch.cat([self.plan.prompts.ids[self.prompt_of], new], 1)

    def _result(self) -> RolloutResult:
        plan, space = self.plan, self.space
        space.ledger.settle(self.checked, self.drawn)
        if plan.hooks.streamer is not None:
            plan.hooks.streamer.end()
        width = int(space.ledger.lengths.max())
        rows = [space.table.ledger_rows[player] for player in range(len(plan.players))]
        responses = tuple(space.ledger.responses(span, width, plan.pad) for span in rows)
        return RolloutResult(responses, plan.seed, plan.ends, self.drawn, self.row_steps, plan.notes)


def _size(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _within(seat: Seat, span: tuple[int, int]) -> slice:
    """The seat's rows among those of a model's span."""
    return slice(seat.start - span[0], seat.stop - span[0])
