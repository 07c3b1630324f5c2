"""What forward, backward, full and overhead mean: the action that is checked and timed for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .case import GRADIENT_MODES, Case, Function, Inputs
from .check import Tensors, tensors_of
from .timing import Action


@dataclass(frozen=True)
class Problem:
    """One case at one shape on one device: what every implementation is given."""

    case: Case
    inputs: Inputs
    upstream: Tensors = ()  # float64; one for each differentiable output

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
        keys = self.case.gradients_of
        inputs = self.inputs.requiring_gradients(keys)
        leaves = [inputs.at(key) for key in keys]
        upstream: list[torch.Tensor] = []  # in the outputs' dtypes; cast in the first run, which nobody times

        def forward() -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
            outputs = differentiable(function(*inputs.args, **inputs.kwargs))
            if not upstream:
                upstream.extend(grad.to(out) for grad, out in zip(self.upstream, outputs, strict=True))
            return outputs, upstream

        def backward(state: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]) -> Tensors:
            return torch.autograd.grad(state[0], leaves, state[1])

        def prepare_backward() -> Any:
            self.restore()
            return forward()

        if mode == "backward":
            return Action(prepare_backward, backward)
        return Action(self.restore, lambda _: backward(forward()))


def differentiable(result: Any) -> Tensors:
    return tuple(tensor for tensor in tensors_of(result) if tensor.requires_grad)


def make_problem(case: Case, inputs: Inputs, modes: Sequence[str], generator: torch.Generator) -> Problem:
    """The problem, with the upstream gradients formed once, so that every implementation gets the same."""
    if not set(modes) & set(GRADIENT_MODES):
        return Problem(case, inputs)
    double = inputs.in_float64().requiring_gradients(case.gradients_of)
    outputs = differentiable(case.truth(*double.args, **double.kwargs))
    return Problem(case, inputs, tuple(case.upstream(outputs, generator)))


def truth_of(problem: Problem, mode: str) -> Tensors:
    """The float64 result of `mode`: outputs, or gradients."""
    problem.restore()
    double = Problem(problem.case, problem.inputs.in_float64(), problem.upstream)
    action = double.action(problem.case.truth, "full" if mode in GRADIENT_MODES else "forward")
    return tuple(tensor.detach() for tensor in tensors_of(action.run(None)))
