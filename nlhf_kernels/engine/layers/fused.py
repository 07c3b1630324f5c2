"""RMSNorm, gated activation, rotary positions and the cache's write as one Triton launch each, in known modules.

A step of few rows is bound by launches, and transformers' code takes six for a norm and ten for a rotation. A module's
forward is replaced during a rollout if its source, comments and annotations aside, equals the source below; attention
keeps its own code, in a copy whose `apply_rotary_pos_emb` is the kernel. All other modules run unchanged.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch

from ...core.capabilities import triton_missing
from ...core.checks import FLOATS
from ..contexts import replaced_forwards
from ..peft_models import adapted_layers

NORM = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
"""
MLP = """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
"""
ROTATION = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""
HALF_TURN = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
Forward = Callable[..., Any]


class LayerFunctions(Protocol):
    """The functions of oracle.py and of triton_kernels.py."""

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        rest_weight: torch.Tensor | None = None,
        first: int = 0,
    ) -> torch.Tensor: ...

    def silu_product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor: ...

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def store_slot(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cursor: torch.Tensor,
    ) -> None: ...


def why_not_usable(device: torch.device) -> str | None:
    """Why the kernels cannot run; None where they can."""
    if device.type != "cuda":
        return f"they need a GPU; the models are on {device.type}"
    return triton_missing() or None


class FusedLayers:
    """The modules of several models whose code is known; models with adapters are left unchanged."""

    def __init__(self, models: Sequence[torch.nn.Module], functions: LayerFunctions) -> None:
        self.functions = functions
        self.forwards: list[tuple[torch.nn.Module, Forward]] = []
        for model in {id(model): model for model in models}.values():
            for module in model.modules() if not adapted_layers(model) else ():
                if (forward := fused_forward(module, functions)) is not None:
                    self.forwards.append((module, forward))

    def applied(self) -> AbstractContextManager[None]:
        """Replace the forwards, except those that another library has replaced already."""
        return replaced_forwards(self.forwards)


def fused_forward(module: torch.nn.Module, functions: LayerFunctions) -> Forward | None:
    """Return a forward with fused kernels for this module; None if its code is not known."""
    own = type(module).forward
    if has_code(own, NORM):
        return partial(_norm, module, functions, MethodType(own, module))
    if has_code(own, MLP) and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return partial(_gated_mlp, module, functions)
    own = inspect.unwrap(own)  # transformers 5.24 wraps it to accept the cache's former name
    if isinstance(own, FunctionType) and "apply_rotary_pos_emb" in own.__code__.co_names:
        rotation: Any = own.__globals__.get("apply_rotary_pos_emb")
        if has_code(rotation, ROTATION) and has_code(
            inspect.unwrap(rotation).__globals__.get("rotate_half"), HALF_TURN
        ):
            names = {**own.__globals__, "apply_rotary_pos_emb": partial(_rotation, functions, rotation)}
            copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
            copy.__kwdefaults__ = own.__kwdefaults__
            return MethodType(copy, module)
    return None


def _norm(module: Any, functions: LayerFunctions, own: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype != module.weight.dtype or hidden_states.dtype not in FLOATS:
        result: torch.Tensor = own(hidden_states)
        return result
    return functions.rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _gated_mlp(module: Any, functions: LayerFunctions, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    product = functions.silu_product(gate, up) if gate.dtype in FLOATS else module.act_fn(gate) * up
    result: torch.Tensor = module.down_proj(product)
    return result


def _rotation(
    functions: LayerFunctions, own: Forward, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    *arguments: Any, **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    whole_heads = q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.shape[-1] % 2 == 0
    one_dtype = q.dtype in FLOATS and q.dtype == k.dtype == cos.dtype == sin.dtype
    if arguments or options or not whole_heads or not one_dtype or cos.ndim != 3:
        result: tuple[torch.Tensor, torch.Tensor] = own(q, k, cos, sin, *arguments, **options)
        return result
    return functions.rotate(q, k, cos, sin)


def has_code(function: Any, source: str) -> bool:
    """Whether a function does exactly what `source` does: the same statements over the same arguments."""
    return _code_of(function) == _statements(source)


@lru_cache(maxsize=512)
def _code_of(function: Any) -> tuple[list[str], list[str]] | None:
    try:
        return _statements(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError, SyntaxError, IndexError):  # no source: compiled, or typed into a shell
        return None


@lru_cache(maxsize=512)
def _statements(source: str) -> tuple[list[str], list[str]]:
    """Names of the arguments, and the statements without docstring and annotations."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise TypeError("expected a function")
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return [argument.arg for argument in function.args.args], [ast.dump(statement) for statement in body]
