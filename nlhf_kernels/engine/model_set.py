"""The models that decode together: checked against each other before any work, and the runners made from them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..core.checks import check_integer
from ..core.modes import eval_mode
from ..core.upstream import (
    attention_name,
    eager_masks_copy_from_host,
    experts_name,
    hands_attention_over,
    longrope_reads_positions,
    parameters_of,
)
from .attention import NAME, REPLACED, use_attention
from .contexts import locked
from .cpu_head import fast_cpu_heads
from .decode_state import DecodeState
from .joint_products import JointProducts
from .layers import oracle
from .layers.fused import FusedLayers, why_not_usable
from .lora import AdapterRunner, BaseRunner, why_not_one_pass, why_one_pass_differs
from .model_info import ModelInfo, clone_with_parameters, inspect_model, rotations
from .one_pass import OnePassRunner
from .pairs import ModelPair, PairRunner
from .peft_models import adapted_layers, adapter_state, check_base, is_adapted
from .probes import examine, why_not_static
from .request import Prompts
from .runners import CachedRunner, Forward, Runner, WholeTextRunner
from .sharded import Sharding, check_not_shared
from .step_products import StepProducts

_log = logging.getLogger(__name__)

CAPTURED_ATTENTION = (*REPLACED, NAME)  # their masks and kernels do not synchronise with the host
CAPTURED_EXPERTS = ("batched_mm", "grouped_mm")


class ModelSet:
    """Policy, reference and opponent of one engine.

    `has_reference`: whether there is one. `notes`: fast paths that are not taken, and why.
    """

    def __init__(
        self,
        op: str,
        policy: Any,
        reference: Any,  # None: the policy's base where it has adapters, else there is none
        opponent: Any,  # a model, a mapping of parameters, or None
        vocab_size: int | None,
        use_cache: bool,
        attention: str | None,
        compile: bool,
        fused: bool | str,  # True, False, "auto", "products" or "layers"
        linear: bool | str,  # True, False or "auto"
        one_pass: bool | str,  # True, False or "auto"
    ) -> None:
        self.op, self.policy = op, policy
        self.notes: list[str] = []
        self._compared_layers: list[int] = []  # ids of the layers that one pass was last compared with two for
        if isinstance(opponent, Mapping):
            check_not_shared(op, policy)
            opponent = clone_with_parameters(policy, opponent, op)
        roles = {"policy": policy, "reference": reference, "opponent": opponent}
        models = {role: model for role, model in roles.items() if model is not None}
        self.shares_base = reference is None and is_adapted(policy)
        if self.shares_base:
            check_base(policy, op)
        if attention is not None:
            for model in models.values():
                model.set_attn_implementation(attention)
        self.info = {
            role: examine(inspect_model(role, model, use_cache, op), attention is None, op)
            for role, model in models.items()
        }
        self.not_static: dict[str, str] = {}  # role -> what its model does wrong over a cache longer than the text
        self.has_reference = reference is not None or self.shares_base
        self.device = self.info["policy"].device
        self._check_devices_and_dtypes()
        self.vocabulary = self._common_vocabulary(vocab_size)
        self.sharding = Sharding(op, self.info)
        for note in self.sharding.notes:
            self._note(note)
        self.one_pass = self.shares_base and one_pass is not False and self._can_take_one_pass(use_cache)
        self.compiled = self._compile() if compile else {}
        whole = {} if self.sharding.in_step else self.info  # weights of shared models are parts, or elsewhere
        if not whole and fused not in (False, "auto"):
            self._note("separate products and layers: processes share the models")
        self.step_products = self._choose_products([info.model for info in whole.values()], linear)
        linear_for = None if self.step_products is None else self.step_products.linear_for
        fuses = fused not in (False, "products") and not self.compiled  # torch.compile fuses layers by itself
        self.fused_layers = self._fuse_layers([info.model for info in whole.values()], fused) if fuses else None
        self.pair = self._pair() if reference is not None and one_pass is True else None
        joins = fused in (True, "products") or (fused == "auto" and self.device.type == "cuda")
        joined = [info.model for info in whole.values()] if joins else []
        self.joint_products = JointProducts(joined, linear_for, self.pair)
        self.active_pair: ModelPair | None = None  # in the rollout that runs
        self.why_not_paired: str | None = None  # in that rollout

    # ---- checks at construction --------------------------------------------------------------------------------------

    def _check_devices_and_dtypes(self) -> None:
        policy = self.info["policy"]
        for role, info in self.info.items():
            if info.device != policy.device:
                raise ValueError(
                    f"{self.op}: {role}: expected a model on {policy.device}, as the policy; got {info.device}"
                )
            if info.dtype != policy.dtype:
                expected, got = (str(dtype).removeprefix("torch.") for dtype in (policy.dtype, info.dtype))
                raise ValueError(f"{self.op}: {role}: expected dtype {expected}, as the policy; got {got}")

    def _common_vocabulary(self, vocab_size: int | None) -> int:
        widths = {role: info.vocabulary for role, info in self.info.items()}
        if vocab_size is not None:
            return check_integer(self.op, "vocab_size", vocab_size, 1, min(widths.values()))
        for role, width in widths.items():
            if width != widths["policy"]:
                raise ValueError(
                    f"{self.op}: {role}: expected policy and {role} of one vocabulary; got {widths['policy']} tokens "
                    f"and {width} (vocab_size=... leaves out the columns that only pad a head)"
                )
        return widths["policy"]

    def _can_take_one_pass(self, use_cache: bool) -> bool:
        reason = self._why_two_passes() if use_cache else "use_cache=False reads the whole text"
        if reason is not None:
            self._note(f"shared weights: the policy and its base take a forward pass each: {reason}")
        return reason is None

    def _why_two_passes(self) -> str | None:
        """Compare by forward passes only where other layers are adapted than at the last comparison."""
        reason, layers = why_not_one_pass(self.policy), [id(layer) for layer in adapted_layers(self.policy)]
        if reason is None and layers != self._compared_layers:
            reason, self._compared_layers = why_one_pass_differs(self.policy, self.info["policy"]), layers
        return reason

    def _compile(self) -> dict[str, Forward]:
        """Return compiled forwards for steps of static shapes; prompts vary in length and are read uncompiled."""
        forwards: dict[str, Forward] = {}
        for role, info in self.info.items():
            if self.sharding.in_step:
                self._note(f"not compiled: the {role} is shared by several processes")
            elif not info.cached:
                self._note(f"not compiled: the {role} reads the whole text every step")
            elif role == "policy" and self.shares_base:
                self._note("not compiled: the policy's adapters are switched by the host")
            else:
                forwards[role] = torch.compile(info.model)
        return forwards

    def may_compile(self, devices: Sequence[str]) -> bool:
        """Return whether it is known on this device what compiling saves; a note says where it is not."""
        known = self.device.type in devices
        if not known:
            self._note(
                f"not compiled: what it saves is known on {' or '.join(devices)}; the models are on {self.device.type}"
            )
        return known

    def compile_steps(self) -> bool:
        """Compile the steps of runners that are made from now on; return whether there are any to compile."""
        self.compiled = self._compile()
        if self.compiled:
            self.fused_layers, self._uncompiled_layers = None, self.fused_layers
        return bool(self.compiled)

    def give_compiling_up(self, error: Exception) -> str:
        """Undo `compile_steps` and return the note that says why."""
        self.compiled, self.fused_layers = {}, self._uncompiled_layers
        self._note(f"not compiled: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
        return self.notes[-1]

    def _fuse_layers(self, models: Sequence[torch.nn.Module], fused: bool | str) -> FusedLayers | None:
        reason = why_not_usable(self.device)
        if reason is None:
            from .layers import triton_kernels

            return FusedLayers(models, triton_kernels)
        if fused == "layers" or self.device.type == "cuda":
            self._note(f"separate layers: {reason}")
        return None

    def _choose_products(self, models: Sequence[torch.nn.Module], linear: bool | str) -> StepProducts | None:
        reason = why_not_usable(self.device) if models else "processes share the models"
        if linear is True and reason is not None:
            self._note(f"PyTorch's products: {reason}")
        return StepProducts(models, linear is True) if linear and reason is None else None

    def _pair(self) -> ModelPair:
        product_for = None if self.step_products is None else self.step_products.product_for
        functions = oracle if self.fused_layers is None else self.fused_layers.functions
        return ModelPair(self.info["policy"], self.info["reference"], functions, product_for)

    def _why_not_paired(self, pair: ModelPair) -> str | None:
        """Why policy and reference take a forward pass each in the coming rollout; None where one serves both."""
        if self.sharding.in_step:
            return "processes share the models"
        if self.compiled:
            return "compiled steps are of one model each"
        policy, opponent = self.info["policy"].model, self.info.get("opponent")
        if opponent is not None and not set(policy.modules()).isdisjoint(opponent.model.modules()):
            return "the opponent has modules of the policy"
        return pair.why_two_passes()

    def _note(self, text: str) -> None:
        self.notes.append(text)
        _log.info("%s: %s", self.op, text)

    def check_static_shapes(self, slots: int) -> None:
        """Determine whether steps may have static shapes, over caches whose length is a multiple of `slots`."""
        for role, info in self.info.items():
            if (reason := why_not_static(info, slots)) is not None:
                self.not_static[role] = reason

    # ---- checks of a request -----------------------------------------------------------------------------------------

    def check_padding(self, prompts: Prompts, new_tokens: int) -> None:
        for fault in self._faults_of_padding(prompts.width, new_tokens) if prompts.padded else ():
            raise ValueError(f"{self.op}: attention_mask: expected prompts of one length; got padding: {fault}")

    def _faults_of_padding(self, width: int, new_tokens: int) -> Iterator[str]:
        """Say of each model that may not be given padding what it does with it."""
        for role, info in self.info.items():
            if info.padding_fault is not None:
                yield f"the {role}, {info.name}, {info.padding_fault}"
            elif info.counted_slots is not None and width + new_tokens > info.counted_slots:
                yield (
                    f"the {role}, {info.name}, counts it as text in batches of {info.counted_slots} tokens and more "
                    f"(attn_temperature_tuning); got {width} + {new_tokens} tokens"
                )

    def check_length(self, longest: int, new_tokens: int, shortest: int | None = None) -> None:
        """Check texts against the models' limits. `longest`, `shortest`: tokens of such a prompt.

        The last new token is never read.
        """
        for role, info in self.info.items():
            if info.max_positions is not None and longest + new_tokens - 1 > info.max_positions:
                raise ValueError(
                    f"{self.op}: max_new_tokens: expected prompt and response within the {role}'s "
                    f"{info.max_positions} positions; got {longest} + {new_tokens} tokens"
                )
            turn = info.rotation_turn
            if turn is not None and shortest is not None and shortest <= turn < longest + new_tokens - 1:
                raise ValueError(
                    f"{self.op}: input_ids: expected all texts within {turn} tokens, or all prompts beyond: the "
                    f"{role} rotates longer texts otherwise, what it has cached of them included (longrope); got "
                    f"prompts of {shortest} to {longest} tokens and {new_tokens} new ones"
                )

    def check_ids(self, ids: torch.Tensor) -> None:
        """Check ids, padding included: on a GPU an id without an embedding would abort the process."""
        lowest, highest = torch.stack(torch.aminmax(ids)).tolist()
        for role, info in self.info.items():
            count = getattr(info.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
            if lowest < 0 or (count is not None and highest >= count):
                wrong = lowest if lowest < 0 else highest
                raise ValueError(
                    f"{self.op}: input_ids: expected ids in [0, {count}), which the {role} embeds; got {wrong}"
                )

    def check_adapters(self) -> None:
        """Repeat the checks of construction: adapters may be added, removed or merged between rollouts."""
        if not self.shares_base:
            return
        check_base(self.policy, self.op)
        if self.one_pass and (reason := self._why_two_passes()) is not None:
            raise ValueError(f"{self.op}: policy: expected adapters as when the engine was made; now {reason}")

    # ---- contexts and runners of a rollout ---------------------------------------------------------------------------

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Apply joint products, products of few rows and fused layers to the models in their current state."""
        pair = self.active_pair
        with (
            self.joint_products.applied(pair),
            nullcontext() if pair is None else pair.applied(),
            self.step_products.applied() if self.step_products else nullcontext(),
            self.fused_layers.applied() if self.fused_layers else nullcontext(),
        ):
            yield

    @contextmanager
    def decoding_mode(self, slices: bool, gather: bool) -> Iterator[None]:
        """Lock the models, switch dropout off and attention and heads to their fastest; restore all afterwards.

        Args:
            slices: keep the logits in slices of the vocabulary.
            gather: gather FSDP's parameters once, for all steps.
        """
        models = [info.model for info in self.info.values()]
        by_kernel = [
            info.model
            for info in self.info.values()
            if info.decode_attention and attention_name(info.model.config) in REPLACED
        ]
        shared = self.sharding.decoding(self.info.values(), slices, gather)
        with locked(*models), eval_mode(*models):
            self.why_not_paired = None if self.pair is None else self._why_not_paired(self.pair)
            self.active_pair = self.pair if self.why_not_paired is None else None
            otherwise = self.compiled.keys() | ({"policy"} if self.active_pair is not None else set())
            eager = [info.model for role, info in self.info.items() if role not in otherwise]
            with fast_cpu_heads(eager), use_attention(by_kernel), shared:
                yield

    def runners(self, rows: Mapping[str, int], length: int, state: DecodeState) -> list[Runner]:
        if (self.one_pass or self.active_pair is not None) and "policy" in rows:
            size = (self.info["policy"], rows["policy"] + rows["reference"], length, state)
            both: OnePassRunner
            both = AdapterRunner(*size) if self.active_pair is None else PairRunner(self.active_pair, *size)
            others = [role for role in rows if role not in both.roles]
            return [both, *(self._runner(role, rows[role], length, state) for role in others)]
        return [self._runner(role, count, length, state) for role, count in rows.items()]

    def _runner(self, role: str, rows: int, length: int, state: DecodeState) -> Runner:
        from_base = role == "reference" and self.shares_base
        info = replace(self.info["policy"], role=role) if from_base else self.info[role]
        runner: Runner
        if info.cached:
            runner = CachedRunner(info, rows, length, state, self.compiled.get(role))
        else:
            runner = WholeTextRunner(info, rows, length, state)
        return BaseRunner(self.policy, runner) if from_base else runner

    def info_of(self, role: str) -> ModelInfo:
        """Return what the model is whose parameters a role has: an adapted policy's base is the policy's model."""
        return self.info["policy" if role == "reference" and self.shares_base else role]

    def passes(self, roles: Iterable[str]) -> list[ModelInfo]:
        """Return the models whose code runs for these roles: the policy's for the reference, too, where it may be."""
        roles = list(roles)
        one = (self.one_pass or self.pair is not None) and "policy" in roles
        return [self.info_of(role) for role in roles if not (one and role == "reference")]

    def cache_bytes(self, rows: Mapping[str, int], length: int) -> dict[str, int]:
        """Return the bytes that `runners` allocates, by model."""
        parts = {}
        for role, count in rows.items():
            info = self.info_of(role)
            parts[f"{role} cache"] = info.cache_bytes(count, length) if info.cached else count * length * 8
        return parts

    # ---- recording ---------------------------------------------------------------------------------------------------

    @property
    def recorded_state(self) -> tuple[Any, ...]:
        """State of the models that a recorded step assumes and callers may change: addresses, attention, adapters."""
        models = [info.model for info in self.info.values()]
        addresses = tuple(parameter.data_ptr() for model in models for parameter in parameters_of(model))
        states = tuple((attention_name(model.config), adapter_state(model)) for model in models)
        return addresses, self.joint_products.addresses, self.active_pair is not None, states

    def why_not_recorded(self) -> list[str]:
        """Return the reasons why a step of these models cannot be captured in a graph."""
        reasons = []
        for role, info in self.info.items():
            if not info.cached:
                reasons.append(f"the {role} reads the whole text every step")
            if (name := attention_name(info.model.config)) not in CAPTURED_ATTENTION:
                reasons.append(f"the {role}'s attention, {name}, may look at values on the host")
            if name == "eager" and eager_masks_copy_from_host():
                reasons.append(f"the {role}'s masks contain a number that this transformers copies from the host")
            if role in self.not_static:
                reasons.append(f"the {role}, {info.name}, {self.not_static[role]}")
            if kind := _rotation_on_host(info.model):
                reasons.append(f"the {role} looks at positions on the host, to rotate by them ({kind})")
            if _routes_on_host(info.model):
                reasons.append(f"the {role} has experts, and sends tokens to them by their number")
            if _indexes_from_host(info.model.config):
                reasons.append(f"the {role}, {info.name}, indexes its keys and values by lists of the host")
        if (reason := self.sharding.why_not_captured(self.device)) is not None:
            reasons.append(reason)
        if self.shares_base and not self.one_pass:
            reasons.append("adapters are switched off and on by the host")
        return reasons

    def why_prompts_not_recorded(self, width: int, padding: int, new_tokens: int) -> list[str]:
        """Return the reasons why a pass over prompts is not recorded where steps are.

        Args:
            width: of the pass.
            padding: tokens of the width that are added to every prompt.
            new_tokens: of a response at most.
        """
        if self.sharding.in_step:
            return ["processes share the models"]
        # Masks that transformers makes look at no value while a graph is captured; a model's own may.
        reasons = [
            f"the {role}, {info.name}, has attention of its own"
            for role, info in self.info.items()
            if not hands_attention_over(info.model)
        ]
        if padding:
            faults = self._faults_of_padding(width, new_tokens)
            reasons += [f"they would be padded to {width} tokens: {fault}" for fault in faults]
            reasons += [
                f"they would be padded to {width} tokens, which is more than the {role}'s positions"
                for role, info in self.info.items()
                if info.max_positions is not None and width > info.max_positions
            ]
        return reasons


def _rotation_on_host(model: Any) -> str | None:
    """Return the kind of a model's rotations that are chosen by values the host reads; None: there is none."""
    kinds = ("dynamic", "longrope") if longrope_reads_positions() else ("dynamic",)
    parts = rotations(model.config.get_text_config(decoder=True))
    return next((part["rope_type"] for part in parts if part.get("rope_type") in kinds), None)


def _routes_on_host(model: Any) -> bool:
    """Whether a mixture of experts counts its tokens on the host, as all but batched implementations do."""
    config = model.config.get_text_config(decoder=True)
    experts = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    return experts and experts_name(config) not in CAPTURED_EXPERTS


def _indexes_from_host(config: Any) -> bool:
    """Whether a model indexes by a list, which is copied to the device: Falcon takes keys as [..., [-2], :]."""
    shared = getattr(config, "multi_query", False) or getattr(config, "new_decoder_architecture", False)
    return getattr(config, "model_type", None) == "falcon" and shared
