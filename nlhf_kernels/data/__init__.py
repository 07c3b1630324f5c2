"""Reading, checking, splitting and tokenising preference pairs and prompts; transformers is not imported."""

from .pairs import Comparison, Pair, load_comparisons, load_pairs, load_prompts
from .rows import Source, read_rows
from .split import split_by_prompt
from .tokens import encode, encode_prompts, leading_ids, pad_left, prompt_batch

__all__ = [
    "Comparison",
    "Pair",
    "Source",
    "encode",
    "encode_prompts",
    "leading_ids",
    "load_comparisons",
    "load_pairs",
    "load_prompts",
    "pad_left",
    "prompt_batch",
    "read_rows",
    "split_by_prompt",
]
