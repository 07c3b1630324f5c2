"""Load models by name, or make a tiny byte-level Llama with random weights, the default of the examples."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM


def load_model(name: str | None, seed: int = 0) -> Any:
    """Load a causal language model from a folder or the hub; without a name, make the tiny one from `seed`."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)  # small steps vanish in bfloat16
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # ByT5's
    return LlamaForCausalLM(LlamaConfig(vocab_size=384, max_position_embeddings=2048, **sizes, **ends))


def load_tokenizer(name: str | None) -> Any:
    """Load the model's tokenizer with left padding, as decoding requires; without a name ByT5's, which has no files."""
    tokenizer = ByT5Tokenizer() if name is None else AutoTokenizer.from_pretrained(name)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
