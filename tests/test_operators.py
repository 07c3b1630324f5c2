"""Operators: opcheck, torch.compile(fullgraph=True) and gradients, for every room's examples and for the helper."""

from __future__ import annotations

import ast
import enum
import importlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad

import nlhf_kernels
from nlhf_kernels.core import torch_op
from nlhf_kernels.core.registry import ops
from nlhf_kernels.ops.logprobs import layout
from tests.support.backends import DEVICE

ROOMS = [op.name for op in ops()]
WITH_OPERATORS = [op.name for op in ops() if len(op.absent) < 3]  # the other ops are plain PyTorch


def examples(op: str):
    """Return the op's examples: (args, kwargs) pairs from tests/test_<op>.py."""
    module = importlib.import_module(f"tests.test_{op}")
    return [make(DEVICE) for make in module.EXAMPLES]


def recorded_operator_calls(op: str, args, kwargs):
    """Record the operator calls of the public function for opcheck. The gradient belongs to the autograd
    function around the operator, so the recorded tensors are detached."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.namespace == torch_op.NAMESPACE:
                calls.append(
                    (function, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments))
                )
            return function(*arguments, **(options or {}))

    with Recorder():
        backward(getattr(nlhf_kernels, op)(*args, **kwargs))
    return calls


def backward(result) -> None:
    """Run backward through every output that requires a gradient, to call the op's backward operators."""
    outputs = result if isinstance(result, tuple) else (result,)
    wanting = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
    if wanting:
        torch.autograd.backward([out.sum() for out in wanting])


@pytest.mark.parametrize("op", WITH_OPERATORS)
def test_opcheck(op) -> None:
    for args, kwargs in examples(op):
        calls = recorded_operator_calls(op, args, kwargs)
        assert calls, f"{op} made no operator call"
        for function, arguments in calls:
            torch.library.opcheck(function, arguments)


@pytest.mark.parametrize("op", ROOMS)
def test_compiles_into_one_graph(op) -> None:
    function = getattr(nlhf_kernels, op)
    for args, kwargs in examples(op):
        torch.compiler.reset()  # the shared lambda would count every op as a recompilation
        compiled = torch.compile(lambda *a, k=kwargs: function(*a, **k), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), function(*args, **kwargs))


def test_no_op_iterates_over_an_enum() -> None:
    """torch.compile of torch 2.11 does not trace that; later versions do."""
    found = []
    for path in sorted((Path(nlhf_kernels.__file__).parent / "ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            loops = isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.iter, ast.Name)
            if loops and isinstance(getattr(layout, node.iter.id, None), enum.EnumMeta):
                found.append(f"{path.name}: {ast.unparse(node.iter)}")
    assert not found


def test_compiled_graph_leaves_the_backend_open() -> None:
    """The backend is resolved inside the operator: a compiled graph follows a later change of backend."""
    args = torch.tensor(1, device=DEVICE), torch.arange(3, device=DEVICE), torch.tensor(2, device=DEVICE)
    compiled = torch.compile(nlhf_kernels.row_uniforms, fullgraph=True, backend="aot_eager")
    compiled(*args)
    unavailable = "cuda" if DEVICE.type == "cpu" else "cpu"
    with nlhf_kernels.use_backend(unavailable), pytest.raises(Exception, match="cannot run this call"):
        compiled(*args)


class Transform(NamedTuple):
    scale: float
    shift: torch.Tensor | None


class LogSumExpInputs(NamedTuple):
    x: torch.Tensor
    transform: Transform
    backend: str


class LogSumExpBackwardInputs(NamedTuple):
    value: torch.Tensor
    upstream: torch.Tensor
    forward: LogSumExpInputs


def _log_sum_exp(inputs: LogSumExpInputs) -> torch.Tensor:
    assert isinstance(inputs, LogSumExpInputs) and isinstance(inputs.transform, Transform)
    return torch.logsumexp(_transformed(inputs), -1)


def _transformed(inputs: LogSumExpInputs) -> torch.Tensor:
    scaled = inputs.transform.scale * inputs.x
    return scaled if inputs.transform.shift is None else scaled + inputs.transform.shift


COMPUTED = []


def _log_sum_exp_backward(inputs: LogSumExpBackwardInputs) -> torch.Tensor:
    COMPUTED.append(inputs.forward.x.shape)
    weights = torch.exp(_transformed(inputs.forward) - inputs.value.unsqueeze(-1))
    return inputs.upstream.unsqueeze(-1) * inputs.forward.transform.scale * weights


@pytest.fixture(scope="module")
def log_sum_exp():
    """An operator defined with the helper, with a gradient defined as in the ops."""
    operator = torch_op.define(
        "helper_log_sum_exp",
        LogSumExpInputs,
        "Tensor",
        _log_sum_exp,
        lambda inputs: inputs.x.new_empty(inputs.x.shape[:-1]),
    )
    gradient = torch_op.define(
        "helper_log_sum_exp_backward",
        LogSumExpBackwardInputs,
        "Tensor",
        _log_sum_exp_backward,
        lambda inputs: torch.empty_like(inputs.forward.x),
    )

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, inputs):
            value = operator(inputs)
            ctx.save_for_backward(x, inputs.transform.shift, value)
            ctx.scale, ctx.backend = inputs.transform.scale, inputs.backend
            return value

        @staticmethod
        @torch_op.differentiable_once
        def backward(ctx, upstream):
            x, shift, value = ctx.saved_tensors
            forward = LogSumExpInputs(x, Transform(ctx.scale, shift), ctx.backend)
            return gradient(LogSumExpBackwardInputs(value, upstream, forward)), None

    def call(x: torch.Tensor, scale: float, shift: torch.Tensor | None = None) -> torch.Tensor:
        inputs = LogSumExpInputs(x, Transform(scale, shift), "")
        return Differentiable.apply(x, inputs) if torch_op.asks_for_gradient(x) else operator(inputs)

    return call


def test_the_inputs_write_the_schema(log_sum_exp) -> None:
    schema = str(torch.ops.nlhf_kernels.helper_log_sum_exp_backward.default._schema)
    assert schema == (
        "nlhf_kernels::helper_log_sum_exp_backward(Tensor value, Tensor upstream, Tensor forward_x, "
        "float forward_transform_scale, Tensor? forward_transform_shift, str forward_backend) -> Tensor"
    )
    schema = str(torch.ops.nlhf_kernels.logprobs_backward_.default._schema)
    assert "Tensor(a!) forward_policy" in schema and schema.count("(a!)") == 1
    x, shift = torch.randn(3, 5), torch.randn(5)
    torch.testing.assert_close(log_sum_exp(x, 0.7, shift), torch.logsumexp(0.7 * x + shift, -1))


def test_helper_gradient_against_finite_differences(log_sum_exp) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: log_sum_exp(t, 1.5), (x,))


def test_helper_gradient_compiles(log_sum_exp) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return (log_sum_exp(x * 2, 0.7, torch.ones(5)) * torch.arange(3.0)).sum()

    x = torch.randn(3, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, expected)


def test_helper_computes_only_what_is_asked(log_sum_exp) -> None:
    x = torch.randn(3, 5)
    assert not log_sum_exp(x, 1.0).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert log_sum_exp(x, 1.0).grad_fn is None
    COMPUTED.clear()
    log_sum_exp(x, 1.0).sum().backward()
    assert COMPUTED == [(3, 5)]


def test_helper_backward_twice_and_double_use(log_sum_exp) -> None:
    x = torch.randn(2, 4, requires_grad=True)
    total = (log_sum_exp(x, 1.0) + log_sum_exp(x, 1.0)).sum()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(first, 2 * x.softmax(-1))
    assert torch.equal(first, second)


@pytest.mark.parametrize("after", [torch.sum, lambda value: value.square().sum()], ids=["constant", "not"])
def test_helper_refuses_a_second_derivative(log_sum_exp, after) -> None:
    """Whether the gradient that comes in is a constant or depends on x."""
    x = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(after(log_sum_exp(x, 1.0)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient + x).sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_helper_refuses_forward_mode(log_sum_exp, requires_grad) -> None:
    """The operator would drop the tangent, and the derivative would be zero."""
    x = torch.randn(2, 4, requires_grad=requires_grad)
    with pytest.raises(NotImplementedError, match=r"expected derivatives by backward\(\) .*; got forward mode"):
        torch.func.jvp(lambda x: log_sum_exp(x, 1.0), (x,), (torch.ones(2, 4),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="got forward mode"):
        log_sum_exp(forward_ad.make_dual(x, torch.ones(2, 4)), 1.0)


def test_helper_refuses_transforms_of_gradients(log_sum_exp) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(NotImplementedError, match=r"expected derivatives by backward\(\) .*; got a transform of"):
        torch.func.grad(lambda x: log_sum_exp(x, 1.0).sum())(x)
