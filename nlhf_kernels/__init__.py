"""Nash Learning from Human Feedback at kernel speed: the public names."""

from . import tabular
from .core.registry import BackendUnavailable, Explanation, explain
from .core.settings import set_backend, use_backend
from .ops import (
    Head,
    LogLinearSample,
    Logprobs,
    MixtureSample,
    MixtureSettings,
    NashPGLoss,
    PreferenceLoss,
    linear_logprobs,
    linear_nash_pg_loss,
    linear_preference_loss,
    log_linear_sample,
    logprobs,
    mirror_descent,
    mixture_sample,
    mixture_settings,
    nash_pg_loss,
    preference_loss,
    row_uniforms,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "Head",
    "LogLinearSample",
    "Logprobs",
    "MixtureSample",
    "MixtureSettings",
    "NashPGLoss",
    "PreferenceLoss",
    "explain",
    "linear_logprobs",
    "linear_nash_pg_loss",
    "linear_preference_loss",
    "log_linear_sample",
    "logprobs",
    "mirror_descent",
    "mixture_sample",
    "mixture_settings",
    "nash_pg_loss",
    "preference_loss",
    "row_uniforms",
    "set_backend",
    "tabular",
    "use_backend",
]
