"""Options of generate() beside the mixture: logits processors act as in transformers on one model, and unsupported
options are refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from nlhf_kernels.core.upstream import cache_argument
from nlhf_kernels.integrations import generate_mixture, mixture_generate
from tests.support.tiny_models import BETA, VOCABULARY, chosen, one_thread, padded, pair, prompts, tiny_model


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


# ---- logits processors -----------------------------------------------------------------------------------------------


class _MixtureModel(transformers.GPT2LMHeadModel):
    """A model with the mixture's logits; transformers' decoding of it is the reference for logits processors."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        models = zip((1 - BETA, BETA), self.models, strict=True)
        logits = sum(weight * model(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
                     for weight, model in models)  # fmt: skip
        return CausalLMOutputWithPast(logits=logits)


def _mixture_model(policy, reference) -> _MixtureModel:
    model = _MixtureModel(policy.config).eval()
    object.__setattr__(model, "models", [policy, reference])  # not as submodules
    return model


ANY_MODE = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [6, 7], *([i] for i in range(20, 60))]},
    "suppress": {"suppress_tokens": list(range(10, 70)), "begin_suppress_tokens": list(range(70, 90))},
    "min_length": {"min_new_tokens": 5, "eos_token_id": list(range(2, 60))},
    "forced_eos": {"forced_eos_token_id": 2},
    "sequence_bias": {"sequence_bias": [[[9], 4.0], [[11], 3.0]]},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.5)},
    "custom": {"logits_processor": [lambda ids, scores: scores.index_fill(1, torch.arange(50), -torch.inf)]},
    "prefix": {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(3 + batch, 60))},
}
SAMPLED = {
    "ours": {"temperature": 0.7, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    "default_top_k": {},
    "typical": {"temperature": 0.7, "top_k": 30, "typical_p": 0.6},
    "epsilon_eta": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "temperature": 1.3},
    "top_h": {"top_h": 0.4, "temperature": 0.8, "top_k": 40},
    "renormalized": {"renormalize_logits": True, "top_k": 7},
    "penalty_then_ours": {"repetition_penalty": 1.7, "temperature": 0.7, "top_k": 30},
    "own_warper_first": {"logits_processor": [transformers.TopKLogitsWarper(9)], "temperature": 2.0, "top_k": 0},
    "keeps_two": {"logits_processor": [transformers.TopPLogitsWarper(0.2, min_tokens_to_keep=2)], "top_k": 0},
}


@pytest.mark.parametrize("name", ANY_MODE)
def test_processors_act_on_the_mixture_as_transformers_would(name) -> None:
    policy, reference = pair()
    base = {**padded(prompts()), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    options = base | {key: _processors(value) for key, value in ANY_MODE[name].items()}
    truth = _mixture_model(policy, reference).generate(**options, use_cache=False)
    mixed = policy.generate(**options, custom_generate=mixture_generate, reference_model=reference, beta=BETA)
    assert torch.equal(mixed, truth)
    plain = policy.generate(**base, custom_generate=mixture_generate, reference_model=reference, beta=BETA)
    assert not torch.equal(mixed, plain), "the case must change something"


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_logprobs_are_those_of_transformers_scores(name) -> None:
    policy, reference = pair()
    options = {key: _processors(value) for key, value in SAMPLED[name].items()}
    options |= {"do_sample": True, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    prompt = prompts((6,))[0].expand(16, -1)
    result = policy.generate(
        prompt,
        custom_generate=mixture_generate,
        reference_model=reference,
        beta=BETA,
        seed=1,
        max_new_tokens=4,
        **options,
    )
    truth = _mixture_model(policy, reference)
    for step in range(4):
        so_far = result.sequences[:, : 6 + step]
        scores = truth.generate(
            so_far,
            attention_mask=torch.ones_like(so_far),
            max_new_tokens=1,
            use_cache=False,
            output_scores=True,
            **options,
        ).scores[0]
        expected = chosen(scores.log_softmax(-1), result.sequences[:, 6 + step])
        torch.testing.assert_close(result.mixture_logprobs[:, step], expected, rtol=0, atol=2e-5)


def _processors(value):
    callables = isinstance(value, list) and callable(value[0])
    return transformers.LogitsProcessorList(value) if callables else value


def test_sampler_takes_its_own_warpers_out_of_the_list() -> None:
    from nlhf_kernels.integrations.generate import _split

    warpers = [transformers.TemperatureLogitsWarper(0.5), transformers.TopKLogitsWarper(4)]
    assert _split(warpers, True) == ([], {"temperature": 0.5, "top_k": 4})
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5)
    assert _split([penalty, *warpers], True) == ([penalty], {"temperature": 0.5, "top_k": 4})
    assert _split([*warpers, penalty], True) == ([*warpers, penalty], {})
    assert _split(warpers[::-1], True) == (warpers[1:], {"temperature": 0.5})


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "beam search": ({"num_beams": 2}, "expected greedy search or sampling"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "got assisted_generation"),
    "assistant": ({"assistant_model": "policy"}, "assistant_model: assisted generation cannot draw from a mixture"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale: UnbatchedClassifierFreeGuidance"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: not supported"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: not supported"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation: expected dynamic"),
    "chunks": ({"prefill_chunk_size": 2}, "prefill_chunk_size: not supported"),
    "token types": ({"token_type_ids": torch.zeros(1, 6, dtype=torch.long)}, "token_type_ids: expected text as input"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 6, 32)}, "inputs_embeds: expected text as input_ids only"),
    "positions": ({"position_ids": torch.arange(6)[None] + 3}, "position_ids: expected those that count"),
    "no reference": ({"reference_model": None}, "reference_model: expected a causal language model; got None"),
    "no beta": ({"beta": None}, "beta: expected a number, the reference's weight"),
    "beta nan": ({"beta": float("nan")}, "beta: expected a finite number; got nan"),
    "row ids": ({"row_ids": torch.arange(3)}, "row_ids: expected 1, one per prompt, or 1; got 3"),
    "a typo": ({"temprature": 0.3}, "temprature"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case) -> None:
    policy, reference = pair()
    options, message = REFUSED[case]
    options = {key: policy if key == "assistant_model" else value for key, value in options.items()}
    ids = {} if case == "embeddings" else {"input_ids": prompts()[1][None]}
    call = {"custom_generate": mixture_generate, "reference_model": reference, "beta": BETA, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        policy.generate(**ids, **{**call, **options})


@pytest.mark.parametrize("architecture", ["gpt2", "mamba"])
def test_only_an_empty_cache_is_taken(architecture) -> None:
    policy, reference = pair(architecture)
    ids = prompts()[1][None]
    call = {"custom_generate": mixture_generate, "reference_model": reference, "beta": BETA, "max_new_tokens": 2}
    name = cache_argument(policy.forward)
    filled = policy(ids, use_cache=True)[name]
    with pytest.raises(ValueError, match=f"{name}: expected an empty cache"):
        policy.generate(torch.cat([ids, ids], 1), **{name: filled}, **call)
    policy.generate(ids, **{name: transformers.DynamicCache(config=policy.config)}, **call)


def test_right_padding_is_refused() -> None:
    policy, reference = pair()
    batch = padded(prompts())
    flipped = {name: value.flip(1) for name, value in batch.items()}
    with pytest.raises(ValueError, match="attention_mask: expected padding on the left; got a row whose last token"):
        generate_mixture(policy, reference, **flipped, beta=BETA, max_new_tokens=2)


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
    with pytest.raises(ValueError, match="reference: expected a decoder-only model; got T5ForConditionalGeneration"):
        generate_mixture(
            tiny_model(),
            transformers.T5ForConditionalGeneration(config),
            prompts()[1][None],
            beta=0.1,
            max_new_tokens=1,
        )


def test_vocabularies_must_agree_unless_their_padding_is_left_out() -> None:
    policy, reference = pair()
    options = {**padded(prompts()), "beta": BETA, "max_new_tokens": 5, "seed": 4}
    before = generate_mixture(policy, reference, **options)
    torch.nn.Module.eval(reference.resize_token_embeddings(VOCABULARY + 7) and reference)
    with pytest.raises(ValueError, match="expected policy and reference of one vocabulary; got 97 tokens and 104"):
        generate_mixture(policy, reference, **options)
    after = generate_mixture(policy, reference, **options, vocab_size=VOCABULARY)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(before.reference_logprobs, after.reference_logprobs)


def test_logits_that_are_no_distribution_are_reported() -> None:
    policy, reference = pair()
    with torch.no_grad():
        reference.transformer.wpe.weight[8] = torch.nan  # in the first step only the longest prompt
    options = {**padded(prompts()), "max_new_tokens": 2}
    result = generate_mixture(policy, reference, **options, beta=BETA, eos_token_id=())
    assert result.ok.tolist() == [True, True, False] and result.tokens[2, 0] == 0
    with pytest.raises(ValueError, match=r"mixture_generate: expected finite logits; got NaN.* in rows \[2\]"):
        policy.generate(**options, custom_generate=mixture_generate, reference_model=reference, beta=BETA)


def test_policy_alone_and_logprobs_on_request() -> None:
    policy, reference = pair()
    alone = generate_mixture(policy, None, **padded(prompts()), max_new_tokens=4, seed=1)
    assert alone.reference_logprobs is None
    torch.testing.assert_close(alone.policy_logprobs, alone.mixture_logprobs)
    some = generate_mixture(
        policy, reference, **padded(prompts()), beta=0.0, max_new_tokens=4, seed=1, logprobs=["mixture"]
    )
    assert some.policy_logprobs is None and some.reference_logprobs is None
    assert torch.equal(some.sequences, alone.sequences)
    torch.testing.assert_close(some.mixture_logprobs, alone.mixture_logprobs)
    with pytest.raises(ValueError, match="logprobs: expected one of policy, mixture; got 'reference'"):
        generate_mixture(policy, None, prompts()[1][None], max_new_tokens=1, logprobs=["reference"])
