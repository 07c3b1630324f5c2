"""Linear layers of one input as one product: query, key and value, and the gate and up projections of an MLP.

A step of a few rows is bound by launches and by reading weights, and one wide product reads the same weights as three
narrow ones in one launch. Each group's weights are copied side by side at the start of every rollout, which costs about
as much as a token step and picks up every change of the weights.

The first layer of a group that is called computes the product for all; the others return their columns of it if they
get the same tensor. The model's own code runs unchanged, and a group whose layers get different inputs, or are not all
called, goes back to separate products. Groups are joined only where the calling code is that of transformers' Llama
and its derivatives, which takes columns of a wider matrix without a copy.

Where policy and reference take one pass (pairs.py), a group's product is that of both models, whose weights lie side by
side as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..core.upstream import copy_all, modules_of, version_of
from ..core.vocabulary import is_dtensor
from .contexts import replaced_forwards
from .pairs import ModelPair
from .peft_models import adapted_layers
from .step_products import Linear

#: Layers of a group, and what the forward of their parent must contain.
GROUPS = {
    ("q_proj", "k_proj", "v_proj"): tuple(f"self.{name}_proj(hidden_states).view(hidden_shape)" for name in "qkv"),
    ("gate_proj", "up_proj"): ("self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",),
}
Group = tuple[torch.nn.Linear, ...]
Weights = list[tuple[torch.Tensor, torch.Tensor | None]]  # weight and bias of each layer of a group
_sources: WeakKeyDictionary[type[torch.nn.Module], str] = WeakKeyDictionary()


class JointProducts:
    """The groups of several models. Their joint weights are allocated by the first rollout and kept until `release`.

    `linear_for` chooses the product with a joint weight; None, or a result of None, is PyTorch's. With a `pair`, its
    other linear layers but the head are groups of one, joined with the other model's only.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        linear_for: Callable[[torch.Tensor], Linear | None] | None = None,
        pair: ModelPair | None = None,
    ) -> None:
        self.linear_for = linear_for
        distinct = {id(model): model for model in models}.values()
        self.groups = [group for model in distinct for group in find_groups(model)]
        self.single_layers: list[Group] = []
        if pair is not None and models:
            joined = {layer for group in self.groups for layer in group}
            self.single_layers = [(layer,) for layer in pair.layers_to_batch() if layer not in joined]
        self.enabled = True  # False: their weights would take too much memory
        self.separate: list[str] = []  # reasons why groups were not joined when `applied` was last entered
        self._products: dict[int, JointProduct] = {}  # index of the group -> its product

    @property
    def bytes(self) -> int:
        """Bytes that `applied` allocates, at most."""
        joinable, _ = self._joinable(with_single_layers=True)
        return sum(weight.numel() * weight.element_size() for group in joinable.values() for weight, _ in group)

    @contextmanager
    def applied(self, pair: ModelPair | None = None) -> Iterator[None]:
        """Copy the weights side by side, and compute each group of layers by one product.

        With a `pair`, its policy's products are those of both models, whose weights lie side by side as well.
        """
        products = {}
        groups = self._groups(pair is not None)
        joinable, self.separate = self._joinable(pair is not None)
        if pair is not None:  # without those whose counterpart in the other model is none
            known = {groups[index][0] for index in joinable}
            joinable = {
                index: weights
                for index, weights in joinable.items()
                if pair.others.get(groups[index][0], groups[index][0]) in known
            }
        for index, weights in joinable.items():
            product = self._products.get(index)
            if product is None or not product.fits(weights):
                product = JointProduct(groups[index], self.linear_for)
            products[index] = product
        self._products = products
        by_layer: dict[Any, JointProduct] = {product.layers[0]: product for product in products.values()}
        for layer, product in by_layer.items():
            other = None if pair is None else pair.others.get(layer)  # None for the reference's own and an opponent's
            product.serve(pair, None if other is None else by_layer[other])
        load(list(zip(products.values(), joinable.values(), strict=True)))
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

    def _groups(self, with_single_layers: bool) -> list[Group]:
        return [*self.groups, *self.single_layers] if with_single_layers else self.groups

    def _joinable(self, with_single_layers: bool) -> tuple[dict[int, Weights], list[str]]:
        """Return the groups to join, by index, with their present weights, and why others are not joined.

        Hooks of other libraries and sharding may change it.
        """
        groups = self._groups(with_single_layers)
        if not self.enabled and groups:
            return {}, ["weights side by side would take more than a twentieth of the memory, or do not fit"]
        weights = [weights_of(group) for group in groups]
        reasons = [_why_not_joined(*each) for each in zip(groups, weights, strict=True)]
        joinable = {index: weights[index] for index, reason in enumerate(reasons) if reason is None}
        return joinable, sorted({reason for reason in reasons if reason is not None})


def find_groups(model: torch.nn.Module) -> list[Group]:
    """Find the groups of a model; a model with adapters has none, because its layers add low-rank updates."""
    if adapted_layers(model):
        return []
    groups = []
    for module in modules_of(model):
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


def weights_of(group: Group) -> Weights:
    return [(layer.weight, layer.bias) for layer in group]


def _why_not_joined(group: Group, weights: Weights) -> str | None:
    """Why the layers of a group cannot be one product now; None where they can."""
    kinds = set()
    for layer, (weight, _) in zip(group, weights, strict=True):
        if "forward" in vars(layer):
            return "a layer's forward has been replaced, by accelerate's hooks or another's"
        if is_dtensor(weight) or weight.shape != (layer.out_features, layer.in_features):
            return "a layer holds a part of its weight"
        kinds.add((layer.in_features, weight.dtype, weight.device))
    if len(kinds) > 1:
        return "layers of one input differ in width, dtype or device"
    return None


class JointProduct:
    """One group: `weight` (sum of out_features, in_features), and `bias`, zero for a layer without one."""

    def __init__(self, layers: Group, linear_for: Callable[[torch.Tensor], Linear | None] | None = None) -> None:
        self.layers = layers
        first, widths = layers[0].weight, [layer.out_features for layer in layers]
        self.biased = [layer.bias is not None for layer in layers]
        self.columns = [
            slice(sum(widths[:index]), sum(widths[: index + 1])) for index in range(len(layers))
        ]  # of the product, layer by layer
        weight = torch.empty(sum(widths), first.shape[1], dtype=first.dtype, device=first.device)
        self._store(weight, torch.zeros_like(weight[:, 0]) if any(self.biased) else None)
        self.linear = None if linear_for is None else linear_for(self.weight)
        #: The same functions for every rollout: a compiled model is compiled anew for others.
        self.forwards = [(layer, self._forward(index)) for index, layer in enumerate(layers)]
        self._serves: tuple[ModelPair | None, JointProduct | None] | None = None
        self.serve(None, None)
        self.forget()

    def fits(self, weights: Weights) -> bool:
        """Whether the layers' weights still have the dtype and device of the joint one, and the same layers a bias."""
        first, _ = weights[0]
        same = (first.dtype, first.device) == (self.weight.dtype, self.weight.device)
        return same and [bias is not None for _, bias in weights] == self.biased

    def serve(self, pair: ModelPair | None, other: JointProduct | None) -> None:
        """Compute this group's product; with a pair and the other model's product of the same layers, both."""
        if self._serves == (pair, other):
            return
        self._serves = pair, other
        if other is not None:
            self._lie_beside(other)
        self.together: Callable[[torch.Tensor], torch.Tensor]
        self.separate: list[Callable[[torch.Tensor], torch.Tensor]]
        if pair is None or other is None:
            self.together = partial(_product, self.linear, self)
            self.separate = [partial(_product, None, layer) for layer in self.layers]
        else:
            self.together = pair.linear(self, other, side_by_side=True)
            pairs = zip(self.layers, other.layers, strict=True)
            self.separate = [pair.linear(layer, counterpart) for layer, counterpart in pairs]

    def _store(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take this memory for the joint weight and bias."""
        self.weight, self.bias = weight, bias
        #: Where the layers' weights and biases lie in the joint ones.
        self.targets = [weight[columns] for columns in self.columns]
        if bias is not None:
            self.targets += [bias[c] for c, biased in zip(self.columns, self.biased, strict=True) if biased]

    def _lie_beside(self, other: JointProduct) -> None:
        """Allocate the weights anew as (2, sum of out_features, in_features), this group's first."""
        weights = self.weight.new_empty(2, *self.weight.shape)
        biases = (None, None) if self.bias is None else self.bias.new_zeros(2, *self.bias.shape)
        for product, weight, bias in zip((self, other), weights, biases, strict=True):
            product._store(weight, bias)

    def forget(self) -> None:
        """Drop the last product."""
        self.input: torch.Tensor | None = None
        self.version = 0  # of the input: a write in place raises it
        self.output: torch.Tensor | None = None
        self.waiting: set[int] = set()  # layers that have not taken their columns yet

    def _forward(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        columns = self.columns[index]

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self.waiting and (index not in self.waiting or x is not self.input or _writes(x) != self.version):
                self.joined = False  # the layers do not read one input, or not all are called
                self.forget()
            if not self.joined:
                return self.separate[index](x)
            if not self.waiting:
                self.input, self.version = x, _writes(x)
                self.output = self.together(x)
                self.waiting = set(range(len(self.layers)))
            assert self.output is not None
            result = self.output[..., columns]
            self.waiting.remove(index)
            if not self.waiting:
                self.forget()
            return result

        return forward


def load(products: Sequence[tuple[JointProduct, Weights]]) -> None:
    """Copy the layers' weights; groups that went back to separate products are joined again."""
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for product, weights in products:
        product.joined = True
        targets += product.targets
        sources += [weight for weight, _ in weights] + [bias for _, bias in weights if bias is not None]
    with torch.no_grad():
        copy_all(targets, sources)


def _product(linear: Linear | None, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return (linear or torch.nn.functional.linear)(x, layer.weight, layer.bias)


def _writes(x: torch.Tensor) -> int:
    """Return the number of in-place writes to a tensor; under torch.compile, which cannot trace the counter, 0."""
    return 0 if torch.compiler.is_compiling() else version_of(x)
