"""Contracts testable only on a GPU: captured graphs advance, streams share no memory, no call synchronizes."""

from __future__ import annotations

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.core.upstream import finite_attention_gradients
from tests.support.gpu import nothing_waits
from tests.support.mixture import logits_pair
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.gpu
on_gpu = pytest.mark.parametrize("backend", ["triton", "cuda"])


def sampler(backend: str, rows: int = 16, vocabulary: int = 50_257, **options):
    """Return a closure that samples from device-side inputs, and its step counter."""
    policy, other = logits_pair(rows, vocabulary, "cuda", (torch.bfloat16, torch.bfloat16))
    seed, step = torch.tensor(3, device="cuda"), torch.tensor(0, device="cuda")
    row_ids = torch.arange(rows, device="cuda")
    settings = nlhf_kernels.mixture_settings([0.7, 0.3], device=policy.device, **options)

    def draw():
        return nlhf_kernels.mixture_sample(
            policy, other, settings=settings, seed=seed, row_ids=row_ids, step=step, backend=backend
        )

    return draw, step


@on_gpu
@pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.9}], ids=str)
def test_a_captured_graph_advances_with_the_device_side_step(backend, options) -> None:
    draw, step = sampler(backend, **options)
    expected = []
    for value in range(4):
        step.fill_(value)
        expected.append(draw().tokens.clone())
    step.fill_(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = draw()
        step.add_(1)
    step.fill_(0)
    for value in range(4):
        graph.replay()
        assert torch.equal(result.tokens, expected[value]), f"replay {value}"
    assert not torch.equal(expected[0], expected[1])


@on_gpu
def test_two_streams_at_once_do_not_share_memory(backend) -> None:
    samplers = [sampler(backend, rows=rows, top_p=0.9) for rows in (64, 63)]
    expected = [draw().tokens.clone() for draw, _ in samplers]
    streams = [torch.cuda.Stream() for _ in samplers]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for index, (draw, _) in enumerate(samplers):
            with torch.cuda.stream(streams[index]):
                results[index].append(draw().tokens)
    torch.cuda.synchronize()
    for index in range(2):
        assert all(torch.equal(tokens, expected[index]) for tokens in results[index])


@on_gpu
def test_nothing_waits_for_the_device(backend) -> None:
    draw, _ = sampler(backend, top_k=40)
    draw()
    game = torch.zeros(4, 8, device="cuda"), torch.full((4, 8, 8), 0.5, device="cuda"), torch.zeros(4, 8, device="cuda")
    step_sizes = torch.full((3,), 0.1, device="cuda")
    nlhf_kernels.mirror_descent(*game, tau=0.1, step_sizes=step_sizes, backend=backend)
    policy, other = logits_pair(4, 100, "cuda")
    with nothing_waits():
        draw()
        beta = torch.linspace(0, 1, 4, device="cuda")
        drawn = nlhf_kernels.mixture_sample(
            policy, other, beta, seed=1, row_ids=torch.arange(4, device="cuda"), step=2, top_p=0.8, backend=backend
        )
        nlhf_kernels.mirror_descent(*game, tau=0.1, step_sizes=step_sizes, backend=backend)
    assert drawn.ok.all()


@on_gpu
def test_many_rows_pass_the_grid_limit(backend) -> None:
    rows = 70_000
    logits = torch.zeros(1, 33, device="cuda").expand(rows, -1)
    uniforms = torch.linspace(0, 1, rows, dtype=torch.float64, device="cuda")
    result = nlhf_kernels.mixture_sample(logits, uniforms=uniforms, backend=backend)
    assert torch.equal(result.tokens.sort().values, result.tokens)
    assert result.tokens.unique().numel() == 33


def test_attention_has_finite_gradients_where_texts_are_padded_on_the_left() -> None:
    """Gradients are finite for 192 (64 mod 128) tokens, where some cuDNN versions give NaN, also with recomputation."""
    model = tiny_model("llama", hidden=128).to("cuda", torch.bfloat16)
    ids, mask = torch.full((2, 192), 5, device="cuda"), torch.ones(2, 192, dtype=torch.int64, device="cuda")
    mask[1, :48] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.config.max_position_embeddings = 192
    for recomputed in (False, True):
        if recomputed:
            model.train().gradient_checkpointing_enable()
        with finite_attention_gradients():
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            logits[mask > 0].float().log_softmax(-1)[:, 7].sum().backward()
        assert all(value.grad.isfinite().all() for value in model.parameters())
        model.zero_grad()
