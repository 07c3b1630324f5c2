"""Decoding with two models, against full forward passes of each and against transformers' own decoding."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from nlhf_kernels.core.upstream import cache_argument
from nlhf_kernels.engine import model_set, runners
from nlhf_kernels.engine.caches import StaticRowsCache
from nlhf_kernels.integrations import generate_mixture, mixture_generate
from tests.support.statistics import assert_plausible, chi_square_p
from tests.support.tiny_models import (
    ARCHITECTURES,
    BETA,
    LENGTHS,
    VOCABULARY,
    chosen,
    one_thread,
    padded,
    pair,
    prompts,
    teacher_forced,
    tiny_model,
    tiny_tokenizer,
)

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def worst_error(result, policy, reference, rows: list[torch.Tensor], beta: float = BETA) -> float:
    """Return the largest error, in nats, of the reported log-probabilities against full forward passes."""
    errors = []
    for row, prompt in enumerate(rows):
        count = int(result.mask[row].sum())
        tokens = result.tokens[row, :count]
        one, two = teacher_forced(policy, prompt, tokens), teacher_forced(reference, prompt, tokens)
        mixture = ((1 - beta) * one + beta * two).log_softmax(-1)
        for truth, got in ((one, result.policy_logprobs), (two, result.reference_logprobs),
                           (mixture, result.mixture_logprobs)):  # fmt: skip
            errors.append((chosen(truth, tokens) - got[row, :count]).abs().max())
    return float(torch.stack(errors).max())


# ---- what is reported, and what is drawn -----------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("use_cache", [True, False])
def test_logprobs_are_those_of_full_forward_passes(architecture, use_cache) -> None:
    policy, reference = pair(architecture)
    rows = prompts()
    result = generate_mixture(
        policy, reference, **padded(rows), beta=BETA, max_new_tokens=8, seed=3, eos_token_id=(), use_cache=use_cache
    )
    assert result.mask.all() and result.ok.all() and result.mask.shape == (3, 8)
    assert worst_error(result, policy, reference, rows) < 5e-5


@every_architecture
def test_greedy_ends_of_the_mixture_are_the_models_themselves(architecture) -> None:
    policy, reference = pair(architecture)
    options = {**padded(prompts()), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beta, model in ((0.0, policy), (1.0, reference)):
        mixed = policy.generate(**options, custom_generate=mixture_generate, reference_model=reference, beta=beta)
        assert torch.equal(mixed, model.generate(**options))


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": 0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}],
    ids=["plain", "filtered"],
)
def test_first_token_is_distributed_as_the_exact_mixture(sampling) -> None:
    policy, reference = pair("llama")
    (prompt,) = prompts((5,))
    tokens = policy.generate(
        prompt[None], custom_generate=mixture_generate, reference_model=reference, beta=BETA, seed=11, do_sample=True,
        max_new_tokens=1, num_return_sequences=4000, **sampling,
    )[:, -1]  # fmt: skip
    logits = sum(
        weight * teacher_forced(model, prompt, prompt[:1])[0]
        for weight, model in ((1 - BETA, policy), (BETA, reference))
    )
    if len(sampling) > 1:
        for warper in (
            transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(20),
            transformers.TopPLogitsWarper(0.9), transformers.MinPLogitsWarper(0.01),
        ):  # fmt: skip
            logits = warper(None, logits[None])[0]
    counts = np.bincount(tokens.numpy(), minlength=VOCABULARY)
    assert_plausible(chi_square_p(counts, logits.softmax(-1).numpy()), "first token")


def test_caches_are_separate() -> None:
    """Policy and reference never share a cache object."""
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    caches: dict[str, set[int]] = {"policy": set(), "reference": set()}
    alive = []  # an id is unique among living objects only
    options = {"beta": BETA, "max_new_tokens": 4, "eos_token_id": ()}
    generate_mixture(policy, reference, prompts()[2][None], **options)  # its comparison has other caches
    for role, model in (("policy", policy), ("reference", reference)):

        def remember(module, args, kwargs, role=role) -> None:
            cache = kwargs.get(cache_argument(module.forward))
            if isinstance(cache, StaticRowsCache):  # not the cache of the comparison
                alive.append(cache)
                caches[role].add(id(cache))

        model.register_forward_pre_hook(remember, with_kwargs=True)
    generate_mixture(policy, reference, prompts()[2][None], **options)
    assert len(caches["policy"]) == len(caches["reference"]) == 1
    assert not caches["policy"] & caches["reference"]


def _share_the_cache(monkeypatch) -> None:
    make_runner, all_runners = model_set.CachedRunner, []

    def runner(*arguments):
        all_runners.append(make_runner(*arguments))
        all_runners[-1].cache = all_runners[0].cache
        return all_runners[-1]

    monkeypatch.setattr(model_set, "CachedRunner", runner)


def _drop_positions(monkeypatch) -> None:
    last_logits = runners.last_logits
    monkeypatch.setattr(
        runners, "last_logits", lambda *arguments, position_ids, **inputs: last_logits(*arguments, **inputs)
    )


@pytest.mark.parametrize(("break_it", "lengths"), [(_share_the_cache, (6, 6)), (_drop_positions, LENGTHS)])
def test_the_judge_notices(break_it, lengths, monkeypatch) -> None:
    """With one cache for both models, or positions that count padding, the error above is large."""
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    rows = prompts(lengths)
    options = {"beta": BETA, "max_new_tokens": 6, "seed": 3, "eos_token_id": ()}
    generate_mixture(policy, reference, **padded(rows), **options)  # the models are compared here, and not again below
    break_it(monkeypatch)
    assert worst_error(generate_mixture(policy, reference, **padded(rows), **options), policy, reference, rows) > 0.1


def test_padding_that_a_model_reads_is_refused() -> None:
    config = transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(ValueError, match="prompts of one length; got padding: the policy, RwkvForCausalLM, reads it"):
        generate_mixture(model, None, **padded(prompts()), max_new_tokens=2)
    generate_mixture(model, None, prompts()[1][None], max_new_tokens=2)


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_row_does_not_depend_on_its_batch(architecture) -> None:
    policy, reference = pair(architecture)
    rows = prompts()
    options = {
        "custom_generate": mixture_generate, "reference_model": reference, "beta": BETA, "seed": 5, "do_sample": True,
        "max_new_tokens": 10, "num_return_sequences": 2, "eos_token_id": None,
    }  # fmt: skip
    together = policy.generate(**padded(rows), row_ids=torch.tensor([7, 8, 9]), **options)[:, -10:]
    for row, prompt in enumerate(rows):
        alone = policy.generate(prompt[None], row_ids=torch.tensor([7 + row]), **options)[:, -10:]
        assert torch.equal(alone, together[2 * row : 2 * row + 2])
    assert len({tuple(tokens) for tokens in together.tolist()}) == 6, "every returned sequence has noise of its own"


def test_seed_row_ids_and_stream_choose_the_noise() -> None:
    policy, reference = pair()
    prompt = prompts()[1].expand(2, -1)

    def draw(**noise) -> list:
        return generate_mixture(
            policy, reference, prompt, beta=BETA, max_new_tokens=12, eos_token_id=(), **noise
        ).tokens.tolist()

    first = draw(seed=1)
    assert first == draw(seed=1) == draw(seed=1, row_ids=torch.tensor([0, 1]))
    assert first[::-1] == draw(seed=1, row_ids=torch.tensor([1, 0]))
    assert first[0] != first[1]
    assert first != draw(seed=2)
    assert first != draw(seed=1, stream=1)
    torch.manual_seed(4)
    draws = [draw(), draw()]
    torch.manual_seed(4)
    assert draws == [draw(), draw()] and draws[0] != draws[1], "torch.manual_seed governs where no seed is given"


def test_result_carries_the_seed_that_repeats_it() -> None:
    policy, reference = pair()
    options = {"beta": BETA, "max_new_tokens": 6}
    first = generate_mixture(policy, reference, **padded(prompts()), **options)
    again = generate_mixture(policy, reference, **padded(prompts()), **options, seed=first.seed)
    assert torch.equal(first.sequences, again.sequences)


def test_beta_per_prompt() -> None:
    policy, reference = pair()
    rows, options = prompts((4, 4, 4)), {"max_new_tokens": 6, "seed": 2, "eos_token_id": ()}
    batch = torch.stack(rows)
    mixed = generate_mixture(
        policy, reference, batch, beta=torch.tensor([0.0, 0.5, 1.0]), num_return_sequences=2, **options
    )
    for row, beta in enumerate((0.0, 0.5, 1.0)):
        ids = torch.tensor([2 * row, 2 * row + 1])
        alone = generate_mixture(
            policy, reference, batch[row : row + 1], beta=beta, row_ids=ids, num_return_sequences=2, **options
        )
        assert torch.equal(alone.tokens, mixed.tokens[2 * row : 2 * row + 2])


def test_dropout_is_off_and_every_flag_comes_back() -> None:
    policy, reference = pair()
    options = {**padded(prompts()), "beta": BETA, "max_new_tokens": 5, "seed": 1}
    still = generate_mixture(policy, reference, **options)
    policy.train()
    policy.transformer.h[0].eval()  # set to eval mode by the caller
    flags = [module.training for module in policy.modules()]
    noisy = generate_mixture(policy, reference, **options)
    assert torch.equal(still.sequences, noisy.sequences)
    assert flags == [module.training for module in policy.modules()]
    assert not reference.training
    assert not noisy.policy_logprobs.requires_grad


# ---- ends ------------------------------------------------------------------------------------------------------------


def _without_ends(policy, reference, rows) -> list[list[int]]:
    options = {"beta": BETA, "max_new_tokens": 8, "seed": 6, "eos_token_id": ()}
    return generate_mixture(policy, reference, **padded(rows), **options).tokens.tolist()


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_rows_end_at_their_own_end_of_sequence(architecture) -> None:
    """Rows end at any of several ids, at different steps, one at once; an end token in the prompt is ignored."""
    policy, reference = pair(architecture)
    rows = prompts((1, 6, 9, 3))
    free = _without_ends(policy, reference, rows)
    ends = [free[0][0], free[1][3], free[2][5]]
    rows[3][1] = ends[0]
    free = _without_ends(policy, reference, rows)
    result = policy.generate(
        **padded(rows), custom_generate=mixture_generate, reference_model=reference, beta=BETA, seed=6, top_k=0,
        do_sample=True, max_new_tokens=8, eos_token_id=ends, pad_token_id=0, return_dict_in_generate=True,
    )  # fmt: skip
    lengths = []
    for row, tokens in enumerate(free):
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), 8)
        assert result.sequences[row, 9:].tolist() == (tokens[:length] + [0] * 8)[: result.mask.shape[1]]
        assert result.mask[row].tolist() == ([True] * length + [False] * 8)[: result.mask.shape[1]]
        assert (result.policy_logprobs[row, length:] == 0).all() and (result.policy_logprobs[row, :length] < 0).all()
        lengths.append(length)
    assert lengths[0] == 1 and len(set(lengths)) >= 3


def test_decoding_stops_when_every_row_has_ended() -> None:
    policy, reference = pair()
    rows = prompts((4, 7))
    free = _without_ends(policy, reference, rows)
    options = {"beta": BETA, "max_new_tokens": 8, "seed": 6}
    result = generate_mixture(policy, reference, **padded(rows), **options, eos_token_id=[free[0][0], free[1][0]])
    assert result.tokens.tolist() == [free[0][:1], free[1][:1]]
    shortest = generate_mixture(
        policy, reference, **padded(rows), **options, eos_token_id=[free[0][0], free[1][0]], min_new_tokens=3
    )
    assert shortest.mask.sum(1).min() >= 3


def test_lengths_are_those_asked_for() -> None:
    policy, reference = pair()
    options = {"custom_generate": mixture_generate, "reference_model": reference, "beta": BETA, "eos_token_id": None}
    prompt = prompts()[1][None]
    assert policy.generate(prompt, max_length=9, **options).shape[1] == 9
    assert policy.generate(prompt, max_new_tokens=5, **options).shape[1] == 11


def test_stopping_criteria_stop_rows() -> None:
    policy, reference = pair()
    rows = prompts()
    free = _without_ends(policy, reference, rows)
    stop = transformers.StopStringCriteria(tiny_tokenizer(), [chr(29 + free[1][2])])
    result = generate_mixture(
        policy, reference, **padded(rows), beta=BETA, max_new_tokens=8, seed=6, eos_token_id=(), pad_token_id=0,
        stopping_criteria=[stop],
    )  # fmt: skip
    assert result.mask[1].tolist() == [True] * 3 + [False] * 5
    assert result.tokens[1].tolist() == free[1][:3] + [0] * 5
    with pytest.raises(ValueError, match="pad_token_id: expected an id"):
        generate_mixture(
            policy, reference, **padded(rows), beta=BETA, max_new_tokens=8, seed=6, eos_token_id=(),
            stopping_criteria=[stop],
        )  # fmt: skip


def test_streamers_see_the_prompt_and_every_token() -> None:
    class Streamer(list):
        def put(self, tokens) -> None:
            self.append(tokens.tolist())

        def end(self) -> None:
            self.append("end")

    policy, reference = pair()
    options = {"custom_generate": mixture_generate, "reference_model": reference, "beta": BETA, "max_new_tokens": 3}
    prompt, streamer = prompts()[1], Streamer()
    out = policy.generate(prompt[None], **options, eos_token_id=None, token_streamer=streamer)
    assert streamer == [[prompt.tolist()], *([token] for token in out[0, -3:].tolist()), "end"]
    with pytest.raises(ValueError, match="streamer: generate.. does not hand it on; expected as token_streamer"):
        policy.generate(prompt[None], **options, streamer=Streamer())


def test_low_precision_models() -> None:
    policy, reference = (model.to(torch.bfloat16) for model in pair("llama"))
    result = generate_mixture(policy, reference, **padded(prompts()), beta=BETA, max_new_tokens=6, seed=3)
    assert worst_error(result, policy, reference, prompts()) < 0.5  # bfloat16's rounding; a wrong cache costs nats
    assert result.policy_logprobs.dtype == torch.float32


def test_package_and_command_line_do_not_import_transformers() -> None:
    code = "import sys, nlhf_kernels, nlhf_kernels.cli.main; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
