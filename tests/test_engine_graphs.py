"""Recorded steps, with a recorder that needs no GPU: reuse of graphs, rows, buckets, and steps that stay eager."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers

from nlhf_kernels import use_backend
from nlhf_kernels.engine import Hooks, Player, RolloutEngine, nash_md
from nlhf_kernels.engine.batch import PlayerRows, remaining_rows
from nlhf_kernels.engine.graphs import CudaRecorder, EagerRecorder, Graphs
from nlhf_kernels.engine.outputs import OpenRowsReader
from tests.support.engine import TINY, can_be_recorded, settings, tiny, tiny_pair, worst_error
from tests.support.recorder import recorded
from tests.support.tiny_models import BETA, one_thread, padded, prompts


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.mark.parametrize("architecture", [name for name in TINY if name not in ("mixtral", "falcon")])
def test_recorded_steps_give_the_logits_of_full_forward_passes(architecture) -> None:
    """Replays with masked slots, growing buckets and a device cursor are right for every kind of position and mask."""
    policy, reference = tiny_pair(architecture)
    engine, recorder = recorded(policy, reference)
    rows = prompts()
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(12))
    if can_be_recorded(policy):
        assert result.notes == () and recorder.replays == 11
        assert recorder.records == 2, "slots 10 to 16, then 17 to 20"
    else:
        assert recorder.records == 0 and "masks contain a number" in result.notes[0]
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, rows, beta) < 5e-5


def test_the_next_rollout_replays_what_this_one_recorded() -> None:
    policy, reference = tiny_pair("llama")
    engine, recorder = recorded(policy, reference)
    first = engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(12))
    records = recorder.records
    engine._space.runners[0].cache.static_layers[0].values.fill_(torch.nan)  # as a failed rollout may leave it
    again = engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(12))
    assert recorder.records == records
    assert torch.equal(first[1].tokens, again[1].tokens) and again[1].ok.all()
    engine.release()
    engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(12))
    assert recorder.records == 2 * records


@pytest.mark.parametrize("attention", [None, "sdpa"])
def test_slots_that_no_step_reads_are_not_cleared(attention) -> None:
    """`decode_attention` reads a row's range only; sdpa reads masked slots, too, which must not hold a NaN."""
    policy, reference = tiny_pair("llama")
    engine, _ = recorded(policy, reference, attention=attention)
    ask = lambda: engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(3))  # noqa: E731
    first = ask()
    stored = engine._space.runners[0].cache.static_layers[0].values
    stored.fill_(torch.nan)
    again = ask()
    assert torch.equal(first[0].tokens, again[0].tokens) and again[0].ok.all()
    unread = stored[:, :, engine._space.state.filled + 1 :]
    assert unread.numel() and (unread.isnan() if attention is None else unread == 0).all()


def test_steps_recorded_without_padding_serve_padded_prompts() -> None:
    policy, reference = tiny_pair("llama")
    engine, recorder = recorded(policy, reference)
    whole, ragged = prompts((9, 9, 9)), prompts((9, 2, 5))
    engine.rollout(**padded(whole), players=nash_md(BETA), settings=settings(6))
    records = recorder.records
    result = engine.rollout(**padded(ragged), players=nash_md(BETA), settings=settings(6))
    assert recorder.records == records
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, ragged, beta) < 5e-5


def test_a_backend_asked_for_is_recorded_anew() -> None:
    engine, recorder = recorded(*tiny_pair("llama"))
    for backend, records in (("cpu", 1), ("torch", 2), ("cpu", 2)):
        with use_backend(backend):
            engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(3))
        assert recorder.records == records


def test_weights_that_moved_are_recorded_anew() -> None:
    """Weights at a new address are recorded again: a graph reads the old address."""
    policy, reference = tiny_pair("gpt2")
    engine, recorder = recorded(policy, reference)
    for records in (1, 2):
        engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(3))
        assert recorder.records == records
        reference.transformer.ln_f.weight.data = reference.transformer.ln_f.weight.data.clone()


def test_recorded_and_eager_rollouts_agree_while_rows_leave() -> None:
    policy, reference = tiny_pair("gpt2")
    rows = prompts((1, 6, 9, 3, 5))
    free, _ = RolloutEngine(policy, reference).rollout(**padded(rows), players=nash_md(BETA), settings=settings(40))
    rollout_settings = settings(40, min_new_tokens=3, end_ids=[int(free.tokens[0, 4]), int(free.tokens[1, 9])])
    eager = RolloutEngine(policy, reference).rollout(**padded(rows), players=nash_md(BETA), settings=rollout_settings)
    engine, _ = recorded(policy, reference)
    replayed = engine.rollout(**padded(rows), players=nash_md(BETA), settings=rollout_settings)
    assert replayed.row_steps < 10 * replayed.steps
    for one, two in zip(eager, replayed, strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.lengths, two.lengths)
        torch.testing.assert_close(one.mixture_logprobs, two.mixture_logprobs, rtol=0, atol=1e-4)


def test_compiled_models_say_the_same(monkeypatch) -> None:
    """Compiled models give the log-probabilities of full forward passes, without a graph break."""
    policy, reference = tiny_pair("llama")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = RolloutEngine(policy, reference, compile=True, bucket=16)
    result = engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(12))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, prompts(), beta) < 5e-5


def test_steps_that_nobody_recorded_are_those_of_the_rollout_that_takes_them() -> None:
    """An unrecorded step uses the current rollout's state, not that of the first, which is past its minimal length."""
    engine = RolloutEngine(*tiny_pair("gpt2"), recorder=EagerRecorder(), bucket=32)
    rollout_settings = settings(12, min_new_tokens=6, end_ids=range(3, 60))
    first, again = (
        engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=rollout_settings) for _ in range(2)
    )
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.lengths, two.lengths) and two.lengths.min() >= 6


class StandInGraph:
    """A torch.cuda.CUDAGraph without a GPU."""

    def pool(self) -> tuple[int, int]:
        return 0, id(self)

    def replay(self) -> None:
        pass


@pytest.fixture
def captures(monkeypatch) -> list[dict]:
    """Replace PyTorch's captures on the CPU and return the options of each."""
    options, stream = [], SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": nullcontext,
        "CUDAGraph": StandInGraph,
        "graph": lambda graph, **given: options.append(given) or nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return options


def test_other_threads_may_use_the_device_during_a_capture(captures) -> None:
    """A loader's thread that pins memory, say: in the mode "global" its call fails and invalidates the capture."""
    CudaRecorder(torch.device("cuda", 0)).record(lambda: None, [])
    assert captures[0]["capture_error_mode"] == "thread_local"


def test_graphs_share_a_pool_that_ends_with_the_last_of_them(captures) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    first = recorder.record(lambda: None, [])
    second = recorder.record(lambda: None, [])
    assert captures[0]["pool"] is None and captures[1]["pool"] == first.__self__.pool()
    del first
    recorder.record(lambda: None, [])
    assert captures[2]["pool"] == second.__self__.pool()
    del second
    gc.collect()
    recorder.record(lambda: None, [])
    assert captures[3]["pool"] is None


def test_buckets() -> None:
    _, recorder = recorded(*tiny_pair("gpt2"))
    graphs = Graphs(recorder, bucket=256)
    assert [graphs.bucket(length) for length in (1, 256, 257)] == [256, 256, 512]


@pytest.mark.parametrize(
    ("is_open", "powers_of_two", "remaining"),
    [
        ("1111 1111", False, None),  # no row has ended
        ("1110 1111", False, [[0, 1, 2], [4, 5, 6, 7]]),
        ("1110 1111", True, None),  # three open rows still need a batch of four
        ("0100 1011", True, [[1], [4, 5, 6, 7]]),
        ("0000 0011", False, [[], [6, 7]]),
        ("0100 0111", True, [[1], [4, 5, 6, 7]]),
        ("0000 0000", False, None),
    ],
)
def test_remaining_rows(is_open, powers_of_two, remaining) -> None:
    players_rows = (PlayerRows(0, "policy", 0, 0, 4), PlayerRows(1, "policy", 1, 4, 8))
    assert remaining_rows(players_rows, [mark == "1" for mark in is_open.replace(" ", "")], powers_of_two) == remaining


def test_the_host_waits_for_the_check_before(monkeypatch) -> None:
    """A check reads the flags of the check before, once they have arrived: the host is at most that far ahead."""
    reader, waits = OpenRowsReader(), []

    def copy(is_open):
        copies.append(len(copies))
        return is_open, SimpleNamespace(synchronize=partial(waits.append, copies[-1]))

    copies: list[int] = []
    monkeypatch.setattr(reader, "_copy", copy)
    rows = [torch.tensor(flags) for flags in ([True, True], [True, False], [False, False])]
    assert reader.exchange(rows[0]) is None and not waits
    assert reader.exchange(rows[1]) == [True, True] and waits == [0]
    assert reader.exchange(rows[2], now=True) == [False, False] and waits == [0, 2]
    assert reader.exchange(rows[2]) == [False, False]
    assert OpenRowsReader().exchange(rows[1]) == [True, False], "a CPU's flags are there at once"


@pytest.mark.parametrize(
    ("architecture", "options", "hooks", "reason"),
    [
        ("mixtral", {"experts": "eager"}, None, "the policy has experts"),
        ("llama", {"rotation": "dynamic"}, None, "the policy looks at positions on the host"),
        ("falcon", {}, None, "the policy, FalconForCausalLM, indexes its keys and values"),
        ("llama", {"use_cache": False}, None, "the policy reads the whole text every step"),
        ("llama", {}, Hooks(criteria=[lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]), "hooks look at"),
    ],
)
def test_what_cannot_be_recorded_runs_eagerly_and_says_why(architecture, options, hooks, reason) -> None:
    policy, reference = tiny_pair(architecture)
    if "experts" in options:
        for model in (policy, reference):
            model.set_experts_implementation(options["experts"])
    if "rotation" in options:
        policy.config.rope_parameters["rope_type"] = options["rotation"]
    engine, recorder = recorded(policy, reference, **{k: v for k, v in options.items() if k == "use_cache"})
    rows = prompts()
    result = engine.rollout(**padded(rows), players=(Player(BETA, 1),), settings=settings(5), hooks=hooks)
    assert recorder.records == 0
    assert any(note.startswith("eager steps: ") and reason in note for note in result.notes)
    assert worst_error(result[0], policy, reference, rows, BETA) < 5e-5


def test_the_attention_is_set_in_one_place() -> None:
    policy, reference = tiny_pair("llama")
    rows = prompts()
    engine = RolloutEngine(policy, reference, attention="eager")
    assert policy.config._attn_implementation == reference.config._attn_implementation == "eager"
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(8))
    assert worst_error(result[1], policy, reference, rows, BETA) < 5e-5


def test_a_stateful_model_is_refused_with_graphs_too() -> None:
    with pytest.raises(ValueError, match="keys and values"):
        recorded(tiny("mamba"), None)
    assert transformers.MambaForCausalLM._is_stateful


def test_a_state_of_the_models_has_one_number_until_graphs_are_cleared() -> None:
    """Keys hold a number in place of every parameter's address."""
    graphs = Graphs(EagerRecorder())
    states = [(1, ("a", 2)), (1, ("a", 3))]
    assert [graphs.number_of(state) for state in (*states, *states)] == [0, 1, 0, 1]
    graphs.recorded["key"] = lambda: None
    graphs.clear()
    assert graphs.recorded == {} and graphs.number_of(states[1]) == 0
