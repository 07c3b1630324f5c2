"""Operations of language models between matrix products: an oracle, Triton kernels, and their use in known models."""
