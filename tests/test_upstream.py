"""Contracts with the libraries below: what `core/upstream.py` asks of them, a test for each name."""

from __future__ import annotations

import pytest
import torch
import transformers

from nlhf_kernels.core.upstream import CACHES, cache_argument, finite_attention_gradients
from nlhf_kernels.engine.models import has_key_value_cache
from tests.support.tiny_models import ARCHITECTURES, random_model, tiny_model

MATH = [torch.nn.attention.SDPBackend.MATH]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_argument(architecture) -> None:
    """The model writes to the Cache that it gets by that name, and gives it back by that name."""
    model = tiny_model(architecture)
    name = cache_argument(model.forward)
    assert name in CACHES
    cache = transformers.DynamicCache(config=model.config)
    out = model(torch.ones(1, 3, dtype=torch.int64), **{name: cache}, use_cache=True)
    assert out[name] is cache
    layer = cache.layers[1]
    assert any(layer.has_previous_state.values()) if architecture == "mamba" else layer.get_seq_length() == 3


def test_a_cache_that_is_no_cache_of_transformers_is_not_taken_for_one() -> None:
    """XLM's argument `cache` is a dict, in versions that call a Cache otherwise as well as in those that call it so."""
    config = transformers.XLMConfig(vocab_size=97, emb_dim=32, n_layers=2, n_heads=4, causal=True, pad_token_id=0)
    model = random_model(config, seed=0)
    assert cache_argument(model.forward) is None
    assert not has_key_value_cache(model)


def test_finite_attention_gradients() -> None:
    """What it switches off comes back, after an exception too. tests/test_gpu_contracts.py shows the cause."""
    for enabled in (True, False):
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.CUDNN_ATTENTION] if enabled else MATH):
            with pytest.raises(KeyError), finite_attention_gradients():
                assert not torch.backends.cuda.cudnn_sdp_enabled()
                raise KeyError
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
