"""Recorded passes over prompts, with a recorder that needs no GPU: shapes, replays, and prompts read unrecorded."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

from nlhf_kernels.engine import Hooks, Player, RolloutEngine, attention, engine, graphs, nash_md
from nlhf_kernels.engine.caches import LayerShape
from nlhf_kernels.engine.graphs import EagerRecorder, Graphs
from nlhf_kernels.engine.loop import Rollout
from nlhf_kernels.engine.recorded_prompts import PromptInputs, host_takes_longer, widened
from nlhf_kernels.engine.request import Prompts
from tests.support import recorder as support
from tests.support.engine import TINY, settings, tiny, tiny_pair, worst_error
from tests.support.tiny_models import BETA, one_thread, padded, prompts
from tests.test_engine_shared import adapted

STEPS = 4
RECORDED = [name for name in TINY if name not in ("mixtral", "falcon", "bloom", "gemma2")]  # gemma2's attention: eager


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def recorded(policy, reference=None, graphs="auto", bucket=32, prompt_bucket=8, **options):
    return support.recorded(policy, reference, bucket, graphs, prompt_bucket=prompt_bucket, **options)


def ask(player: RolloutEngine, lengths=(1, 6, 9), players=None, new: int = STEPS, **options):
    rows = prompts(lengths)
    return player.rollout(**padded(rows), players=players or nash_md(BETA), settings=settings(new, **options)), rows


@pytest.mark.parametrize("architecture", RECORDED)
def test_passes_give_the_logits_of_full_forward_passes(architecture) -> None:
    """The first pass of a shape is not recorded, the second is, later ones replay it over other prompts."""
    policy, reference = tiny_pair(architecture)
    player, recorder = recorded(policy, reference)
    plain = RolloutEngine(policy, reference)
    for lengths, passes in (((1, 6, 9), 0), ((1, 6, 9), 1), ((16, 2, 11), 1), ((9, 9, 10), 1)):
        result, rows = ask(player, lengths)
        assert result.notes == () and len(player.graphs.recorded_passes) == passes
        for responses, expected, beta in zip(result, ask(plain, lengths)[0], (0.0, BETA), strict=True):
            assert torch.equal(responses.tokens, expected.tokens)
            assert worst_error(responses, policy, reference, rows, beta) < 5e-5
    assert recorder.replays == 4 * (STEPS - 1) + 3, "the recorded pass is replayed at once"


def test_a_pass_is_recorded_for_each_shape_that_it_assumes() -> None:
    policy, reference = tiny_pair("llama")
    player, _ = recorded(policy, reference)
    shapes = {(3, 9, 17): 1, (9, 2): 2, (5, 13): 2, (3, 8): 3, (8, 8): 4, (16, 16): 5, (1, 2, 3): 6, (8,): 7}
    for lengths, passes in shapes.items():
        for _ in range(2):
            result, rows = ask(player, lengths)
            assert worst_error(result[1], policy, reference, rows, BETA) < 5e-5
        assert len(player.graphs.recorded_passes) == passes
    for _ in range(2):
        ask(player, (8, 8), min_new_tokens=1, end_ids=5)  # the first token is sampled within the pass
    assert len(player.graphs.recorded_passes) == 8


def test_passes_read_tensors_of_one_address(monkeypatch) -> None:
    """A graph reads addresses: the prompts, each row's prompt, and no tensor that a rollout allocates."""
    player, _ = recorded(*tiny_pair("llama"))
    seen = []
    read = Rollout._prefill_on_device

    def watched(rollout, inputs, fan_out):
        seen.append([inputs.ids.data_ptr(), inputs.mask.data_ptr(), fan_out.data_ptr()])
        assert inputs.ids.is_contiguous() and inputs.mask.is_contiguous()
        read(rollout, inputs, fan_out)

    monkeypatch.setattr(Rollout, "_prefill_on_device", watched)
    kept = []
    for lengths in ((3, 9), (3, 17), (3, 9)):
        kept.append(ask(player, lengths))
    assert seen[0] == seen[1] == seen[2]


def test_tokens_do_not_depend_on_what_has_been_recorded() -> None:
    """An unrecorded pass of a shape that may be recorded reads the same padding: the same numbers, to the last bit."""
    policy, reference = tiny_pair("llama")
    player, _ = recorded(policy, reference)
    first, again = ask(player)[0], ask(player)[0]
    assert len(player.graphs.recorded_passes) == 1
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.policy_logprobs, two.policy_logprobs)
    assert player._space.state.filled == 16 + STEPS - 1, "nine tokens take two buckets of eight"


@pytest.mark.parametrize("samples", [1, 3])
def test_an_adapter_and_its_base(samples) -> None:
    policy, base = adapted(tiny("llama")), tiny("llama")
    player, _ = recorded(policy)
    merged = copy.deepcopy(policy).merge_and_unload()
    assert player.models.one_pass
    for lengths in ((1, 6, 9), (1, 6, 9), (4, 16, 2)):
        result, rows = ask(player, lengths, nash_md(BETA, samples=samples))
        for responses, beta in zip(result, (0.0, BETA), strict=True):
            assert worst_error(responses, merged, base, rows, beta, samples=samples) < 5e-5
    assert len(player.graphs.recorded_passes) == 1


@pytest.mark.parametrize("fused", [False, "products"])
def test_two_models_in_one_pass(fused) -> None:
    policy, reference = tiny("qwen2", seed=1), tiny("qwen2", seed=2)
    player, recorder = recorded(policy, reference, one_pass=True, fused=fused)
    for lengths in ((1, 6, 9), (1, 6, 9), (4, 16, 2)):
        result, rows = ask(player, lengths)
        assert player.models.active_pair is not None and result.notes == ()
        for responses, beta in zip(result, (0.0, BETA), strict=True):
            assert worst_error(responses, policy, reference, rows, beta) < 5e-5
    assert len(player.graphs.recorded_passes) == 1 and recorder.replays == 3 * (STEPS - 1) + 2


def test_an_opponent_and_several_samples() -> None:
    policy, reference = tiny_pair("gpt2")
    opponent = {name: value.detach() * 1.1 for name, value in policy.named_parameters()}
    player, _ = recorded(policy, reference, opponent=opponent)
    plain = RolloutEngine(policy, reference, opponent=opponent)
    players = (Player(stream=0, samples=3), Player(BETA, stream=1, samples=2, parameters="opponent"))
    for lengths in ((1, 6, 9), (1, 6, 9), (4, 16, 2)):
        for one, two in zip(ask(player, lengths, players)[0], ask(plain, lengths, players)[0], strict=True):
            assert torch.equal(one.tokens, two.tokens)
            torch.testing.assert_close(one.mixture_logprobs, two.mixture_logprobs, rtol=0, atol=1e-4)
    assert len(player.graphs.recorded_passes) == 1


def test_weights_that_changed_are_read_and_weights_that_moved_are_recorded_anew() -> None:
    policy, reference = tiny_pair("llama")
    player, _ = recorded(policy, reference)
    ask(player), ask(player)
    for parameter in policy.parameters():
        parameter.data.mul_(1.05)
    result, rows = ask(player)
    assert worst_error(result[0], policy, reference, rows, 0.0) < 5e-5
    reference.model.norm.weight.data = reference.model.norm.weight.data * 2
    for passes in (1, 2):
        result, rows = ask(player)
        assert len(player.graphs.recorded_passes) == passes
        assert worst_error(result[1], policy, reference, rows, BETA) < 5e-5
    player.release()
    assert player.graphs.recorded_passes == {}
    ask(player)
    assert player.graphs.recorded_passes == {}, "no pass of it has been seen since"


def test_few_passes_are_kept_and_idle_ones_make_room(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "KEPT_PASSES", 2)
    monkeypatch.setattr(graphs, "IDLE_PASSES", 5)
    recorder = mock.Mock(record=lambda read, state: lambda: replays.append(read))
    kept, calls, replays = Graphs(recorder), [], []

    def run(key: str) -> None:
        kept.run_pass(key, lambda: calls.append(key), ())

    for key in "aabbcc":
        run(key)
    assert set(kept.recorded_passes) == {"a", "b"} and calls == ["a", "b", "c", "c"] and len(replays) == 2
    run("b"), run("c")
    assert set(kept.recorded_passes) == {"b", "c"}, "a came last six passes ago"
    run("a")
    assert set(kept.recorded_passes) == {"b", "c"}


def test_an_error_of_recording_names_the_remedy() -> None:
    def record(read, state):
        raise error

    kept = Graphs(mock.Mock(record=record))
    kept.run_pass("key", lambda: None, ())
    error: Exception = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match=r"stream is capturing\); RolloutEngine\(graphs='steps'\) reads them"):
        kept.run_pass("key", lambda: None, ())
    error = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError, match="^no memory$"):
        kept.run_pass("key", lambda: None, ())


def test_hooks_read_the_prompts_as_they_are() -> None:
    policy, reference = tiny_pair("llama")
    player, recorder = recorded(policy, reference)
    widths = []
    hooks = Hooks(processors=[lambda text, scores: widths.append(text.shape[1]) or scores])
    rows = prompts()
    for _ in range(2):
        player.rollout(**padded(rows), players=(Player(BETA, 1),), settings=settings(2), hooks=hooks)
    assert widths == [9, 10] * 2 and recorder.records == 0


def test_what_is_recorded_is_chosen(monkeypatch) -> None:
    policy, reference = tiny_pair("llama")
    for choice, longer, passes, width in (
        ("auto", True, 1, 16), ("auto", False, 0, 9), (True, False, 1, 16), ("steps", True, 0, 9)
    ):  # fmt: skip
        monkeypatch.setattr(engine, "host_takes_longer", lambda *_, longer=longer: longer)
        player, _ = recorded(policy, reference, graphs=choice)
        result = [ask(player)[0] for _ in range(2)][1]
        assert len(player.graphs.recorded_passes) == passes and result.notes == ()
        assert player._space.state.filled == width + STEPS - 1
    unrecorded = RolloutEngine(policy, reference, recorder=EagerRecorder(), prompt_bucket=8)
    ask(unrecorded)
    assert unrecorded._space.state.filled == 9 + STEPS - 1, "padding would save nothing"
    for option, message in (
        ({"graphs": "all"}, "graphs: expected auto, steps, True or False; got 'all'"),
        ({"prompt_bucket": 0}, "prompt_bucket: expected an integer in .1, "),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutEngine(policy, reference, **option)


def test_the_host_is_compared_with_the_gpu() -> None:
    """Two models of Qwen2's sizes: 0.5B with 16 prompts of 128 tokens is bound by the host, 7B is not."""
    shape = LayerShape(2, 64, 64, torch.bfloat16, torch.bfloat16)
    info = RolloutEngine(tiny("llama")).models.info["policy"]
    half, seven = (
        [replace(info, layers=(shape,) * layers, weights=weights, dtype=torch.bfloat16)] * 2
        for layers, weights in ((24, 358_000_000), (28, 6_525_000_000))
    )
    assert host_takes_longer(half, half, 16 * 128) and not host_takes_longer(half, half, 64 * 128)
    assert host_takes_longer(seven, seven, 128) and not host_takes_longer(seven, seven, 16 * 128)
    assert host_takes_longer(half, half, 4000) and not host_takes_longer(half, half[:1], 4000), "in one pass"
    in_float32 = [replace(model, dtype=torch.float32) for model in half]
    assert host_takes_longer(in_float32, in_float32, 128) and not host_takes_longer(in_float32, in_float32, 16 * 128)


def test_the_code_of_one_model_runs_in_one_pass() -> None:
    policy, reference = tiny("llama", seed=1), tiny("llama", seed=2)
    roles = ("policy", "opponent", "reference")
    for player, names in (
        (RolloutEngine(policy, reference, opponent=reference), roles),
        (RolloutEngine(policy, reference, opponent=reference, one_pass=True), roles[:2]),
        (RolloutEngine(adapted(policy)), ("policy",)),
    ):
        present = [role for role in roles if role in player.models.info or role == "reference"]
        assert player.models.passes(present) == [player.models.info[name] for name in names]


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2"])
def test_weights_per_token_leave_out_table_and_head(architecture) -> None:
    model = tiny(architecture)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    expected = sum(p.numel() for p in model.parameters()) - table.numel() - (0 if head is table else head.numel())
    assert RolloutEngine(model).models.info["policy"].weights == expected > 0


@pytest.mark.parametrize(
    ("finding", "reason"),
    [
        ({"padding_fault": "reads it"}, "they would be padded to 16 tokens: the policy, LlamaForCausalLM, reads it"),
        ({"counted_slots": 19}, "they would be padded to 16 tokens: the policy, LlamaForCausalLM, counts it as text"),
        ({"max_positions": 15}, "they would be padded to 16 tokens, which is more than the policy's positions"),
    ],
)
def test_models_that_no_padding_may_be_given_to(finding, reason) -> None:
    """Their steps are recorded all the same, and so are prompts that need no padding."""
    policy, reference = tiny_pair("llama")
    player, _ = recorded(policy, reference)
    player.models.info["policy"] = replace(player.models.info["policy"], **finding)
    for _ in range(2):
        result, rows = ask(player, (9, 9))
    assert result.notes[0].startswith(f"prompts are read unrecorded: {reason}")
    assert player.graphs.recorded and not player.graphs.recorded_passes
    assert worst_error(result[1], policy, reference, rows, BETA) < 5e-5
    for _ in range(2):
        result, rows = ask(player, (8, 8))
    assert result.notes == () and len(player.graphs.recorded_passes) == 1


def test_a_model_with_attention_of_its_own_is_read_unrecorded() -> None:
    policy, reference = tiny_pair("bloom")
    player, _ = recorded(policy, reference)
    result = [ask(player)[0] for _ in range(2)][1]
    if player.models.why_not_recorded():
        assert all(note.startswith("eager steps") for note in result.notes)
    else:
        assert result.notes[0] == "prompts are read unrecorded: the policy, BloomForCausalLM, has attention of its own"
    assert not player.graphs.recorded_passes


def test_the_plan_counts_the_padding_and_the_inputs() -> None:
    policy, reference = tiny_pair("llama")
    rollout_settings = settings(50)  # 9 + 50 tokens fit into two buckets of 32 slots, 16 + 50 need three
    for choice, length in (("steps", 64), ("auto", 96)):
        player, _ = recorded(policy, reference, graphs=choice)
        plan = player.memory_plan(3, 9, nash_md(BETA), rollout_settings)
        assert (plan.length, plan.prompt) == (length, 9)
        assert plan.parts.get("prompts", 0) == (16 * 6 * 96 if choice == "auto" else 0)
        ask(player, new=50)
        assert player._space.state.mask.shape[1] == length
    inputs = player._space.inputs
    assert inputs.ids.nbytes + inputs.mask.nbytes == plan.parts["prompts"]


def test_inputs_are_contiguous_at_every_shape() -> None:
    inputs = PromptInputs(24, torch.device("cpu"))
    for count, width in ((2, 5), (3, 8)):
        ids = torch.arange(1, 1 + count * width).view(count, width)
        mask = (ids > 2).long()
        wide = widened(Prompts(ids, mask, padded=False), 8)
        loaded = inputs.load(wide)
        assert torch.equal(loaded.ids[:, -width:], ids) and torch.equal(loaded.mask[:, -width:], mask)
        assert loaded.padded is (width < 8) and not loaded.mask[:, :-width].any()
        assert loaded.ids.is_contiguous() and loaded.ids.data_ptr() == inputs.ids.data_ptr()


def test_prompts_without_padding_have_no_mask_in_a_capture(monkeypatch) -> None:
    """transformers 5.17 makes a mask of all that it does not see on the host while a graph is captured."""

    def sdpa_mask(**options):
        raise AssertionError("a mask")

    monkeypatch.setattr(attention, "sdpa_mask", sdpa_mask)
    shape = {"batch_size": 2, "q_length": 8, "kv_length": 8}
    assert attention.nlhf_decode_mask(**shape) is None
    assert attention.nlhf_decode_mask(**shape, local_size=9) is None
    for options in (
        {"local_size": 8}, {"attention_mask": torch.ones(2, 8)}, {"kv_length": 9}, {"allow_is_causal_skip": False}
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="a mask"):
            attention.nlhf_decode_mask(**{**shape, **options})
