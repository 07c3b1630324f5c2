"""A model without its weights: its parameters on one rank, what a forward pass saves, what its caches hold per token.

No weight is read or allocated: models are built on the meta device, and forward passes run over PyTorch's fake tensors,
which have shapes and dtypes and no memory, with hooks on the tensors that autograd saves. So the sizes hold for any
architecture, dtype and kind of checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from ..core.optional import need
from ..engine.caches import LayerShape, ProbeLayer
from .layout import Layout, adapter_share_of, share_of

_SLICED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    Args:
        shape: of the whole.
        itemsize: bytes of a number.
        trained: whether training changes it.
    """

    shape: tuple[int, ...]
    itemsize: int
    trained: bool


@dataclass(frozen=True)
class ModelShapes:
    """A model without its weights.

    Args:
        config: transformers' configuration.
        dtype: of the weights.
        lora: peft's configuration of adapters; None: all weights are trained.
        trust_remote_code: run Python code that comes with the model.
        kind: transformers' class that builds it from `config`.
    """

    config: Any
    dtype: torch.dtype = torch.float32
    lora: Any = None
    trust_remote_code: bool = False
    kind: Any = AutoModelForCausalLM
    parameters: dict[str, Parameter] = field(init=False)  # tied ones once, by the names of the model without adapters
    plan: dict[str, str] = field(init=False)  # of tensor parallelism

    def __post_init__(self) -> None:
        model = self.build()
        parameters = {
            name: Parameter(tuple(value.shape), value.element_size(), value.requires_grad)
            for name, value in model.named_parameters()
        }
        base = model.get_base_model() if self.lora else model
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "plan", dict(getattr(base, "tp_plan", None) or {}))

    def build(self, tp_size: int = 1) -> Any:
        """Build the model on the meta device, or what one process of a tensor-parallel group computes of its layers.

        Args:
            tp_size: processes of the group.
        """
        config = copy.deepcopy(self.config)
        text = config.get_text_config(decoder=True)
        if tp_size > 1:
            if getattr(text, "head_dim", None) is None:
                text.head_dim = text.hidden_size // text.num_attention_heads
            for name in _SLICED:
                if isinstance(value := getattr(text, name, None), int):
                    setattr(text, name, max(1, value // tp_size))
        with torch.device("meta"):
            model = self.kind.from_config(config, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
            if not self.lora:
                return model
            peft = need("peft", "plan: lora")
            return peft.get_peft_model(model, self.lora)

    def bytes(self, layout: Layout, *, trained: bool = False, size: Callable[[Parameter], float] | None = None) -> int:
        """Return the bytes that a rank holds.

        Args:
            layout: of the processes; FSDP2 leaves adapters whole on every rank.
            trained: of the trained parameters alone.
            size: bytes of a number of a parameter; None: the parameter's own.
        """
        total = 0.0
        for name, parameter in self.parameters.items():
            if trained and not parameter.trained:
                continue
            adapter = self.lora is not None and parameter.trained
            share = (adapter_share_of if adapter else share_of)(plain_name(name), parameter.shape, self.plan, layout)
            total += share * (parameter.itemsize if size is None else size(parameter))
        return int(total)

    @property
    def width(self) -> int:
        """Return the width of hidden states."""
        return int(self.config.get_text_config(decoder=True).hidden_size)

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens."""
        return int(self.config.get_text_config(decoder=True).vocab_size)


def plain_name(name: str) -> str:
    """Return a parameter's name without what peft adds to it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@lru_cache(maxsize=64)
def _activations(model: _ByIdentity, rows: int, tokens: int, autocast: Any, tp: int, split: bool, again: bool) -> int:
    shapes: ModelShapes = model.value
    if split and autocast is not None:  # FSDP2's own mixed precision: layers come in half precision, none is cast
        shapes, autocast = ModelShapes(shapes.config, autocast, shapes.lora, shapes.trust_remote_code), None
    with FakeTensorMode():
        network = _without_memory(shapes.build(tp)).train()
        if again:
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable()
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device="cpu")
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        inputs["attention_mask"] = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="cpu")
        own = [value.untyped_storage() for value in network.parameters()]
        weights = set(map(id, own))  # a storage is one object as long as something holds it
        storages: dict[int, Any] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if id(storage) not in weights:
                storages[id(storage)] = storage
            return value

        inner = network.get_base_model() if shapes.lora else network
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
        with hooks, torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            inner.base_model(**inputs)
        return sum(storage.nbytes() for storage in storages.values())


def activation_bytes(
    model: ModelShapes,
    rows: int,
    tokens: int,
    autocast: torch.dtype | None,
    layout: Layout,
    recomputes: bool,
) -> int:
    """Return the bytes that a forward pass of the policy's body saves for the backward pass, on one rank.

    Args:
        model: the policy.
        rows, tokens: of a micro-batch.
        autocast: dtype of the products where it is another than the weights'.
        layout: of the processes.
        recomputes: with activation checkpointing: the layers' inputs, and one layer while it is computed again.
    """
    key = (_ByIdentity(model), rows, tokens, autocast, layout.tp_size, layout.fsdp_size > 1)
    if not recomputes:
        return _activations(*key, False)
    layers = int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 1))
    return _activations(*key, True) + _activations(*key, False) // layers


def layer_shapes(model: ModelShapes, tp_size: int, dtype: torch.dtype | None) -> list[LayerShape]:
    """Return what each layer of a model stores in a cache, per row and position.

    Args:
        model: the model.
        tp_size: processes that share its heads.
        dtype: of rollouts; None: the weights' own.
    """
    return _layer_shapes(_ByIdentity(model), tp_size, dtype)


@lru_cache(maxsize=64)
def _layer_shapes(key: _ByIdentity, tp_size: int, dtype: torch.dtype | None) -> list[LayerShape]:
    model = key.value
    shapes = model if dtype is None else ModelShapes(model.config, dtype, None, model.trust_remote_code)
    with FakeTensorMode(), torch.no_grad():
        network = _without_memory(shapes.build(tp_size)).eval()
        cache = Cache(layer_class_to_replicate=ProbeLayer)
        ids = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        network(input_ids=ids, past_key_values=cache, use_cache=True)
    return [layer.shape for layer in cache.layers if isinstance(layer, ProbeLayer) and layer.shape is not None]


def _without_memory(network: Any) -> Any:
    """Replace meta tensors, which autocast does not support, by fake tensors with a CPU as their device."""
    fakes: dict[int, Any] = {}
    for module in network.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in own:
            if id(value) not in fakes:
                fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                is_parameter = isinstance(value, torch.nn.Parameter)
                fakes[id(value)] = torch.nn.Parameter(fake, value.requires_grad) if is_parameter else fake
            setattr(module, name, fakes[id(value)])
    return network


@dataclass(frozen=True, eq=False)
class _ByIdentity:
    """A cache key for objects without a hash."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.value is self.value
