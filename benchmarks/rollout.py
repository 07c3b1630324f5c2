"""Compare rollouts: the engine, a hand-written loop, `generate()`, and TRL's loop.

The harness of `benchmarks.run` is made for ops, with one call and one truth. A rollout is a loop over models, and its
rivals use different random numbers, so this runner checks log-probabilities against a full forward pass; it shares the
harness's timing, results and tables. A time covers all steps, prompts included; no row ends early. The engine's times
for prompts with the first token, and for each later token, are separate rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks.harness.case import Shape
from benchmarks.harness.gate import short_reason
from benchmarks.harness.machine import without_paths
from benchmarks.harness.results import Accuracy, ResultRow, RowKey, Speedup, finite_or_none
from benchmarks.harness.rounds import build_parser, check_rivals, run_rounds
from benchmarks.harness.runner import RunContext
from benchmarks.harness.timing import Action, Timing, TimingPlan, time_calls
from benchmarks.targets import headline_shapes
from nlhf_kernels.core.upstream import cache_argument

BETA = 0.3
SDPA, COMPILED = "engine, sdpa", "engine, compiled"  # without decode_attention; torch.compile for the models' steps
#: Settings of `fused`: nothing; query/key/value and gate/up as one product; norms and similar layers as Triton kernels.
UNFUSED, PRODUCTS, LAYERS = "engine, unfused", "engine, products", "engine, layers"
COMPILED_UNFUSED = "engine, compiled, unfused"
LINEAR, COMPILED_LINEAR = "engine, linear", "engine, compiled, linear"  # products of a step by decode_linear
#: Two models of one architecture in one forward pass. A product of both is one of cuBLAS over weights side by side, one
#: of decode_linear, or two of cuBLAS.
ONE_PASS, ONE_PASS_LINEAR, ONE_PASS_LAYERS = "engine, one pass", "engine, one pass, linear", "engine, one pass, layers"
TUNED, COMPILED_TUNED = "engine, tuned", "engine, compiled, tuned"  # with plans that `nlhf-kernels tune` measured
STEPS, COMPILED_STEPS = "engine, steps recorded", "engine, compiled, steps recorded"  # prompts read unrecorded
PROMPTS = "engine, prompts recorded"  # whatever their size
LORA, LORA_RANK = "engine, LoRA", 16  # a policy with adapters and its base, in one pass; "engine" has two models
FIRST, STEP = ": the first token", ": a token step"
#: Nats, of any log-probability. Rounding to bfloat16 gave a mean of 0.04 at 7B; wrong positions give several nats.
ALLOWED_ERROR = {"float32": 1e-3, "bfloat16": 0.8}
_SMALL = {"width": 256, "layers": 4, "vocabulary": 32_000}
_HALF_B = {"width": 896, "layers": 24, "vocabulary": 151_936, "mlp": 4864, "heads": 14, "kv_heads": 2, "tied": 1}
_7B = {"width": 3584, "layers": 28, "vocabulary": 152_064, "mlp": 18_944, "heads": 28, "kv_heads": 4, "tied": 0}
SHAPES = {
    "tiny": [Shape({"prompts": 2, "prompt": 6, "new": 5, "width": 32, "layers": 2, "vocabulary": 101})],
    "standard": [
        *(Shape({"prompts": 4, "prompt": 64, "new": new, **_SMALL}, devices=("cpu",)) for new in (32, 128)),
        *(
            Shape({"prompts": prompts, "prompt": 128, "new": 96, **sizes}, "bfloat16", devices=("cuda",))
            for prompts, sizes in ((16, _HALF_B), (16, _7B), (1, _HALF_B), (64, _HALF_B))
        ),
    ],
}
SHAPES["headline"] = headline_shapes("rollout", SHAPES["standard"])


@dataclass(frozen=True)
class Pair:
    """Two models with random weights, and prompts of one length; a quarter of every second prompt is padding."""

    policy: Any
    reference: Any  # None: the policy's base, its adapters off
    ids: torch.Tensor
    mask: torch.Tensor
    new: int


def make(shape: Shape, device: torch.device) -> Pair:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    sizes = {name: int(value) for name, value in shape.sizes.items()}
    options: dict[str, Any] = {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["width"],
        "intermediate_size": sizes.get("mlp", sizes["width"] * 8 // 3),
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes.get("heads", max(1, sizes["width"] // 64)),
        "max_position_embeddings": sizes["prompt"] + sizes["new"],
    }
    if "kv_heads" in sizes:
        config = Qwen2Config(**options, num_key_value_heads=sizes["kv_heads"], tie_word_embeddings=bool(sizes["tied"]))
    else:
        config = LlamaConfig(**options)
    torch.manual_seed(7)
    with torch.device(device):  # the CPU takes minutes to draw billions of weights
        policy, reference = (AutoModelForCausalLM.from_config(config, dtype=shape.torch_dtype).eval() for _ in range(2))
    ids = torch.randint(3, sizes["vocabulary"], (sizes["prompts"], sizes["prompt"]), device=device)
    mask = torch.ones_like(ids)
    mask[1::2, : sizes["prompt"] // 4] = 0
    return Pair(policy, reference, ids, mask, sizes["new"])


def adapted(pair: Pair) -> Pair:
    """Return the pair of a policy with random adapters on all linear layers but the head, and its base."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return replace(pair, policy=get_peft_model(pair.policy, config).eval(), reference=None)


@torch.no_grad()
def lockstep(pair: Pair, betas: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Decode by hand: two DynamicCaches, logits of the last position only, all log-probabilities kept."""
    from transformers import DynamicCache

    models = pair.policy, pair.reference
    caches = [DynamicCache(config=model.config) for model in models]
    positions, text, columns = (mask.cumsum(-1) - 1).clamp(min=0), ids, []
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(pair.new):
        inputs = {"input_ids": text, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        logits = [
            model(**inputs, **{cache_argument(model.forward): cache}, logits_to_keep=1).logits[:, -1].float()
            for model, cache in zip(models, caches, strict=True)
        ]
        log_pi, log_mu = (one.log_softmax(-1) for one in logits)
        log_mix = torch.lerp(log_pi, log_mu, betas[:, None]).log_softmax(-1)
        text = torch.multinomial(log_mix.exp(), 1)
        columns.append([text, *(values.gather(-1, text) for values in (log_pi, log_mu, log_mix))])
        finished |= text[:, 0] < 0  # no token ends a row here, but a real loop has to check
        if finished.all():
            break
        mask = torch.cat([mask, mask[:, -1:]], 1)
        positions = positions[:, -1:] + 1


def batched(pair: Pair) -> None:
    betas = torch.tensor([0.0, BETA], device=pair.ids.device).repeat_interleave(len(pair.ids))
    lockstep(pair, betas, pair.ids.repeat(2, 1), pair.mask.repeat(2, 1))


def one_after_the_other(pair: Pair) -> None:
    for beta in (0.0, BETA):
        lockstep(pair, torch.full((len(pair.ids),), beta, device=pair.ids.device), pair.ids, pair.mask)


@torch.no_grad()
def generate(model: Any, pair: Pair) -> None:
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    model.generate(pair.ids, attention_mask=pair.mask, max_new_tokens=pair.new, **options)


def generate_per_model(pair: Pair) -> None:
    """Generate from the policy and from the reference: the cost of two calls, without mixture or log-probabilities."""
    generate(pair.policy, pair)
    generate(pair.reference, pair)


@torch.no_grad()
def trl_way(pair: Pair) -> None:
    """Reproduce the cost structure of TRL 1.13's NashMDTrainer: generate() for the policy; for every mixture token,
    both models with use_cache=False, and logits and their log-softmax at every position of the prefix."""
    generate(pair.policy, pair)
    text, mask = pair.ids, pair.mask
    for _ in range(pair.new):
        inputs = {"input_ids": text, "attention_mask": mask, "use_cache": False}
        z_policy, z_reference = pair.policy(**inputs).logits, pair.reference(**inputs).logits
        mixed = torch.nn.functional.log_softmax(BETA * z_reference + (1 - BETA) * z_policy, dim=-1)
        scores = mixed[:, -1].to(copy=True, dtype=torch.float32)
        token = torch.multinomial(scores.softmax(-1), 1)
        text, mask = torch.cat([text, token], 1), torch.cat([mask, mask[:, -1:]], 1)


def engine_calls(pair: Pair, **options: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return calls of a whole rollout and of one with a single token."""
    from nlhf_kernels import RolloutEngine, RolloutSettings, nash_md

    engine = RolloutEngine(pair.policy, pair.reference, **options)
    whole, first = (RolloutSettings(max_new_tokens=new, seed=1, end_ids=()) for new in (pair.new, 1))
    return tuple(partial(engine.rollout, pair.ids, pair.mask, nash_md(BETA), each) for each in (whole, first))


@torch.no_grad()
def largest_error(pair: Pair, result: Any) -> float:
    """Return the largest error of the log-probabilities against one full forward pass without a cache."""
    errors = []
    for responses in result:
        text = torch.cat([pair.ids, responses.tokens], 1)
        mask = torch.cat([pair.mask, torch.ones_like(responses.tokens)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for model, got in ((pair.policy, responses.policy_logprobs), (pair.reference, responses.reference_logprobs)):
            with pair.policy.disable_adapter() if model is None else nullcontext():
                inputs = {"input_ids": text, "attention_mask": mask, "position_ids": positions, "use_cache": False}
                logits = (model or pair.policy)(**inputs).logits
            truth = logits[:, pair.ids.shape[1] - 1 : -1].float().log_softmax(-1)
            errors.append((truth.gather(-1, responses.tokens[..., None])[..., 0] - got).abs().max())
    return float(torch.stack(errors).max())


def weight_bytes(pair: Pair) -> float:
    """Return the bytes of both models' weights, read once per token step.

    An embedding table counts only if it is also the head.
    """
    weights = 0
    for model in (pair.policy, pair.reference) if pair.reference is not None else (pair.policy,):
        head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        weights += sum(p.numel() * p.element_size() for p in model.parameters() if p is head or p is not table)
    return float(weights)


RIVALS = {
    "eager": batched,
    "y, then y'": one_after_the_other,
    "generate per model": generate_per_model,
    "TRL 1.13's way, transcribed": trl_way,
}


#: Arguments of the engine. On a GPU, "engine" fuses products and layers.
ENGINES: dict[str, dict[str, Any]] = {
    "engine": {},
    SDPA: {"attention": "sdpa"},
    UNFUSED: {"fused": False},
    PRODUCTS: {"fused": "products"},
    LAYERS: {"fused": "layers"},
    COMPILED: {"compile": True},
    COMPILED_UNFUSED: {"compile": True, "fused": False},
    LINEAR: {"linear": True},
    COMPILED_LINEAR: {"compile": True, "linear": True},
    ONE_PASS: {"one_pass": True},
    ONE_PASS_LINEAR: {"one_pass": True, "linear": True},
    ONE_PASS_LAYERS: {"one_pass": True, "fused": "layers"},
    TUNED: {},
    COMPILED_TUNED: {"compile": True},
    STEPS: {"graphs": "steps"},
    COMPILED_STEPS: {"compile": True, "graphs": "steps"},
    PROMPTS: {"graphs": True},
    LORA: {},
}


def groups_of(shape: Shape, device: torch.device, chosen: Sequence[str] | None = None) -> list[list[str]]:
    """Return the implementations in groups that are measured one after the other.

    On a GPU the most important come first, since compiling takes longer than a budget may allow; on a CPU, whose load
    varies, all are in one group and alternate.

    Args:
        shape: of the models; the larger ones take half a minute to compile.
        device: where they run.
        chosen: the rivals; None: all.
    """
    rivals = [name for name in RIVALS if chosen is None or name in chosen]
    lora = [[LORA]] if find_spec("peft") else []  # adapters change the policy: it is in no other group
    if device.type != "cuda":
        return [["engine", SDPA, PRODUCTS, ONE_PASS, *rivals], *lora]
    large = shape.sizes["width"] >= 2048
    ours = [ONE_PASS, ONE_PASS_LINEAR, LINEAR, PRODUCTS, LAYERS, UNFUSED, SDPA, ONE_PASS_LAYERS]
    variants = [PROMPTS if large else STEPS, *ours]  # the other is the default's way
    if large:  # the rivals take longer than all that has a target
        return [["engine"], *lora, [COMPILED], *([rivals] if rivals else []), variants]
    compiled_variants = [COMPILED_LINEAR], [COMPILED_UNFUSED], [COMPILED_STEPS]
    return [["engine", *rivals], [COMPILED], variants, *lora, *compiled_variants]


def tuned_groups(shape: Shape, device: torch.device) -> list[list[str]]:
    """Return what --tuned measures; compiled on a GPU only."""
    return [[TUNED], [COMPILED_TUNED]] if device.type == "cuda" else [[TUNED]]


class Check(NamedTuple):
    """What came of an engine's first rollouts."""

    calls: dict[str, Callable[[], Any]]  # those to time: "", a whole rollout, and FIRST
    accuracy: Accuracy | None = None
    status: str = "ok"
    reason: str = ""


def check(pair: Pair, options: dict[str, Any], allowed: float) -> Check:
    """Compare an engine's log-probabilities with those of full forward passes."""
    try:
        whole, first = engine_calls(pair, **options)
        whole()  # a second rollout replays its prompts, too
        error = largest_error(pair, whole())
    except Exception as failure:  # of one engine; the others of the group still run
        return Check({}, None, "failed", without_paths(short_reason(failure)))
    accuracy = Accuracy(finite_or_none(error), allowed)
    if not error <= allowed:
        return Check({}, accuracy, "red", f"log-probabilities off by {error:.2g}")
    return Check({"": whole, FIRST: first}, accuracy)


def run_shape(shape: Shape, context: RunContext, plan: TimingPlan, names: Sequence[str]) -> list[ResultRow]:
    """Measure one group: rivals, and engines that pass their check."""
    device = context.settings.device
    pair = make(shape, device)
    pair = adapted(pair) if LORA in names else pair
    checks = {name: check(pair, ENGINES[name], ALLOWED_ERROR[shape.dtype]) for name in names if name in ENGINES}
    calls = {name + part: call for name, checked in checks.items() for part, call in checked.calls.items()}
    rivals = [name for name in names if name in RIVALS]
    calls |= {name: partial(RIVALS[name], pair) for name in rivals}
    timings = time_calls({name: Action(lambda: None, lambda _, call=call: call()) for name, call in calls.items()},
                         device, plan)  # fmt: skip
    for name in checks:
        if isinstance(whole := timings.get(name), Timing) and isinstance(first := timings[name + FIRST], Timing):
            timings[name + STEP] = per_step(whole, first, pair.new - 1)
    weights = weight_bytes(pair)

    def row(name: str, kind: str, steps: int) -> ResultRow:
        checked = checks.get(name, Check({}))
        timing, status, reason = timings.get(name), checked.status, checked.reason
        if isinstance(timing, Exception):
            timing, status, reason = None, "failed", without_paths(short_reason(timing))
        eager = timings.get("eager") if kind != "part" else None
        return ResultRow(
            key=RowKey("rollout", shape.label, shape.dtype, "forward", name, device.type, context.threads),
            kind=kind,
            status=status,
            run=context.facts,
            reasons=(reason,) if reason else (),
            chosen=name == "engine",
            accuracy=checked.accuracy,
            timing=timing,
            floor=context.ceilings.floor_of(timing, weights * steps, 0.0, shape.dtype) if timing and steps else None,
            speedup=Speedup(eager.median_us / timing.median_us, None) if timing and isinstance(eager, Timing) else None,
        )

    engines = [row(name, "backend" if name == "engine" else "variant", pair.new) for name in checks]
    parts = [(name + part, steps) for name in checks for part, steps in ((FIRST, 0), (STEP, 1))]
    measured = [row(name, "part", steps) for name, steps in parts if isinstance(timings.get(name), Timing)]
    return [*engines, *measured, *(row(name, "baseline", pair.new) for name in rivals)]


def per_step(whole: Timing, first: Timing, steps: int) -> Timing:
    """Return the cost of a token after the first: the rest of the rollout over its number of steps."""
    shorter = {name: (getattr(whole, name) - first.median_us) / steps for name in ("median_us", "p20_us", "p80_us")}
    return replace(whole, **shorter)


def print_rates(shape: Shape, rows: Sequence[ResultRow], console: Console) -> None:
    new, tokens = int(shape.sizes["new"]), 2 * int(shape.sizes["prompts"]) * int(shape.sizes["new"])
    for row in rows:
        if row.timing is not None and row.kind != "part":
            seconds = row.timing.median_us / 1e6
            rate = f"{1e3 * seconds / new:9.2f} ms a token step {tokens / seconds:12.0f} tokens/s"
            console.print(f"  {row.key.implementation:<28} {rate}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser("rollout", __doc__)
    parser.add_argument("--tuned", action="store_true", help="only the engine, under names of its own: after tune")
    arguments = parser.parse_args(argv)
    check_rivals("rollout", arguments.rival, RIVALS)
    groups = tuned_groups if arguments.tuned else partial(groups_of, chosen=arguments.rival)
    rows = run_rounds("rollout", arguments, SHAPES, run_shape, print_rates, groups)
    return 0 if all(row.status == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
