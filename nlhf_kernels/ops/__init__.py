"""One folder, one operation: oracle, kernels, public function, derivations."""

from .mirror_descent.op import mirror_descent
from .mixture_sample.op import LogLinearSample, MixtureSample, log_linear_sample, mixture_sample
from .mixture_sample.settings import MixtureSettings, mixture_settings
from .row_uniforms.op import row_uniforms

__all__ = [
    "LogLinearSample",
    "MixtureSample",
    "MixtureSettings",
    "log_linear_sample",
    "mirror_descent",
    "mixture_sample",
    "mixture_settings",
    "row_uniforms",
]
