"""RolloutEngine: y ~ pi and y' ~ pi^beta for a batch of prompts, in one pass of decoding."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Lock

import torch

from ..core.checks import check_integer, check_option, check_switch
from ..core.vocabulary import VocabularySlice
from .batch import Batch
from .compiling import COMPILED_DEVICES, CompileDecision
from .contexts import no_autocast
from .decode_state import DecodeState
from .graphs import BUCKET, CudaRecorder, EagerRecorder, Graphs, Recorder
from .hooks import Hooks
from .loop import Rollout, Workspace
from .memory import MemoryPlan, RequestSize, check_fits, has_room, may_copy, rollout_parts, rows_by_model
from .model_set import ModelSet
from .outputs import TokenBuffers
from .recorded_prompts import PROMPT_BUCKET, PromptInputs, host_takes_longer, widened
from .request import (
    LOGPROBS,
    Player,
    Prompts,
    Request,
    RolloutResult,
    RolloutSettings,
    check_players,
    check_prompts,
    check_settings,
    mixture_weights,
    noise_row_ids,
    resolve_end_ids,
)
from .sharded import agreed

_log = logging.getLogger(__name__)


class RolloutEngine:
    """Decodes with a policy and a reference in lockstep.

    The models are used in place: after a training step, they decode with their new weights. The buffers of one rollout
    are reused by the next of the same size or smaller; `release` frees them.

    Args:
        policy: a causal language model of transformers, or a peft model around one.
        reference: likewise; None: the policy's own base where it has adapters, else there is no reference.
        opponent: a third set of parameters, for players that ask for it: a model, or a mapping of names to tensors (an
            average of the policy's parameters). A mapping's tensors are used in place, not copied.
        vocab_size (int): columns of the heads that count; None: all, which must then be equally many.
        use_cache (bool): False reads the whole text every step, for models without keys and values.
        attention (str): transformers' name of an attention, set on the models; None: `decode_attention` where it fits.
        compile (bool or "auto"): torch.compile for the models' steps, which takes a minute or more per number of rows;
            "auto": on a GPU, from the rollout on after which `rollouts_to_come` are expected to repay it.
        fused ("auto", bool, "products" or "layers"): "products": query, key and value as one product, gate and up as
            one, with weights copied side by side; "layers": norms, gated activations, rotary positions and the cache's
            write as Triton kernels, on a GPU and without `compile`, which fuses by itself; True: both; "auto": both on
            a GPU, the products where the copies take at most a twentieth of its memory. Models with adapters and those
            that processes share run as they are.
        linear ("auto" or bool): the products of a step's linear layers by `decode_linear` on a GPU: "auto": those for
            which `nlhf-kernels tune` measured Triton faster than cuBLAS; True: all, by plans that are not measured
            unless `tune` did; False: none. Models with adapters and those that processes share keep PyTorch's.
        one_pass ("auto" or bool): policy and reference in one forward pass over the rows of both: "auto": a policy with
            adapters and its base; True: two models of one architecture as well, whose layers are one product each for
            both: of weights side by side where `fused` copies them, or by `linear=True`; False: a pass each. Notes say
            where that cannot be; compiled steps and models that processes share are of one model each.
        graphs ("auto", bool or "steps"): what is recorded on a GPU: "auto": steps, and passes over prompts that would
            take the host longer than the GPU; True: all passes over prompts, too; "steps": steps alone; False: nothing.
        recorder: what records; None: CUDA graphs on a GPU, nothing elsewhere.
        bucket (int): cache slots by which a recorded step's view of the cache grows.
        prompt_bucket (int): tokens to a multiple of which prompts are padded where their pass may be recorded.
        memory_limit (int): bytes that a rollout may allocate; None: what the device has free.
        op (str): the name in errors.
    """

    def __init__(
        self,
        policy: torch.nn.Module,
        reference: torch.nn.Module | None = None,
        *,
        opponent: torch.nn.Module | Mapping[str, torch.Tensor] | None = None,
        vocab_size: int | None = None,
        use_cache: bool = True,
        attention: str | None = None,
        compile: bool | str = False,
        fused: bool | str = "auto",
        linear: bool | str = "auto",
        one_pass: bool | str = "auto",
        graphs: bool | str = "auto",
        recorder: Recorder | None = None,
        bucket: int = BUCKET,
        prompt_bucket: int = PROMPT_BUCKET,
        memory_limit: int | None = None,
        op: str = "RolloutEngine",
    ) -> None:
        self.op, self.memory_limit = op, memory_limit
        check_switch(op, "fused", fused, ("auto", "products", "layers"))
        check_switch(op, "linear", linear, ("auto",))
        check_switch(op, "one_pass", one_pass, ("auto",))
        check_switch(op, "compile", compile, ("auto",))
        check_switch(op, "graphs", graphs, ("auto", "steps"))
        self.fused = fused
        self.models = ModelSet(
            op,
            policy,
            reference,
            opponent,
            vocab_size,
            use_cache,
            attention,
            compile is True,
            fused,
            linear,
            one_pass,
        )
        self.device = self.models.device
        #: Rollouts that the caller expects to ask for, the next included: compile="auto" counts their steps.
        self.rollouts_to_come = 1
        self._compile_decision: CompileDecision | None = None
        if compile == "auto" and self.models.may_compile(COMPILED_DEVICES):
            layers = sum(len(info.layers) for info in self.models.info.values())
            self._compile_decision = CompileDecision(layers)
        if recorder is None and graphs and self.device.type == "cuda":
            recorder = CudaRecorder(self.device)
        if recorder is None and (compile is True or self._compile_decision is not None):
            recorder = EagerRecorder()
        self.graphs = None if recorder is None else Graphs(recorder, bucket)
        self.prompt_bucket = check_integer(op, "prompt_bucket", prompt_bucket, 1, 2**31)
        records = recorder is not None and not isinstance(recorder, EagerRecorder)
        self._recorded_prompts = graphs if records and graphs != "steps" else False  # "auto", True or False
        if self.graphs is not None:
            self.models.check_static_shapes(bucket)
        self._space: Workspace | None = None
        self._capacity: tuple[dict[str, int], int, int, tuple[str, ...], bool] | None = None
        self._busy = Lock()

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference, the policy's own base included."""
        return self.models.has_reference

    def rollout(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        players: Sequence[Player],
        settings: RolloutSettings,
        hooks: Hooks | None = None,
    ) -> RolloutResult:
        """Sample every player's responses to every prompt.

        Dropout is off; training flags are restored afterwards. Models decode in their own dtype, under
        autocast too.

        Args:
            input_ids ((P, S) int64): prompts, padded on the left.
            attention_mask ((P, S) integers or bool): 0 at padding; None: nothing is padded.
            players (sequence of Player): the distributions to sample from; the result is in their order.
            settings (RolloutSettings): how tokens are sampled and when a response ends.
            hooks (Hooks): logits processors, stopping criteria and a streamer, for one player.
        """
        request = self._resolve(input_ids, attention_mask, players, settings, hooks or Hooks())
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(f"{self.op}: expected one rollout at a time; got a second while one is running")
        try:
            tries_compiling = self._compile_where_it_repays(request)
            with no_autocast(self.device), self.models.decoding_mode(request.part is not None, request.gather):
                try:
                    return self._run(request)
                except Exception as error:
                    if not tries_compiling:
                        raise
                    # A long run must not end with a compiler's error; one of another cause comes again, and is raised.
                    note = self.models.give_compiling_up(error)
                self.release()
                return self._run(replace(request, notes=(*request.notes, note)))
        finally:
            self._busy.release()

    def memory_plan(
        self, prompts: int, prompt_length: int, players: Sequence[Player], settings: RolloutSettings
    ) -> MemoryPlan:
        """Return what a rollout of this size allocates, by part.

        Args:
            prompts (int): prompts of a call.
            prompt_length (int): tokens of the longest.
            players (sequence of Player): the distributions to sample from.
            settings (RolloutSettings): of the rollout.
        """
        check_settings(self.op, settings)
        check_players(self.op, players, self.has_reference, "opponent" in self.models.info)
        width, _ = self._recorded_width(prompts, prompt_length, players, settings)
        plan = self._plan(prompts, prompt_length if width is None else width, players, settings)
        return replace(plan, prompt=prompt_length)

    def _plan(self, prompts: int, width: int, players: Sequence[Player], settings: RolloutSettings) -> MemoryPlan:
        """Plan for prompts of this width, which is that of a recorded pass where they are read by one."""
        rows, length = rows_by_model(prompts, players, self.has_reference), self._length(width, settings)
        batch_rows = prompts * sum(player.samples for player in players)
        policy = self.models.info["policy"]
        part = self._part(settings)
        parts = rollout_parts(
            self.models.cache_bytes(rows, length),
            rows,
            batch_rows,
            length,
            settings.max_new_tokens,
            policy.vocabulary if part is None else part.widest,
            policy.dtype.itemsize,
            len(self._logprobs(settings)),
        )
        if joint := self.models.joint_products.bytes:
            parts["joint products"] = joint
        if self._recorded_prompts:
            parts["prompts"] = PromptInputs.bytes(batch_rows * length)
        return MemoryPlan(parts, batch_rows, length, width)

    def release(self) -> None:
        """Free what rollouts allocated, recorded steps included."""
        self._space = self._capacity = None
        self.models.joint_products.release()
        if self.graphs is not None:
            self.graphs.clear()

    # ---- one rollout -------------------------------------------------------------------------------------------------

    def _resolve(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        players: Sequence[Player],
        settings: RolloutSettings,
        hooks: Hooks,
    ) -> Request:
        """Check a request and resolve its defaults; all errors of a request are raised here."""
        check_settings(self.op, settings)
        check_players(self.op, players, self.has_reference, "opponent" in self.models.info)
        if hooks and len(players) > 1:
            raise ValueError(f"{self.op}: hooks: expected one player, whose rows are the batch; got {len(players)}")
        prompts = check_prompts(self.op, input_ids, attention_mask, self.device)
        for player in players:
            mixture_weights(self.op, player, len(prompts.ids), self.device)
            noise_row_ids(self.op, player, len(prompts.ids), self.device)
        self.models.check_padding(prompts, settings.max_new_tokens)
        self.models.check_ids(prompts.ids)
        self.models.check_adapters()
        shortest, longest = torch.stack(torch.aminmax(prompts.mask.sum(1))).tolist()
        self.models.check_length(longest, settings.max_new_tokens, shortest)
        end_ids = resolve_end_ids(self.op, self.models.policy, settings, self.models.vocabulary)
        sharding = self.models.sharding
        seed = sharding.agree(settings.seed, prompts.ids, prompts.mask, settings.max_new_tokens)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        eager = self._why_eager(hooks)
        width, reasons = (None, []) if eager else self._recorded_width(*prompts.shape, players, settings)
        unrecorded = [f"prompts are read unrecorded: {reason}" for reason in reasons]
        gather = self._may_gather(prompts, players, settings)
        stepwise = sharding.fsdp_group is not None and not gather
        notes = ["parameters are gathered at every step: all at once they do not fit"] * stepwise
        return Request(
            prompts=prompts if width is None else widened(prompts, width),
            players=tuple(players),
            settings=settings,
            hooks=hooks,
            seed=seed,
            end_ids=end_ids,
            pad_id=settings.pad_id if settings.pad_id is not None else (*end_ids, 0)[0],
            logprobs=self._logprobs(settings),
            has_reference=self.has_reference,
            vocabulary=self.models.vocabulary,
            part=None if hooks else self._part(settings),
            records_prompts=width is not None,
            gather=gather,
            any_open=sharding.any_open(gather),
            notes=(*self.models.notes, *notes, *eager, *unrecorded),
        )

    def _recorded_width(
        self, prompts: int, width: int, players: Sequence[Player], settings: RolloutSettings
    ) -> tuple[int | None, list[str]]:
        """Return the width of a pass over prompts that may be recorded, None where it is read as it is, and the models'
        reasons for that.

        It depends on sizes alone, not on what has been recorded before: a seed's tokens are the same in every rollout.
        """
        if not self._recorded_prompts:
            return None, []
        whole = -(-width // self.prompt_bucket) * self.prompt_bucket
        roles = rows_by_model(prompts, players, self.has_reference)
        models, passes = [self.models.info_of(role) for role in roles], self.models.passes(roles)
        if self._recorded_prompts == "auto" and not host_takes_longer(models, passes, prompts * whole):
            return None, []
        reasons = self.models.why_prompts_not_recorded(whole, whole - width, settings.max_new_tokens)
        return (None if reasons or self.models.why_not_recorded() else whole), reasons

    def _part(self, settings: RolloutSettings) -> VocabularySlice | None:
        """Return the vocabulary slice that logits stay in; None with filters, whose thresholds need all logits."""
        filtered = settings.top_k != 0 or settings.top_p != 1 or settings.min_p != 0
        return None if filtered else self.models.sharding.part

    def _may_gather(self, prompts: Prompts, players: Sequence[Player], settings: RolloutSettings) -> bool:
        """Whether to gather FSDP's parameters once for the rollout, which must fit in all processes."""
        sharding = self.models.sharding
        if sharding.fsdp_group is None:
            return False
        plan = self.memory_plan(len(prompts.ids), prompts.width, players, settings)
        plan = replace(plan, parts={**plan.parts, "gathered parameters": sharding.gathered_bytes()})
        return agreed(has_room(plan, self.memory_limit, self.device), sharding.fsdp_group, self.device)

    def _logprobs(self, settings: RolloutSettings) -> tuple[str, ...]:
        """Resolve the kinds of log-probabilities: by default all but a missing reference's, which cannot be named."""
        available = LOGPROBS if self.has_reference else ("policy", "mixture")
        names = available if settings.logprobs is None else settings.logprobs
        return tuple(check_option(self.op, "logprobs", name, available) for name in names)

    def _why_eager(self, hooks: Hooks) -> list[str]:
        reasons = []
        if self.graphs is None and self.device.type == "cuda":
            reasons.append("graphs=False was asked for")
        elif self.graphs is not None:
            reasons += ["hooks look at every token on the host"] if hooks else []
            reasons += self.models.why_not_recorded()
        return [f"eager steps: {reason}" for reason in reasons]

    def _compile_where_it_repays(self, request: Request) -> bool:
        """Compile the models' steps if that is decided now; return whether this rollout is the first to compile."""
        steps = self.rollouts_to_come * request.settings.max_new_tokens
        if self._compile_decision is None or request.eager or not self._compile_decision.repays(steps):
            return False
        _log.info("%s: compiling: %d steps are expected, of %s", self.op, steps, self._compile_decision)
        self._compile_decision = None
        compiled = self.models.compile_steps()
        if compiled:
            self.release()  # runners and recorded steps of models that are not compiled
        return compiled

    def _run(self, request: Request) -> RolloutResult:
        space = self._workspace(request)
        if self.models.why_not_paired is not None:
            note = f"policy and reference take a forward pass each: {self.models.why_not_paired}"
            request = replace(request, notes=(*request.notes, note))
        graphs = None if request.eager else self.graphs
        with self.models.fused():
            state = None if graphs is None else graphs.number_of(self.models.recorded_state)
            rollout = Rollout(request, space, graphs, state)
            result = rollout.run()
        separate = [f"separate products: {reason}" for reason in self.models.joint_products.separate]
        result = replace(result, notes=(*result.notes, *separate))
        if graphs is not None and self._compile_decision is not None:
            self._compile_decision.record(rollout.step_seconds, result.steps - 1)
        return result

    def _workspace(self, request: Request) -> Workspace:
        """Return the current workspace if it is large enough, else allocate one."""
        rows = rows_by_model(len(request.prompts.ids), request.players, self.has_reference)
        length, steps = self._length(request.prompts.width, request.settings), request.settings.max_new_tokens
        if self._space is not None and self._capacity is not None:
            row_capacity, slots, step_capacity, logprobs, paired = self._capacity
            if (
                row_capacity.keys() == rows.keys()
                and all(row_capacity[role] >= rows[role] for role in rows)
                and (slots >= length and step_capacity >= steps and logprobs == request.logprobs)
                and paired == (self.models.active_pair is not None)
            ):
                return self._space
        self.release()  # before the next allocation: memory may not hold both
        size = (*request.prompts.shape, request.players, request.settings)
        plan = self._plan(*size)
        copies = self.models.joint_products.bytes
        small = may_copy(copies, self.memory_limit, self.device) and has_room(plan, self.memory_limit, self.device)
        if self.fused == "auto" and copies and not small:
            self.models.joint_products.enabled = False
            plan = self._plan(*size)
        self._check_fits(request, plan)
        _log.info("%s: allocating for %s", self.op, plan)
        state = DecodeState(plan.rows, length, self.device)
        if self.models.fused_layers is not None:
            state.store_slot = self.models.fused_layers.functions.store_slot
        self._space = Workspace(
            state=state,
            outputs=TokenBuffers(steps, plan.rows, request.logprobs, self.device),
            batch=Batch(plan.rows, self.device),
            runners=self.models.runners(rows, length, state),
            inputs=PromptInputs(plan.rows * length, self.device) if self._recorded_prompts else None,
            seed=torch.zeros((), dtype=torch.int64, device=self.device),
            bias=torch.zeros(request.vocabulary, dtype=torch.float32, device=self.device),
        )
        self._capacity = (rows, length, steps, request.logprobs, self.models.active_pair is not None)
        return self._space

    def _length(self, prompt_length: int, settings: RolloutSettings) -> int:
        """Cache slots per row."""
        length = prompt_length + settings.max_new_tokens
        return length if self.graphs is None else self.graphs.bucket(length)

    def _check_fits(self, request: Request, plan: MemoryPlan) -> None:
        samples, settings = sum(player.samples for player in request.players), request.settings
        prompts, new_tokens = request.prompts, settings.max_new_tokens
        size = RequestSize(len(prompts.ids), samples, prompts.width, new_tokens, settings.min_new_tokens)

        def total(size: RequestSize) -> int:
            shorter = replace(settings, max_new_tokens=size.new_tokens)
            return self.memory_plan(size.prompts, size.prompt_length, request.players, shorter).total

        check_fits(self.op, plan, self.memory_limit, self.device, size, total)
