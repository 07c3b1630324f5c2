"""Launch plans: selection, sweeps with a simulated clock, the plan file, and `nlhf-kernels tune`."""

from __future__ import annotations

import json
import re
import warnings
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nlhf_kernels
from nlhf_kernels.cli import tune
from nlhf_kernels.cli.main import main
from nlhf_kernels.core import settings, tuning
from nlhf_kernels.core.registry import ops
from nlhf_kernels.core.tuning import Launch, Tunable, Workload

CARD = "A card"
GPU = torch.device("cuda", 0)


class Plan(NamedTuple):
    tile: int
    warps: int


@pytest.fixture
def tunable(monkeypatch, tmp_path):
    """Return a kernel whose plans are stored in a temporary file."""
    monkeypatch.setattr(Tunable, "instances", dict(Tunable.instances))
    monkeypatch.setattr(settings, "tuning", str(tmp_path / "cache" / "plans.json"))
    monkeypatch.setattr(tuning, "card_name", lambda device: CARD)
    tuning.forget_plans()
    yield Tunable("logprobs", "triton", Plan, lambda default: [Plan(tile, 4) for tile in (16, 32, 64)])
    tuning.forget_plans()


WORKLOAD = tuning.make_workload(0, (50_257,), (torch.empty(0, dtype=torch.bfloat16, device="cpu"),), "forward")
DEFAULT = Plan(8, 4)


def swept(tunable, times, result=lambda plan: torch.zeros(2, dtype=torch.float32)):
    """Run a sweep in which a plan takes the time in `times` (by tile) and returns `result`."""

    def call():
        return result(tunable.plan(GPU, WORKLOAD, DEFAULT))

    def median_us(call, seconds):
        call()
        return times[tunable.plan(GPU, WORKLOAD, DEFAULT).tile]

    return tuning.sweep([call], Launch(tunable, WORKLOAD, DEFAULT), 60.0, median_us)


def test_workloads_round_rows_up_and_name_dtypes() -> None:
    one, two = torch.empty(1, dtype=torch.bfloat16, device="cpu"), torch.empty(1, dtype=torch.float32, device="cpu")
    assert tuning.make_workload(65, (7,), (one, one, two)) == Workload(128, (7,), "bfloat16 float32")
    assert [tuning.make_workload(rows, (), ()).rows for rows in (0, 1, 2, 3, 64)] == [0, 1, 2, 4, 64]
    assert str(WORKLOAD) == "any x 50257 bfloat16 forward"


def test_the_fastest_plan_is_kept_and_taken(tunable) -> None:
    assert tunable.plan(GPU, WORKLOAD, DEFAULT) == DEFAULT
    result = swept(tunable, {8: 10.0, 16: 12.0, 32: 5.0, 64: 7.0})
    assert result.best == Plan(32, 4)
    path = tuning.keep(CARD, [result])
    assert tunable.plan(GPU, WORKLOAD, DEFAULT) == Plan(32, 4)
    assert tunable.plan(torch.device("cpu"), WORKLOAD, DEFAULT) == DEFAULT
    assert tunable.plan(GPU, WORKLOAD._replace(sizes=(32_000,)), DEFAULT) == DEFAULT
    (entry,) = json.loads(path.read_text())["cards"][CARD]
    assert (entry["median_us"], entry["default_us"], entry["plan"]) == (5.0, 10.0, {"tile": 32, "warps": 4})
    with tuning.use_plan(tunable, Plan(99, 1)):
        assert tunable.plan(GPU, WORKLOAD, DEFAULT) == Plan(99, 1)


def test_noise_is_no_gain(tunable) -> None:
    assert swept(tunable, {8: 10.0, 16: 9.9, 32: 10.1, 64: 30.0}).best == DEFAULT


def test_a_plan_that_fails_or_changes_the_result_is_not_taken(tunable) -> None:
    def result(plan):
        if plan.tile == 16:
            raise RuntimeError("out of resource: shared memory\nand much more")
        return torch.full((2,), 1.0 if plan.tile != 32 else 1.001, dtype=torch.float32)

    measured = swept(tunable, {8: 10.0, 16: 1.0, 32: 2.0, 64: 3.0}, result)
    assert measured.best == Plan(64, 4)
    assert measured.medians[Plan(16, 4)] == "RuntimeError: out of resource: shared memory"
    assert measured.medians[Plan(32, 4)] == "another result"


def test_the_default_plan_has_a_time_even_if_its_results_vary(tunable) -> None:
    results = iter(range(100))
    measured = swept(tunable, {8: 10.0}, lambda plan: torch.full((2,), next(results), dtype=torch.int64))
    assert measured.best == DEFAULT and measured.default_us == 10.0


def test_what_the_time_does_not_allow_is_not_measured(tunable) -> None:
    launch = Launch(tunable, WORKLOAD, DEFAULT)
    result = tuning.sweep([lambda: None], launch, 0.0, lambda call, seconds: 1.0)
    assert set(result.medians.values()) == {1.0, "no time left"}
    assert result.best == DEFAULT


def test_no_graph_of_gradients_outlives_a_call(tunable, monkeypatch) -> None:
    """It would keep its leaf's node on the stream of the first call, where no recorded call may wait."""
    leaf, compared = torch.ones(3, dtype=torch.float32, requires_grad=True), []
    monkeypatch.setattr(tuning, "_agree", lambda result, truth: compared.append(truth) or True)
    swept(tunable, dict.fromkeys((8, 16, 32, 64), 1.0), lambda plan: 2 * leaf)
    assert compared and not any(tensor.requires_grad for truth in compared for tensor in truth)


def test_a_rival_that_is_faster_keeps_its_place(tunable) -> None:
    """A kernel that competes with another backend is remembered only where its best plan is faster than that."""
    times = {8: 10.0, 16: 12.0, 32: 5.0, 64: 7.0}

    def sweep_against(rival_us):
        def rival():
            return "rival"

        def median_us(call, seconds):
            return rival_us if call is rival else times[tunable.plan(GPU, WORKLOAD, DEFAULT).tile]

        launch = Launch(tunable, WORKLOAD, DEFAULT)
        return tuning.sweep([lambda: None], launch, 60.0, median_us, rivals=[rival])

    assert not tuning.is_tuned("logprobs", "triton", GPU, WORKLOAD)
    tuning.keep(CARD, [sweep_against(6.0)])
    assert tuning.is_tuned("logprobs", "triton", GPU, WORKLOAD)
    assert tunable.plan(GPU, WORKLOAD, DEFAULT) == Plan(32, 4)
    for rival_us in (5.05, 4.0):
        result = sweep_against(rival_us)
        assert result.rival_us == rival_us and not result.beats_rival
        tuning.keep(CARD, [result])
        assert not tuning.is_tuned("logprobs", "triton", GPU, WORKLOAD), "the entry of an earlier measurement goes"


def test_plans_of_other_gpus_and_ops_stay(tunable, tmp_path) -> None:
    tuning.keep("Another card", [swept(tunable, {8: 10.0, 16: 1.0, 32: 5.0, 64: 7.0})])
    path = tuning.keep(CARD, [swept(tunable, {8: 10.0, 16: 12.0, 32: 5.0, 64: 7.0})])
    tuning.keep(CARD, [swept(tunable, {8: 10.0, 16: 12.0, 32: 5.0, 64: 2.0})])
    cards = json.loads(path.read_text())["cards"]
    assert {card: [entry["plan"]["tile"] for entry in entries] for card, entries in cards.items()} == {
        "Another card": [16],
        CARD: [64],
    }


def test_plans_of_other_sources_are_not_used(tunable, monkeypatch) -> None:
    tuning.keep(CARD, [swept(tunable, {8: 10.0, 16: 12.0, 32: 5.0, 64: 7.0})])
    monkeypatch.setattr(tuning, "sources_digest", lambda op, backend: "changed")
    tuning.forget_plans()
    assert tunable.plan(GPU, WORKLOAD, DEFAULT) == DEFAULT


@pytest.mark.parametrize(
    "content",
    ["", "[]", "not json", '{"schema": 2, "cards": {}}', '{"schema": 1, "cards": {"A card": [{"op": "logprobs"}]}}',
     '{"schema": 1, "cards": {"A card": 3}}', "PLAN 0", "PLAN -1", 'PLAN "8"', "PLAN true"],
)  # fmt: skip
def test_a_broken_file_is_ignored_with_one_warning(tunable, content) -> None:
    path = tuning.keep(CARD, [swept(tunable, {8: 10.0, 16: 12.0, 32: 5.0, 64: 7.0})])
    if content.startswith("PLAN"):
        content = path.read_text().replace('"tile": 32', f'"tile": {content.removeprefix("PLAN ")}')
    path.write_text(content)
    tuning.forget_plans()
    with pytest.warns(UserWarning, match="expected launch plans that `nlhf-kernels tune` wrote"):
        assert tunable.plan(GPU, WORKLOAD, DEFAULT) == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tunable.plan(GPU, WORKLOAD, DEFAULT) == DEFAULT


def test_a_file_of_something_else_is_not_replaced(tunable, tmp_path) -> None:
    path = tmp_path / "cache" / "plans.json"
    path.parent.mkdir()
    path.write_text("my notes")
    with pytest.raises(ValueError, match="expected a file that `nlhf-kernels tune` wrote, or none"):
        tuning.keep(CARD, [swept(tunable, {8: 10.0, 16: 12.0, 32: 5.0, 64: 7.0})])
    assert path.read_text() == "my notes"


def test_off_means_off(tunable, monkeypatch) -> None:
    tuning.keep(CARD, [swept(tunable, {8: 10.0, 16: 12.0, 32: 5.0, 64: 7.0})])
    monkeypatch.setattr(settings, "tuning", "off")
    tuning.forget_plans()
    assert tunable.plan(GPU, WORKLOAD, DEFAULT) == DEFAULT
    assert tuning.keep(CARD, []) is None


def test_every_plan_of_the_rooms_gives_the_same_result() -> None:
    """In Triton's interpreter, every plan that `tune` may choose is right at sizes not divisible by any tile."""
    torch.manual_seed(0)
    policy, other = (torch.randn(3, 700, dtype=torch.float32, device="cpu") for _ in range(2))
    draws = {"seed": 1, "row_ids": torch.arange(3, dtype=torch.int64, device="cpu"), "step": 0}
    query, keys = (
        torch.randn(2, 4, 16, device="cpu", dtype=torch.float32),
        torch.randn(2, 2, 300, 16, dtype=torch.float32, device="cpu"),
    )
    ends = torch.tensor([300, 170], dtype=torch.int64, device="cpu")
    calls = {
        "mixture_sample": lambda: nlhf_kernels.mixture_sample(policy, other, 0.3, **draws, backend="triton"),
        "logprobs": lambda: nlhf_kernels.logprobs(policy, torch.tensor([0, 699, 5]), other, kl=True, backend="triton"),
        "decode_attention": lambda: nlhf_kernels.decode_attention(query, keys, keys, ends=ends, backend="triton"),
        "decode_linear": lambda: nlhf_kernels.decode_linear(policy, other.repeat(7, 1), backend="triton"),
        "decode_linear of two": lambda: nlhf_kernels.decode_linear(
            policy, other.repeat(7, 1), None, policy.repeat(7, 1), None, 2, backend="triton"
        ),
    }
    for op, call in calls.items():
        with tuning.record_launches() as launches:
            call()
        launch = launches[0]
        assert (launch.tunable.op, launch.tunable.backend) == (op.partition(" ")[0], "triton")
        plans = list(launch.tunable.candidates(launch.tunable.make(launch.default)))
        assert len(set(plans)) >= 8
        few = dict.fromkeys([plans[0], plans[len(plans) // 2], plans[-1]])
        truth = tuning.tensors_of(call())
        for plan in few:
            with tuning.use_plan(launch.tunable, plan):
                for ours, expected in zip(tuning.tensors_of(call()), truth, strict=True):
                    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_command_measures_and_shows(capsys) -> None:
    """A dry run of less than a second in the interpreter prints plans in lines of at most 80 columns."""
    sizes = ["--vocabulary", "64", "--rows", "1", "--products", "16x32", "--one-pass", "--dtype", "float32"]
    assert main(["tune", "--dry-run", *sizes, "--minutes", "0.01"]) == 0
    output = capsys.readouterr().out
    assert "decode_linear triton" in output and "16 x 32 x 16 float32" in output
    assert "weights" in output, "of two models in one launch"
    assert re.search(r"torch: [\d,]+ us", output), "the product that the kernel has to beat"
    assert "mixture_sample triton" in output and "any x 64 float32" in output and "tile=" in output
    assert all(len(line) <= 80 for line in output.splitlines())


def test_what_fails_is_told_and_the_rest_is_measured(capsys, monkeypatch) -> None:
    """A plan's illegal access takes the GPU down: what was measured before it must not be lost."""
    real = nlhf_kernels.decode_linear

    def linear(*arguments, **options):
        if options.get("backend") == "triton":
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        return real(*arguments, **options)

    def sweep(calls, launch, *_):
        if launch.tunable.op == "logprobs":
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        return tuning.Sweep(launch, {launch.default: 5.0})

    monkeypatch.setattr(nlhf_kernels, "decode_linear", linear)
    monkeypatch.setattr(tuning, "sweep", sweep)
    sizes = ["--vocabulary", "64", "--rows", "1", "--products", "16x32", "--dtype", "float32"]
    assert main(["tune", "--dry-run", *sizes]) == 1
    output = capsys.readouterr().out
    assert "mixture_sample triton" in output
    failed = [line for line in output.splitlines() if line.startswith("not measured: ")]
    error = "RuntimeError: CUDA error: an illegal memory access"
    assert failed[0] == f"not measured: decode_linear triton: {error}"
    assert [line.partition(" triton")[0].split()[-1] for line in failed] == ["decode_linear", "logprobs", "logprobs"]


def test_a_tuned_draw_is_a_single_operation() -> None:
    """A number among its arguments would be a launch of its own, as long as the sampler's."""
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made.append(function.overloadpacket.__name__)
            return function(*arguments, **(options or {}))

    operations = tune.operations(tune.Sizes(64), [2], [], torch.float32, torch.device("cpu"))
    for _, arguments, options, _ in [each for each in operations if each.op == "mixture_sample"]:
        with Watch():
            nlhf_kernels.mixture_sample(*arguments, **options, backend="torch")
    assert made.count("mixture_sample") == 2 and not {"fill_", "full", "empty"} & {*made}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a GPU, whose kernels alone have launch plans"),
        (["--dry-run", "--rows", "0"], "--rows: expected at least 1; got 0"),
        (["--dry-run", "--vocabulary", "0"], "--vocabulary: expected at least 1; got 0"),
        (["--dry-run", "--minutes", "nan"], "--minutes: expected a number above 0; got nan"),
        (["--dry-run", "--model", "no/such/folder"], "there is no such folder"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be tuned")
def test_bad_input_is_refused(arguments, message, capsys) -> None:
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_games_are_two_numbers(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--games", "8"])
    assert "--games: expected two numbers above 0, such as 8x2048; got '8'" in capsys.readouterr().err


def test_every_tunable_kernel_is_launched_by_some_operation() -> None:
    """Launches are recorded for backends that run here; the others are checked by name."""
    for op, _ in Tunable.instances:
        assert op in {entry.name for entry in ops()}
    sizes = tune.Sizes(64, heads=2, kv_heads=1, head_dim=16, products=((16, 32),))
    operations = list(tune.operations(sizes, [2], [(2, 3)], torch.float32, torch.device("cpu")))
    assert {each.op for each in operations} >= {op for op, _ in Tunable.instances}
    launches = tune.find_launches(operations, failures := [])
    assert not failures
    launched = {launch.tunable.op for launch in launches}
    assert launched >= {"mixture_sample", "decode_attention", "decode_linear", "logprobs"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tuning_on_a_gpu(tmp_path, monkeypatch, capsys) -> None:
    """Plans are found, stored and used by the next call, whose tokens do not change."""
    monkeypatch.setattr(settings, "tuning", str(tmp_path / "plans.json"))
    tuning.forget_plans()
    logits = torch.randn(8, 32_000, dtype=torch.bfloat16, device="cuda")
    draws = {"seed": 1, "row_ids": torch.arange(8, dtype=torch.int64, device="cuda"), "step": 0, "backend": "triton"}
    before = nlhf_kernels.mixture_sample(logits, **draws).tokens
    assert main(["tune", "--vocabulary", "32000", "--rows", "8", "--minutes", "0.2"]) == 0
    assert (tmp_path / "plans.json").exists()
    assert torch.equal(nlhf_kernels.mixture_sample(logits, **draws).tokens, before)
    assert main(["info"]) == 0
    tuning.forget_plans()
