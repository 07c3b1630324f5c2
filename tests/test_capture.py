"""Captured steps neither copy data from the host nor read tensor values; checked without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import nlhf_kernels
from nlhf_kernels.core import capabilities
from nlhf_kernels.core.processes import leave_process_group
from nlhf_kernels.core.registry import ops
from nlhf_kernels.core.upstream import distributed_config_class
from nlhf_kernels.engine import Hooks, RolloutEngine, model_set, nash_md
from nlhf_kernels.engine.loop import Rollout
from nlhf_kernels.engine.sharded import Sharding
from tests.support.capture import DEVICE, CaptureRefused, capturing, no_launches, on_device, said_to_capture
from tests.support.engine import can_be_recorded, settings, tiny, tiny_pair
from tests.support.tiny_models import BETA, padded, prompts
from tests.test_engine_shared import adapted
from tests.test_operators import backward

ROOMS = [op.name for op in ops()]


@pytest.mark.parametrize("backend", ["torch", "triton"])  # on a GPU, `auto` adds the CUDA kernels
@pytest.mark.parametrize("op", ROOMS)
def test_ops(op, backend) -> None:
    """Every example passes forward and backward under `capturing()`, which raises on host access."""
    reasons: list[str] = []
    walked = 0
    for make in importlib.import_module(f"tests.test_{op}").EXAMPLES:
        args, kwargs = (on_device(values) for values in make(torch.device("cpu")))
        with capturing(), nlhf_kernels.use_backend(backend):
            reasons = nlhf_kernels.explain(op, *args, **kwargs).reasons.get(backend, [])
            if not reasons:
                backward(getattr(nlhf_kernels, op)(*args, **kwargs))
                walked += 1
    if not walked:
        pytest.skip("; ".join(reasons))


class _Watched:
    """A graph recorder that runs each step eagerly under `capturing()`."""

    def record(self, step, state):
        def watched() -> None:
            with capturing():
                step()

        return watched

    def run_concurrently(self, calls):
        return [call() for call in calls]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "llama", "gemma3", "mistral", "qwen2", "qwen3", "adapter"])
def test_engine_steps(architecture, fused, monkeypatch) -> None:
    """Steps of four kinds of position encoding, of sliding windows, and of an adapter with its base in one pass."""
    engine = watched_engine(architecture, monkeypatch, fused=fused, graphs="steps")
    assert watch_steps(engine, slices=False) == 4 and engine.graphs.recorded


@pytest.mark.parametrize("prompt_bucket", [9, 16])  # without padding, and with
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "mistral", "qwen2", "qwen3", "phi3", "adapter"])
def test_engine_passes_over_prompts(architecture, prompt_bucket, monkeypatch) -> None:
    """The second pass is the one that is recorded."""
    fused = not capabilities.triton_missing()
    engine = watched_engine(architecture, monkeypatch, fused=fused, prompt_bucket=prompt_bucket)
    watch_steps(engine, slices=False)
    assert engine.graphs.recorded_passes


def watched_engine(architecture: str, monkeypatch: Any, fused: bool, **options: Any) -> RolloutEngine:
    if fused and capabilities.triton_missing():
        pytest.skip("needs triton")
    monkeypatch.setattr(model_set, "why_not_usable", lambda device: None)
    models = (adapted(tiny("llama")),) if architecture == "adapter" else tiny_pair(architecture)
    if not can_be_recorded(models[0]):
        pytest.skip("this transformers makes eager masks of a number on the host; the engine takes eager steps")
    for model in models:
        model.config.pad_token_id = None  # otherwise transformers reads the prompts to warn about padding
    return RolloutEngine(*models, recorder=_Watched(), bucket=32, fused=fused, **options)


@pytest.mark.parametrize("options", [{"fused": False}, {"fused": True}, {"fused": True, "linear": True}], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "qwen3"])
def test_steps_of_two_models_in_one_pass(architecture, options, monkeypatch) -> None:
    if options["fused"] and capabilities.triton_missing():
        pytest.skip("needs triton")
    monkeypatch.setattr(model_set, "why_not_usable", lambda device: None)
    models = tiny(architecture, seed=1), tiny(architecture, seed=2)
    if not can_be_recorded(models[0]):
        pytest.skip("this transformers makes eager masks of a number on the host; the engine takes eager steps")
    for model in models:
        model.config.pad_token_id = None
    engine = RolloutEngine(*models, recorder=_Watched(), bucket=16, one_pass=True, **options)
    assert watch_steps(engine, slices=False) == 4
    assert engine.models.active_pair is not None


def watch_steps(engine: RolloutEngine, *, slices: bool) -> int:
    """Read prompts twice and take a rollout's steps on the meta device; return the number of steps."""
    batch = padded(prompts((9, 9)))
    request = engine._resolve(batch["input_ids"], None, nash_md(BETA), settings(4, backend="torch"), Hooks())
    assert not request.notes
    request = replace(request, prompts=replace(request.prompts, **on_device(vars(request.prompts))))
    info = engine.models.info
    engine.models.info = {name: replace(f, model=f.model.to(DEVICE), device=DEVICE) for name, f in info.items()}
    engine.device = DEVICE
    with torch.no_grad(), engine.models.decoding_mode(slices, False), engine.models.fused():
        for _ in range(2):
            rollout = Rollout(request, engine._workspace(request), engine.graphs)
            with no_launches(), said_to_capture():
                rollout.prefill()
        for _ in range(3):
            rollout.step()
    return rollout.steps


@pytest.fixture
def two_processes() -> Iterator[None]:
    """PyTorch's stand-in for a process group of two: collectives return at once, also those of meta tensors."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=fake.FakeStore())
    try:
        yield
    finally:
        leave_process_group()


@contextmanager
def filling() -> Iterator[None]:
    """Let the embedding of a split vocabulary fill by `masked_fill_`. PyTorch writes `x[mask] = 0`, which it turns into
    that on CUDA alone (`canDispatchToMaskedFill`), and not on the meta device."""

    def mask_tensor(ids: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (ids < first) | (ids >= first + count)
        return mask, (ids - first).masked_fill_(mask, 0)

    def apply_mask(buffer: Any, values: torch.Tensor) -> None:
        values.masked_fill_(buffer.data.unsqueeze(-1), 0.0)

    partial = importlib.import_module("torch.distributed.tensor.placement_types")._MaskPartial
    buffer = importlib.import_module("torch.distributed.tensor._ops._mask_buffer").MaskBuffer
    masks = mock.patch.object(partial, "_mask_tensor", staticmethod(mask_tensor))
    with masks, mock.patch.object(buffer, "apply_mask", apply_mask):
        yield


@pytest.mark.skipif(distributed_config_class() is None, reason="transformers is too old for split models")
def test_a_step_of_split_models(two_processes, tmp_path, monkeypatch) -> None:
    """Between its collectives, a step of two tensor-parallel models and the sampling from their slices neither copy
    from the host nor read values. Whether NCCL's collectives can be captured, only GPUs tell."""
    monkeypatch.setattr(Sharding, "why_not_captured", lambda *_: None)
    tiny("llama").save_pretrained(tmp_path)
    split = distributed_config_class()
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=split(tp_size=2))]
    models.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=split(tp_size=2)))
    for model in models:
        model.config.pad_token_id = None
    engine = RolloutEngine(*models, recorder=_Watched(), bucket=16, fused=False, graphs="steps")
    assert engine.models.sharding.part is not None, "logits stay in slices"
    with filling():
        assert watch_steps(engine, slices=True) == 4
    del engine, models, model


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.as_tensor(3, device=x.device),
        lambda x: x * torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x + torch.ones(2).to(x.device),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x[[1, 0]],
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, 0.0),
        lambda x: x.cpu(),
    ],
)
def test_the_rules_find_each_kind_of_mistake(mistake) -> None:
    x = torch.ones(2, device=DEVICE)
    with capturing(), pytest.raises(CaptureRefused):
        mistake(x)


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, float, torch.Tensor.tolist, torch.Tensor.nonzero])
def test_the_rules_find_a_read_value(read) -> None:
    with capturing(), pytest.raises((RuntimeError, NotImplementedError, CaptureRefused)):
        read(torch.ones(1, device=DEVICE))
