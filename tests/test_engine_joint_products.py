"""Joint products of query, key and value, and of gate and up: equal logits, also after changes of the weights."""

from __future__ import annotations

import copy

import pytest
import torch

from nlhf_kernels.engine import Player, RolloutEngine, nash_ema, nash_md
from nlhf_kernels.engine.joint_products import JointProduct, find_groups, load, weights_of
from tests.support.engine import TINY, settings, tiny, tiny_pair, worst_error
from tests.support.recorder import recorded
from tests.support.tiny_models import BETA, one_thread, padded, prompts
from tests.test_engine_shared import adapted

LIKE_LLAMA = ("llama", "qwen2", "mistral", "qwen3", "gemma2", "gemma3", "granite", "llama_tied", "cohere")
TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def calls_of_linear(monkeypatch) -> list[tuple[int, ...]]:
    """Record the shapes of the weights of all later linear products."""
    shapes, linear = [], torch.nn.functional.linear

    def record(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    return shapes


@pytest.mark.parametrize("architecture", LIKE_LLAMA)
def test_logits_are_the_models_own(architecture, monkeypatch) -> None:
    """Logits are the model's, with Qwen2's biases and Qwen3's norms, by two products a layer instead of five."""
    policy, reference = tiny_pair(architecture)
    rows = prompts()
    engine = RolloutEngine(policy, reference, fused=True)
    layers = policy.config.num_hidden_layers
    assert len(engine.models.joint_products.groups) == 4 * layers
    shapes = calls_of_linear(monkeypatch)
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(6))
    per_forward = 4 * layers + 1  # joint, output projection, joint, down projection; the head
    assert len(shapes) == 6 * 2 * per_forward
    assert result.notes == ()
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, rows, beta) < TOLERANCE
    assert not any("forward" in vars(module) for model in (policy, reference) for module in model.modules())


@pytest.mark.parametrize("architecture", [name for name in TINY if name not in LIKE_LLAMA])
def test_other_models_keep_their_products(architecture) -> None:
    model = tiny(architecture)
    attention_only = architecture == "mixtral"  # Llama's attention, but experts in place of its MLP
    assert len(find_groups(model)) == (model.config.num_hidden_layers if attention_only else 0)


def test_code_that_is_not_known_keeps_its_products() -> None:
    """Layers of a subclass with a forward of its own are not joined."""
    model = tiny("llama")
    groups = len(find_groups(model))
    mlp_class = type(model.model.layers[0].mlp)

    class Doubled(mlp_class):
        def forward(self, x):
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    model.model.layers[0].mlp.__class__ = Doubled
    assert len(find_groups(model)) == groups - 1


def in_place(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def behind_autograd(model: torch.nn.Module) -> None:
    """Update without a change of the version counter, as kernels that write by address do."""
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def elsewhere(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data


def by_an_optimizer(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("update", [in_place, behind_autograd, elsewhere, by_an_optimizer])
@pytest.mark.parametrize("replayed", [False, True])
def test_updates_between_rollouts_are_followed(update, replayed) -> None:
    policy, reference = tiny_pair("qwen2")
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    rows = prompts()
    if replayed:
        engine, _ = recorded(policy, reference, bucket=32, fused=True)
    else:
        engine = RolloutEngine(policy, reference, fused=True)
    request = {**padded(rows), "players": nash_md(BETA), "settings": settings(5)}
    before = engine.rollout(**request)
    update(policy)
    after = engine.rollout(**request)
    assert worst_error(after[1], policy, reference, rows, BETA) < TOLERANCE
    assert not torch.equal(before[0].policy_logprobs, after[0].policy_logprobs)


def test_an_average_updated_in_place_is_followed() -> None:
    policy, reference = tiny_pair("llama")
    average = {name: value.detach() + 0.2 * torch.randn_like(value) for name, value in policy.named_parameters()}
    engine, rows = RolloutEngine(policy, reference, opponent=average, fused=True), prompts()
    for _ in range(2):
        opponent = copy.deepcopy(policy)
        opponent.load_state_dict(average, strict=False)
        _, response = engine.rollout(**padded(rows), players=nash_ema(BETA), settings=settings(5))
        assert worst_error(response, opponent, reference, rows, BETA) < TOLERANCE
        for value in average.values():
            value.mul_(0.9)


def test_another_dtype_takes_new_storage() -> None:
    policy = tiny("llama")
    engine, rows = RolloutEngine(policy, fused=True), prompts()
    products = engine.models.joint_products
    with products.applied():
        first = products.addresses
    policy.bfloat16()
    with products.applied():
        assert products.addresses != first
        policy(rows[2][None])  # float32 weights would be refused


def test_one_model_twice_is_joined_once() -> None:
    policy, rows = tiny("llama"), prompts()
    engine = RolloutEngine(policy, policy, fused=True)
    assert len(engine.models.joint_products.groups) == 2 * policy.config.num_hidden_layers
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(4))
    assert worst_error(result[1], policy, policy, rows, BETA) < TOLERANCE


def test_adapters_keep_their_layers() -> None:
    base = tiny("llama")
    engine = RolloutEngine(adapted(base), fused=True)
    assert engine.models.joint_products.groups == [] and engine.models.one_pass
    beside = RolloutEngine(adapted(base), tiny("llama", seed=2), fused=True)
    assert len(beside.models.joint_products.groups) == 2 * base.config.num_hidden_layers, "the reference's"


def test_a_layer_with_a_forward_of_anothers_keeps_it() -> None:
    policy, rows = tiny("llama"), prompts()
    layer = policy.model.layers[0].self_attn.k_proj
    layer.forward = own = lambda x: type(layer).forward(layer, x)
    result = RolloutEngine(policy, fused=True).rollout(**padded(rows), players=(Player(),), settings=settings(3))
    assert vars(layer)["forward"] is own
    assert result.notes == (
        "separate products: a layer's forward has been replaced, by accelerate's hooks or another's",
    )
    del layer.forward  # a deep copy would keep calling this model's weights
    assert worst_error(result[0], policy, None, rows, 0.0) < TOLERANCE


def test_an_interrupted_rollout_leaves_the_layers_as_they_were() -> None:
    policy, rows = tiny("llama"), prompts()
    engine = RolloutEngine(policy, fused=True)
    request = {**padded(rows), "players": (Player(),), "settings": settings(3)}

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    handle = policy.model.layers[0].self_attn.k_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.rollout(**request)
    handle.remove()
    assert not any("forward" in vars(module) for module in policy.modules())
    assert worst_error(engine.rollout(**request)[0], policy, None, rows, 0.0) < TOLERANCE


def test_compiled_models_join_products_without_a_break_or_another_compilation(monkeypatch) -> None:
    """The graph of each model and bucket has the joint products, and serves later rollouts and changed weights."""
    policy, reference = tiny_pair("qwen2")
    compile, weights = torch.compile, []

    def backend(module, inputs):
        for node in module.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
            weights.append(tuple(node.args[1].meta["example_value"].shape))
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine, rows = RolloutEngine(policy, reference, compile=True, bucket=16, fused=True), prompts()
    counters = torch._dynamo.utils.counters
    for _ in range(2):
        result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(12))
        assert worst_error(result[1], policy, reference, rows, BETA) < TOLERANCE
        assert counters["stats"]["unique_graphs"] == 2 * 2 and not counters["graph_break"]
        in_place(policy)
    layers = policy.config.num_hidden_layers
    assert len(weights) == 2 * 2 * (4 * layers + 1), "two buckets, two models; the head"


# ---- one product -----------------------------------------------------------------------------------------------------


def product() -> tuple[JointProduct, list]:
    torch.manual_seed(0)
    layers = tuple(torch.nn.Linear(8, width, bias=width != 4) for width in (6, 4, 4))
    joint = JointProduct(layers)
    load([(joint, weights_of(layers))])
    return joint, [forward for _, forward in joint.forwards]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_columns_in_any_order(order, monkeypatch) -> None:
    joint, forwards = product()
    shapes = calls_of_linear(monkeypatch)
    x = torch.randn(2, 3, 8)
    for _ in range(2):
        for index in order:
            torch.testing.assert_close(forwards[index](x), joint.layers[index](x))
    assert shapes.count((14, 8)) == 2 and joint.output is None, "nothing is held between steps"


@pytest.mark.parametrize("other", ["another tensor", "written in place", "one layer twice"])
def test_layers_that_do_not_share_an_input_go_back_to_products_of_their_own(other, monkeypatch) -> None:
    joint, forwards = product()
    x = torch.randn(2, 8)
    forwards[0](x)
    y = torch.randn(2, 8) if other == "another tensor" else x.mul_(2) if other == "written in place" else x
    index = 0 if other == "one layer twice" else 1
    torch.testing.assert_close(forwards[index](y), joint.layers[index](y))
    shapes = calls_of_linear(monkeypatch)
    torch.testing.assert_close(forwards[0](x), joint.layers[0](x))
    assert (14, 8) not in shapes


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_planned_allocated_and_released() -> None:
    policy, reference = tiny_pair("llama")
    engine = RolloutEngine(policy, reference, fused=True)
    plan = engine.memory_plan(3, 9, nash_md(BETA), settings(4))
    separate = RolloutEngine(policy, reference, fused=False).memory_plan(3, 9, nash_md(BETA), settings(4))
    engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(4))
    weights = [product.weight for product in engine.models.joint_products._products.values()]
    allocated = sum(weight.numel() * weight.element_size() for weight in weights)
    assert plan.parts["joint products"] == allocated == plan.total - separate.total
    engine.release()
    assert engine.models.joint_products.addresses == ()


def test_auto_does_without_where_memory_is_short(monkeypatch) -> None:
    """`auto` on a GPU, simulated here, makes no joint products where memory is short."""
    policy, reference = tiny_pair("llama")
    rows, players = prompts(), nash_md(BETA)
    separate = RolloutEngine(policy, reference, fused=False).memory_plan(3, 9, players, settings(4)).total
    copies = RolloutEngine(policy, reference, fused=True).models.joint_products.bytes
    reason = "separate products: weights side by side would take more than a twentieth of the memory, or do not fit"
    assert 10 * copies > separate + copies
    for limit, notes in ((separate + 20 * copies, ()), (10 * copies, (reason,)), (separate, (reason,))):
        engine = RolloutEngine(policy, reference, fused=True, memory_limit=limit)
        engine.fused = "auto"
        result = engine.rollout(**padded(rows), players=players, settings=settings(4))
        assert result.notes == notes
        assert worst_error(result[1], policy, reference, rows, BETA) < TOLERANCE
    with pytest.raises(MemoryError, match="joint products"):
        RolloutEngine(policy, reference, fused=True, memory_limit=separate).rollout(
            **padded(rows), players=players, settings=settings(4)
        )


def test_auto_is_for_a_gpu() -> None:
    assert RolloutEngine(tiny("llama")).models.joint_products.groups == []
    with pytest.raises(ValueError, match="fused: expected auto, products, layers, True or False; got 'yes'"):
        RolloutEngine(tiny("llama"), fused="yes")
