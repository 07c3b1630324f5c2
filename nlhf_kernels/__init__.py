"""Nash Learning from Human Feedback at kernel speed: the public names."""

from . import tabular
from .core.registry import BackendUnavailable, Explanation, explain
from .core.settings import set_backend, use_backend
from .ops import mirror_descent, row_uniforms

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "explain",
    "mirror_descent",
    "row_uniforms",
    "set_backend",
    "tabular",
    "use_backend",
]
