"""RolloutEngine: y ~ pi and y' ~ pi^beta for a batch of prompts, in one pass of decoding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import torch

from ..core.checks import check_option
from .clock import Clock
from .ensemble import Ensemble
from .graphs import BUCKET, CudaRecorder, Graphs, Recorder, Unrecorded
from .hooks import Hooks
from .ledger import Ledger
from .loop import Plan, Rollout, Workspace
from .memory import MemoryPlan, Request, check_fits
from .models import plainly
from .request import (
    LOGPROBS,
    Player,
    RolloutSettings,
    check_players,
    check_prompts,
    check_settings,
    end_ids,
    row_ids,
    weights,
)
from .result import RolloutResult
from .table import Table

_log = logging.getLogger(__name__)


class RolloutEngine:
    """Decodes with a policy and a reference in lockstep.

    policy      a causal language model of transformers, or a peft model around one
    reference   likewise; None: the policy's own base where it has adapters, else there is no reference
    opponent    a third set of parameters, for players who ask for it: a model, or a mapping of names to tensors (an
                average of the policy's parameters); a mapping's tensors are used in place, not copied

    The models stay yours: trained between rollouts, they play with their new weights. What is allocated for one rollout
    serves the next of the same size or smaller; `release` gives it back.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any = None,
        *,
        opponent: Any = None,
        vocab_size: int | None = None,  # columns of the heads that count; None: all, which must then be equal
        use_cache: bool = True,  # False: every step reads the whole text again, for models without keys and values
        attention: str
        | None = None,  # transformers' name of one, set on the models; None: decode_attention where it fits
        compile: bool = False,  # torch.compile for the models' steps; takes a minute or more per number of rows
        graphs: bool = True,  # False: eager steps on a GPU too
        recorder: Recorder | None = None,  # what records steps; None: CUDA graphs on a GPU, nothing elsewhere
        bucket: int = BUCKET,  # cache slots by which a recorded step's view grows
        memory_limit: int | None = None,  # bytes; None: what the device has free
        op: str = "RolloutEngine",  # the name in errors
    ) -> None:
        self.op, self.memory_limit = op, memory_limit
        self.ensemble = Ensemble(op, policy, reference, opponent, vocab_size, use_cache, attention, compile)
        self.device = self.ensemble.device
        if recorder is None and graphs and self.device.type == "cuda":
            recorder = CudaRecorder(self.device)
        if recorder is None and compile:
            recorder = Unrecorded()
        self.graphs = None if recorder is None else Graphs(recorder, bucket)
        if self.graphs is not None:
            self.ensemble.stand(bucket)
        self._space: Workspace | None = None
        self._capacity: tuple[dict[str, int], int, int, tuple[str, ...]] | None = None
        self._busy = Lock()

    @property
    def mixes(self) -> bool:
        """Whether there is a reference."""
        return self.ensemble.mixes

    def rollout(
        self,
        input_ids: torch.Tensor,  # (P, S) int64, padded on the left
        attention_mask: torch.Tensor | None,  # (P, S), 0 at padding; None: there is none
        players: Sequence[Player],
        settings: RolloutSettings,
        hooks: Hooks | None = None,
    ) -> RolloutResult:
        """Every player answers every prompt. Dropout is off meanwhile; training flags come back as they were. Models
        play in their own dtype, under autocast too."""
        plan = self._plan(input_ids, attention_mask, players, settings, hooks or Hooks())
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(f"{self.op}: expected one rollout at a time; got a second while one is running")
        try:
            with plainly(self.device), self.ensemble.playing():
                return self._run(plan)
        finally:
            self._busy.release()

    def memory_plan(
        self, prompts: int, prompt_length: int, players: Sequence[Player], settings: RolloutSettings
    ) -> MemoryPlan:
        """What a rollout of this size allocates, by part."""
        check_settings(self.op, settings)
        check_players(self.op, players, self.ensemble.mixes, "opponent" in self.ensemble.facts)
        rows, length = self.ensemble.rows(prompts, players), self._length(prompt_length, settings)
        every = prompts * sum(player.samples for player in players)
        parts = self.ensemble.cache_bytes(rows, length)
        policy = self.ensemble.facts["policy"]
        parts["logits"] = sum(rows.values()) * policy.vocabulary * policy.dtype.itemsize
        parts["results"] = every * settings.max_new_tokens * (8 + 1 + 4 * len(self._logprobs(settings)))
        parts["masks"] = every * length * 8
        return MemoryPlan(parts, every, length, prompt_length)

    def release(self) -> None:
        """Give back what was allocated, recorded steps included."""
        self._space = self._capacity = None
        if self.graphs is not None:
            self.graphs.recorded.clear()

    # ---- one rollout -------------------------------------------------------------------------------------------------

    def _plan(
        self, ids: torch.Tensor, mask: torch.Tensor | None, players: Sequence[Player], settings: Any, hooks: Hooks
    ) -> Plan:
        """All that can be wrong with a request is found here."""
        check_settings(self.op, settings)
        check_players(self.op, players, self.ensemble.mixes, "opponent" in self.ensemble.facts)
        if hooks and len(players) > 1:
            raise ValueError(f"{self.op}: hooks: expected one player, whose rows are the batch; got {len(players)}")
        prompts = check_prompts(self.op, ids, mask, self.device)
        for player in players:
            weights(self.op, player, len(prompts.ids), self.device)
            row_ids(self.op, player, len(prompts.ids), self.device)
        self.ensemble.check_padding(prompts, settings.max_new_tokens)
        self.ensemble.check_ids(prompts.ids)
        self.ensemble.check_adapters()
        shortest, longest = (int(length) for length in torch.aminmax(prompts.mask.sum(1)))
        self.ensemble.check_room(longest, settings.max_new_tokens, shortest)
        ends = end_ids(self.op, self.ensemble.policy, settings.end_ids, self.ensemble.vocabulary)
        seed = settings.seed
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        return Plan(
            prompts=prompts,
            players=tuple(players),
            settings=settings,
            hooks=hooks,
            seed=seed,
            ends=ends,
            pad=settings.pad_id if settings.pad_id is not None else (*ends, 0)[0],
            logprobs=self._logprobs(settings),
            mixes=self.ensemble.mixes,
            vocabulary=self.ensemble.vocabulary,
            state=self.ensemble.recorded_state if self.graphs is not None else None,
            notes=(*self.ensemble.notes, *self._why_eager(hooks)),
        )

    def _logprobs(self, settings: RolloutSettings) -> tuple[str, ...]:
        """Without a reference there is nothing to say of it, unless it is asked for by name."""
        known = LOGPROBS if self.ensemble.mixes else ("policy", "mixture")
        names = known if settings.logprobs is None else settings.logprobs
        return tuple(check_option(self.op, "logprobs", name, known) for name in names)

    def _why_eager(self, hooks: Hooks) -> list[str]:
        reasons = []
        if self.graphs is None and self.device.type == "cuda":
            reasons.append("graphs=False was asked for")
        elif self.graphs is not None:
            reasons += ["hooks look at every token on the host"] if hooks else []
            reasons += self.ensemble.why_not_recorded()
        return [f"eager steps: {reason}" for reason in reasons]

    def _run(self, plan: Plan) -> RolloutResult:
        recorded = self.graphs if not any(note.startswith("eager steps") for note in plan.notes) else None
        rollout = Rollout(plan, self._workspace(plan), recorded)
        return rollout.run()

    def _length(self, prompt: int, settings: RolloutSettings) -> int:
        length = prompt + settings.max_new_tokens
        return length if self.graphs is None else self.graphs.bucket(length)

    def _check_fits(self, plan: Plan, memory: MemoryPlan) -> None:
        samples, settings = sum(player.samples for player in plan.players), plan.settings
        asked = Request(
            len(plan.prompts.ids), samples, plan.prompts.width, settings.max_new_tokens, settings.min_new_tokens
        )

        def total(request: Request) -> int:
            fewer = replace(settings, max_new_tokens=request.new_tokens)
            return self.memory_plan(request.prompts, request.prompt_length, plan.players, fewer).total

        check_fits(self.op, memory, self.memory_limit, self.device, asked, total)

    def _workspace(self, plan: Plan) -> Workspace:
        """The one at hand where it is large enough."""
        rows = self.ensemble.rows(len(plan.prompts.ids), plan.players)
        length, steps = self._length(plan.prompts.width, plan.settings), plan.settings.max_new_tokens
        if self._space is not None and self._capacity is not None:
            had, slots, had_steps, logprobs = self._capacity
            if (
                had.keys() == rows.keys()
                and all(had[role] >= rows[role] for role in rows)
                and (slots >= length and had_steps >= steps and logprobs == plan.logprobs)
            ):
                return self._space
        self.release()  # before the new one is made: both would not fit where memory is tight
        memory = self.memory_plan(len(plan.prompts.ids), plan.prompts.width, plan.players, plan.settings)
        self._check_fits(plan, memory)
        _log.info("%s: allocating for %s", self.op, memory)
        clock = Clock(memory.rows, length, self.device)
        self._space = Workspace(
            clock=clock,
            ledger=Ledger(steps, memory.rows, plan.logprobs, self.device),
            table=Table(memory.rows, self.device),
            readers=self.ensemble.readers(rows, length, clock),
            seed=torch.zeros((), dtype=torch.int64, device=self.device),
            bias=torch.zeros(plan.vocabulary, dtype=torch.float32, device=self.device),
        )
        self._capacity = (rows, length, steps, plan.logprobs)
        return self._space
