"""Nash Learning from Human Feedback at kernel speed: the public names."""

from . import tabular
from .core.registry import BackendUnavailable, Explanation, explain
from .core.settings import set_backend, use_backend
from .ops import (
    LogLinearSample,
    MixtureSample,
    MixtureSettings,
    log_linear_sample,
    mirror_descent,
    mixture_sample,
    mixture_settings,
    row_uniforms,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "LogLinearSample",
    "MixtureSample",
    "MixtureSettings",
    "explain",
    "log_linear_sample",
    "mirror_descent",
    "mixture_sample",
    "mixture_settings",
    "row_uniforms",
    "set_backend",
    "tabular",
    "use_backend",
]
