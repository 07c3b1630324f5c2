"""What is asked of transformers and peft beyond their documented interface, and what is worked around in torch, with
the versions it was seen in.

Each entry has a contract test of its own in tests/test_upstream.py, which fails by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: What a model's forward and generate() call a Cache. transformers 5.17 to 5.23: the first, and the second in recurrent
#: models; 5.24: the third, in all of them.
CACHES = ("past_key_values", "cache_params", "cache")


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the name of the argument by which `forward` takes a Cache of transformers, or None.

    XLM and Flaubert take a `cache` that is a dict, in all of transformers 5.17 to 5.24.
    """
    parameters = inspect.signature(forward).parameters
    names = [name for name in CACHES if name in parameters and "dict" not in str(parameters[name].annotation)]
    return names[0] if names else None


def plain_lora_layers() -> tuple[type, ...]:
    """Return peft's layers whose forward is their base layer's plus `lora_B(lora_A(x)) * scaling` (0.14 to 0.21)."""
    from peft.tuners import lora

    names = ("Linear", "Linear8bitLt", "Linear4bit")  # the last two where bitsandbytes is installed
    return tuple(getattr(lora, name) for name in names if hasattr(lora, name))


#: peft's kinds of adapters that act within layers, on every token by itself (0.14 to 0.21). X-LoRA, Poly, Shadow and
#: adaption prompts do something in between layers; Lily takes a mean over all tokens of a batch.
ADAPTERS_PER_TOKEN = {
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA",
    "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
#: LoRA's initialisations that leave the base's weights as they are; pissa, olora, corda, loftq and lora_ga change them.
INITS_BESIDE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


@contextmanager
def finite_attention_gradients() -> Iterator[None]:
    """Keep cuDNN out of PyTorch's attention, around a forward pass and its backward pass.

    torch 2.11 to 2.13 on compute capability 9.0 (pytorch/pytorch#196678): where a mask is passed and the length is 64
    more than a multiple of 128, cuDNN's gradient of a query is NaN if the scores of its row are low or all masked, as
    they are where a text is padded on the left. Recomputed activations choose their kernel anew in the backward pass.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
