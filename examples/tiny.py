"""Models by name, or a tiny Llama of random weights that reads bytes: what the examples run on as they stand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM


def load_model(name: str | None, seed: int = 0) -> Any:
    """A causal language model from a folder or the hub; without a name the tiny one, its weights drawn from `seed`."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)  # small steps vanish in bfloat16
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # ByT5's
    return LlamaForCausalLM(LlamaConfig(vocab_size=384, max_position_embeddings=2048, **sizes, **ends))


def load_tokenizer(name: str | None) -> Any:
    """The model's own, padded on the left as decoding needs it; without a name ByT5's, which needs no files."""
    tokenizer = ByT5Tokenizer() if name is None else AutoTokenizer.from_pretrained(name)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
