"""NLHF inside other libraries. Importing this folder imports transformers; `import nlhf_kernels` alone does not."""

from .generate import mixture_generate
from .mixture import MixtureGeneration, generate_mixture

__all__ = ["MixtureGeneration", "generate_mixture", "mixture_generate"]
