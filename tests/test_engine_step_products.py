"""Linear layers of a step by `decode_linear`: which take it, the models' own numbers, and where it is refused."""

from __future__ import annotations

import pytest
import torch

from nlhf_kernels.core import capabilities
from nlhf_kernels.engine import RolloutEngine, model_set, nash_md, step_products
from nlhf_kernels.engine.step_products import StepProducts
from tests.support.engine import settings, tiny, tiny_pair, worst_error
from tests.support.tiny_models import BETA, one_thread, padded, prompts
from tests.test_engine_shared import adapted


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, tuple[int, ...], str]]:
    """Let the CPU stand in for a GPU; record (rows, weight's shape, backend) of every call of `decode_linear`."""
    calls = []
    monkeypatch.setattr(model_set, "why_not_usable", lambda device: None)
    run = step_products.decode_linear

    def record(x, weight, bias, *, backend):
        calls.append((len(x), tuple(weight.shape), backend))
        return run(x, weight, bias, backend=backend)

    monkeypatch.setattr(step_products, "decode_linear", record)
    return calls


@pytest.mark.skipif(bool(capabilities.triton_missing()), reason="needs triton")
@pytest.mark.parametrize("fused", [False, "products"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_all_products_of_a_step_run_on_triton(products, architecture, fused) -> None:
    policy, reference = tiny_pair(architecture)
    rows = prompts((2, 5))
    engine = RolloutEngine(policy, reference, fused=fused, linear=True)
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(3))
    assert result.notes == () and {backend for *_, backend in products} == {"triton"}
    per_layer = 4 if fused else 7
    few = {4, 2, 10}  # rows of a step; of the prompts' last tokens, which the head reads; of the prompts
    assert {count for count, *_ in products} <= few
    # The CPU's head has a forward of its own (cpu_head.py).
    assert sum(count == 4 for count, *_ in products) == 2 * 2 * per_layer * policy.config.num_hidden_layers
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, rows, beta) < 1e-4
    assert not any("forward" in vars(module) for model in (policy, reference) for module in model.modules())


def test_prompts_of_many_tokens_keep_pytorchs_product(products) -> None:
    model = tiny("llama")
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(13, 5, layer.in_features)
    with torch.no_grad(), StepProducts([model], everywhere=True).applied():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))
    assert products == [], "65 vectors"


def test_auto_takes_measured_products_only(products, monkeypatch) -> None:
    """A layer whose product was measured faster for some number of rows calls the op, which decides by rows."""
    measured = []
    monkeypatch.setattr(
        step_products, "measured_faster", lambda problem: measured.append(problem) or problem[2:] == (32, 40, 32, 1)
    )
    policy, reference = tiny_pair("llama")
    down = tuple(policy.model.layers[0].mlp.down_proj.weight.shape)
    assert down == (32, 40)
    engine = RolloutEngine(policy, reference)
    engine.rollout(**padded(prompts((2, 5))), players=nash_md(BETA), settings=settings(3))
    assert {(shape, backend) for _, shape, backend in products} == {(down, "auto")}
    assert {problem.rows for problem in measured} == {16, 32, 64}
    products.clear()
    RolloutEngine(policy, reference, linear=False).rollout(
        **padded(prompts((2, 5))), players=nash_md(BETA), settings=settings(3)
    )
    assert products == []


def test_nothing_is_replaced_without_a_measurement(products) -> None:
    engine = RolloutEngine(*tiny_pair("llama"))
    assert engine.models.step_products.forwards == []


def test_adapters_wide_floats_and_forwards_of_others_keep_their_products(products) -> None:
    assert StepProducts([adapted(tiny("llama"))], everywhere=True).forwards == []
    assert StepProducts([tiny("llama").double()], everywhere=True).forwards == []
    model = tiny("llama")
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = own = lambda x: type(layer).forward(layer, x)
    with StepProducts([model], everywhere=True).applied():
        assert vars(layer)["forward"] is own
    assert vars(layer)["forward"] is own


def test_without_a_gpu_a_note_says_so_where_it_is_asked_for() -> None:
    engine = RolloutEngine(*tiny_pair("llama"), linear=True)
    result = engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(2))
    assert result.notes == ("PyTorch's products: they need a GPU; the models are on cpu",)
    with pytest.raises(ValueError, match="linear: expected auto, True or False; got 'triton'"):
        RolloutEngine(*tiny_pair("llama"), linear="triton")


def test_a_compiled_step_keeps_the_operator(products, monkeypatch) -> None:
    """torch.compile takes the operator into its graph, without a graph break."""
    monkeypatch.setattr(step_products, "measured_faster", lambda problem: True)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    policy, reference = tiny_pair("llama")
    engine = RolloutEngine(policy, reference, compile=True, bucket=16)
    result = engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(4))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, prompts(), beta) < 1e-4
