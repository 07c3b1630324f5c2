"""Two models of one architecture in one forward pass (one_pass.py): policy and reference, parameters of their own.

A module that owns parameters and the reference's of the same name are a pair. During a rollout the policy's gets a
forward that takes the first rows through it and the rest through the reference's, so that the policy's code, with its
attention over one cache, serves both models. This halves the Python code of a step and of the prompts, and the launches
of all that has no parameters; linear layers, and norms whose code is known, are one call for both models.

Both models must be built alike, and no parameter may be read outside the forward of the module that owns it. Both are
checked: structures, configurations and buffers are compared, and two short texts are read in one pass and in two while
every operation on a parameter is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch

from ..core.checks import FLOATS
from ..core.modes import eval_mode
from ..core.upstream import attention_name, has_forward_hooks, modules_of, observing_operations, version_of
from .alike import owns_parameters, why_not_alike, why_parameters_differ
from .contexts import exact_products, locked, no_autocast, replaced_forwards
from .cpu_head import ROWS, is_plain, product
from .decode_state import DecodeState
from .layers.fused import NORM, LayerFunctions, has_code
from .model_info import ModelInfo
from .one_pass import OnePassRunner, RowsMixedError, are_joined, module_inputs, short_texts, vectors_of
from .probes import failure, output_dtypes


class Layer(Protocol):
    """A linear layer, or several as one (joint_products.py)."""

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def bias(self) -> torch.Tensor | None: ...


Forward = Callable[..., Any]
#: Input vectors (R, D), how many of them are the policy's, its layer, the reference's -> (R, N).
Product = Callable[[torch.Tensor, int, Layer, Layer], torch.Tensor]


class Split:
    """How many of a pass's rows are the policy's; forwards of a rollout read it."""

    first = rows = 0

    def of(self, vectors: int) -> int:
        """Return how many of a module's input vectors are the policy's."""
        return vectors_of(self.first, self.rows, vectors)


class ModelPair:
    """A policy and a reference, and the forwards that serve both.

    Args:
        policy, reference: their descriptions.
        functions: of norms, for both models in one call.
        product_for: chooses the product with two weights of one shape; None, or a result of None: two of PyTorch's.
    """

    def __init__(
        self,
        policy: ModelInfo,
        reference: ModelInfo,
        functions: LayerFunctions,
        product_for: Callable[[torch.Tensor], Product | None] | None = None,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.functions, self.product_for = functions, product_for
        self.split = Split()
        self.others: dict[torch.nn.Module, torch.nn.Module] = {}  # the reference's modules, by the policy's
        self.forwards: list[tuple[torch.nn.Module, Forward]] = []
        self._compared: list[tuple[Any, int]] = []  # modules, and buffers with their versions, at the last comparison
        self._difference: str | None = None  # what it found

    def why_two_passes(self) -> str | None:
        """Why one pass cannot serve both models now; None where it can.

        Asked before every rollout: callers may change models in between. Structures are compared anew only where
        modules or buffers are others than at the last comparison.
        """
        modules = [*modules_of(self.policy.model), *modules_of(self.reference.model)]
        if any("forward" in vars(module) or has_forward_hooks(module) for module in modules):
            return "a module has hooks, or a forward that accelerate or another has replaced"
        if attention_name(self.policy.model.config) != attention_name(self.reference.model.config):
            return "their attentions differ"
        parts: list[tuple[Any, int]] = [(module, 0) for module in modules]
        parts += [(buffer, version_of(buffer)) for module in modules for buffer in module.buffers(recurse=False)]
        if not _same(parts, self._compared):
            self._compared = parts
            self._difference = why_not_alike(self.policy, self.reference)
            self.others, self.forwards = {}, []
            if self._difference is None:
                self._pair()
                self._difference = self._why_results_differ()
        return self._difference or why_parameters_differ(self.policy.model, self.reference.model)

    def linear(self, layer: Layer, other: Layer, side_by_side: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the forward of a linear layer of the policy and its counterpart.

        `side_by_side`: whether the reference's weight and bias follow the policy's in memory.
        """
        chosen = self.product_for and self.product_for(layer.weight)
        if chosen is None and side_by_side:
            chosen = batched_product
        if chosen is None:
            narrow = layer is self._head and is_plain(layer) and layer.bias is None
            chosen = partial(two_products, narrow=narrow)
        return partial(_linear, self.split, chosen, layer, other)

    def layers_to_batch(self) -> list[torch.nn.Linear]:
        """Return the linear layers of both models whose products one of PyTorch's could compute, were their weights
        side by side: all but those of Triton's kernel, and the head, whose copy would be the largest."""
        models = (self.policy.model, self.reference.model)
        heads = [model.get_output_embeddings() for model in models]  # type: ignore[operator]
        return [
            layer
            for model in models
            for layer in modules_of(model)
            if type(layer) is torch.nn.Linear and layer not in heads
            if self.product_for is None or self.product_for(layer.weight) is None
        ]

    def applied(self) -> AbstractContextManager[None]:
        """Replace the forwards of the policy's modules, except those that joint products have replaced already."""
        return replaced_forwards(self.forwards)

    # ---- forwards ----------------------------------------------------------------------------------------------------

    @property
    def _head(self) -> Any:
        return self.policy.model.get_output_embeddings()  # type: ignore[operator]

    def _pair(self) -> None:
        others = dict(self.reference.model.named_modules())
        self.others = {
            module: others[name] for name, module in self.policy.model.named_modules() if owns_parameters(module)
        }
        self.forwards = [(module, self._forward(module, other)) for module, other in self.others.items()]

    def _forward(self, module: Any, other: Any) -> Forward:
        if type(module) is torch.nn.Linear:
            return self.linear(module, other)
        each = partial(_each, self.split, module.forward, other.forward)
        if has_code(type(module).forward, NORM):
            return partial(_norm, self.split, self.functions, each, module, other)
        return each

    # ---- comparison --------------------------------------------------------------------------------------------------

    def _why_results_differ(self) -> str | None:
        """Why modules would not get the policy's rows, then the reference's, or use each model's parameters.

        Two different texts are read, one by each model: in one pass, in which every operation on a parameter is
        observed, and in two.
        """
        info, modules = self.policy, list(self.others)
        if next(info.model.parameters()).device.type == "meta":
            return None
        of_policy = short_texts(info)
        of_reference = {name: value.flatten().roll(7).view(value.shape) for name, value in of_policy.items()}
        of_reference |= {name: of_policy[name].roll(1, 0) for name in ("attention_mask", "position_ids")}
        both = {name: torch.cat([of_policy[name], of_reference[name]]) for name in of_policy}
        reads = _ParameterReads((self.policy.model, self.reference.model))
        with (
            locked(info.model, self.reference.model), no_autocast(info.device), eval_mode(info.model),
            eval_mode(self.reference.model), exact_products(), output_dtypes(info.model) as dtypes,
        ):  # fmt: skip
            seen = module_inputs(info, modules, of_policy)
            seen_by_other = module_inputs(self.reference, list(self.others.values()), of_reference)
            self.split.first, self.split.rows = len(of_policy["input_ids"]), len(both["input_ids"])
            try:
                with replaced_forwards(reads.allowed_in(self.forwards)), observing_operations(reads.observe):
                    seen_in_one_pass = module_inputs(info, modules, both)
            except RowsMixedError as error:
                return str(error)
            except Exception as error:
                return failure(error)
        if reads.operation is not None:
            return f"{info.name} reads a parameter outside the module that owns it, in {reads.operation}"
        if not are_joined(seen_in_one_pass, seen, seen_by_other, dtypes):
            return f"{info.name} mixes the rows of a batch on their way to a layer"
        return None


def _same(parts: list[tuple[Any, int]], others: list[tuple[Any, int]]) -> bool:
    return len(parts) == len(others) and all(
        part is other and version == other_version
        for (part, version), (other, other_version) in zip(parts, others, strict=True)
    )


class PairRunner(OnePassRunner):
    """Policy and reference of one architecture; the pair's forwards are applied for the whole rollout."""

    def __init__(self, pair: ModelPair, info: ModelInfo, rows: int, length: int, state: DecodeState) -> None:
        super().__init__(info, rows, length, state)
        self.pair = pair

    def split(self, first: int, rows: int) -> AbstractContextManager[None]:
        self.pair.split.first, self.pair.split.rows = first, rows
        return nullcontext()


# ---- forwards of a pair ----------------------------------------------------------------------------------------------


def _linear(split: Split, product: Product, layer: Layer, other: Layer, x: torch.Tensor) -> torch.Tensor:
    vectors = x.reshape(-1, x.shape[-1])
    first = split.of(x.shape[0]) * len(vectors) // max(1, x.shape[0])
    return product(vectors, first, layer, other).view(*x.shape[:-1], -1)


def two_products(
    x: torch.Tensor, first: int, layer: Layer, other: Layer, narrow: bool = False
) -> torch.Tensor:  # (R, D) -> (R, N)
    """PyTorch's products, each into its rows of the result. `narrow`: few rows by the product of cpu_head.py."""
    out = x.new_empty(len(x), len(layer.weight))
    for rows, part in ((slice(0, first), layer), (slice(first, None), other)):
        if narrow and len(x[rows]) in ROWS:
            out[rows] = product(x[rows], part.weight)
        elif part.bias is None:
            torch.mm(x[rows], part.weight.t(), out=out[rows])
        else:
            torch.addmm(part.bias, x[rows], part.weight.t(), out=out[rows])
    return out


def batched_product(x: torch.Tensor, first: int, layer: Layer, other: Layer) -> torch.Tensor:  # (R, D) -> (R, N)
    """One batched product of PyTorch's for weights that lie side by side, where both models have as many rows."""
    if 2 * first != len(x):
        return two_products(x, first, layer, other)
    columns, width = layer.weight.shape
    weights = layer.weight.as_strided((2, columns, width), (columns * width, width, 1))
    vectors = x.view(2, first, width)
    if layer.bias is None:
        out = torch.bmm(vectors, weights.mT)
    else:
        biases = layer.bias.as_strided((2, 1, columns), (columns, columns, 1))
        out = torch.baddbmm(biases, vectors, weights.mT)
    return out.view(len(x), columns)


def _norm(
    split: Split, functions: LayerFunctions, each: Forward, norm: Any, other: Any, hidden_states: torch.Tensor
) -> torch.Tensor:
    if hidden_states.dtype != norm.weight.dtype or hidden_states.dtype not in FLOATS:
        result: torch.Tensor = each(hidden_states)
        return result
    first = split.of(hidden_states.shape[0])
    return functions.rms_norm(hidden_states, norm.weight, norm.variance_epsilon, other.weight, first)


def _each(split: Split, forward: Forward, other: Forward, *arguments: Any, **options: Any) -> Any:
    """Take every tensor's first rows through one module and the rest through the other."""
    if split.first == 0:
        return other(*arguments, **options)
    results = (
        each(
            *(_part(split, value, rest) for value in arguments),
            **{name: _part(split, value, rest) for name, value in options.items()},
        )
        for each, rest in ((forward, False), (other, True))
    )
    return _joined(*results)


def _part(split: Split, value: Any, rest: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    first = split.of(len(value))
    return value[first:] if rest else value[:first]


def _joined(first: Any, rest: Any) -> Any:
    if isinstance(first, tuple):
        return tuple(_joined(*parts) for parts in zip(first, rest, strict=True))
    return None if first is None else torch.cat([first, rest])


# ---- parameters read elsewhere ---------------------------------------------------------------------------------------


class _ParameterReads:
    """Operations that take a parameter of some models, or a view of one, other than within given forwards.

    `operation`: the first of them; None where there is none.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        parameters = [parameter for model in models for parameter in model.parameters() if parameter.numel()]
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.running = 0  # of the given forwards
        self.operation: str | None = None

    def allowed_in(self, forwards: Sequence[tuple[torch.nn.Module, Forward]]) -> list[tuple[torch.nn.Module, Forward]]:
        return [(module, partial(self._within, forward)) for module, forward in forwards]

    def _within(self, forward: Forward, *arguments: Any, **options: Any) -> Any:
        self.running += 1
        try:
            return forward(*arguments, **options)
        finally:
            self.running -= 1

    def observe(self, operation: str, tensors: Sequence[torch.Tensor]) -> None:
        if self.running or self.operation is not None:
            return
        if any(tensor.untyped_storage().data_ptr() in self.storages for tensor in tensors):
            self.operation = operation
