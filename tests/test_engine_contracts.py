"""Contracts of a rollout: ends, training flags, memory, interruptions, and errors before any work."""

from __future__ import annotations

import copy
import re
import threading

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from nlhf_kernels.engine import Hooks, Player, RolloutEngine, RolloutSettings, nash_ema, nash_md
from nlhf_kernels.engine.request import check_prompts
from tests.support.engine import settings, tiny, tiny_pair, worst_error
from tests.support.tiny_models import BETA, VOCABULARY, one_thread, padded, prompts, random_model


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def rollout(engine, rows, steps=6, players=None, **options):
    return engine.rollout(**padded(rows), players=players or nash_md(BETA), settings=settings(steps, **options))


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_several_ends_and_rows_that_finish_at_once() -> None:
    policy, reference = tiny_pair("gpt2")
    engine, rows = RolloutEngine(policy, reference), prompts((1, 6, 9, 3))
    free = rollout(engine, rows, 30)
    ends = (int(free[0].tokens[0, 0]), int(free[0].tokens[1, 11]), int(free[1].tokens[2, 5]))
    result = rollout(engine, rows, 30, end_ids=ends, pad_id=96)
    for before, responses in zip(free, result, strict=True):
        for row, tokens in enumerate(before.tokens.tolist()):
            length = next((i + 1 for i, token in enumerate(tokens) if token in ends), 30)
            width = responses.tokens.shape[1]
            assert responses.tokens[row].tolist() == (tokens[:length] + [96] * 30)[:width]
            assert responses.mask[row].tolist() == ([True] * length + [False] * 30)[:width]
            assert int(responses.lengths[row]) == length
            assert responses.finish_reasons[row] == ("end" if tokens[length - 1] in ends else "length")
            assert (responses.mixture_logprobs[row, length:] == 0).all()
    assert int(result[0].lengths[0]) == 1
    assert worst_error(result[0], policy, reference, rows, 0.0) < 5e-5


def test_an_end_at_the_last_step_is_an_end() -> None:
    engine, rows = RolloutEngine(*tiny_pair("gpt2")), prompts((4,))
    free = rollout(engine, rows, 3, players=(Player(),))[0]
    ended = rollout(engine, rows, 3, players=(Player(),), end_ids=[int(free.tokens[0, 2])])[0]
    if int(free.tokens[0, 2]) not in free.tokens[0, :2].tolist():
        assert ended.finish_reasons == ["end"] and int(ended.lengths[0]) == 3
    assert rollout(engine, rows, 3, players=(Player(),), end_ids=[95])[0].finish_reasons == ["length"]


def test_minimum_length_forbids_every_end() -> None:
    engine, rows = RolloutEngine(*tiny_pair("gpt2")), prompts()
    ends = list(range(2, 90))
    assert int(rollout(engine, rows, 20, end_ids=ends, min_new_tokens=11)[0].lengths.min()) >= 12
    assert int(rollout(engine, rows, 20, end_ids=ends)[0].lengths.min()) < 11


def test_decoding_stops_soon_after_everyone_has_ended() -> None:
    result = rollout(RolloutEngine(*tiny_pair("gpt2")), prompts(), 100, end_ids=list(range(VOCABULARY)))
    assert result.steps <= 9 and result[0].tokens.shape == (3, 1)


def test_the_policys_own_ends_are_the_default() -> None:
    policy, reference = tiny_pair("gpt2")
    policy.generation_config.eos_token_id = list(range(VOCABULARY))
    result = RolloutEngine(policy, reference).rollout(
        **padded(prompts()), players=nash_md(BETA), settings=RolloutSettings(20, seed=1)
    )
    assert result[0].lengths.tolist() == [1, 1, 1]


def test_a_nan_is_reported_and_stays_in_its_row() -> None:
    policy, reference = tiny_pair("gpt2")
    with torch.no_grad():
        reference.transformer.wpe.weight[8] = torch.nan  # a position that only the longest prompt reaches
    _, other = rollout(RolloutEngine(policy, reference), prompts(), 2)
    assert other.ok.tolist() == [True, True, False] and other.tokens[2, 0] == 0
    assert worst_error(other, policy, reference, prompts()[:2], BETA) < 5e-5


# ---- around the loop -------------------------------------------------------------------------------------------------


def test_dropout_and_checkpointing_are_off_and_every_flag_comes_back() -> None:
    policy, reference = tiny_pair("llama")
    still = rollout(RolloutEngine(policy, reference), prompts())
    policy.train()
    policy.gradient_checkpointing_enable()
    policy.config.attention_dropout = 0.5
    policy.model.layers[0].eval()  # set to eval mode by the caller
    flags = [module.training for module in policy.modules()]
    noisy = rollout(RolloutEngine(policy, reference), prompts())
    assert all(torch.equal(one.tokens, two.tokens) for one, two in zip(still, noisy, strict=True))
    assert flags == [module.training for module in policy.modules()]
    assert not noisy[0].policy_logprobs.requires_grad


@pytest.mark.parametrize("prompts_of", [3, 4, 7, 8])
def test_heads_say_the_same_either_way_round(prompts_of) -> None:
    """6 and 16 rows take the usual product, 8 and 14 the other: both are exact, and each head's forward is restored."""
    policy, reference = tiny_pair("llama")
    rows = prompts(range(2, 2 + prompts_of))
    result = rollout(RolloutEngine(policy, reference), rows, 4)
    assert worst_error(result[1], policy, reference, rows, BETA) < 5e-5
    assert "forward" not in vars(policy.lm_head) and "forward" not in vars(reference.lm_head)


def test_an_interrupted_rollout_leaves_the_engine_usable() -> None:
    policy, reference = tiny_pair("gpt2")
    engine = RolloutEngine(policy, reference)
    before = rollout(engine, prompts())
    policy.train()
    calls = []

    def interrupt(*_) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = reference.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        rollout(engine, prompts())
    handle.remove()
    assert policy.training and "forward" not in vars(policy.lm_head)
    after = rollout(engine, prompts())
    assert torch.equal(before[1].tokens, after[1].tokens)
    assert torch.equal(before[1].mixture_logprobs, after[1].mixture_logprobs)


def test_two_engines_of_one_model_take_turns() -> None:
    """A second engine's rollout waits for the first: otherwise it would save and restore the first one's flags."""
    policy, reference = tiny_pair("gpt2")
    policy.train()
    entered, go_on = threading.Event(), threading.Event()

    def hold(ids, scores):
        entered.set()
        assert go_on.wait(30)
        return scores

    def first() -> None:
        hooks = Hooks(processors=[hold])
        RolloutEngine(policy, reference).rollout(
            **padded(prompts()), players=(Player(),), settings=settings(2), hooks=hooks
        )

    other = RolloutEngine(policy, reference)
    threads = [threading.Thread(target=first), threading.Thread(target=lambda: rollout(other, prompts()))]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert policy.training and not reference.training


def test_autocast_and_inference_mode_around_a_rollout_change_nothing() -> None:
    models = tiny_pair("llama")
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        engine = RolloutEngine(*models)
        inside = rollout(engine, prompts())
    after = rollout(engine, prompts())
    assert after[0].policy_logprobs.tolist() == inside[0].policy_logprobs.tolist()
    weight = torch.ones((), requires_grad=True)
    (weight * inside[0].policy_logprobs).sum().backward()  # an inference tensor could not be saved for backward


def test_a_model_with_an_autocast_of_its_own() -> None:
    """A forward wrapped in autocast, as accelerate prepares it, caches float32 keys and bfloat16 values."""
    policy, reference = tiny_pair("llama")
    plain, early = copy.deepcopy(policy), RolloutEngine(policy, reference)
    policy.forward = torch.autocast("cpu", torch.bfloat16)(policy.forward)
    result = rollout(RolloutEngine(policy, reference), prompts())
    assert worst_error(result[0], plain, reference, prompts(), 0.0) < 0.1
    with pytest.raises(ValueError, match="keys and values of torch.float32, as when the engine was made; got"):
        rollout(early, prompts())


def test_a_rollout_within_a_rollout_is_refused() -> None:
    engine = RolloutEngine(*tiny_pair("gpt2"))
    hooks = Hooks(criteria=[lambda ids, scores: rollout(engine, prompts()) is None])
    with pytest.raises(RuntimeError, match="expected one rollout at a time"):
        engine.rollout(**padded(prompts()), players=(Player(),), settings=settings(3), hooks=hooks)


def test_cost_is_linear_in_length() -> None:
    """Every step reads one token per row, however long the text."""
    policy, reference = tiny_pair("llama")
    engine, read = RolloutEngine(policy, reference), []
    reference.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"].numel()), with_kwargs=True)
    rollout(engine, prompts(), 30)
    assert read == [27, *[6] * 29]  # the prompts, the steps


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "falcon"])
def test_memory_is_what_was_planned(architecture) -> None:
    engine = RolloutEngine(*tiny_pair(architecture))
    rollout_settings = settings(20)
    plan = engine.memory_plan(3, 9, nash_md(BETA, samples=2), rollout_settings)
    engine.rollout(**padded(prompts()), players=nash_md(BETA, samples=2), settings=rollout_settings)
    for runner, name in zip(engine._space.runners, ("policy cache", "reference cache"), strict=True):
        allocated = sum(
            t.numel() * t.element_size() for layer in runner.cache.static_layers for t in (layer.keys, layer.values)
        )
        assert plan.parts[name] == allocated
    assert plan.total == sum(plan.parts.values()) and plan.rows == 12
    assert "reference cache" in str(plan)
    longer = engine.memory_plan(3, 9, nash_md(BETA, samples=2), settings(49))
    assert longer.parts["policy cache"] * 29 == plan.parts["policy cache"] * 58, "linear in length"
    with pytest.raises(ValueError, match="expected an engine with an opponent; got one without"):
        engine.memory_plan(3, 9, nash_ema(), rollout_settings)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    policy, reference = tiny_pair("llama")
    rollout_settings = settings(50)
    needed = RolloutEngine(policy, reference).memory_plan(3, 9, nash_md(BETA), rollout_settings).total
    engine = RolloutEngine(policy, reference, memory_limit=needed - 1)
    with pytest.raises(MemoryError, match=r"at most 4 rows .* or max_new_tokens at most 49, or prompts of at most 8"):
        engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=rollout_settings)
    assert engine.rollout(**padded(prompts()), players=(Player(),), settings=rollout_settings).steps == 50


@pytest.mark.parametrize("prompts_asked", [1, 3, 8])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.4, 0.2, 0.08, 0.02])
def test_the_advice_of_what_does_not_fit_works(prompts_asked, share) -> None:
    """A rollout within each limit named by the error fits. Logits do not shrink with length, caches shrink in steps."""
    policy, reference = tiny_pair("gpt2")
    ids = torch.full((prompts_asked, 12), 5)
    most, players = settings(30), nash_md(BETA, samples=2)
    needed = RolloutEngine(policy, reference).memory_plan(prompts_asked, 12, players, most).total
    engine = RolloutEngine(policy, reference, memory_limit=int(share * needed))
    with pytest.raises(MemoryError) as refusal:
        engine.rollout(ids, None, players, most)
    advice = str(refusal.value).splitlines()[-1]
    rows = re.search(r"at most (\d+) rows", advice)
    if rows:
        assert engine.rollout(ids[: int(rows[1]) // 4], None, players, most).steps > 0
    if new := re.search(r"max_new_tokens at most (\d+)", advice):
        assert engine.rollout(ids, None, players, settings(int(new[1]))).steps > 0
        with pytest.raises(MemoryError):
            engine.rollout(ids, None, players, settings(int(new[1]) + 1))
    if length := re.search(r"prompts of at most (\d+) tokens", advice):
        assert engine.rollout(ids[:, : int(length[1])], None, players, most).steps > 0
    if not (rows or new or length):
        assert advice == "fewer rows of fewer tokens, or more memory"


# ---- refusals --------------------------------------------------------------------------------------------------------

IDS, ONES = torch.full((2, 4), 5), torch.ones(2, 4, dtype=torch.long)
REQUESTS = {
    "right padding": (
        {"attention_mask": torch.tensor([[1, 1, 1, 0], [1] * 4])},
        "padding on the left; got a row whose",
    ),
    "holes": ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1] * 4])}, r"on the left only; got holes in rows \[0\]"),
    "only padding": ({"attention_mask": torch.tensor([[0] * 4, [1] * 4])}, r"got only padding in rows \[0\]"),
    "mask shape": ({"attention_mask": ONES[:1]}, "attention_mask: expected shape"),
    "empty": ({"input_ids": IDS[:, :0]}, "input_ids: expected at least one row and one token"),
    "unknown ids": ({"input_ids": IDS + 97}, r"input_ids: expected ids in \[0, 97\), which the policy embeds; got"),
    "ids of padding": ({"input_ids": -IDS}, r"input_ids: expected ids in \[0, 97\), which the policy embeds; got -"),
    "too long": ({"settings": settings(126)}, r"within the policy's 128 positions; got 4 \+ 126 tokens"),
    "no players": ({"players": ()}, "players: expected at least one Player"),
    "no opponent": ({"players": nash_ema()}, "expected an engine with an opponent"),
    "stream": ({"players": (Player(stream=256),)}, r"players\[0\].stream: expected an integer in \[0, 255\]"),
    "beta": ({"players": (Player(float("nan")),)}, "beta: expected a finite number"),
    "betas": ({"players": (Player(torch.zeros(3)),)}, "beta: expected a number or one per row, 2"),
    "row ids": ({"players": (Player(row_ids=torch.arange(3)),)}, "row_ids: expected 2, one per prompt, or 2; got 3"),
    "ends": ({"settings": settings(3, end_ids=[97])}, r"end_ids: expected an integer in \[0, 96\]; got 97"),
    "no ends": ({"settings": settings(3, end_ids="</s>")}, "end_ids: expected token ids .*; got '</s>'"),
    "top_p": ({"settings": settings(3, top_p=0.0)}, "top_p: expected a finite number"),
    "minimum": ({"settings": settings(3, min_new_tokens=4)}, "min_new_tokens: expected an integer"),
    "logprobs": ({"settings": settings(3, logprobs=["pi"])}, "logprobs: expected one of policy, reference, mixture"),
    "hooks": ({"hooks": Hooks(streamer=object())}, "hooks: expected one player"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_bad_requests_are_refused_before_any_work(case) -> None:
    policy, reference = tiny_pair("gpt2")
    engine = RolloutEngine(policy, reference)
    for model in (policy, reference):
        model.register_forward_pre_hook(lambda *_: pytest.fail("a model was run"))
    arguments, message = REQUESTS[case]
    request = {"input_ids": IDS, "attention_mask": ONES, "players": nash_md(BETA), "settings": settings(3)}
    with pytest.raises((ValueError, TypeError), match=message):
        engine.rollout(**{**request, **arguments})


def test_models_that_do_not_fit_each_other_are_refused() -> None:
    policy, reference = tiny_pair("gpt2")
    wider = tiny("gpt2", seed=3)
    wider.resize_token_embeddings(VOCABULARY + 7)
    with pytest.raises(
        ValueError, match="reference: expected policy and reference of one vocabulary; got 97 tokens and 104"
    ):
        RolloutEngine(policy, wider)
    assert RolloutEngine(policy, wider, vocab_size=VOCABULARY).models.vocabulary == VOCABULARY
    with pytest.raises(ValueError, match="reference: expected dtype float32, as the policy; got bfloat16"):
        RolloutEngine(policy, reference.bfloat16())
    with pytest.raises(TypeError, match="policy: expected a causal language model; got str"):
        RolloutEngine("gpt2", reference)
    with pytest.raises(ValueError, match=r"players\[1\].beta: expected 0, as the engine has no reference; got 0.3"):
        rollout(RolloutEngine(policy), prompts())


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_that_moves_tokens_is_refused(use_cache) -> None:
    """Padded prompts are refused for Bart, which counts positions from the first slot and takes no position_ids."""
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 128}
    policy = random_model(transformers.BartConfig(vocab_size=VOCABULARY, d_model=32, **sizes), seed=1)
    engine = RolloutEngine(policy, use_cache=use_cache)
    with pytest.raises(ValueError, match="got padding: the policy, BartForCausalLM, gives other logits after it"):
        rollout(engine, prompts((3, 9)), players=(Player(),))
    rows = prompts((9, 9))
    (responses,) = rollout(engine, rows, players=(Player(),))
    assert worst_error(responses, policy, None, rows, 0.0) < 5e-5


def test_a_rotation_that_turns_at_a_length_has_texts_on_one_side_of_it() -> None:
    """Long texts of Phi-3 are rotated otherwise from their first token on: a cache would hold some of each."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    options = {"original_max_position_embeddings": 16, "rope_parameters": {**rope, "factor": 8.0}}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 128}
    config = transformers.Phi3Config(vocab_size=VOCABULARY, hidden_size=32, pad_token_id=0, **sizes, **options)
    policy = random_model(config, seed=1)
    engine = RolloutEngine(policy)
    for lengths in ((1, 6, 11), (17, 30)):  # the last of 11 + 6 tokens is never read
        rows = prompts(lengths)
        assert worst_error(rollout(engine, rows, players=(Player(),))[0], policy, None, rows, 0.0) < 5e-5
    for lengths in ((1, 30), (9, 12)):
        with pytest.raises(ValueError, match="within 16 tokens, or all prompts beyond"):
            rollout(engine, prompts(lengths), players=(Player(),))


class HostReads(TorchDispatchMode):
    """Counts how often the host reads a tensor's values in a way that waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [True, False])
def test_prompts_that_are_right_are_read_once_by_the_host(masked) -> None:
    """No check reads a scalar of its own: each read would wait for the device (`tolist`, once, is not counted)."""
    ids, mask = torch.full((3, 4), 5), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    with HostReads() as reads:
        result = check_prompts("rollout", ids, mask if masked else None, ids.device)
    assert reads.count == 0 and result.padded is masked
