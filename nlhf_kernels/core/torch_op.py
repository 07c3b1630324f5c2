"""Operators: how a room's function becomes `torch.ops.nlhf_kernels.<name>`, opaque to torch.compile and cheap to call.

An operator's inputs are one NamedTuple, written once in the room's op.py. Its fields are the operator's schema, the
public function fills them, and the backends read them by name. A field may be such a NamedTuple itself, as the inputs
of the forward are among those of a backward operator; the schema then has its fields in that place.

`define` registers schema, implementation and fake with `torch.library.Library`, which is cheaper to call than
`torch.library.custom_op`; `benchmarks/cases/row_uniforms.py` measures what a call costs. The backend is chosen inside
the operator, so a compiled graph does not fix it and a `use_backend` around the graph applies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable

from .upstream import is_unobserved, under_function_transforms

NAMESPACE = "nlhf_kernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Inputs = TypeVar("Inputs", bound=NamedTuple)
Result = TypeVar("Result")

#: The implementation behind each operator, for tests that run it: PyTorch's dispatch modes see only the operator.
IMPLEMENTATIONS: dict[object, Callable[..., Any]] = {}

_SCHEMA_TYPES: dict[object, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    list[torch.Tensor]: "Tensor[]",
    torch.dtype: "ScalarType",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
}


def define(
    name: str,
    inputs: type[Inputs],
    returns: str,
    run: Callable[[Inputs], Result],
    fake: Callable[[Inputs], Result],
    overwrites: str = "",
    run_known: Callable[[Inputs], Any] | None = None,
) -> Callable[[Inputs], Result]:
    """Register `torch.ops.nlhf_kernels.<name>` and return it as a function of its inputs.

    Args:
        name: of the operator.
        inputs: the NamedTuple of its inputs.
        returns: the schema of its result, as in `(Tensor, Tensor)`.
        run: the implementation, on CPU and CUDA tensors; its result may not alias an input.
        fake: the result's shapes, dtypes and devices for the same inputs, without reading values.
        overwrites: the argument of the schema that `run` writes into; empty for none.
        run_known: `Calls.run_known` of a room whose operator has no gradient. Eager calls that nothing observes (a
            compiler, a mode, a profiler) then leave out PyTorch's dispatcher.
    """
    arguments = _schema(inputs, overwrites)
    nested = len(arguments) > len(inputs._fields)
    of_operands = _builder(inputs)

    def on_operands(function: Callable[[Inputs], Result]) -> Callable[..., Result]:
        return lambda *operands: function(of_operands(operands))

    _library.define(f"{name}({', '.join(arguments)}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    implementation = on_operands(run)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", on_operands(fake), lib=_library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    IMPLEMENTATIONS[operator] = implementation
    if nested:
        return lambda inputs: operator(*_flatten(inputs))
    if run_known is None:
        return lambda inputs: operator(*inputs)

    def call(inputs: Inputs) -> Result:
        result: Any = past_dispatcher(run_known, inputs)
        return operator(*inputs) if result is NotImplemented else result  # type: ignore[no-any-return]

    return call


def past_dispatcher(run_known: Callable[[Inputs], Any], inputs: Inputs) -> Any:
    """Return the result of a call without its operator; NotImplemented for a call that is observed or not known."""
    return NotImplemented if torch.compiler.is_compiling() or not is_unobserved() else run_known(inputs)


def asks_for_gradient(*tensors: torch.Tensor | None) -> bool:
    """Return whether a result of these tensors requires a gradient; if not, no autograd Function is needed.

    Raise where the operators have no rule for the derivative that is asked for: they would return it as zero.
    """
    asks = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if torch.compiler.is_compiling():
        return asks
    forward_mode = any(tensor is not None and unpack_dual(tensor).tangent is not None for tensor in tensors)
    if forward_mode or (asks and under_function_transforms()):
        raise NotImplementedError(
            f"{NAMESPACE}: expected derivatives by backward() or torch.autograd.grad; got "
            + ("forward mode (torch.func.jvp, jacfwd, dual tensors)" if forward_mode else "a transform of torch.func")
        )
    return asks


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative an error, for the backward of an autograd Function.

    PyTorch's `once_differentiable` does so only where the incoming gradient requires one itself. That of a loss is the
    constant 1, and the second derivative would be zero.
    """
    guarded = once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            upstream = tuple(None if gradient is None else _requiring(gradient) for gradient in upstream)
        return guarded(ctx, *upstream)

    return run


def _requiring(gradient: torch.Tensor) -> torch.Tensor:
    return gradient if gradient.requires_grad else gradient.detach().requires_grad_()


def _schema(inputs: type[NamedTuple], overwrites: str, prefix: str = "") -> list[str]:
    """Return the schema's arguments, one for each field that is no NamedTuple itself, named by the path to it."""
    nested = _nested_fields(inputs)
    arguments: list[str] = []
    for field, kind in get_type_hints(inputs).items():
        if nested[field] is not None:
            arguments += _schema(nested[field], overwrites, f"{prefix}{field}_")
        else:
            alias = "(a!)" if prefix + field == overwrites else ""
            arguments.append(f"{_SCHEMA_TYPES[kind]}{alias} {prefix}{field}")
    return arguments


@cache
def _nested_fields(inputs: type[NamedTuple]) -> dict[str, Any]:
    """Return for each field its NamedTuple, or None."""
    kinds = get_type_hints(inputs)
    return {field: kind if hasattr(kind, "_fields") else None for field, kind in kinds.items()}


def _flatten(inputs: tuple[Any, ...]) -> list[Any]:
    """Return the operands in the schema's order."""
    operands: list[Any] = []
    for value in inputs:
        if isinstance(value, tuple):
            operands += _flatten(value)
        else:
            operands.append(value)
    return operands


@cache
def _builder(inputs: type[Inputs]) -> Callable[[Sequence[Any]], Inputs]:
    """Return the function from operands in the schema's order to the inputs. It runs in every call of an operator."""
    pieces: list[tuple[int, int, Callable[[Sequence[Any]], Any] | None]] = []  # runs of plain fields; nested ones
    stop = 0
    for kind in _nested_fields(inputs).values():
        start, stop = stop, stop + (1 if kind is None else len(_schema(kind, "")))
        if kind is None and pieces and pieces[-1][2] is None:
            start = pieces.pop()[0]
        pieces.append((start, stop, None if kind is None else _builder(kind)))
    if len(pieces) == 1:
        return partial(tuple.__new__, inputs)  # at half the cost of inputs(*operands)

    def build(operands: Sequence[Any]) -> Inputs:
        values: list[Any] = []
        for start, stop, build_nested in pieces:
            part = operands[start:stop]
            values += part if build_nested is None else (build_nested(part),)
        return inputs(*values)

    return build
