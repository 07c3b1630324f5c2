"""Nash Learning from Human Feedback at kernel speed: the public names."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import tabular
from .core.registry import BackendUnavailable, Explanation, explain
from .core.settings import set_backend, use_backend
from .ops import (
    DecodeWindow,
    Head,
    LogLinearSample,
    Logprobs,
    MixtureSample,
    MixtureSettings,
    NashPGLoss,
    PreferenceLoss,
    decode_attention,
    decode_linear,
    decode_window,
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

if TYPE_CHECKING:
    from .engine import Player, RolloutEngine, RolloutResult, RolloutSettings, nash_ema, nash_md
    from .train import NashConfig, NashTrainer

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "DecodeWindow",
    "Explanation",
    "Head",
    "LogLinearSample",
    "Logprobs",
    "MixtureSample",
    "MixtureSettings",
    "NashConfig",
    "NashPGLoss",
    "NashTrainer",
    "Player",
    "PreferenceLoss",
    "RolloutEngine",
    "RolloutResult",
    "RolloutSettings",
    "decode_attention",
    "decode_linear",
    "decode_window",
    "explain",
    "linear_logprobs",
    "linear_nash_pg_loss",
    "linear_preference_loss",
    "log_linear_sample",
    "logprobs",
    "mirror_descent",
    "mixture_sample",
    "mixture_settings",
    "nash_ema",
    "nash_md",
    "nash_pg_loss",
    "preference_loss",
    "row_uniforms",
    "set_backend",
    "tabular",
    "use_backend",
]

_ENGINE = {"Player", "RolloutEngine", "RolloutResult", "RolloutSettings", "nash_ema", "nash_md"}
_TRAIN = {"NashConfig", "NashTrainer"}


def __getattr__(name: str) -> Any:
    """Engine and trainer import transformers, which `import nlhf_kernels` alone does not."""
    for folder, names in ((".engine", _ENGINE), (".train", _TRAIN)):
        if name in names:
            return getattr(import_module(folder, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
