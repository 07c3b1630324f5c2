"""Policy and reference of one architecture in one forward pass: the numbers of two passes, and where it is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from nlhf_kernels.core import capabilities
from nlhf_kernels.engine import Player, RolloutEngine, model_set, nash_ema, nash_md, pairs, step_products
from nlhf_kernels.engine.pairs import ModelPair
from tests.support.engine import FLATTENING, TINY, can_be_recorded, settings, tiny, tiny_pair, worst_error
from tests.support.tiny_models import BETA, one_thread, padded, prompts
from tests.test_engine_adapters import TokensFirst
from tests.test_engine_graphs import recorded
from tests.test_engine_joint_products import behind_autograd, by_an_optimizer, elsewhere, in_place
from tests.test_engine_shared import adapted

REFUSED = {  # architecture -> why its models take a pass each
    "llama4": "Llama4ForCausalLM mixes the rows of a batch on their way to a layer",
    "jetmoe": "a JetMoeMoE has parameters beside its modules",
}
PREFIX = "policy and reference take a forward pass each: "
TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def alike(architecture: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    return tiny(architecture, seed=1), tiny(architecture, seed=2)


def assert_as_in_two_passes(result, policy, reference, request, **options) -> None:
    """Assert the tokens of an engine that takes a pass for each model, and its log-probabilities up to rounding."""
    expected = RolloutEngine(policy, reference, one_pass=False, **options).rollout(**request)
    assert (result.steps, result.row_steps) == (expected.steps, expected.row_steps)
    for one, two in zip(result, expected, strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.lengths, two.lengths)
        for name in ("policy_logprobs", "reference_logprobs", "mixture_logprobs"):
            difference = (getattr(one, name) - getattr(two, name))[one.mask].abs().max()
            assert difference < TOLERANCE, (name, difference)


# ---- the numbers of two passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, "products"])
@pytest.mark.parametrize("architecture", {**TINY, **FLATTENING})
def test_one_pass_gives_the_numbers_of_two(architecture, fused) -> None:
    """Prompts are padded and have two answers each; positions, norms, heads, biases and experts are of every kind."""
    policy, reference = alike(architecture)
    request = {**padded(prompts()), "players": nash_md(BETA, samples=2), "settings": settings(6)}
    engine = RolloutEngine(policy, reference, one_pass=True, fused=fused)
    result = engine.rollout(**request)
    assert result.notes == ((PREFIX + REFUSED[architecture],) if architecture in REFUSED else ())
    assert (engine.models.active_pair is None) is (architecture in REFUSED)
    assert_as_in_two_passes(result, policy, reference, request)
    assert not any("forward" in vars(module) for model in (policy, reference) for module in model.modules())


def test_log_probabilities_are_those_of_full_forward_passes() -> None:
    policy, reference = alike("qwen2")
    rows = prompts()
    result = RolloutEngine(policy, reference, one_pass=True, fused=True).rollout(
        **padded(rows), players=nash_md(BETA), settings=settings(8)
    )
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, rows, beta) < TOLERANCE
    assert (result[0].policy_logprobs - result[0].reference_logprobs).abs().max() > 0.1, "the models differ"


def test_the_policys_code_runs_once_for_both(monkeypatch) -> None:
    """Prompts and every later token are one call of attention a layer, over the rows of both models."""
    policy, reference = alike("llama")
    engine = RolloutEngine(policy, reference, one_pass=True)
    rows, attend = [], type(policy.model.layers[0].self_attn).forward

    def count(self, hidden_states, *args, **kwargs):
        rows.append((self.layer_idx, len(hidden_states), hidden_states.shape[1]))
        return attend(self, hidden_states, *args, **kwargs)

    engine.rollout(**padded(prompts((2, 5))), players=nash_md(BETA), settings=settings(3))
    monkeypatch.setattr(type(policy.model.layers[0].self_attn), "forward", count)
    engine.rollout(**padded(prompts((2, 5))), players=nash_md(BETA), settings=settings(3))
    assert rows == [(0, 4, 5), (1, 4, 5), *[(0, 8, 1), (1, 8, 1)] * 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype) -> None:
    policy, reference = (model.to(dtype) for model in alike("qwen3"))
    request = {**padded(prompts()), "players": nash_md(BETA), "settings": settings(6)}
    engine = RolloutEngine(policy, reference, one_pass=True, fused=True)
    result = engine.rollout(**request)
    assert engine.models.active_pair is not None
    expected = RolloutEngine(policy, reference, one_pass=False).rollout(**request)
    first = expected[0].policy_logprobs[:, 0] - result[0].policy_logprobs[:, 0]  # later tokens may differ in bfloat16
    assert first.abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-5)
    if dtype == torch.float64:
        assert_as_in_two_passes(result, policy, reference, request)


@pytest.mark.parametrize("count", [3, 4, 12])
def test_a_head_over_few_rows(count) -> None:
    """Heads of 7 to 15 rows on the CPU have a product of their own (cpu_head.py), each model's part as well."""
    policy, reference = alike("llama")
    request = {**padded(prompts(range(1, count + 1))), "players": nash_md(BETA), "settings": settings(4)}
    result = RolloutEngine(policy, reference, one_pass=True).rollout(**request)
    assert_as_in_two_passes(result, policy, reference, request)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_rows_that_end_leave(architecture, replayed) -> None:
    policy, reference = alike(architecture)
    request = {**padded(prompts((1, 6, 9, 3, 5))), "players": nash_md(BETA), "settings": settings(30)}
    free = RolloutEngine(policy, reference).rollout(**request)
    ends = sorted({int(free[0].tokens[0, 2]), int(free[0].tokens[1, 9]), int(free[1].tokens[2, 4])})
    request["settings"] = settings(30, end_ids=ends)
    if replayed and can_be_recorded(policy):
        engine, recorder = recorded(policy, reference, one_pass=True)
        result = engine.rollout(**request)
        assert recorder.records > 1
        expected = recorded(policy, reference, one_pass=False)[0].rollout(**request)
        for one, two in zip(result, expected, strict=True):
            assert torch.equal(one.tokens, two.tokens)
    else:
        result = RolloutEngine(policy, reference, one_pass=True).rollout(**request)
        assert_as_in_two_passes(result, policy, reference, request)
    assert result.notes == () and result.row_steps < 10 * result.steps


# ---- an opponent -----------------------------------------------------------------------------------------------------


def test_an_opponent_keeps_its_own_pass_and_may_outlast_the_policys_rows(monkeypatch) -> None:
    policy, reference = alike("qwen2")
    average = {name: value.detach() + 0.2 * torch.randn_like(value) for name, value in policy.named_parameters()}
    request = {**padded(prompts((1, 6, 9, 3))), "players": nash_ema(BETA), "settings": settings(24)}
    free = RolloutEngine(policy, reference, opponent=average).rollout(**request)
    ends = set(free[0].tokens[:, :7].flatten().tolist()) - set(free[1].tokens[0].tolist())
    request["settings"] = settings(24, end_ids=tuple(ends))
    sizes, split = set(), pairs.PairRunner.split
    monkeypatch.setattr(pairs.PairRunner, "split", lambda self, *rows: sizes.add(rows) or split(self, *rows))
    result = RolloutEngine(policy, reference, opponent=average, one_pass=True, fused=True).rollout(**request)
    assert result.notes == ()
    assert_as_in_two_passes(result, policy, reference, request, opponent=average)
    assert any(first == 0 for first, _ in sizes), "rows of the reference alone"


def test_an_opponent_alone_leaves_the_policy_out() -> None:
    policy, reference = alike("llama")
    opponent = tiny("llama", seed=3)
    request = {**padded(prompts()), "players": (Player(BETA, parameters="opponent"),), "settings": settings(5)}
    result = RolloutEngine(policy, reference, opponent=opponent, one_pass=True, fused=True).rollout(**request)
    assert_as_in_two_passes(result, policy, reference, request, opponent=opponent)


# ---- changes between rollouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("replayed", "fused"), [(False, False), (True, True)], ids=["eager", "replayed, joined"])
@pytest.mark.parametrize("update", [in_place, behind_autograd, elsewhere, by_an_optimizer])
def test_updates_of_either_model_are_followed(update, replayed, fused) -> None:
    policy, reference = alike("qwen2")
    make = (lambda *models, **options: recorded(*models, **options)[0]) if replayed else RolloutEngine
    engine = make(policy, reference, one_pass=True, fused=fused)
    request = {**padded(prompts()), "players": nash_md(BETA), "settings": settings(5)}
    before = engine.rollout(**request)
    for model in (policy, reference):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        update(model)
        after = engine.rollout(**request)
        assert_as_in_two_passes(after, policy, reference, request)
        assert not torch.equal(before[1].mixture_logprobs, after[1].mixture_logprobs)


@pytest.mark.parametrize("fused", [False, True])
def test_modules_that_are_replaced_are_followed(fused) -> None:
    policy, reference = alike("llama")
    engine = RolloutEngine(policy, reference, one_pass=True, fused=fused)
    request = {**padded(prompts()), "players": nash_md(BETA), "settings": settings(5)}
    engine.rollout(**request)
    policy.lm_head = copy.deepcopy(reference.lm_head)
    result = engine.rollout(**request)
    assert engine.models.active_pair is not None
    assert_as_in_two_passes(result, policy, reference, request)
    reference.model.layers[0].mlp.down_proj = copy.deepcopy(policy.model.layers[1].mlp.down_proj)
    assert_as_in_two_passes(engine.rollout(**request), policy, reference, request)
    policy.lm_head = torch.nn.Linear(32, 97, bias=True)
    result = engine.rollout(**request)
    assert result.notes == (PREFIX + "their parameters differ in number, shape, dtype or device",)
    assert_as_in_two_passes(result, policy, reference, request)


def test_buffers_that_change_are_compared_again() -> None:
    policy, reference = alike("llama")
    engine = RolloutEngine(policy, reference, one_pass=True)
    request = {**padded(prompts()), "players": nash_md(BETA), "settings": settings(5)}
    engine.rollout(**request)
    for change, notes in ((turn, (PREFIX + "buffers of a LlamaRotaryEmbedding differ",)), (lambda _: None, None)):
        change(reference)
        result = engine.rollout(**request)
        assert notes is None or result.notes == notes
        assert_as_in_two_passes(result, policy, reference, request)
    turn(policy)
    assert engine.rollout(**request).notes == ()


def test_a_hook_takes_two_passes_for_as_long_as_it_is_there() -> None:
    policy, reference = alike("llama")
    engine, recorder = recorded(policy, reference, one_pass=True)
    request = {**padded(prompts()), "players": nash_md(BETA), "settings": settings(5)}
    calls = []
    for hooked in (False, True, False):
        layer = reference.model.layers[0].mlp
        handle = layer.register_forward_hook(lambda *_: calls.append(1)) if hooked else None
        result = engine.rollout(**request)
        note = "a module has hooks, or a forward that accelerate or another has replaced"
        assert result.notes == ((PREFIX + note,) if hooked else ())
        assert_as_in_two_passes(result, policy, reference, request)
        if handle is not None:
            handle.remove()
    assert calls and recorder.records >= 3, "recorded anew for each way"


# ---- where it is refused ---------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """A wrapper that reads a weight of the block it calls."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * (1 + self.block.down_proj.weight.T.mean())


def wrapped(wrap) -> tuple[torch.nn.Module, torch.nn.Module]:
    models = alike("llama")
    for model in models:
        model.model.layers[1].mlp = wrap(model.model.layers[1].mlp)
    return models


def changed(change) -> tuple[torch.nn.Module, torch.nn.Module]:
    policy, reference = alike("llama")
    change(reference)
    return policy, reference


def set_eps(model: torch.nn.Module) -> None:
    model.model.norm.variance_epsilon = 1e-2


def turn(model: torch.nn.Module) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def replace_forward(model: torch.nn.Module) -> None:
    layer = model.model.layers[0].mlp
    layer.forward = lambda x: type(layer).forward(layer, x)


def long_rotation() -> tuple[torch.nn.Module, torch.nn.Module]:
    models = alike("llama")
    for model in models:
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    return models


CASES = {
    "another width": (lambda: tiny_pair("llama"), "their configurations differ in head_dim, hidden_size"),
    "one model": (lambda: (tiny("llama"),) * 2, "policy and reference are one model"),
    "an adapter": (lambda: (adapted(tiny("llama")), tiny("llama", 2)), "a model has adapters"),
    "another number": (lambda: changed(set_eps), "model.norm has other numbers in one than in the other"),
    "another buffer": (lambda: changed(turn), "buffers of a LlamaRotaryEmbedding differ"),
    "a forward of another's": (lambda: changed(replace_forward), "a module has hooks, or a forward that accelerate"),
    "rotation by length": (long_rotation, "the rotation of positions depends on a model's longest text so far"),
    "rows mixed": (lambda: wrapped(lambda mlp: TokensFirst(mlp, True)), "mixes the rows of a batch"),
    "rows last": (lambda: wrapped(lambda mlp: TokensFirst(mlp, False)), "a layer gets 5 vectors from a batch of 6"),
    "read elsewhere": (lambda: wrapped(Scaled), "LlamaForCausalLM reads a parameter outside the module that owns it"),
}


@pytest.mark.parametrize("case", CASES)
def test_models_that_are_not_alike_take_two_passes_with_a_note(case) -> None:
    """The two models may have equal weights, as before training: what would be wrong is found all the same."""
    make, reason = CASES[case]
    policy, reference = make()
    if case in ("read elsewhere", "rows mixed"):
        reference.load_state_dict(policy.state_dict())
    request = {**padded(prompts()), "players": nash_md(BETA), "settings": settings(4)}
    engine = RolloutEngine(policy, reference, one_pass=True)
    result = engine.rollout(**request)
    assert engine.models.active_pair is None
    assert [note for note in result.notes if note.startswith(PREFIX) and reason in note], result.notes
    assert_as_in_two_passes(result, policy, reference, request)


def test_options_and_opponents_that_need_a_pass_for_each() -> None:
    request = {**padded(prompts((5, 5))), "players": nash_md(BETA), "settings": settings(3)}
    policy, reference = alike("llama")
    note = lambda **options: RolloutEngine(policy, reference, one_pass=True, **options).rollout(**request).notes  # noqa: E731
    assert note(use_cache=False) == (PREFIX + "a model reads the whole text every step",)
    assert note(opponent=policy) == (PREFIX + "the opponent has modules of the policy",)
    assert note(opponent=reference) == ()
    assert RolloutEngine(policy, reference, one_pass=False).rollout(**request).notes == ()
    with pytest.raises(ValueError, match="one_pass: expected auto, True or False; got 'always'"):
        RolloutEngine(policy, reference, one_pass="always")


def test_compiled_steps_are_of_one_model_each(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    policy, reference = alike("llama")
    engine = RolloutEngine(policy, reference, one_pass=True, compile=True, bucket=16)
    result = engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(3))
    assert result.notes == (PREFIX + "compiled steps are of one model each",)


def test_adapters_take_two_passes_where_one_is_not_wanted() -> None:
    base = tiny("llama")
    engine = RolloutEngine(adapted(copy.deepcopy(base)), one_pass=False)
    assert not engine.models.one_pass
    result = engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(4))
    assert result.notes == ()


def test_an_error_in_a_step_leaves_the_models_as_they_were(monkeypatch) -> None:
    policy, reference = alike("llama")
    engine = RolloutEngine(policy, reference, one_pass=True)
    request = {**padded(prompts()), "players": nash_md(BETA), "settings": settings(3)}
    engine.rollout(**request)
    with monkeypatch.context() as patch:
        patch.setattr(pairs.PairRunner, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.rollout(**request)
    assert not any("forward" in vars(module) for model in (policy, reference) for module in model.modules())
    assert_as_in_two_passes(engine.rollout(**request), policy, reference, request)


def test_models_are_compared_once(monkeypatch) -> None:
    comparisons, compare = [], ModelPair._why_results_differ
    monkeypatch.setattr(
        ModelPair, "_why_results_differ", lambda self: comparisons.append(torch.get_rng_state()) or compare(self)
    )
    policy, reference = alike("llama")
    engine = RolloutEngine(policy, reference, one_pass=True)
    state = torch.get_rng_state()
    for _ in range(2):
        engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(3))
    assert len(comparisons) == 1 and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in policy.modules())


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_planned_allocated_and_released() -> None:
    policy, reference = alike("llama")
    ask = {"players": nash_md(BETA), "settings": settings(4)}
    engine, two = (RolloutEngine(policy, reference, one_pass=one_pass, fused=True) for one_pass in (True, False))
    plan, plan_of_two = (each.memory_plan(3, 9, **ask).parts for each in (engine, two))
    engine.rollout(**padded(prompts()), **ask)
    (runner,) = engine._space.runners
    stored = sum(tensor.nbytes for layer in runner.cache.static_layers for tensor in layer.storage)
    assert stored == plan["policy cache"] + plan["reference cache"]
    products = engine.models.joint_products
    assert plan["joint products"] == sum(product.weight.nbytes for product in products._products.values())
    layers = [model.model.layers for model in (policy, reference)]
    assert plan["joint products"] == sum(p.nbytes for each in layers for p in each.parameters() if p.ndim == 2)
    assert {**plan, "joint products": 0} == {**plan_of_two, "joint products": 0}
    engine.release()
    assert products.addresses == ()


def test_products_of_both_models_are_one_batched_product(monkeypatch) -> None:
    """With weights side by side every linear layer but the head is one product for both models, prompts included."""
    shapes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, weights: shapes.append(tuple(x.shape)) or bmm(x, weights))
    policy, reference = alike("llama")
    request = {**padded(prompts((2, 5))), "players": nash_md(BETA), "settings": settings(3)}
    result = RolloutEngine(policy, reference, one_pass=True, fused="products").rollout(**request)
    assert_as_in_two_passes(result, policy, reference, request)
    assert [shape[:2] for shape in shapes if shape[:2] != (2, 15)] == [(2, 10)] * 8 + [(2, 4)] * 16


# ---- Triton's kernels, interpreted -----------------------------------------------------------------------------------


@pytest.mark.skipif(bool(capabilities.triton_missing()), reason="needs triton")
@pytest.mark.parametrize("fused", [False, True])
def test_products_and_norms_of_both_models_are_one_launch(fused, monkeypatch) -> None:
    from nlhf_kernels.engine.layers import triton_kernels

    monkeypatch.setattr(model_set, "why_not_usable", lambda device: None)
    calls, norms, run, norm = [], [], step_products.decode_linear, triton_kernels.rms_norm

    def record(x, weight, *rest, backend):
        calls.append((len(x), rest[-1], backend))
        return run(x, weight, *rest, backend=backend)

    monkeypatch.setattr(step_products, "decode_linear", record)
    monkeypatch.setattr(triton_kernels, "rms_norm", lambda *rest: norms.append(rest[-1]) or norm(*rest))
    policy, reference = alike("qwen2")
    request = {**padded(prompts((2, 3))), "players": nash_md(BETA), "settings": settings(2)}
    result = RolloutEngine(policy, reference, fused=fused, linear=True, one_pass=True).rollout(**request)
    assert result.notes == ()
    layers = policy.config.num_hidden_layers
    steps = [call for call in calls if call[0] == 8]
    assert set(steps) == {(8, 4, "triton")} and len(steps) == (4 if fused else 7) * layers + 1
    passes = 3  # the comparison, the prompts, a step
    assert len(norms) == (passes * (2 * layers + 1) if fused is True else 0)
    assert_as_in_two_passes(result, policy, reference, request, fused=False, linear=False)


def test_long_prompts_keep_pytorchs_products() -> None:
    class Layer:
        weight, bias = torch.randn(3, 5), torch.randn(3)

    class Other(Layer):
        weight, bias = torch.randn(3, 5), None

    x = torch.randn(2 * 65, 5)
    result = step_products._few_rows_of_two("triton", x, 65, Layer, Other)
    torch.testing.assert_close(result[:65], torch.nn.functional.linear(x[:65], Layer.weight, Layer.bias))
    torch.testing.assert_close(result[65:], torch.nn.functional.linear(x[65:], Other.weight))
