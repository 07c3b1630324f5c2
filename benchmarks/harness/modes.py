"""The modes forward, backward, full and overhead: the action that is checked and timed in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .case import GRADIENT_MODES, Case, Function, Inputs, Shape
from .check import Tensors, tensors_of
from .timing import Action


@dataclass(frozen=True)
class Problem:
    """One case at one shape on one device: the inputs of every implementation."""

    case: Case
    inputs: Inputs
    gradients_of: tuple[int | str, ...] = ()
    upstream: Mapping[int, torch.Tensor] = field(default_factory=dict)  # output's position -> float64 gradient

    def restore(self) -> None:
        if self.case.restore is not None:
            self.case.restore(self.inputs)

    def action(self, function: Function, mode: str) -> Action:
        if mode in GRADIENT_MODES:
            return self._gradient_action(function, mode)
        inputs = self.inputs

        def forward(_: Any) -> Any:
            return function(*inputs.args, **inputs.kwargs)

        return Action(self.restore, forward)

    def _gradient_action(self, function: Function, mode: str) -> Action:
        inputs = self.inputs.requiring_gradients(self.gradients_of)
        leaves = [inputs.at(key) for key in self.gradients_of]
        upstream: list[torch.Tensor] = []  # in the outputs' dtypes; cast in the first run, which is not timed

        def forward() -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
            result = tensors_of(function(*inputs.args, **inputs.kwargs))
            outputs = [result[position] for position in self.upstream]
            if not upstream:
                upstream.extend(grad.to(out) for grad, out in zip(self.upstream.values(), outputs, strict=True))
            return outputs, upstream

        def backward(state: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]) -> Tensors:
            return torch.autograd.grad(state[0], leaves, state[1])

        def prepare_backward() -> Any:
            self.restore()
            return forward()

        if mode == "backward":
            return Action(prepare_backward, backward)
        return Action(self.restore, lambda _: backward(forward()))


def make_problem(case: Case, shape: Shape, device: torch.device, generator: torch.Generator) -> Problem:
    """Make the problem, with the same upstream gradients for every implementation.

    Only outputs that are differentiable in the truth get one: an implementation may make further outputs
    differentiable.
    """
    inputs, keys = case.make(shape, device, generator), case.gradients_at(shape)
    if not set(case.modes_at(shape)) & set(GRADIENT_MODES):
        return Problem(case, inputs, keys)
    double = inputs.in_float64().requiring_gradients(keys)
    outputs = tensors_of(case.truth(*double.args, **double.kwargs))
    positions = [position for position, output in enumerate(outputs) if output.requires_grad]
    upstream = case.upstream([outputs[position] for position in positions], generator)
    return Problem(case, inputs, keys, dict(zip(positions, upstream, strict=True)))


def truth_of(problem: Problem, mode: str) -> Tensors:
    """Return the float64 result of `mode`: outputs, or gradients."""
    problem.restore()
    double = replace(problem, inputs=problem.inputs.in_float64())
    action = double.action(problem.case.truth, "full" if mode in GRADIENT_MODES else "forward")
    return tuple(tensor.detach() for tensor in tensors_of(action.run(None)))
