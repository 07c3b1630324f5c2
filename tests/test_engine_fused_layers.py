"""Fused layers: kernels against float64 and their oracle, and models with fused layers against models without."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers

from nlhf_kernels.core import capabilities
from nlhf_kernels.engine import RolloutEngine, model_set, nash_md
from nlhf_kernels.engine.layers import fused as fused_layers
from nlhf_kernels.engine.layers import oracle as layer_oracle
from nlhf_kernels.engine.layers.fused import FusedLayers, has_code
from tests.support.engine import settings, tiny, tiny_pair, worst_error
from tests.support.tiny_models import BETA, one_thread, padded, prompts
from tests.test_engine_shared import adapted

if capabilities.triton_missing():
    pytest.skip("needs triton", allow_module_level=True)
from nlhf_kernels.engine.layers import triton_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU by Triton's interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Between kernel and oracle, of the largest element. Triton's interpreter truncates to bfloat16 where a GPU rounds.
ULPS = {torch.float32: 4, torch.bfloat16: 1 if DEVICE.type == "cuda" else 3, torch.float16: 1}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(DEVICE, dtype)


def assert_exact(actual: torch.Tensor, oracle: torch.Tensor, truth: torch.Tensor) -> None:
    """Assert that the kernel is within ULPS of the oracle, and of the oracle's distance from float64."""
    ulp = torch.finfo(oracle.dtype).eps * truth.abs().max().clamp(min=1)
    assert actual.dtype == oracle.dtype and actual.shape == oracle.shape and actual.is_contiguous()
    assert (actual.double() - oracle.double()).abs().max() <= ULPS[oracle.dtype] * ulp
    error = (oracle.double() - truth).abs().max()
    assert (actual.double() - truth).abs().max() <= error + ULPS[oracle.dtype] * ulp


def test_compiled_steps_trace_every_layer_as_one_launch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.traced_layers"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    traced = dict(json.loads(line) for line in result.stdout.splitlines())
    assert traced.keys() == {"rms_norm", "silu_product", "rotate", "store_slot"}
    assert all(calls.count("triton_kernel_wrapper_mutation") == 1 for calls in traced.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 32), (2, 3, 100), (2, 896), (2, 1, 4, 8), (2, 3, 4, 8), (0, 1, 32)], ids=str)
def test_rms_norm(shape, dtype) -> None:
    x, weight = 3 * normal(*shape, dtype=dtype), 1 + normal(shape[-1], dtype=dtype, seed=1)
    wide = x.double()
    truth = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    if not x.numel():
        assert triton_kernels.rms_norm(x, weight, 1e-6).shape == shape
        return
    assert_exact(triton_kernels.rms_norm(x, weight, 1e-6), layer_oracle.rms_norm(x, weight, 1e-6), truth)


@pytest.mark.parametrize("tokens", [1, 3])
def test_rms_norm_of_columns(tokens) -> None:
    """The kernel normalizes a query's heads within a wider product, in any layout, and ignores other columns (NaN)."""
    product = torch.full((2, tokens, 50), torch.nan, device=DEVICE)
    product[..., 8:40] = normal(2, tokens, 32, dtype=torch.float32)
    heads, weight = product[..., 8:40].view(2, tokens, 4, 8), 1 + normal(8, dtype=torch.float32, seed=1)
    for x in (heads, heads.transpose(0, 1), heads.transpose(1, 2)):
        torch.testing.assert_close(triton_kernels.rms_norm(x, weight, 1e-6), layer_oracle.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 32), (5, 100), (5, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("first", [0, 2, 5])
def test_rms_norm_of_two_models(first, shape, dtype) -> None:
    """The first entries take one weight, with all their tokens and heads, and the rest the other."""
    x, weight, rest = (
        3 * normal(*shape, dtype=dtype),
        *(1 + normal(shape[-1], dtype=dtype, seed=seed) for seed in (1, 2)),
    )
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    truth = torch.cat([weight.double() * normed[:first], rest.double() * normed[first:]])
    kernel, oracle = (each.rms_norm(x, weight, 1e-6, rest, first) for each in (triton_kernels, layer_oracle))
    assert_exact(kernel, oracle, truth)
    parts = layer_oracle.rms_norm(x[:first], weight, 1e-6), layer_oracle.rms_norm(x[first:], rest, 1e-6)
    assert torch.equal(oracle, torch.cat(parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 40), (2, 3, 1500), (2, 1024), (0, 1, 8)], ids=str)
def test_silu_product(shape, dtype) -> None:
    both = 4 * normal(*shape[:-1], 2 * shape[-1], dtype=dtype)
    gate, up = both.chunk(2, -1)
    if not gate.numel():
        assert triton_kernels.silu_product(gate, up).shape == shape
        return
    truth = gate.double() * gate.double().sigmoid() * up.double()
    assert_exact(triton_kernels.silu_product(gate, up), layer_oracle.silu_product(gate, up), truth)


def test_silu_product_at_the_ends() -> None:
    gate = torch.tensor([[-torch.inf, -1e4, -100.0, 0.0, 100.0, torch.inf, torch.nan, 2.0]], device=DEVICE)
    up = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, torch.nan]], device=DEVICE)
    actual, oracle = triton_kernels.silu_product(gate, up), layer_oracle.silu_product(gate, up)
    torch.testing.assert_close(actual, oracle, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("query_heads", "key_heads", "tokens", "width"), [(4, 2, 1, 8), (3, 1, 3, 12), (2, 2, 1, 80)])
@pytest.mark.parametrize("positions_of", [2, 1], ids=["own positions", "shared positions"])
def test_rotate(query_heads, key_heads, tokens, width, positions_of, dtype) -> None:
    """Rotation of transposed columns of a product (B, T, heads x width), as attention passes them, is exact."""
    heads = query_heads + key_heads
    product = normal(2, tokens, heads * width, dtype=dtype).view(2, tokens, heads, width).transpose(1, 2)
    query, key = product[:, :query_heads], product[:, query_heads:]
    angles = 30 * torch.rand(positions_of, tokens, width // 2, generator=torch.Generator().manual_seed(1))
    angles = torch.cat([angles, angles], -1).to(DEVICE)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    actual = triton_kernels.rotate(query, key, cos, sin)
    oracle = layer_oracle.rotate(query, key, cos, sin)
    truth = layer_oracle.rotate(query.double(), key.double(), cos.double(), sin.double())
    for one, two, three in zip(actual, oracle, truth, strict=True):
        assert_exact(one, two, three)
    assert triton_kernels.rotate(query[:0], key[:0], cos[:0], sin[:0])[0].shape == query[:0].shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slot", [0, 2, 4])
def test_store_slot(slot, dtype) -> None:
    """One slot of some rows of a cache is written in place; keys and values may differ in width."""
    caches = {kind: [normal(4, 2, 5, width, dtype=dtype) for width in (8, 12)] for kind in ("actual", "oracle")}
    key = normal(3, 1, 2 * 8, dtype=dtype, seed=1).view(3, 1, 2, 8).transpose(1, 2)
    value = normal(3, 1, 2 * 12, dtype=dtype, seed=2).view(3, 1, 2, 12).transpose(1, 2)
    cursor = torch.tensor([slot], device=DEVICE)
    for kind, functions in (("actual", triton_kernels), ("oracle", layer_oracle)):
        functions.store_slot(*(stored[:3] for stored in caches[kind]), key, value, cursor)
    for actual, oracle in zip(caches["actual"], caches["oracle"], strict=True):
        assert torch.equal(actual, oracle)
        assert (actual[:3, :, slot] == (key if actual.shape[-1] == 8 else value)[:, :, 0]).all()


# ---- models ----------------------------------------------------------------------------------------------------------


def count_call(counts, name, function, *arguments):
    counts[name] += 1
    return function(*arguments)


def counted(functions, monkeypatch) -> dict[str, int]:
    counts = dict.fromkeys(("rms_norm", "silu_product", "rotate", "store_slot"), 0)
    for name in counts:
        monkeypatch.setattr(functions, name, partial(count_call, counts, name, getattr(functions, name)))
    return counts


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "qwen3"])
@pytest.mark.parametrize("fused", [True, "layers"])
def test_logits_are_the_models_own(architecture, fused, monkeypatch) -> None:
    monkeypatch.setattr(model_set, "why_not_usable", lambda device: None)
    counts = counted(triton_kernels, monkeypatch)
    policy, reference = (model.to(DEVICE) for model in tiny_pair(architecture))
    rows = prompts((2, 5))
    engine = RolloutEngine(policy, reference, fused=fused)
    batch = {name: value.to(DEVICE) for name, value in padded(rows).items()}
    result = engine.rollout(**batch, players=nash_md(BETA), settings=settings(3))
    layers, forwards = policy.config.num_hidden_layers, 2 * 3
    norms = (4 if architecture == "qwen3" else 2) * layers + 1
    assert counts == {
        "rms_norm": forwards * norms, "silu_product": forwards * layers, "rotate": forwards * layers,
        "store_slot": 2 * 2 * layers,
    }, "prompts are stored otherwise"  # fmt: skip
    assert result.notes == ()
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, [row.to(DEVICE) for row in rows], beta) < 1e-4
    assert not any("forward" in vars(module) for model in (policy, reference) for module in model.modules())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "qwen3"])
def test_the_oracle_gives_a_models_numbers_to_the_last_bit(architecture) -> None:
    """The oracle rounds where transformers does: its logits are equal, in bfloat16 too."""
    model = tiny(architecture).bfloat16()
    ids = torch.arange(3, 12)[None]
    own = model(ids).logits
    layers = FusedLayers([model], layer_oracle)
    with torch.no_grad(), layers.applied():
        assert torch.equal(model(ids).logits, own)
    assert len(layers.forwards) == 1 + (6 if architecture == "qwen3" else 4) * model.config.num_hidden_layers


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "bloom", "phi3", "cohere", "gpt_neox"])
def test_code_that_is_not_known_runs_as_it_is(architecture) -> None:
    """Unknown layers are not fused: Gemma's norm adds one to its weight, GPT-NeoX rotates a part of the head, Cohere
    interleaves."""
    model = tiny(architecture)
    own_classes = {type(module).__name__ for module, _ in FusedLayers([model], layer_oracle).forwards}
    ids = torch.arange(3, 12)[None]
    own = model(ids).logits
    with torch.no_grad(), FusedLayers([model], layer_oracle).applied():
        torch.testing.assert_close(model(ids).logits, own, rtol=0, atol=1e-5)
    assert not own_classes & {"Gemma3RMSNorm", "CohereAttention", "GPTNeoXAttention", "GPT2Attention", "BloomMLP"}


def test_one_changed_statement_is_another_code() -> None:
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
    assert has_code(norm.forward, fused_layers.NORM)
    assert not has_code(norm.forward, fused_layers.NORM.replace("+ self.variance_epsilon", "- self.variance_epsilon"))
    assert not has_code(norm.forward, fused_layers.NORM.replace("return self.weight * ", "return (1 + self.weight) * "))
    assert not has_code(torch.relu, fused_layers.NORM) and not has_code(None, fused_layers.NORM)


def test_adapters_keep_their_models_code() -> None:
    assert FusedLayers([adapted(tiny("llama"))], layer_oracle).forwards == []


def test_a_forward_of_anothers_stays() -> None:
    model = tiny("llama")
    module = model.model.norm
    module.forward = own = lambda x: type(module).forward(module, x)
    with FusedLayers([model], layer_oracle).applied():
        assert vars(module)["forward"] is own
    assert vars(module)["forward"] is own


def test_dtypes_that_differ_take_the_models_own_code() -> None:
    """A float32 norm over bfloat16 hidden states runs the model's own code."""
    model = tiny("llama").bfloat16()
    model.model.norm.float()
    model.lm_head.float()
    ids = torch.arange(3, 9)[None]
    own = model(ids).logits
    with torch.no_grad(), FusedLayers([model], layer_oracle).applied():
        assert torch.equal(model(ids).logits, own)


def test_a_copy_of_attention_leaves_transformers_alone() -> None:
    model = tiny("llama")
    module = transformers.models.llama.modeling_llama
    before = module.apply_rotary_pos_emb
    with FusedLayers([model], layer_oracle).applied():
        assert module.apply_rotary_pos_emb is before
        untouched = copy.deepcopy(tiny("llama"))
        assert "forward" not in vars(untouched.model.layers[0].self_attn)
    assert "forward" not in vars(model.model.layers[0].self_attn)


def test_without_a_gpu_a_note_says_so_where_layers_are_asked_for() -> None:
    engine = RolloutEngine(tiny("llama"), tiny("llama", seed=2), fused="layers")
    result = engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(2))
    assert result.notes == ("separate layers: they need a GPU; the models are on cpu",)
