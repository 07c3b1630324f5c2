"""Decoding with the attention "nlhf_decode" in transformers' models: against eager, with padding and static caches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import transformers

import nlhf_kernels
from nlhf_kernels import decode_attention
from nlhf_kernels.core.upstream import cache_argument
from nlhf_kernels.engine import Player, RolloutEngine, attention, nash_md
from tests.support.engine import settings, tiny_pair, worst_error
from tests.support.tiny_models import BETA, one_thread, padded, prompts, random_model, tiny_model

ARCHITECTURES = ("llama", "qwen2", "gemma2", "mistral")
SLOTS, STEPS = 24, 5


@pytest.fixture(autouse=True)
def _without_gradients_on_one_thread():
    with one_thread(), torch.no_grad():
        yield


def gpt_oss(seed: int = 0) -> torch.nn.Module:
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "sinks" in name else 0.2)
    return model


def make(architecture: str) -> torch.nn.Module:
    return gpt_oss() if architecture == "gpt_oss" else tiny_model(architecture)


Step = Callable[..., torch.Tensor]


def decode(model: torch.nn.Module, cache: transformers.Cache, around: Callable[[Step, torch.Tensor], Step]) -> list:
    """Logits of a prefill of left-padded prompts and of STEPS tokens after it."""
    batch = padded(prompts())
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keeping = {cache_argument(model.forward): cache, "use_cache": True}
    out = model(**batch, position_ids=positions, **keeping)
    logits = [out.logits[:, -1]]

    def step(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return model(**inputs, **keeping).logits[:, -1]

    step = around(step, mask)
    for count in range(STEPS):
        ids = torch.arange(len(mask))[:, None] + 5 * count + 3
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
        positions = positions[:, -1:] + 1
        logits.append(step(ids, mask, positions))
    return logits


def plainly(step: Step, mask: torch.Tensor) -> Step:
    return step


def in_a_window(step: Step, mask: torch.Tensor) -> Step:
    """Pass the same two tensors in every step, updated in place, as a captured graph requires."""
    starts, ends = (mask == 0).sum(-1), torch.full((len(mask),), mask.shape[1])

    def wrapped(*inputs: torch.Tensor) -> torch.Tensor:
        ends.add_(1)
        with nlhf_kernels.decode_window(starts, ends):
            return step(*inputs)

    return wrapped


def caches(model: torch.nn.Module) -> dict[str, Callable[[], transformers.Cache]]:
    return {
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=SLOTS),
        "dynamic": lambda: transformers.DynamicCache(config=model.config),
    }


def assert_same(logits: list, expected: list, tolerance: float = 2e-5) -> None:
    for got, want in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt_oss"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_decoding_equals_eager_attention(architecture, cache) -> None:
    model = make(architecture)
    model.set_attn_implementation("eager")
    expected = decode(model, caches(model)[cache](), plainly)
    model.set_attn_implementation(attention.NAME)
    with (
        mock.patch.object(attention, "decode_attention", wraps=attention.decode_attention) as kernel,
        mock.patch.object(attention, "sdpa_mask", wraps=attention.sdpa_mask) as masks,
        mock.patch.object(attention, "_plain_attention", wraps=attention._plain_attention) as plain,
    ):
        logits = decode(model, caches(model)[cache](), in_a_window)
    assert_same(logits, expected)
    assert kernel.call_count == 2 * STEPS, "every layer of every step took the kernel"
    assert {call.kwargs["q_length"] for call in masks.call_args_list} == {9}, "no mask but the prefill's"
    assert plain.call_count == (2 if architecture in ("gemma2", "gpt_oss") else 0), "the prefill, where sdpa cannot"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_window_it_is_sdpa(architecture) -> None:
    """Outside a decode_window, the logits match eager attention and the kernel is never called."""
    model = make(architecture)
    model.set_attn_implementation("eager")
    expected = decode(model, caches(model)["static"](), plainly)
    model.set_attn_implementation(attention.NAME)
    with mock.patch.object(attention, "decode_attention", side_effect=AssertionError):
        assert_same(decode(model, caches(model)["static"](), plainly), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_training_has_its_gradients(architecture) -> None:
    """With gradients enabled, a window does not change the gradients, even for sequences of one token."""
    model = make(architecture)
    ids = torch.tensor([[7], [9]])
    window = nlhf_kernels.decode_window(None, torch.ones(2, dtype=torch.int64))
    gradients = []
    for name in ("eager", attention.NAME):
        model.set_attn_implementation(name)
        with torch.enable_grad(), window if name == attention.NAME else torch.enable_grad():
            loss = model(input_ids=ids, use_cache=False).logits.square().mean()
            gradients.append(torch.autograd.grad(loss, [model.get_input_embeddings().weight])[0])
    torch.testing.assert_close(*gradients)


def test_a_step_compiles_into_one_graph() -> None:
    """The window's tensors are inputs of the compiled step, not constants."""
    model = make("llama")
    model.set_attn_implementation(attention.NAME)
    expected = decode(model, caches(model)["static"](), in_a_window)
    torch.compiler.reset()

    def compiled(step: Step, mask: torch.Tensor) -> Step:
        starts, ends = (mask == 0).sum(-1), torch.full((len(mask),), mask.shape[1])
        fast = torch.compile(step, fullgraph=True, backend="aot_eager")

        def wrapped(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            ends.add_(1)
            with nlhf_kernels.decode_window(starts, ends):
                return fast(ids, None, positions)  # no mask: its growing shape would recompile every step

        return wrapped

    assert_same(decode(model, caches(model)["static"](), compiled), expected)


def test_masks_that_a_range_cannot_express_are_made() -> None:
    """A chunked mask, and a mask that a model adds to the causal one, are materialized."""
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    sizes = {"batch_size": 2, "q_length": 1, "kv_length": 9, "q_offset": 8, "allow_is_causal_skip": False}
    llama, chunked = transformers.MistralConfig(sliding_window=4), transformers.MistralConfig(sliding_window=4)
    chunked.attention_chunk_size = 4
    with nlhf_kernels.decode_window(None, torch.full((2,), 9)):
        causal = attention.nlhf_decode_mask(**sizes, config=llama)
        sliding = {"mask_function": sliding_window_causal_mask_function(4), "local_size": 4}
        window = attention.nlhf_decode_mask(**sizes, config=llama, **sliding)
        assert causal is None and window is None
        blocks = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))
        own = attention.nlhf_decode_mask(**sizes, config=chunked, mask_function=blocks, local_size=4)
        added = attention.nlhf_decode_mask(**sizes, config=llama, mask_function=lambda b, h, q, k: k > 2)
        several = attention.nlhf_decode_mask(**{**sizes, "q_length": 2, "q_offset": 7}, config=llama)
    assert own[0, 0, 0].tolist() == [False] * 8 + [True]
    assert added[0, 0, 0].tolist() == [False] * 3 + [True] * 6
    assert several.shape == (2, 1, 2, 9)


def test_what_a_window_cannot_serve_is_refused() -> None:
    query, cache = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 4, 8)
    bias = torch.zeros(1, 2, 1, 4)
    with (
        nlhf_kernels.decode_window(None, torch.ones(1, dtype=torch.int64)),
        pytest.raises(ValueError, match="nlhf_decode: position_bias: expected none in a decode_window; got one"),
    ):
        attention.nlhf_decode_attention(torch.nn.Identity(), query, cache, cache, None, position_bias=bias)


def test_windows_nest_and_close() -> None:
    from nlhf_kernels.ops import current_decode_window

    ones = torch.ones(2, dtype=torch.int64)
    with nlhf_kernels.decode_window(None, ones) as outer:
        with pytest.raises(KeyError), nlhf_kernels.decode_window(ones, ones):
            assert current_decode_window().starts is ones
            raise KeyError
        assert current_decode_window() is outer
    assert current_decode_window() is None
    with pytest.raises(TypeError, match="decode_window: ends: expected dtype int64; got float32"):
        nlhf_kernels.decode_window(None, torch.ones(2)).__enter__()
    with pytest.raises(ValueError, match=r"starts: expected shape \(rows\) with rows=2; got \(3,\)"):
        nlhf_kernels.decode_window(torch.ones(3, dtype=torch.int64), ones).__enter__()


def test_a_thread_sees_its_own_window_and_waits_for_that_of_another() -> None:
    """With two threads, a window is visible only in its own thread, and is gone afterwards."""
    from nlhf_kernels.ops import current_decode_window

    ones, inside, observed_windows = torch.ones(2, dtype=torch.int64), threading.Event(), []

    def other() -> None:
        observed_windows.append(current_decode_window())
        inside.set()
        with nlhf_kernels.decode_window(ones, ones) as mine:
            observed_windows.append(current_decode_window() is mine)

    thread = threading.Thread(target=other)
    with nlhf_kernels.decode_window(None, ones) as window:
        thread.start()
        assert inside.wait(30)
        thread.join(0.05)
        assert thread.is_alive() and current_decode_window() is window
    thread.join(30)
    assert observed_windows == [None, True] and current_decode_window() is None


# ---- in the rollout engine -------------------------------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch):
    """Record the kernel calls made by the engine's forward passes."""
    calls = []
    monkeypatch.setattr(attention, "decode_attention", lambda *a, **k: calls.append(None) or decode_attention(*a, **k))
    return calls


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2", "gemma3", "mixtral"])
def test_a_rollout_takes_the_kernel_and_gives_the_models_back(architecture, kernel_calls) -> None:
    models = tiny_pair(architecture)
    for model in models if architecture == "gemma2" else ():
        model.set_attn_implementation("eager")  # transformers 5.17 takes sdpa by default, which leaves out the soft cap
    before = [model.config._attn_implementation for model in models]
    engine = RolloutEngine(*models)
    kernel_calls.clear()  # discard the calls made by the engine's constructor
    rows = prompts((1, 6))
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(5))
    assert len(kernel_calls) == 2 * 2 * 4, "models, layers, steps after the prompt"
    assert [model.config._attn_implementation for model in models] == before
    own = RolloutEngine(*models, attention=before[0]).rollout(
        **padded(rows), players=nash_md(BETA), settings=settings(5)
    )
    for ours, theirs in zip(result, own, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(ours.mixture_logprobs, theirs.mixture_logprobs, rtol=1e-4, atol=1e-4)


def test_parts_of_a_model_have_their_own_attention_again() -> None:
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"vocab_size": 97, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 1, **shape}
    vision = {"hidden_size": 16, "image_size": 28, "patch_size": 14, **shape}
    ids = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)
    )
    chosen = {"": "sdpa", "vision_config": "eager", "text_config": "sdpa"}
    model.set_attn_implementation(chosen)
    engine = RolloutEngine(model.eval())
    engine.rollout(**padded(prompts((1, 6))), players=(Player(),), settings=settings(3))
    parts = {name: getattr(model.config, name, model.config)._attn_implementation for name in chosen if name}
    assert {"": model.config._attn_implementation, **parts} == chosen


def test_an_attention_chosen_between_rollouts_is_kept(kernel_calls) -> None:
    policy, reference = tiny_pair("llama")
    engine = RolloutEngine(policy, reference)
    transformers.AttentionInterface.register("chosen", attention.sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("chosen", attention.sdpa_mask)
    reference.set_attn_implementation("chosen")
    kernel_calls.clear()
    engine.rollout(**padded(prompts((1, 6))), players=nash_md(BETA), settings=settings(5))
    assert len(kernel_calls) == 2 * 4, "layers of the policy, steps after the prompt"


@pytest.mark.parametrize("architecture", ["bloom", "falcon"])
def test_a_model_that_attends_by_itself_keeps_its_own_attention(architecture, kernel_calls) -> None:
    """ALiBi models add a position bias to the mask, which the kernel does not support: it is never called."""
    policy, reference = tiny_pair(architecture)
    RolloutEngine(policy, reference).rollout(**padded(prompts((1, 6))), players=nash_md(BETA), settings=settings(3))
    assert kernel_calls == []


def test_a_layer_that_makes_a_mask_of_its_own_is_found(kernel_calls) -> None:
    """Doge adds learned values to the mask. Without a mask it would attend to padding, so the kernel is not called."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
    config = transformers.DogeConfig(vocab_size=97, hidden_size=32, max_position_embeddings=128, **sizes)
    policy, rows = random_model(config, 1), prompts((1, 9))
    whole, part = (policy(rows[1][None, :length], use_cache=False).logits[0, :5] for length in (9, 5))
    if not torch.allclose(whole, part, atol=1e-4):
        pytest.skip("transformers 5.17: Doge itself, without a cache, lets a token attend to the next ones")
    kernel_calls.clear()
    (responses,) = RolloutEngine(policy).rollout(**padded(rows), players=(Player(),), settings=settings(5))
    assert kernel_calls == [] and worst_error(responses, policy, None, rows, 0.0) < 5e-5
