"""A tokenizer trained on the texts at hand: byte-level BPE, so that nothing is unknown to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..core.checks import check_integer

PAD, END = "<pad>", "<end>"
_BYTES = 256


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A `PreTrainedTokenizerFast` of at most `size` tokens, with a padding and an end token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_integer("vocabulary", "size", size, _BYTES + 2, 10**6)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    wrapper: Any = transformers.PreTrainedTokenizerFast
    return wrapper(tokenizer_object=bpe, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False)
