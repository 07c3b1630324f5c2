"""The definition of a benchmark case: inputs, float64 truth, rivals, costs and allowed error."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .check import Check, accuracy_check

MODES = ("forward", "backward", "full", "overhead")
GRADIENT_MODES = ("backward", "full")
NEEDED_PRESETS = ("tiny", "standard")
STATED_PRESETS = (*NEEDED_PRESETS, "growth")  # growth: time and memory against one size at a time; optional
PRESETS = (*STATED_PRESETS, "headline")  # the standard shapes that `benchmarks/targets.py` names

ModesByShape = Mapping[tuple[str, str, str], tuple[str, ...]]  # case, shape's label, dtype -> modes
Function = Callable[..., Any]  # called with the inputs' args and kwargs, as the library's function is


@dataclass(frozen=True)
class Shape:
    """One size of the problem. `modes`, `devices` and `gradients_of` narrow what the case measures at this size."""

    sizes: Mapping[str, int | float | str]
    dtype: str = "float32"
    modes: tuple[str, ...] = ()  # () = the modes of the case
    devices: tuple[str, ...] = ("cpu", "cuda")
    gradients_of: tuple[int | str, ...] = ()  # () = those of the case

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.sizes.items())

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def identity(self) -> tuple[str, str]:
        """Return the label and dtype that identify this shape in a results file."""
        return self.label, self.dtype

    def matches(self, conditions: Mapping[str, str]) -> bool:
        """Return whether every name=value holds for this shape; `dtype` counts as a name."""
        facts = {"dtype": self.dtype, **{name: str(value) for name, value in self.sizes.items()}}
        return all(facts.get(name) == value for name, value in conditions.items())


def name_and_value(text: str) -> tuple[str, str]:
    """Parse an argument of --shape."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ArgumentTypeError(f"expected NAME=VALUE, such as games=1024 or dtype=float32; got {text!r}")
    return name, value


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, shared by every implementation."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    spare: Mapping[int | str, torch.Tensor] = field(default_factory=dict)  # copies for `restore`; no call sees them

    def map_tensors(self, change: Callable[[int | str, torch.Tensor], torch.Tensor]) -> Inputs:
        """Return a copy with every tensor replaced by `change(position or name, tensor)`."""

        def changed(key: int | str, value: Any) -> Any:
            return change(key, value) if isinstance(value, torch.Tensor) else value

        return Inputs(
            tuple(changed(index, value) for index, value in enumerate(self.args)),
            {name: changed(name, value) for name, value in self.kwargs.items()},
        )

    def in_float64(self) -> Inputs:
        return self.map_tensors(lambda _, tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def requiring_gradients(self, keys: Sequence[int | str]) -> Inputs:
        """Return a copy whose tensors at `keys` are leaves that require gradients; they share the originals' memory."""
        return self.map_tensors(
            lambda key, tensor: tensor.detach().requires_grad_() if key in keys else tensor.detach()
        )

    def at(self, key: int | str) -> torch.Tensor:
        tensor: torch.Tensor = self.args[key] if isinstance(key, int) else self.kwargs[key]
        return tensor


@dataclass(frozen=True)
class Unavailable:
    """The reasons why a callable cannot be provided, returned in its place."""

    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Baseline:
    """A rival. `check` replaces the case's check for a rival whose result differs by design (another random stream)."""

    function: Function
    check: Check | None = None
    why_not: Callable[[Inputs], tuple[str, ...]] = lambda inputs: ()  # reasons why it cannot run; empty: it can


@dataclass(frozen=True)
class Variant:
    """Another way to call the library's function: one more row for each backend that can run."""

    call: Callable[[Function], Function]  # the function, bound to a backend -> its replacement
    modes: tuple[str, ...] = MODES


def _no_parts(inputs: Inputs) -> dict[str, Callable[[], Any] | Unavailable]:
    return {}


def random_upstream(outputs: Sequence[torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return non-uniform gradients for float64 outputs: uniform ones would hide errors that cancel over a row."""
    return tuple(torch.randn(out.shape, dtype=torch.float64, device=out.device, generator=generator) for out in outputs)


@dataclass(frozen=True)
class Case:
    """One op's benchmark. Every `Function` is called with the same arguments as the library's function."""

    name: str
    op: str  # the room that resolves the backend
    shapes: Mapping[str, Sequence[Shape]]  # preset -> shapes
    make: Callable[[Shape, torch.device, torch.Generator], Inputs]
    truth: Function  # called with float64 copies of the inputs; differentiable where gradients are measured
    baselines: Mapping[str, Baseline]  # speed-ups and allowed errors are relative to "eager"
    bytes_moved: Callable[[Shape, str], float]  # (shape, mode) -> least bytes read and written
    flops: Callable[[Shape, str], float]  # (shape, mode) -> FLOPs that could run at the matmul rate
    function: str = ""  # the library's function, nlhf_kernels.<function>; "" = the room's name
    compiled: Callable[[], Function] | None = None  # makes the torch.compile rival; None: compiling changes nothing
    check: Check = field(default_factory=accuracy_check)
    modes: tuple[str, ...] = ("forward",)
    gradients_of: tuple[int | str, ...] = ()  # arguments (position or name) that get gradients in backward and full
    upstream: Callable[[Sequence[torch.Tensor], torch.Generator], tuple[torch.Tensor, ...]] = random_upstream
    parts: Callable[[Inputs], Mapping[str, Callable[[], Any] | Unavailable]] = _no_parts  # layers below the public call
    restore: Callable[[Inputs], None] | None = None  # restores, untimed, the inputs that a call may overwrite
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modes = set(self.modes).union(*(shape.modes for shapes in self.shapes.values() for shape in shapes))
        if modes - set(MODES):
            raise ValueError(f"case {self.name}: modes: expected some of {MODES}, got {sorted(modes - set(MODES))}")
        if not set(NEEDED_PRESETS) <= set(self.shapes) <= set(STATED_PRESETS):
            expected = f"{NEEDED_PRESETS} of the presets {STATED_PRESETS}"
            raise ValueError(f"case {self.name}: shapes: expected {expected}, got {sorted(self.shapes)}")
        if modes & set(GRADIENT_MODES) and not self.gradients_of:
            raise ValueError(f"case {self.name}: gradients_of: expected arguments, for {GRADIENT_MODES} are measured")

    def modes_at(self, shape: Shape) -> tuple[str, ...]:
        return shape.modes or self.modes

    def gradients_at(self, shape: Shape) -> tuple[int | str, ...]:
        return shape.gradients_of or self.gradients_of
