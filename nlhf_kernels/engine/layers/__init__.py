"""Layers of language models between their products: an oracle, Triton kernels, and the models that may take them."""
