"""The decoding loop: prefill, then a step per token: decode, sample, write; every few steps, check which rows ended.

`Workspace` is the storage that rollouts share; `Rollout` serves one request.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..core.settings import requested
from ..ops.mixture_sample.op import sample_packed
from .batch import Batch, PlayerRows, PlayerTensors, remaining_rows
from .compiling import clock
from .decode_state import DecodeState
from .graphs import Graphs
from .outputs import OpenRowsReader, TokenBuffers
from .recorded_prompts import PromptInputs
from .request import Prompts, Request, RolloutResult
from .runners import Runner

CHECK_EVERY = 8  # steps between checks for ends; after its end a row decodes up to as many, on a GPU twice as many


@dataclass(frozen=True)
class Workspace:
    """All buffers of rollouts; their addresses stay the same from rollout to rollout."""

    state: DecodeState
    outputs: TokenBuffers
    batch: Batch
    runners: Sequence[Runner]
    inputs: PromptInputs | None  # of recorded passes over prompts; None: there are none
    seed: torch.Tensor  # () int64
    bias: torch.Tensor  # (V,) float32: -inf at the end tokens, for responses of a minimal length


class Rollout:
    """One request. `graphs` replays recorded steps; None runs every step eagerly. `model_state`: what recorded steps
    assume of the models."""

    def __init__(self, request: Request, space: Workspace, graphs: Graphs | None, model_state: Hashable = None) -> None:
        self.request, self.space, self.graphs, self.model_state = request, space, graphs, model_state
        self.open_rows = OpenRowsReader()
        self.steps = 0  # tokens sampled per row
        self.checked = 0  # of them, searched for ends
        self.row_steps = 0  # rows sampled, summed over steps
        self.step_seconds = 0.0  # of all steps after the first token

    def run(self) -> RolloutResult:
        self.prefill()
        began = clock()
        while self._any_open() and self.steps < self.request.settings.max_new_tokens:
            self.step()
        result = self._result()  # waits for the device
        self.step_seconds = clock() - began
        return result

    def prefill(self) -> None:
        """Assign rows to players, read the prompts, sample the first token."""
        request, space = self.request, self.space
        batch, prompts, device = space.batch, request.prompts, space.seed.device
        processed = bool(request.hooks.processors)
        fan_out = batch.assign(request.players, len(prompts.ids), request.settings, request.has_reference, processed)
        end_ids = torch.tensor(request.end_ids, dtype=torch.int64, device=device)
        space.state.reset(prompts, fan_out, recorded=self.graphs is not None)
        space.outputs.reset(len(fan_out), request.settings.max_new_tokens, end_ids)
        space.seed.fill_(request.seed)
        space.bias.zero_().index_fill_(0, end_ids, -torch.inf)
        self.fan_out = fan_out  # (rows,): each row's prompt
        self.output_rows = list(range(len(fan_out)))  # batch.output_rows on the host
        for runner in space.runners:
            runner.assign(batch.spans)
        if self.graphs is None or not request.records_prompts:
            self._prefill_on_device(prompts, fan_out)
        else:
            assert space.inputs is not None
            prompts = space.inputs.load(prompts)
            key = (*prompts.shape, prompts.padded, *self._assumed())
            read = partial(self._prefill_on_device, prompts, fan_out)
            self.graphs.run_pass(key, read, (space.state.step, batch.tokens))
        self._count()

    def _prefill_on_device(self, prompts: Prompts, fan_out: torch.Tensor) -> None:
        """Run the device's part of `prefill`, which a graph may record."""
        calls = [partial(runner.prefill, prompts, fan_out) for runner in self.space.runners]
        self._sample(self._run_models(calls, at_once=self.request.records_prompts))

    def step(self) -> None:
        """Decode and sample one token for every row of the batch."""
        state, batch = self.space.state, self.space.batch
        if self.graphs is None:
            self._step_on_device()
        else:
            state.bucket = self.graphs.bucket(state.filled + 1)
            key = (state.bucket, *self._assumed())
            self.graphs.run(key, self._step_on_device, (state.cursor, state.step, state.positions, batch.tokens))
        state.filled += 1
        self._count()

    def _assumed(self) -> tuple[Hashable, ...]:
        """Return what a recording assumes of rows, sampling and models."""
        batch = self.space.batch
        rows = tuple((player.source, player.stream, player.start, player.stop) for player in batch.players)
        return (rows, self._ends_forbidden(), batch.filtered, batch.columns, self.request.logprobs,
                requested(self.request.settings.backend).backend, self.model_state)  # fmt: skip

    def _step_on_device(self) -> None:
        """Run the device's part of a step, which a graph may record."""
        space = self.space
        space.state.open_slot()
        spans = space.batch.spans
        runners = [runner for runner in space.runners if any(spans[role][1] > spans[role][0] for role in runner.roles)]
        calls = [partial(runner.decode, space.batch.tokens, space.state) for runner in runners]
        logits = self._run_models(calls, at_once=True)
        space.state.advance()
        self._sample(logits)

    def _run_models(
        self, calls: Sequence[Callable[[], dict[str, torch.Tensor]]], at_once: bool
    ) -> dict[str, torch.Tensor]:
        """Run a forward pass of every model and return the logits by role. `at_once`: where the recorder can, except
        that collectives keep one order in all processes."""
        if not at_once or self.graphs is None or self.request.any_open is not None:
            results = [call() for call in calls]
        else:
            results = self.graphs.recorder.run_concurrently(calls)
        return {role: logits for result in results for role, logits in result.items()}

    def _sample(self, logits: dict[str, torch.Tensor]) -> None:
        batch = self.space.batch
        for player, tensors in zip(batch.players, batch.player_tensors, strict=True):
            if player.size:
                self._sample_player(player, tensors, logits)
        self.space.state.step.add_(1)

    def _sample_player(self, player: PlayerRows, tensors: PlayerTensors, logits: dict[str, torch.Tensor]) -> None:
        request, space, batch = self.request, self.space, self.space.batch
        roles = [player.source, "reference"] if request.has_reference else [player.source]
        columns = request.columns
        width = columns.stop - columns.start
        models = [logits[role][player.within(batch.spans[role]), :width] for role in roles]
        if request.hooks.processors:
            models = [*models, request.hooks.process(self._text(), models, batch.mixture_weights).contiguous()]
        indices = {"policy": 0, "reference": 1, "mixture": len(models)}
        sample = sample_packed(
            models,
            tensors.settings,
            seed=space.seed,
            row_ids=tensors.row_ids,
            step=space.state.step,
            stream=player.stream,
            bias=space.bias[columns] if self._ends_forbidden() else None,
            logprob_mask=sum({1 << indices[name] for name in request.logprobs}),
            backend=request.settings.backend,
            part=request.part,
        )
        tensors.tokens.copy_(sample.tokens)
        step, rows = space.state.step, tensors.output_rows
        space.outputs.write(step, rows, sample.tokens, sample.ok)
        if request.logprobs:
            asked = [indices[name] for name in request.logprobs]
            space.outputs.write_logprobs(step, rows, _rows_of(sample.logprobs, asked))

    def _ends_forbidden(self) -> bool:
        return bool(self.request.end_ids) and self.steps < self.request.settings.min_new_tokens

    def _count(self) -> None:
        self.steps += 1
        self.row_steps += self.space.batch.rows

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _any_open(self) -> bool:
        """Whether any row is open; every CHECK_EVERY steps, look for ends and compact the batch."""
        if self.request.hooks:
            return self._any_open_with_hooks()
        if self.steps - self.checked < CHECK_EVERY or not self.request.end_ids:
            return True
        outputs = self.space.outputs
        outputs.find_ends(self.checked, self.steps)
        self.checked = self.steps
        is_open = self.open_rows.exchange(outputs.is_open, now=self.request.any_open is not None)
        if is_open is None:
            return True
        if any(is_open):
            self._compact(is_open)
        return self._anywhere(any(is_open))

    def _anywhere(self, is_open: bool) -> bool:
        """Whether a row is open in any process: processes in step stop together, after the last row of all of them."""
        return is_open if self.request.any_open is None else self.request.any_open(is_open)

    def _compact(self, is_open: Sequence[bool]) -> None:
        """Remove rows that have ended. `is_open`: one per row of the outputs."""
        space, batch = self.space, self.space.batch
        open_in_batch = [is_open[row] for row in self.output_rows]
        remaining = remaining_rows(batch.players, open_in_batch, powers_of_two=self.graphs is not None)
        if remaining is None:
            return
        self.output_rows = [self.output_rows[row] for player_rows in remaining for row in player_rows]
        rows = batch.compact(remaining)
        space.state.compact(rows)
        for runner in space.runners:
            runner.compact(rows, batch.spans)

    def _any_open_with_hooks(self) -> bool:
        """Whether any row is open, checked at every token; ended rows go on with pad tokens, as in transformers."""
        outputs, batch, step = self.space.outputs, self.space.batch, self.steps - 1
        tokens = batch.tokens[: batch.rows]
        tokens.masked_fill_(~outputs.is_open, self.request.pad_id)
        outputs.tokens[step, : batch.rows] = tokens
        if self.request.hooks.streamer is not None:
            self.request.hooks.streamer.put(tokens.cpu())
        outputs.find_ends(step, self.steps)
        self.checked = self.steps
        if self.request.hooks.criteria:
            outputs.stop(self.request.hooks.should_stop(self._text()), step)
        return self._anywhere(bool(outputs.is_open.any()))

    def _text(self) -> torch.Tensor:  # (B, S + steps)
        new = self.space.outputs.tokens[: self.steps, : self.space.batch.rows].T
        return torch.cat([self.request.prompts.ids[self.fan_out], new], 1)

    def _result(self) -> RolloutResult:
        request, outputs = self.request, self.space.outputs
        outputs.find_ends(self.checked, self.steps)
        if request.hooks.streamer is not None:
            request.hooks.streamer.end()
        width = int(outputs.lengths.max())
        spans = [self.space.batch.output_spans[player] for player in range(len(request.players))]
        responses = tuple(outputs.responses(rows, width, request.pad_id) for rows in spans)
        return RolloutResult(responses, request.seed, request.end_ids, self.steps, self.row_steps, request.notes)


def _rows_of(matrix: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Return some rows of a matrix, as a view where they follow one another."""
    first = indices[0]
    if indices == list(range(first, first + len(indices))):
        return matrix[first : first + len(indices)]
    return torch.stack([matrix[index] for index in indices])
