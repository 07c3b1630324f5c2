"""Models compared with their own forward pass: right in static shapes, past windows and after padding, or refused.

Every model here differs from a plain causal model: a mask from the length of its cache, attention in both directions,
slots counted as tokens, or positions with another origin.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from nlhf_kernels.engine import Player, RolloutEngine, model_set
from nlhf_kernels.engine.graphs import EagerRecorder
from nlhf_kernels.engine.model_info import inspect_model
from nlhf_kernels.engine.probes import examine, why_not_static
from tests.support.engine import TINY, settings, tiny, worst_error
from tests.support.tiny_models import _SHAPE, VOCABULARY, _config, one_thread, padded, prompts, random_model

TOLERANCE = 5e-5
LONG = (2, 6, 14)  # all prompts but the first are longer than a window of four
_GQA = {**_SHAPE, "num_key_value_heads": 2}
_DECODER = {**_SHAPE, "is_decoder": True}
_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "max_position_embeddings": 128}
_LLAMA4 = {
    **_GQA, "head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 1,
    "attention_chunk_size": 4, "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"],
}  # fmt: skip

#: Models that differ from plain causal ones, by name.
ODD = {
    "gpt_neo": _config(
        "GPTNeoConfig", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
        max_position_embeddings=128,
    ),
    "llama4": _config("Llama4TextConfig", **_LLAMA4, attn_temperature_tuning=False),
    "llama4_tuned": _config("Llama4TextConfig", **_LLAMA4, attn_temperature_tuning=True, floor_scale=4),
    "mpt": _config("MptConfig", d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=40),
    "bert": _config("BertConfig", **_DECODER),
    "bert_encoder": _config("BertConfig", **_SHAPE),
    "roberta": _config("RobertaConfig", **_DECODER),
    "git": _config("GitConfig", **_SHAPE, vision_config={"hidden_size": 16, "num_hidden_layers": 1,
                   "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28, "patch_size": 14}),
    "xlm": _config("XLMConfig", **_XLM, pad_index=2),
    "xlm_both": _config("XLMConfig", **{**_XLM, "causal": False}),
}  # fmt: skip


def make(name: str, **options) -> torch.nn.Module:
    if name == "paligemma2":
        text = {"vocab_size": VOCABULARY, "hidden_size": 32, **_GQA, "head_dim": 8, "sliding_window": 4}
        vision = {"hidden_size": 16, "image_size": 28, "patch_size": 14, "projection_dim": 32}
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.PaliGemmaConfig(
            text_config={"model_type": "gemma2", **text},
            vision_config={"model_type": "siglip_vision_model", **vision},
            projection_dim=32,
            image_token_index=90,
        )
        model = random_model(config, 1, transformers.PaliGemmaForConditionalGeneration)
        ids = torch.arange(3, 15)[None]
        if not torch.allclose(model(ids).logits[:, :4], model(ids[:, :4]).logits, atol=1e-3):
            pytest.skip("this transformers reads PaliGemma's text in both directions, which is refused")
        return model
    return random_model(ODD[name](32), 1) if name in ODD else tiny(name)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def error(engine: RolloutEngine, model: torch.nn.Module, rows: list[torch.Tensor], steps: int = 14) -> float:
    """Return the largest error of a rollout's log-probabilities against full forward passes."""
    (responses,) = engine.rollout(**padded(rows), players=(Player(),), settings=settings(steps))
    return worst_error(responses, model, None, rows, 0.0)


def static_engine(model: torch.nn.Module, bucket: int = 48, **options) -> RolloutEngine:
    return RolloutEngine(model, recorder=EagerRecorder(), bucket=bucket, **options)


# ---- static shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TINY, "llama4", "bert", "paligemma2"])
@pytest.mark.parametrize("lengths", [LONG, (9, 9)], ids=["padded", "whole"])
def test_static_shapes_give_the_logits_of_full_forward_passes(name, lengths, monkeypatch) -> None:
    """A cache of 48 slots gives the right logits for texts from within to far past windows of four."""
    for name_of_check in ("_routes_on_host", "_indexes_from_host"):  # the eager recorder allows both
        monkeypatch.setattr(model_set, name_of_check, lambda model: False)
    model = make(name)
    engine = static_engine(model)
    assert error(engine, model, prompts(lengths)) < TOLERANCE
    assert engine.models.why_not_recorded() == []


@pytest.mark.parametrize(("name", "bucket"), [("gpt_neo", 48), ("gpt_neo", 8), ("mpt", 48)])
def test_a_model_that_takes_the_caches_length_for_the_texts_has_growing_shapes(name, bucket, monkeypatch) -> None:
    """GPT-Neo, whose window ends at the cache's end, and MPT, whose table of positions is shorter than the cache, get
    growing shapes, and run uncompiled: every token would be another compilation."""
    monkeypatch.setattr(torch, "compile", lambda model: lambda **_: pytest.fail("a compiled model was run"))
    model = make(name)
    engine = static_engine(model, bucket, compile=True)
    (reason,) = engine.models.why_not_recorded()
    assert reason.startswith(f"the policy, {type(model).__name__}, ") and "cache" in reason
    result = engine.rollout(**padded(prompts((9, 9))), players=(Player(),), settings=settings(3))
    assert result.notes == (f"eager steps: {reason}",)
    assert error(engine, model, prompts((9, 9))) < TOLERANCE


# ---- attention -------------------------------------------------------------------------------------------------------


def takes_kernel(model: torch.nn.Module) -> bool:
    return RolloutEngine(model).models.info["policy"].decode_attention


@pytest.mark.parametrize("lengths", [LONG, (9, 9)], ids=["padded", "whole"])
def test_attention_of_both_directions_is_not_replaced(lengths) -> None:
    """decode_attention does not replace the attention of PaliGemma 2, whose layers have is_causal=False: causality,
    window and padding are in the mask, which decode_attention does not read."""
    model = make("paligemma2")
    assert not takes_kernel(model) and takes_kernel(make("gemma2"))
    assert error(RolloutEngine(model), model, prompts(lengths)) < TOLERANCE


@pytest.mark.parametrize("window", [4, 4096])
def test_a_window_that_only_the_mask_has_is_found_however_long(window) -> None:
    """A model whose window is only in the mask does not take the kernel, even if no text reaches the window (4096)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, **_GQA, "max_position_embeddings": 8192}
    config = transformers.MistralConfig(sliding_window=window, **sizes)
    assert takes_kernel(random_model(config, 1))
    hiding = random_model(config, 1)
    for layer in hiding.model.layers:
        layer.self_attn.forward = _told_no_window(layer.self_attn)
    assert not takes_kernel(hiding)


def _told_no_window(attention: torch.nn.Module):
    """Return the layer's forward without its window passed to the attention function."""
    own = attention.forward

    def forward(*args, **kwargs):
        window, attention.sliding_window = getattr(attention, "sliding_window", None), None
        config = attention.config
        attention.config = type(
            "Hidden", (), {"sliding_window": None, "__getattr__": lambda _, n: getattr(config, n)}
        )()
        try:
            return own(*args, **kwargs)
        finally:
            attention.config, attention.sliding_window = config, window

    return forward


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "use_cache", "what"),
    [
        ("xlm", False, "XLMWithLMHeadModel, gives other logits after it"),
        ("llama4_tuned", True, "Llama4ForCausalLM, gives other logits after it"),
        ("llama4_tuned", False, "Llama4ForCausalLM, gives other logits after it"),
        ("git", True, "GitForCausalLM, reads it"),
    ],
)
def test_padding_is_refused_where_it_changes_anything(name, use_cache, what) -> None:
    """Padding is refused for XLM, which attends to it, Llama 4, which counts it from `floor_scale` slots on, and GIT,
    which reads it in steps."""
    model = make(name)
    try:
        engine = RolloutEngine(model, use_cache=use_cache)
    except TypeError:
        if name != "git":
            raise
        pytest.skip("GIT of this transformers fails on text alone")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=f"expected prompts of one length; got padding: the policy, {what}"):
        engine.rollout(**padded(prompts((5, 6))), players=(Player(),), settings=settings(3))
    model._forward_pre_hooks.clear()
    assert error(engine, model, prompts((9, 9))) < TOLERANCE


def test_slots_that_are_counted_far_on_are_refused_by_the_configuration() -> None:
    """Padding past `floor_scale` slots (8192 in published models), which no short comparison reaches, is refused."""
    config = _config("Llama4TextConfig", **_LLAMA4, attn_temperature_tuning=True, floor_scale=32)
    model = random_model(config(32), 1)
    engine = RolloutEngine(model)
    assert error(engine, model, prompts((3, 20)), steps=12) < TOLERANCE
    with pytest.raises(ValueError, match=r"counts it as text in batches of 32 tokens and more .*; got 20 \+ 13 tokens"):
        error(engine, model, prompts((3, 20)), steps=13)
    assert error(engine, model, prompts((20, 20)), steps=40) < TOLERANCE


def test_tokens_of_the_paddings_id_are_text() -> None:
    """Tokens with the padding's id are read as text: XLM gets a mask, without which it would infer padding."""
    model = make("xlm")
    rows = [torch.tensor([5, 2, 9, 2]), torch.tensor([2, 7, 2, 8])]
    engine = RolloutEngine(model, use_cache=False)
    (responses,) = engine.rollout(**padded(rows), players=(Player(),), settings=settings(6, temperature=0.0))
    for row, prompt in enumerate(rows):
        text = torch.cat([prompt, responses.tokens[row]])[None]
        logits = model(text, attention_mask=torch.ones_like(text)).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, responses.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(responses.policy_logprobs[row], expected, rtol=0, atol=1e-4)


# ---- models that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert_encoder", "reads from left to right; the logits of BertLMHeadModel change with tokens that come later"),
        ("roberta", "tokens at positions 0, 1, 2, ...; RobertaForCausalLM counts them otherwise by itself"),
    ],
)
def test_models_that_are_no_causal_ones_are_refused(name, message, use_cache) -> None:
    with pytest.raises(ValueError, match=f"RolloutEngine: policy: expected .*{message}"):
        RolloutEngine(make(name), use_cache=use_cache)


def test_a_model_of_both_directions_without_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="the logits of XLMWithLMHeadModel change with tokens that come later"):
        RolloutEngine(make("xlm_both"), use_cache=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LlamaModel", "LlamaModel has no head that gives logits"),
        ("LlamaForQuestionAnswering", "LlamaForQuestionAnswering has no head that gives logits"),
        ("LlamaForSequenceClassification", r"gives logits of shape \(1, 3\) for one token, not \(1, 1, vocabulary\)"),
        ("LlamaForTokenClassification", "gives 3 logits a token, fewer than its vocabulary has"),
    ],
)
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_models_without_a_language_models_head_are_refused(role, kind, message) -> None:
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, pad_token_id=0, num_labels=3, **_GQA)
    models = {"policy": tiny("llama"), role: getattr(transformers, kind)(config)}
    with pytest.raises(TypeError, match=f"RolloutEngine: {role}: expected a causal language model; .*{message}"):
        RolloutEngine(**models)


# ---- the comparisons themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_reason(name, dtype) -> None:
    """Models in 16 bits are served as the same models in float32 are."""
    exact = examine(inspect_model("policy", tiny(name), True), True, "test")
    info = examine(inspect_model("policy", tiny(name).to(dtype), True), True, "test")
    assert info.padding_fault is None and info.decode_attention is exact.decode_attention
    assert why_not_static(info, 32) is None


def test_findings_are_cached_per_model() -> None:
    model, calls = tiny("llama"), []
    RolloutEngine(model)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    RolloutEngine(model)
    assert len(calls) == 1, "the shapes of the cache"
    model.set_attn_implementation("eager")
    RolloutEngine(model)
    assert len(calls) > 10


def test_a_comparison_leaves_everything_as_it_was() -> None:
    model = tiny("mistral").train()
    before = torch.get_rng_state()
    torch.set_float32_matmul_precision("high")
    try:
        static_engine(model)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.config._attn_implementation == "sdpa" and not torch.is_inference_mode_enabled()
    assert all(not module._forward_hooks for module in model.modules())


def test_memory_that_is_short_is_no_fault_of_the_model() -> None:
    model, calls = tiny("llama"), []

    def short(*_) -> None:
        calls.append(1)
        if len(calls) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(short)
    with pytest.raises(torch.OutOfMemoryError):
        RolloutEngine(model)
    handle.remove()
    assert takes_kernel(model)
