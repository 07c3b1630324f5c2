"""Linear layers of one input as one product: query, key and value, and the gate and up projections of an MLP.

A step of a few rows is bound by launches and by reading weights, and one wide product reads the same weights as three
narrow ones in one launch. Each group's weights are copied side by side at the start of every rollout, which costs about
as much as a token step and picks up every change of the weights.

The first layer of a group that is called computes the product for all; the others return their columns of it if they
get the same tensor. The model's own code runs unchanged, and a group whose layers get different inputs, or are not all
called, goes back to separate products. Groups are joined only where the calling code is that of transformers' Llama
and its derivatives, which takes columns of a wider matrix without a copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

from ..core.upstream import version_of
from ..core.vocabulary import is_dtensor
from .contexts import replaced_forwards
from .peft_models import adapted_layers
from .step_products import Linear

#: Layers of a group, and what the forward of their parent must contain.
GROUPS = {
    ("q_proj", "k_proj", "v_proj"): tuple(f"self.{name}_proj(hidden_states).view(hidden_shape)" for name in "qkv"),
    ("gate_proj", "up_proj"): ("self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",),
}
Group = tuple[torch.nn.Linear, ...]
_sources: WeakKeyDictionary[type[torch.nn.Module], str] = WeakKeyDictionary()


class JointProducts:
    """The groups of several models. Their joint weights are allocated by the first rollout and kept until `release`.

    `linear_for` chooses the product with a joint weight; None, or a result of None, is PyTorch's.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        linear_for: Callable[[torch.Tensor], Linear | None] | None = None,
    ) -> None:
        self.linear_for = linear_for
        distinct = {id(model): model for model in models}.values()
        self.groups = [group for model in distinct for group in find_groups(model)]
        self.enabled = True  # False: their weights would take too much memory
        self._products: dict[int, JointProduct] = {}  # index of the group -> its product

    @property
    def bytes(self) -> int:
        """Bytes that `applied` allocates."""
        return sum(
            layer.weight.numel() * layer.weight.element_size() for group in self._joinable().values() for layer in group
        )

    def why_separate(self) -> list[str]:
        """Reasons why groups that were found are not joined."""
        if not self.enabled:
            return (
                ["weights side by side would take more than a twentieth of the memory, or do not fit"]
                if self.groups
                else []
            )
        return sorted({reason for group in self.groups if (reason := _why_not_joined(group)) is not None})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Copy the weights side by side, and compute each group of layers by one product."""
        products = {}
        for index, group in self._joinable().items():
            product = self._products.get(index)
            if product is None or not product.fits():
                product = JointProduct(group, self.linear_for)
            products[index] = product
        self._products = products
        for product in products.values():
            product.load()
        forwards = [pair for product in products.values() for pair in product.forwards]
        try:
            with replaced_forwards(forwards):
                yield
        finally:
            for product in products.values():
                product.forget()

    @property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of the joint weights, which a recorded step assumes."""
        return tuple(product.weight.data_ptr() for product in self._products.values())

    def release(self) -> None:
        """Free the joint weights; the next rollout decides again whether they fit in memory."""
        self._products, self.enabled = {}, True

    def _joinable(self) -> dict[int, Group]:
        """Return the groups to join, checked at every rollout: hooks of other libraries and sharding may change."""
        if not self.enabled:
            return {}
        return {index: group for index, group in enumerate(self.groups) if _why_not_joined(group) is None}


def find_groups(model: torch.nn.Module) -> list[Group]:
    """Find the groups of a model; a model with adapters has none, because its layers add low-rank updates."""
    if adapted_layers(model):
        return []
    groups = []
    for module in model.modules():
        for names, expressions in GROUPS.items():
            layers = tuple(getattr(module, name, None) for name in names)
            if all(type(layer) is torch.nn.Linear for layer in layers) and all(
                expression in _forward_source(module) for expression in expressions
            ):
                groups.append(layers)
    return groups  # type: ignore[return-value]


def _forward_source(module: torch.nn.Module) -> str:
    """Return the source of the module's forward; "" if there is none (compiled, or defined in a shell)."""
    module_class = type(module)
    if module_class not in _sources:
        try:
            _sources[module_class] = inspect.getsource(module_class.forward)
        except (OSError, TypeError):
            _sources[module_class] = ""
    return _sources[module_class]


def _why_not_joined(group: Group) -> str | None:
    """Why the layers of a group cannot be one product now; None where they can."""
    for layer in group:
        if "forward" in vars(layer):
            return "a layer's forward has been replaced, by accelerate's hooks or another's"
        if is_dtensor(layer.weight) or layer.weight.shape != (layer.out_features, layer.in_features):
            return "a layer holds a part of its weight"
    if len({(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in group}) > 1:
        return "layers of one input differ in width, dtype or device"
    return None


class JointProduct:
    """One group: `weight` (sum of out_features, in_features), and `bias`, zero for a layer without one."""

    def __init__(self, layers: Group, linear_for: Callable[[torch.Tensor], Linear | None] | None = None) -> None:
        self.layers = layers
        first, widths = layers[0].weight, [layer.out_features for layer in layers]
        self.weight = torch.empty(sum(widths), first.shape[1], dtype=first.dtype, device=first.device)
        self.linear = None if linear_for is None else linear_for(self.weight)
        self.bias: torch.Tensor | None = None
        if any(layer.bias is not None for layer in layers):
            self.bias = torch.zeros(sum(widths), dtype=first.dtype, device=first.device)
        self.columns = [
            slice(sum(widths[:index]), sum(widths[: index + 1])) for index in range(len(layers))
        ]  # of the product, layer by layer
        #: The same functions for every rollout: a compiled model is compiled anew for others.
        self.forwards = [(layer, self._forward(index)) for index, layer in enumerate(layers)]
        self.forget()

    def fits(self) -> bool:
        """Whether the layers' weights still have the dtype and device of the joint one."""
        weight = self.layers[0].weight
        return (weight.dtype, weight.device) == (self.weight.dtype, self.weight.device)

    def load(self) -> None:
        """Copy the layers' weights; a group that went back to separate products is joined again."""
        self.joined = True
        torch.cat([layer.weight.detach() for layer in self.layers], out=self.weight)  # one launch
        if self.bias is not None:
            pairs = zip(self.layers, self.columns, strict=True)
            biases = [
                torch.zeros_like(self.bias[columns]) if layer.bias is None else layer.bias.detach()
                for layer, columns in pairs
            ]
            torch.cat(biases, out=self.bias)

    def forget(self) -> None:
        """Drop the last product."""
        self.input: torch.Tensor | None = None
        self.version = 0  # of the input: a write in place raises it
        self.output: torch.Tensor | None = None
        self.waiting: set[int] = set()  # layers that have not taken their columns yet

    def _forward(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        layer, columns = self.layers[index], self.columns[index]

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self.waiting and (index not in self.waiting or x is not self.input or _writes(x) != self.version):
                self.joined = False  # the layers do not read one input, or not all are called
                self.forget()
            if not self.joined:
                return torch.nn.functional.linear(x, layer.weight, layer.bias)
            if not self.waiting:
                self.input, self.version = x, _writes(x)
                self.output = (self.linear or torch.nn.functional.linear)(x, self.weight, self.bias)
                self.waiting = set(range(len(self.layers)))
            assert self.output is not None
            result = self.output[..., columns]
            self.waiting.remove(index)
            if not self.waiting:
                self.forget()
            return result

        return forward


def _writes(x: torch.Tensor) -> int:
    """Return the number of in-place writes to a tensor; under torch.compile, which cannot trace the counter, 0."""
    return 0 if torch.compiler.is_compiling() else version_of(x)
