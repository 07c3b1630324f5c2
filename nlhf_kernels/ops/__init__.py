"""One folder, one operation: oracle, kernels, public function, derivations."""

from .decode_attention.op import decode_attention
from .decode_attention.window import DecodeWindow, current_decode_window, decode_window
from .decode_linear.op import decode_linear
from .linear_logprobs.head import Head
from .linear_logprobs.op import linear_logprobs
from .logprobs.op import Logprobs, logprobs
from .mirror_descent.op import mirror_descent
from .mixture_sample.op import LogLinearSample, MixtureSample, log_linear_sample, mixture_sample
from .mixture_sample.settings import MixtureSettings, mixture_settings
from .nash_pg_loss.linear import linear_nash_pg_loss
from .nash_pg_loss.op import NashPGLoss, nash_pg_loss
from .preference_loss.linear import linear_preference_loss
from .preference_loss.op import PreferenceLoss, preference_loss
from .row_uniforms.op import row_uniforms

__all__ = [
    "DecodeWindow",
    "Head",
    "LogLinearSample",
    "Logprobs",
    "MixtureSample",
    "MixtureSettings",
    "NashPGLoss",
    "PreferenceLoss",
    "current_decode_window",
    "decode_attention",
    "decode_linear",
    "decode_window",
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
]
