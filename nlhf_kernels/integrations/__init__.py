"""NLHF inside other libraries. Importing this folder imports transformers; `import nlhf_kernels` alone does not."""

from ..engine.attention import nlhf_decode_attention, nlhf_decode_mask
from .generate import mixture_generate
from .mixture import MixtureGeneration, generate_mixture

__all__ = [
    "MixtureGeneration",
    "generate_mixture",
    "mixture_generate",
    "nlhf_decode_attention",
    "nlhf_decode_mask",
]
