"""Contracts with upstream libraries: one test for each name in `core/upstream.py`."""

from __future__ import annotations

import ast
import importlib.machinery
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers.masking_utils import eager_mask

from nlhf_kernels.core import upstream
from nlhf_kernels.core.processes import leave_process_group
from nlhf_kernels.core.upstream import CACHES, cache_argument, finite_attention_gradients
from nlhf_kernels.engine.caches import ProbeLayer
from nlhf_kernels.engine.model_info import has_key_value_cache
from tests.support.capture import DEVICE as META
from tests.support.capture import CaptureRefused, capturing
from tests.support.tiny_models import ARCHITECTURES, random_model, tiny_model

ROOT = Path(__file__).resolve().parent.parent
MATH = [torch.nn.attention.SDPBackend.MATH]


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_viewed() -> None:
    leaf = torch.zeros(4, 3)
    assert upstream.viewed(leaf) is leaf
    assert upstream.viewed(leaf[1:].T) is leaf
    assert upstream.viewed(leaf.detach()) is not leaf, "detached views share memory and remember nothing"


def test_version_of() -> None:
    tensor = torch.zeros(2)
    before = upstream.version_of(tensor)
    tensor[0].add_(1)
    assert upstream.version_of(tensor) > before


@pytest.mark.parametrize(("ours", "theirs"), [(upstream.modules_of, "modules"), (upstream.parameters_of, "parameters")])
def test_modules_of_and_parameters_of(ours, theirs) -> None:
    """They return what PyTorch's own methods do, in its order, where modules and weights occur twice or are None."""
    model = tiny_model("llama")
    model.again, model.nothing = model.model.layers[1], None
    model.lm_head.weight = model.model.embed_tokens.weight
    assert list(map(id, ours(model))) == list(map(id, getattr(model, theirs)()))


def test_copy_all() -> None:
    targets, sources = [torch.zeros(3, 4)[1:], torch.zeros(2)], [torch.ones(2, 4), torch.full((2,), 2.0)]
    before = [target.data_ptr() for target in targets]
    upstream.copy_all(targets, sources)
    assert all(map(torch.equal, targets, sources)) and [target.data_ptr() for target in targets] == before
    upstream.copy_all([], [])


def test_uncompiled() -> None:
    model = tiny_model("llama")
    assert upstream.uncompiled(torch.compile(model)) is model
    assert upstream.uncompiled(model) is model


def test_has_forward_hooks() -> None:
    layer = torch.nn.Linear(2, 2)
    assert not upstream.has_forward_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert upstream.has_forward_hooks(layer)
        handle.remove()
        assert not upstream.has_forward_hooks(layer)


def test_observing_operations() -> None:
    """Views of a tensor are operations too, and results are those of the operations."""
    seen, x = [], torch.ones(2, 3)
    with torch.no_grad(), upstream.observing_operations(lambda name, tensors: seen.append((name, len(tensors)))):
        result = torch.cat([x.t().t(), x])
    assert result.shape == (4, 3)
    assert seen == [("aten.t.default", 1), ("aten.t.default", 1), ("aten.cat.default", 2)]
    x.add_(1)
    assert len(seen) == 3


def test_finite_attention_gradients() -> None:
    """Settings are restored, also after an exception. tests/test_gpu_contracts.py shows the cause."""
    for enabled in (True, False):
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.CUDNN_ATTENTION] if enabled else MATH):
            with pytest.raises(KeyError), finite_attention_gradients():
                assert not torch.backends.cuda.cudnn_sdp_enabled()
                raise KeyError
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def test_is_unobserved() -> None:
    """Whatever sees an operator's call, or transforms it, is noticed; gradients being off is nothing of that."""
    from torch.utils._python_dispatch import TorchDispatchMode

    assert upstream.is_unobserved()
    with torch.no_grad():
        assert upstream.is_unobserved()
    with torch.inference_mode():
        assert upstream.is_unobserved()
    for observer in (TorchDispatchMode(), torch.device("cpu"), torch.profiler.profile()):
        with observer:
            assert not upstream.is_unobserved(), observer
    seen = []
    torch.func.vmap(lambda x: (seen.append(upstream.is_unobserved()), x)[1])(torch.zeros(2))
    torch.jit.trace(lambda x: (seen.append(upstream.is_unobserved()), x + 1)[1], torch.zeros(2), check_trace=False)
    assert seen == [False, False]
    assert upstream.is_unobserved()


def test_tensor_exchange() -> None:
    """core/calls.py tries what it finds; from torch 2.10 on, it finds something."""
    recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
    assert (upstream.tensor_exchange() is not None) == recent
    assert not recent or "dlpack_exchange_api" in repr(upstream.tensor_exchange())


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_allocator(device) -> None:
    """Allocates what torch.empty_strided does, in inference mode too."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    allocate = upstream.allocator(torch.device(device))
    for shape, strides, dtype in (((), (), torch.int64), ((3, 0), (0, 1), torch.bool), ((2, 5), (5, 1), torch.float32)):
        ours, expected = (
            allocate(shape, strides, dtype),
            torch.empty_strided(shape, strides, dtype=dtype, device=device),
        )
        assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (
            expected.shape, expected.stride(), expected.dtype, expected.device
        )  # fmt: skip
        assert type(ours) is torch.Tensor and not ours.requires_grad
    with torch.inference_mode():
        assert allocate((1,), (1,), torch.int64).is_inference()


# ---- triton ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> list[dict[str, Any]]:
    """What reached Triton's driver from five calls of two launches; see tests/support/launches.py."""
    pytest.importorskip("triton")
    if upstream._triton_version() not in upstream.TRITON_LAUNCHED_BY_ADDRESS:
        pytest.skip("this triton launches its own way only")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.launches"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_launch_by_address(launches) -> None:
    """Launched by addresses, a kernel gets what it got from Triton: grid, stream, function, arguments."""
    first, *others = (launches[start : start + 2] for start in (0, 2, 4))
    assert [launch["own_way"] for launch in first] == [True, True]
    for by_address in others:
        assert [launch["own_way"] for launch in by_address] == [False, False]
        assert [launch["arguments"] for launch in by_address] == [launch["arguments"] for launch in first]
        assert [launch["arguments"][0] for launch in by_address] == [7, 8]


def test_triton_is_observed(launches) -> None:
    assert [launch["own_way"] for launch in launches[6:]] == [True] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_current_raw_stream() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        assert upstream.current_raw_stream(torch.cuda.current_device()) == torch.cuda.current_stream().cuda_stream


# ---- transformers: models --------------------------------------------------------------------------------------------


def test_keep_unsharded() -> None:
    """In a group of one process, parameters stay gathered through a forward pass; then the old setting is restored."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for reshards in (True, False, None):
            module = torch.nn.Sequential(torch.nn.Linear(3, 3))
            fully_shard(module[0], mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=reshards)
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
            inputs = torch.ones(1, 3)
            with torch.no_grad():
                module(inputs)
                usual = isinstance(module[0].weight, DTensor)
                with upstream.keep_unsharded(module[0]):
                    module(inputs)
                    assert not isinstance(module[0].weight, DTensor)
                module[0].reshard()
                module(inputs)
            assert isinstance(module[0].weight, DTensor) is usual is (reshards is not False)
            del module
    finally:
        leave_process_group()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_argument(architecture) -> None:
    """The model updates the Cache passed by that name and returns it by that name."""
    model = tiny_model(architecture)
    name = cache_argument(model.forward)
    assert name in CACHES
    cache = transformers.DynamicCache(config=model.config)
    out = model(torch.ones(1, 3, dtype=torch.int64), **{name: cache}, use_cache=True)
    assert out[name] is cache
    layer = cache.layers[1]
    assert any(layer.has_previous_state.values()) if architecture == "mamba" else layer.get_seq_length() == 3


def test_a_cache_that_is_no_cache_of_transformers_is_not_taken_for_one() -> None:
    """XLM's argument `cache` is a dict in every version, also where other models name their Cache `cache`."""
    config = transformers.XLMConfig(vocab_size=97, emb_dim=32, n_layers=2, n_heads=4, causal=True, pad_token_id=0)
    model = random_model(config, seed=0)
    assert cache_argument(model.forward) is None
    assert not has_key_value_cache(model)


def test_attention_name() -> None:
    """The next forward pass uses the attention of the name set there, without validation."""
    model, ids = tiny_model("llama"), torch.ones(1, 3, dtype=torch.int64)
    assert upstream.names_attention(model.config) and not upstream.names_attention(object())
    assert upstream.attention_name(model.config) == "sdpa"
    calls = []

    def attend(module, query, *arguments, **named):
        calls.append(query.shape)
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("counted", attend)
    upstream.set_attention_name(model.config, "counted")
    model(ids)
    assert upstream.attention_name(model.config) == "counted" and len(calls) == 2
    assert upstream.attention_name(object()) is None


def test_eager_masks_copy_from_host() -> None:
    """The function returns what a mask made under the rules of a graph's capture shows."""
    copies = False
    try:
        with capturing():
            eager_mask(batch_size=1, q_length=1, kv_length=4, device=META)
    except CaptureRefused:
        copies = True
    assert upstream.eager_masks_copy_from_host() is copies


def test_longrope_reads_positions() -> None:
    """The function returns what a rotation made under the rules of a graph's capture shows."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    config = transformers.Phi3Config(
        **shape, original_max_position_embeddings=16, rope_parameters={**rope, "factor": 8.0}
    )
    rotation = random_model(config, seed=0).model.rotary_emb
    rotation(torch.zeros(1), torch.arange(20)[None])  # factors of long texts are made, and copied, at the first
    rotation.to(META)
    rotation.original_inv_freq = rotation.original_inv_freq.to(META)
    if hasattr(rotation, "long_inv_freq"):
        rotation.long_inv_freq = rotation.long_inv_freq.to(META)
    reads = False
    try:
        with capturing():
            rotation(torch.zeros(1, device=META), torch.zeros(1, 4, dtype=torch.int64, device=META))
    except (RuntimeError, NotImplementedError):
        reads = True
    assert upstream.longrope_reads_positions() is reads


def test_experts_name() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = random_model(transformers.MixtralConfig(vocab_size=97, intermediate_size=8, **shape), seed=0)
    model.set_experts_implementation("batched_mm")
    assert upstream.experts_name(model.config) == "batched_mm"
    assert upstream.experts_name(object()) is None


def test_hands_attention_over() -> None:
    """Models with ALiBi compute attention themselves, so the function returns False."""
    assert upstream.hands_attention_over(tiny_model("llama"))
    assert not upstream.hands_attention_over(tiny_model("bloom"))


def test_keeps_recurrent_state() -> None:
    assert upstream.keeps_recurrent_state(tiny_model("mamba"))
    assert not upstream.keeps_recurrent_state(tiny_model("llama"))


def test_is_mask_within_window() -> None:
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    assert upstream.is_mask_within_window(sliding_window_causal_mask_function(4))
    assert not upstream.is_mask_within_window(causal_mask_function)


def test_has_injected_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    assert not upstream.has_injected_adapter(model)
    assert model._hf_peft_config_loaded is False, "it is False by that name, not for want of it"
    try:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:
        pytest.skip(str(error))  # transformers 5.24 requires a newer peft than the pinned one
    assert upstream.has_injected_adapter(model)


# ---- transformers: generate() and the Trainer ------------------------------------------------------------------------


def test_dropped_by_generate() -> None:
    model, seen = tiny_model("gpt2"), []

    def decode(model, input_ids, **_):
        seen.append(upstream.dropped_by_generate(inspect.currentframe().f_back))
        return input_ids

    streamer = types.SimpleNamespace(put=lambda ids: None, end=lambda: None)
    ids = torch.ones(1, 3, dtype=torch.int64)
    model.generate(ids, custom_generate=decode, streamer=streamer, max_new_tokens=2)
    model.generate(ids, custom_generate=decode, max_new_tokens=2)
    assert seen == [{"streamer": streamer}, {}]
    assert "assistant_model" in inspect.unwrap(transformers.GenerationMixin.generate).__code__.co_varnames
    assert upstream.dropped_by_generate(inspect.currentframe()) == upstream.dropped_by_generate(None) == {}


def test_distributed_config_class(monkeypatch) -> None:
    kind = upstream.distributed_config_class()
    if kind is not None:
        assert (kind(tp_size=2).tp_size, kind(fsdp_size=3).fsdp_size, kind(tp_size=2).dp_replicate_size) == (2, 3, 1)
    monkeypatch.setitem(sys.modules, "transformers.distributed", types.ModuleType("transformers.distributed"))
    assert upstream.distributed_config_class() is None, "a transformers that is too old"


def test_plain_class() -> None:
    """The function undoes FSDP2's subclassing of a module's class."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("torch is too old for FSDP2")
    layer = torch.nn.Linear(4, 4)
    assert upstream.plain_class(layer) is torch.nn.Linear
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fsdp.fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert type(layer) is not torch.nn.Linear
        assert upstream.plain_class(layer) is torch.nn.Linear
    finally:
        del layer
        leave_process_group()


def test_skeleton() -> None:
    model = tiny_model("gpt2")
    model.set_attn_implementation("eager")
    copy = upstream.skeleton(model)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    assert {name: value.shape for name, value in copy.named_parameters()} == shapes
    assert all(value.is_meta for value in copy.parameters()) and not any(value.is_meta for value in model.parameters())
    assert upstream.attention_name(copy.config) == "eager"


def test_accepting_split_models(tmp_path) -> None:
    """The attributes that Trainer's constructor checks are restored afterwards."""
    accelerate = pytest.importorskip("accelerate")
    if not hasattr(accelerate, "ParallelismConfig"):
        pytest.skip("accelerate is too old for tensor parallelism")
    check = accelerate.ParallelismConfig._validate_accelerator
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with upstream.accepting_split_models(args):
        assert args.save_only_model
        accelerate.ParallelismConfig(tp_size=2)._validate_accelerator(None)
    assert not args.save_only_model and accelerate.ParallelismConfig._validate_accelerator is check


def test_fully_shard_by_accelerate() -> None:
    """accelerate's function shards a model in place, and leaves one alone that it has sharded already."""
    plugin = pytest.importorskip("accelerate.utils").FullyShardedDataParallelPlugin
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        state = types.SimpleNamespace(fsdp_plugin=plugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP"))
        accelerator = types.SimpleNamespace(
            state=state, mixed_precision="no", is_main_process=True, device=torch.device("cpu")
        )
        model = tiny_model("llama")
        for _ in range(2):
            assert upstream.fully_shard_by_accelerate(accelerator, model) is model
            assert all(hasattr(value, "device_mesh") for value in model.parameters())
            state.fsdp_plugin.auto_wrap_policy = None
        assert upstream.plain_class(model) is transformers.LlamaForCausalLM
        del model
    finally:
        leave_process_group()


@pytest.mark.parametrize("name", upstream.TRAINER_METHODS)
def test_trainer_methods(name) -> None:
    method = getattr(transformers.Trainer, name)
    assert tuple(inspect.signature(method).parameters) == upstream.TRAINER_METHODS[name]


def test_wandb_of(monkeypatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", module := types.ModuleType("wandb"))
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    assert upstream.wandb_of(integration_utils.WandbCallback()) is module


def test_cache_layers() -> None:
    """The layers of engine/caches.py have the attributes that transformers requires of cache layers."""
    assert not ProbeLayer.__abstractmethods__
    cache = transformers.Cache(layer_class_to_replicate=ProbeLayer)
    tiny_model("llama")(torch.ones(1, 3, dtype=torch.int64), **{cache_argument(tiny_model("llama").forward): cache})
    assert [layer.shape.heads for layer in cache.layers] == [2, 2]


# ---- peft ------------------------------------------------------------------------------------------------------------


def test_plain_lora_layers() -> None:
    """Their forward pass equals the sum that engine/lora.py computes for a part of the rows."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    (layer, _) = (one for one in model.modules() if type(one) in upstream.plain_lora_layers())
    assert not layer.merged and not layer.disable_adapters and not layer.lora_variant
    (name,) = layer.active_adapters
    x = torch.randn(3, 32)
    expected = layer.base_layer(x) + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
    torch.testing.assert_close(layer(x), expected)
    with model.disable_adapter():
        assert layer.disable_adapters
        torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_adapters_per_token() -> None:
    """tests/test_engine_adapters.py decodes with each kind."""
    peft = pytest.importorskip("peft")
    assert {kind.value for kind in peft.PeftType} > {"LORA", "ADALORA", "IA3", "XLORA", "POLY", "ADAPTION_PROMPT"}
    assert upstream.ADAPTERS_PER_TOKEN.isdisjoint({"XLORA", "POLY", "LILY", "ADAPTION_PROMPT", "SHADOW"})
    assert peft.LoraConfig().peft_type.value in upstream.ADAPTERS_PER_TOKEN


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "pissa", "olora"])
def test_inits_beside_base(init) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, before) == (init in upstream.INITS_BESIDE_BASE)


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_no_test_makes_a_name_that_a_library_does_not_have() -> None:
    """Such a test passes where the real call fails. `raising=False` and `create=True` make names; an environment's
    variable may be absent."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            made = isinstance(node, ast.Call) and any(
                (keyword.arg, ast.unparse(keyword.value)) in (("raising", "False"), ("create", "True"))
                for keyword in node.keywords
            )
            if made and not ast.unparse(node.func).endswith(".delenv"):
                found.append(f"{path.name}:{node.lineno}")
    assert not found
