"""The models that play together: found fit for each other before any work, and made into readers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..core.checks import check_integer
from ..core.upstream import attention_name, experts_name
from .attention import NAME, REPLACED, attending
from .clock import Clock
from .heads import weights_first
from .models import evaluating, in_turn, inspect_model, rotations, twin
from .one_pass import why_not_one_pass, why_one_pass_differs
from .peft_models import adapted_layers, adapter_state, check_base, is_adapted
from .probes import examine, why_not_standing
from .readers import CachedReader, Reader, WholeTextReader
from .request import Player, Prompts
from .shared_weights import BaseReader, SharedReader

_log = logging.getLogger(__name__)

CAPTURED_ATTENTION = (*REPLACED, NAME)  # those whose masks and kernels need nothing of the host
CAPTURED_EXPERTS = ("batched_mm", "grouped_mm")


class Ensemble:
    """`mixes`: whether there is a reference. `notes`: what cannot be done the fast way, and why."""

    def __init__(
        self,
        op: str,
        policy: Any,
        reference: Any,  # None: the policy's base where it has adapters, else there is none
        opponent: Any,  # a model, a mapping of parameters, or None
        vocab_size: int | None,
        use_cache: bool,
        attention: str | None,
        compiled: bool,
    ) -> None:
        self.op, self.policy = op, policy
        self.notes: list[str] = []
        self._compared: list[int] = []  # ids of the layers that were adapted when one pass was compared with two
        if isinstance(opponent, Mapping):
            opponent = twin(policy, opponent, op)
        given = {"policy": policy, "reference": reference, "opponent": opponent}
        models = {role: model for role, model in given.items() if model is not None}
        self.shares_base = reference is None and is_adapted(policy)
        if self.shares_base:
            check_base(policy, op)
        if attention is not None:
            for model in models.values():
                model.set_attn_implementation(attention)
        self.facts = {
            role: examine(inspect_model(role, model, use_cache, op), attention is None, op)
            for role, model in models.items()
        }
        self.not_standing: dict[str, str] = {}  # models that a cache longer than the text misleads, and how
        self.by_kernel = [facts.model for facts in self.facts.values() if facts.decode_attention]
        self.mixes = reference is not None or self.shares_base
        self.device = self.facts["policy"].device
        self._check_together()
        self.vocabulary = self._common_vocabulary(vocab_size)
        self.one_pass = self.shares_base and self._may_share(use_cache)
        self.forwards = self._compiled() if compiled else {}

    def stand(self, slots: int) -> None:
        """Look whether steps may have standing shapes, over caches whose length is a multiple of `slots`."""
        for role, facts in self.facts.items():
            if (reason := why_not_standing(facts, slots)) is not None:
                self.not_standing[role] = reason

    def _compiled(self) -> dict[str, Any]:
        """What steps call in a model's place. Prompts are read by the model itself: each has a length of its own."""
        forwards = {}
        for role, facts in self.facts.items():
            if not facts.cached:
                self.note(f"not compiled: the {role} reads the whole text every step")
            elif role == "policy" and self.shares_base:
                self.note("not compiled: the policy's adapters are switched by the host")
            else:
                forwards[role] = torch.compile(facts.model)
        return forwards

    def _may_share(self, use_cache: bool) -> bool:
        reason = self._why_two_passes() if use_cache else "use_cache=False reads the whole text"
        if reason is not None:
            self.note(f"shared weights: the policy and its base take a forward pass each: {reason}")
        return reason is None

    def _why_two_passes(self) -> str | None:
        """The forward passes of a comparison are made anew only where other layers are adapted."""
        reason, layers = why_not_one_pass(self.policy), [id(layer) for layer in adapted_layers(self.policy)]
        if reason is None and layers != self._compared:
            reason, self._compared = why_one_pass_differs(self.policy, self.facts["policy"]), layers
        return reason

    def note(self, text: str) -> None:
        self.notes.append(text)
        _log.info("%s: %s", self.op, text)

    def _check_together(self) -> None:
        policy = self.facts["policy"]
        for role, facts in self.facts.items():
            if facts.device != policy.device:
                raise ValueError(
                    f"{self.op}: {role}: expected a model on {policy.device}, as the policy; got {facts.device}"
                )
            if facts.dtype != policy.dtype:
                expected, got = (str(dtype).removeprefix("torch.") for dtype in (policy.dtype, facts.dtype))
                raise ValueError(f"{self.op}: {role}: expected dtype {expected}, as the policy; got {got}")

    def _common_vocabulary(self, vocab_size: int | None) -> int:
        widths = {role: facts.vocabulary for role, facts in self.facts.items()}
        if vocab_size is not None:
            return check_integer(self.op, "vocab_size", vocab_size, 1, min(widths.values()))
        for role, width in widths.items():
            if width != widths["policy"]:
                raise ValueError(
                    f"{self.op}: {role}: expected policy and {role} of one vocabulary; got {widths['policy']} tokens "
                    f"and {width} (vocab_size=... leaves out the columns that only pad a head)"
                )
        return widths["policy"]

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Dropout off, heads and attention at their fastest; the models are as they were afterwards."""
        models = [facts.model for facts in self.facts.values()]
        eager = [facts.model for role, facts in self.facts.items() if role not in self.forwards]
        by_kernel = [m for m in self.by_kernel if attention_name(m.config) in REPLACED]
        with in_turn(*models), evaluating(*models), weights_first(eager), attending(by_kernel):
            yield

    def roles(self, players: Sequence[Player]) -> list[str]:
        """The models these players need."""
        played = [role for role in ("policy", "opponent") if any(player.parameters == role for player in players)]
        return [*played, "reference"] if self.mixes else played

    def rows(self, prompts: int, players: Sequence[Player]) -> dict[str, int]:
        """Rows that each of those models reads."""
        every = prompts * sum(player.samples for player in players)
        return {
            role: prompts * sum(player.samples for player in players if player.parameters == role)
            if role != "reference"
            else every
            for role in self.roles(players)
        }

    def reader(self, role: str, rows: int, length: int, clock: Clock) -> Reader:
        from_base = role == "reference" and self.shares_base
        facts = replace(self.facts["policy"], role=role) if from_base else self.facts[role]
        if facts.cached:
            reader: Reader = CachedReader(facts, rows, length, clock, self.forwards.get(role))
        else:
            reader = WholeTextReader(facts, rows, length, clock)
        return BaseReader(self.policy, reader) if from_base else reader

    def readers(self, rows: Mapping[str, int], length: int, clock: Clock) -> list[Reader]:
        if self.one_pass and "policy" in rows:
            both = SharedReader(self.facts["policy"], rows["policy"] + rows["reference"], length, clock)
            rest = [role for role in rows if role not in both.names]
            return [both, *(self.reader(role, rows[role], length, clock) for role in rest)]
        return [self.reader(role, count, length, clock) for role, count in rows.items()]

    def cache_bytes(self, rows: Mapping[str, int], length: int) -> dict[str, int]:
        """What `readers` allocates, model by model."""
        parts = {}
        for role, count in rows.items():
            facts = self.facts["policy" if role == "reference" and self.shares_base else role]
            parts[f"{role} cache"] = facts.cache_bytes(count, length) if facts.cached else count * length * 8
        return parts

    def check_padding(self, prompts: Prompts, new_tokens: int) -> None:
        for role, facts in self.facts.items() if prompts.padded else ():
            who = f"{self.op}: attention_mask: expected prompts of one length; got padding: the {role}, {facts.name},"
            if facts.padding is not None:
                raise ValueError(f"{who} {facts.padding}")
            if facts.counted_slots is not None and prompts.width + new_tokens > facts.counted_slots:
                raise ValueError(
                    f"{who} counts it as text in batches of {facts.counted_slots} tokens and more "
                    f"(attn_temperature_tuning); got {prompts.width} + {new_tokens} tokens"
                )

    def check_room(self, longest: int, new_tokens: int, shortest: int | None = None) -> None:
        """`longest`, `shortest`: tokens of such a prompt. The last new token is never read."""
        for role, facts in self.facts.items():
            if facts.positions is not None and longest + new_tokens - 1 > facts.positions:
                raise ValueError(
                    f"{self.op}: max_new_tokens: expected prompt and response within the {role}'s {facts.positions} "
                    f"positions; got {longest} + {new_tokens} tokens"
                )
            if facts.turns is not None and shortest is not None and shortest <= facts.turns < longest + new_tokens - 1:
                raise ValueError(
                    f"{self.op}: input_ids: expected all texts within {facts.turns} tokens, or all prompts beyond: the "
                    f"{role} rotates longer texts otherwise, what it has cached of them included (longrope); got "
                    f"prompts of {shortest} to {longest} tokens and {new_tokens} new ones"
                )

    def check_ids(self, ids: torch.Tensor) -> None:
        """Padding is embedded, too. On a GPU an id without an embedding would be the end of the process."""
        lowest, highest = (int(value) for value in torch.aminmax(ids))
        for role, facts in self.facts.items():
            count = getattr(facts.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
            if lowest < 0 or (count is not None and highest >= count):
                wrong = lowest if lowest < 0 else highest
                raise ValueError(
                    f"{self.op}: input_ids: expected ids in [0, {count}), which the {role} embeds; got {wrong}"
                )

    def check_adapters(self) -> None:
        """What was looked at when the engine was made, again: adapters come, go and are merged between rollouts."""
        if not self.shares_base:
            return
        check_base(self.policy, self.op)
        if self.one_pass and (reason := self._why_two_passes()) is not None:
            raise ValueError(f"{self.op}: policy: expected adapters as when the engine was made; now {reason}")

    @property
    def recorded_state(self) -> tuple[Any, ...]:
        """What a recorded step has fixed of the models, and their owner may change."""
        models = [facts.model for facts in self.facts.values()]
        places = tuple(parameter.data_ptr() for model in models for parameter in model.parameters())
        return places, *((attention_name(m.config), adapter_state(m)) for m in models)

    def why_not_recorded(self) -> list[str]:
        """Why a step of these models cannot be captured in a graph."""
        reasons = []
        for role, facts in self.facts.items():
            if not facts.cached:
                reasons.append(f"the {role} reads the whole text every step")
            if (name := attention_name(facts.model.config)) not in CAPTURED_ATTENTION:
                reasons.append(f"the {role}'s attention, {name}, may look at values on the host")
            if role in self.not_standing:
                reasons.append(f"the {role}, {facts.name}, {self.not_standing[role]}")
            if _rotates_on_host(facts.model):
                reasons.append(f"the {role} looks at positions on the host, to rotate by them (dynamic)")
            if _routes_on_host(facts.model):
                reasons.append(f"the {role} has experts, and sends tokens to them by their number")
            if _indexes_from_host(facts.model.config):
                reasons.append(f"the {role}, {facts.name}, indexes its keys and values by lists of the host")
        if self.shares_base and not self.one_pass:
            reasons.append("adapters are switched off and on by the host")
        return reasons


def _routes_on_host(model: Any) -> bool:
    """Mixtures of experts count their tokens on the host, unless the implementation is a batched one."""
    config = model.config.get_text_config(decoder=True)
    experts = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    return experts and experts_name(config) not in CAPTURED_EXPERTS


def _indexes_from_host(config: Any) -> bool:
    """Falcon takes the shared keys and values of its heads as [..., [-2], :], which copies the list to the device."""
    shared = getattr(config, "multi_query", False) or getattr(config, "new_decoder_architecture", False)
    return getattr(config, "model_type", None) == "falcon" and shared


def _rotates_on_host(model: Any) -> bool:
    return any(part.get("rope_type") == "dynamic" for part in rotations(model.config.get_text_config(decoder=True)))
