"""LoRA in one pass over many architectures, the comparison that admits it, and peft's other adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from nlhf_kernels.engine import RolloutEngine, nash_md
from tests.support.engine import FLATTENING, settings, tiny, worst_error
from tests.support.tiny_models import BETA, one_thread, padded, prompts

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def lora(base: torch.nn.Module, trained: bool = True, **options) -> torch.nn.Module:
    policy = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))
    return train(policy) if trained else policy


def train(policy: torch.nn.Module, std: float = 0.15) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data + std * torch.randn(parameter.shape, generator=generator)
    return policy.eval()


def error(policy, base, **options) -> tuple[RolloutEngine, float]:
    """Return the engine, and the error of its rollouts against full forward passes of the policy and of its base."""
    engine, rows = RolloutEngine(policy, **options), prompts()
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(4))
    worst = [
        worst_error(responses, policy, base, rows, beta) for responses, beta in zip(result, (0.0, BETA), strict=True)
    ]
    assert (result[0].policy_logprobs - result[0].reference_logprobs).abs().max() > 0.05, "the adapter must matter"
    return engine, max(worst)


# ---- one pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "falcon", "gemma3", "mixtral", *FLATTENING])
def test_every_linear_layer_is_adapted_in_one_pass(architecture) -> None:
    """One pass serves all linear layers, also Conv1D layers, and layers whose input has its tokens flattened."""
    base = tiny(architecture)
    names = [name for name, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "FalconLinear")]
    policy = lora(copy.deepcopy(base), target_modules=[name for name in names if "lm_head" not in name])
    engine, worst = error(policy, base)
    assert engine.models.one_pass, engine.models.notes
    assert worst < 5e-5


class TokensFirst(torch.nn.Module):
    """A wrapper that transposes (batch, tokens) before it calls a block, and optionally flattens the two."""

    def __init__(self, block: torch.nn.Module, flatten: bool) -> None:
        super().__init__()
        self.block, self.flatten = block, flatten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(0, 1)
        out = self.block(turned.reshape(-1, x.shape[-1]) if self.flatten else turned)
        return out.reshape(turned.shape).transpose(0, 1)


def mixing(flatten: bool) -> torch.nn.Module:
    base = tiny("llama")
    base.model.layers[1].mlp = TokensFirst(base.model.layers[1].mlp, flatten)
    return base


@pytest.mark.parametrize(
    ("flatten", "reason"),
    [
        (True, "LlamaForCausalLM mixes the rows of a batch"),
        (False, "a layer gets 5 vectors from a batch of 6"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_mixes_rows_takes_two_passes(flatten, reason, dtype) -> None:
    base = mixing(flatten)
    if dtype == torch.float32:
        engine, worst = error(lora(copy.deepcopy(base)), base)
        assert worst < 5e-5
    else:
        engine = RolloutEngine(lora(base.to(dtype), trained=False))
    assert not engine.models.one_pass
    assert any(reason in note for note in engine.models.notes)


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_rounding_alone_does_not_cost_one_pass(architecture) -> None:
    base = tiny(architecture, hidden=64).to(torch.bfloat16)
    assert RolloutEngine(lora(base, target_modules=["q_proj", "v_proj"])).models.one_pass


def test_the_comparison_leaves_a_new_adapter_as_it_was() -> None:
    """The comparison sets random weights, as a new adapter's zeros would hide errors, and restores the old ones."""
    policy = lora(mixing(flatten=True), trained=False)
    before = {name: (value, value.data_ptr(), value.clone()) for name, value in policy.named_parameters()}
    scaling = [dict(m.scaling) for m in policy.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert not RolloutEngine(policy).models.one_pass
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in policy.named_parameters():
        same, place, content = before[name]
        assert value is same and value.data_ptr() == place and torch.equal(value, content), name
    assert scaling == [dict(m.scaling) for m in policy.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
    assert not any("forward" in vars(module) for module in policy.modules())


def test_layers_that_are_adapted_later_are_compared_then() -> None:
    base, rows = mixing(flatten=True), prompts()
    policy = lora(copy.deepcopy(base), target_modules=["q_proj"])
    engine = RolloutEngine(policy)
    request = {**padded(rows), "players": nash_md(BETA), "settings": settings(4)}
    for name, target in (("", ""), ("second", "v_proj"), ("mlp", "down_proj")):
        if name:
            policy.add_adapter(name, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
            policy.set_adapter(name)
        if name != "mlp":
            assert worst_error(engine.rollout(**request)[1], policy, base, rows, BETA) < 5e-5
    with pytest.raises(ValueError, match="expected adapters as when the engine was made; now LlamaForCausalLM mixes"):
        engine.rollout(**request)


def test_a_forward_that_others_put_into_a_layer_stays() -> None:
    """A replaced forward, such as accelerate's hooks that move weights to the device, is kept."""
    base = tiny("llama")
    policy = lora(copy.deepcopy(base))
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    layer.forward = own = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    engine = RolloutEngine(policy)
    assert not engine.models.one_pass
    engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(2))
    assert vars(layer)["forward"] is own


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_without_a_cache_the_base_is_read_whole_too(architecture) -> None:
    base = tiny(architecture)
    targets = ["in_proj"] if architecture == "mamba" else TARGETS
    engine, worst = error(lora(copy.deepcopy(base), target_modules=targets), base, use_cache=False)
    assert worst < 5e-5
    assert any("use_cache=False" in note for note in engine.models.notes)


# ---- peft's other adapters -------------------------------------------------------------------------------------------

TOKENS = {"embed_tokens": [3, 4, 5, 6, 7]}
OPTIONS: dict[str, tuple[dict, bool]] = {  # of LoRA, and whether one pass serves them
    "rslora": ({"use_rslora": True}, True),
    "lora_bias": ({"lora_bias": True}, True),
    "ranks": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, True),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, True),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, True),
    "dora": ({"use_dora": True}, False),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "saved": ({"modules_to_save": ["lm_head"]}, False),
    "tokens": ({"trainable_token_indices": TOKENS}, False),
    "parameters": ({"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]}, False),
}
KINDS: dict[str, dict] = {
    "AdaLora": {"init_r": 4, "target_r": 2, "total_step": 10}, "Beft": {}, "C3A": {"block_size": 8}, "Deft": {},
    "Delora": {"r": 4}, "FourierFT": {"n_frequency": 20}, "Frod": {}, "Glora": {"r": 4}, "Gralora": {"r": 4},
    "Hira": {"r": 4}, "HRA": {"r": 4}, "IA3": {"feedforward_modules": ["down_proj"]},
    "LNTuning": {"target_modules": ["input_layernorm"]}, "LoHa": {"r": 4}, "LoKr": {"r": 4}, "Miss": {"r": 4},
    "OFT": {"oft_block_size": 4}, "OSF": {}, "Peanut": {"r": 4}, "Psoft": {"r": 4}, "Pvera": {"r": 4},
    "RandLora": {"r": 4}, "Road": {"group_size": 8}, "Shira": {"r": 2}, "Supertuning": {}, "TinyLora": {"r": 2},
    "TrainableTokens": {"target_modules": ["embed_tokens"], "token_indices": [3, 4, 5, 6, 7]}, "UniLora": {},
    "VBLoRA": {"num_vectors": 8, "vector_length": 8}, "Vera": {"r": 4}, "WaveFT": {"n_frequency": 20},
}  # fmt: skip


def make_kind(name: str) -> Callable[..., object]:
    config_class = getattr(peft, f"{name}Config", None)
    return config_class or pytest.skip(f"peft {peft.__version__} has no {name}Config")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_lora(name) -> None:
    options, one_pass = OPTIONS[name]
    base = tiny("qwen2" if name == "lora_bias" else "llama")
    engine, worst = error(lora(copy.deepcopy(base), **options), base)
    assert worst < 5e-5
    assert engine.models.one_pass is one_pass


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_take_two_passes(name) -> None:
    base = tiny("llama")
    config = make_kind(name)(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **KINDS[name]})
    policy = train(peft.get_peft_model(copy.deepcopy(base), config))
    engine, worst = error(policy, base)
    assert worst < 5e-5 and not engine.models.one_pass


def test_every_kind_that_is_served_is_tested() -> None:
    from nlhf_kernels.core.upstream import ADAPTERS_PER_TOKEN

    kinds = {kind.value for kind in peft.PeftType}
    tested = {make_kind(name)(**KINDS[name]).peft_type.value for name in KINDS if hasattr(peft, f"{name}Config")}
    assert tested | {"LORA", "BOFT"} == ADAPTERS_PER_TOKEN & kinds, "BOFT compiles a CUDA extension when it is made"


REFUSED = {
    "aLoRA": ({"alora_invocation_tokens": [5]}, "acts on every token; got alora_invocation_tokens in 'default'"),
    "layers": ({"layer_replication": [(0, 2), (1, 2)]}, "its base as it is, .*; got layer_replication in 'default'"),
    "pissa": ({"init_lora_weights": "pissa"}, "its base as it is, .*; got init_lora_weights='pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "its base as it is, .*; got init_lora_weights='olora'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_would_be_wrong_are_refused(case) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"RolloutEngine: policy: expected an adapter that .*{message}"):
        RolloutEngine(lora(tiny("llama"), **options))


def test_a_reference_beside_it_serves_an_adapter_that_changed_its_base() -> None:
    base = tiny("llama")
    policy = lora(copy.deepcopy(base), init_lora_weights="pissa")
    rows = prompts()
    result = RolloutEngine(policy, base).rollout(**padded(rows), players=nash_md(BETA), settings=settings(4))
    assert worst_error(result[1], policy, base, rows, BETA) < 5e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [("Lily", {"r": 4}), ("Poly", {"r": 4, "n_tasks": 2}), ("AdaptionPrompt", {"adapter_len": 4, "adapter_layers": 1})],
)
def test_kinds_that_act_between_tokens_or_layers_are_refused(name, options) -> None:
    targets = {} if name == "AdaptionPrompt" else {"target_modules": TARGETS}
    policy = peft.get_peft_model(tiny("llama"), make_kind(name)(task_type="CAUSAL_LM", **targets, **options))
    for arguments, role in (((policy,), "policy"), ((tiny("llama"), policy), "reference")):
        with pytest.raises(ValueError, match=f"{role}: expected LoRA or another adapter that acts within layers"):
            RolloutEngine(*arguments)
