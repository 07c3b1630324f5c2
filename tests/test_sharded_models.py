"""Models sharded by transformers: tokens and gradients of the whole model, without broadcasts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from tests.support import processes
from tests.support.processes import collectives
from tests.support.tiny_models import VOCABULARY, padded, prompts, random_model, tiny_model

SHARED = ("llama", "qwen2", "gemma2", "mixtral")  # gemma2 caps its logits; qwen2's head is its embedding


def model_of(architecture: str, seed: int) -> torch.nn.Module:
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if architecture == "mixtral":
        sizes = {"hidden_size": 32, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2}
        return random_model(transformers.MixtralConfig(**shape, **sizes), seed)
    if architecture == "wide":
        sizes = {"hidden_size": 32, "intermediate_size": 40}
        return random_model(transformers.LlamaConfig(**shape | {"num_key_value_heads": 4}, **sizes), seed)
    if architecture == "qwen2":
        sizes = {"hidden_size": 32, "intermediate_size": 40, "tie_word_embeddings": True}
        return random_model(transformers.Qwen2Config(**shape, **sizes), seed)
    return tiny_model(architecture, seed)


_saved: set[Path] = set()


def loaded(architecture: str, seed: int, **layout: int) -> Any:
    """Load a model saved by the first process, sharded by `layout`, or whole without it."""
    from transformers.distributed import DistributedConfig

    folder = Path(sys.argv[1], f"{architecture}-{seed}")
    if folder not in _saved:
        _saved.add(folder)
        if torch.distributed.get_rank() == 0:
            model_of(architecture, seed).save_pretrained(folder)
        torch.distributed.barrier()
    options = {"distributed_config": DistributedConfig(**layout)} if layout else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def pair(architecture: str = "llama", **layout: int) -> tuple[Any, Any]:
    return loaded(architecture, 0, **layout), loaded(architecture, 1, **layout)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = padded(prompts((3, 6), seed=seed))
    return inputs["input_ids"], inputs["attention_mask"]


def settings(**options: Any) -> Any:
    from nlhf_kernels.engine import RolloutSettings

    return RolloutSettings(**{"max_new_tokens": 12, "seed": 3, "end_ids": (5, 6, 7, 8), **options})


def assert_same(result: Any, whole: Any) -> None:
    for one, other in zip(result, whole, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.lengths, other.lengths)
        for name in ("policy_logprobs", "reference_logprobs"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4)


def size() -> int:
    return torch.distributed.get_world_size()


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def split_layers_give_the_whole_models_tokens() -> None:
    """Tokens agree for a vocabulary of 97 (49 and 48), two samples of y and y' for two prompts, some ending early."""
    from nlhf_kernels.engine import RolloutEngine, nash_md

    for architecture in SHARED:
        engine = RolloutEngine(*pair(architecture, tp_size=size()))
        part = engine.models.sharding.part
        assert part is not None and part.total == VOCABULARY and part.processes == size(), engine.models.notes
        result = engine.rollout(*batch(), nash_md(0.25, samples=2), settings())
        assert_same(result, RolloutEngine(*pair(architecture)).rollout(*batch(), nash_md(0.25, samples=2), settings()))
        assert min(int(response.lengths.min()) for response in result) < 12, "rows that end leave the batch"
        assert engine.models.policy.lm_head(torch.zeros(1, 32)).shape == (1, VOCABULARY), "the head is as it was"


def filters_hooks_and_least_lengths() -> None:
    """Filters and logits processors, which need whole logits, agree; so does min_new_tokens, applied per slice."""
    from nlhf_kernels.engine import RolloutEngine, nash_md
    from nlhf_kernels.engine.hooks import Hooks
    from nlhf_kernels.engine.request import Player

    shared, whole = RolloutEngine(*pair(tp_size=size())), RolloutEngine(*pair())
    for options in ({"top_p": 0.8, "top_k": 20}, {"min_new_tokens": 9}, {"temperature": 0.0}):
        requests = batch(), nash_md(0.25), settings(**options)
        results = [engine.rollout(*requests[0], *requests[1:]) for engine in (shared, whole)]
        assert_same(*results)
    forbid = Hooks(processors=[lambda ids, scores: scores.index_fill(1, torch.arange(20, 60), -torch.inf)])
    results = [engine.rollout(*batch(), [Player(0.3)], settings(), forbid) for engine in (shared, whole)]
    assert_same(*results)


def a_token_costs_its_layers_and_two_collectives_a_draw() -> None:
    """Per token, only the collectives below the head and two per draw: neither tokens nor logits are communicated."""
    from nlhf_kernels.engine import RolloutEngine, nash_md

    policy, reference = pair(tp_size=size())
    engine = RolloutEngine(policy, reference)
    ids, mask = batch()
    with torch.no_grad():
        below = collectives(lambda: policy.model(input_ids=ids))
        gathered = collectives(lambda: policy(input_ids=ids))
    assert 2 * 2 <= below < gathered, "two sums a layer; the logits"
    run = lambda new: engine.rollout(ids, mask, nash_md(0.25), settings(max_new_tokens=new, end_ids=()))  # noqa: E731
    run(9)
    counts = [collectives(lambda new=new: run(new)) for new in (4, 9)]
    assert counts[1] - counts[0] == 5 * (2 * below + 2 * 2), "a token: two models, two draws"


def processes_agree_on_a_seed_and_on_prompts() -> None:
    from nlhf_kernels.engine import RolloutEngine, nash_md

    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    engine = RolloutEngine(*pair(tp_size=size()))
    own = engine.rollout(*batch(), nash_md(0.25), settings(seed=None, end_ids=())).responses[0].tokens
    parts = [torch.empty_like(own) for _ in range(size())]
    torch.distributed.all_gather(parts, own)
    assert all(torch.equal(part, own) for part in parts)
    with pytest.raises(ValueError, match="input_ids: expected the same prompts, settings and seed in all processes"):
        engine.rollout(*batch(seed=rank), nash_md(0.25), settings())
    with pytest.raises(ValueError, match="expected the same prompts, settings and seed in all processes"):
        engine.rollout(*batch(), nash_md(0.25), settings(seed=rank))


def an_opponent_of_its_own_and_half_precision() -> None:
    """Nash-EMA's opponent, a sharded third model, agrees with the whole model. In bfloat16, sums differ by rounding but
    tokens agree among processes."""
    from nlhf_kernels.engine import RolloutEngine, nash_ema

    shared = [loaded("llama", seed, tp_size=size()) for seed in range(3)]
    whole = [loaded("llama", seed) for seed in range(3)]
    engines = [RolloutEngine(models[0], models[1], opponent=models[2]) for models in (shared, whole)]
    assert engines[0].models.sharding.part is not None
    assert_same(*(engine.rollout(*batch(), nash_ema(0.25), settings()) for engine in engines))

    engine = RolloutEngine(*(model.bfloat16() for model in shared[:2]), opponent=shared[2].bfloat16())
    result = engine.rollout(*batch(), nash_ema(0.25), settings(end_ids=()))
    for response in result:
        for own in (response.tokens, response.policy_logprobs, response.mixture_logprobs):
            parts = [torch.empty_like(own) for _ in range(size())]
            torch.distributed.all_gather(parts, own.contiguous())
            assert all(torch.equal(part, own) for part in parts)


def bad_models_are_named() -> None:
    from nlhf_kernels.engine import RolloutEngine

    policy, reference = pair(tp_size=size())
    with pytest.raises(ValueError, match="reference: expected a model shared as the policy is, by processes"):
        RolloutEngine(policy, loaded("llama", 1))
    with pytest.raises(ValueError, match="opponent: expected a model, loaded and shared as the policy; got a mapping"):
        RolloutEngine(policy, reference, opponent=dict(policy.named_parameters()))


# ---- FSDP ------------------------------------------------------------------------------------------------------------


def stored_in_parts_and_gathered_once() -> None:
    """Processes have different prompts; no step has a collective, and the parameters are resharded afterwards."""
    from nlhf_kernels.engine import RolloutEngine, nash_md

    rank = torch.distributed.get_rank()
    for architecture in ("llama", "qwen2"):
        policy, reference = pair(architecture, fsdp_size=size())
        engine = RolloutEngine(policy, reference, fused=True)
        own = batch(seed=rank)
        result = engine.rollout(*own, nash_md(0.25), settings())
        assert_same(result, RolloutEngine(*pair(architecture)).rollout(*own, nash_md(0.25), settings()))
        assert not any("gathered" in note for note in result.notes)
        counts = [
            collectives(lambda new=new: engine.rollout(*own, nash_md(0.25), settings(max_new_tokens=new)))  # noqa: B023
            for new in (4, 12)
        ]
        assert counts[0] == counts[1], "steps gather nothing"
        assert all(hasattr(parameter, "full_tensor") for parameter in policy.parameters()), "parts again"
        with torch.no_grad():
            first = collectives(lambda: policy(input_ids=own[0]))  # noqa: B023
        assert first >= 2, "layers are gathered by every forward pass, as before"
        policy(input_ids=own[0]).logits.logsumexp(-1).sum().backward()
        assert all(parameter.grad.to_local().isfinite().all() for parameter in policy.parameters()), "it trains on"


def stored_in_parts_and_gathered_at_every_step() -> None:
    """If not all parameters fit at once, processes whose rows end at different steps stop together."""
    from nlhf_kernels.engine import RolloutEngine, nash_md

    rank = torch.distributed.get_rank()
    policy, reference = pair(fsdp_size=size())
    engine = RolloutEngine(policy, reference, fused=True)  # products stay separate: weights are not whole
    ends = settings(max_new_tokens=40, end_ids=tuple(range(3, 60)) if rank else (5,))
    own = batch(seed=rank)
    engine.memory_limit = engine.memory_plan(2, own[0].shape[1], nash_md(0.25), ends).total + 1000
    result = engine.rollout(*own, nash_md(0.25), ends)
    assert "parameters are gathered at every step: all at once they do not fit" in result.notes
    assert "separate products and layers: processes share the models" in result.notes
    assert_same(result, RolloutEngine(*pair()).rollout(*own, nash_md(0.25), ends))
    with pytest.raises(ValueError, match="max_new_tokens: expected the same in all processes that share"):
        engine.rollout(*own, nash_md(0.25), settings(max_new_tokens=4 + rank))


# ---- both ------------------------------------------------------------------------------------------------------------


def losses_over_split_heads_have_the_whole_models_gradients() -> None:
    """Gradients of all parameters equal the whole model's, also if the head is tied to the embedding."""
    import nlhf_kernels
    from nlhf_kernels import Head

    ids, _ = batch()
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)

    def gradients(policy: Any, reference: Any, mode: str) -> tuple[float, dict[str, torch.Tensor]]:
        heads = [Head(model.lm_head.weight) for model in (policy, reference)]
        with torch.no_grad():
            other = reference.model(input_ids=ids).last_hidden_state
        hidden = policy.model(input_ids=ids).last_hidden_state
        loss = nlhf_kernels.linear_nash_pg_loss(
            hidden, heads[0], targets, torch.tensor([0.8, 0.3]), other, heads[1], tau=0.05, kl=mode
        ).loss
        policy.zero_grad()
        loss.backward()
        parts = {name: parameter.grad for name, parameter in policy.named_parameters()}
        whole = {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in parts.items()}
        return float(loss), whole

    for architecture in ("llama", "qwen2", "mixtral"):
        pairs = []
        for layout in ({"tp_size": size()}, {}):
            policy, reference = pair(architecture, **layout)
            pairs.append((policy, reference.requires_grad_(False)))
        for mode in ("sequence", "exact"):
            (loss, split), (expected, whole) = (gradients(*models, mode) for models in pairs)
            assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
            for name, gradient in whole.items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name)


def split_by_two_and_stored_by_two() -> None:
    """Four processes: tensor parallelism within pairs, FSDP across pairs, and different prompts per pair."""
    from nlhf_kernels.engine import RolloutEngine, nash_md

    own = batch(seed=torch.distributed.get_rank() // 2)
    policy, reference = pair(tp_size=2, fsdp_size=2)
    engine = RolloutEngine(policy, reference)
    assert engine.models.sharding.part is not None and engine.models.sharding.part.processes == 2
    whole = RolloutEngine(*pair()).rollout(*own, nash_md(0.25), settings(max_new_tokens=20))
    result = engine.rollout(*own, nash_md(0.25), settings(max_new_tokens=20))
    assert not result.notes
    assert_same(result, whole)
    plan = engine.memory_plan(2, own[0].shape[1], nash_md(0.25), settings(max_new_tokens=20))
    engine.memory_limit = plan.total + 1000
    result = engine.rollout(*own, nash_md(0.25), settings(max_new_tokens=20))
    assert result.notes == ("parameters are gathered at every step: all at once they do not fit",)
    assert_same(result, whole)


def split_by_four() -> None:
    """Tokens agree for a vocabulary of 97 in three slices of 25 and one of 22."""
    from nlhf_kernels.engine import RolloutEngine, nash_md

    engine = RolloutEngine(*pair("wide", tp_size=4))
    assert engine.models.sharding.part is not None
    result = engine.rollout(*batch(), nash_md(0.25, samples=2), settings())
    assert_same(result, RolloutEngine(*pair("wide")).rollout(*batch(), nash_md(0.25, samples=2), settings()))


CHECKS = [
    split_layers_give_the_whole_models_tokens,
    filters_hooks_and_least_lengths,
    a_token_costs_its_layers_and_two_collectives_a_draw,
    processes_agree_on_a_seed_and_on_prompts,
    an_opponent_of_its_own_and_half_precision,
    bad_models_are_named,
    stored_in_parts_and_gathered_once,
    stored_in_parts_and_gathered_at_every_step,
    losses_over_split_heads_have_the_whole_models_gradients,
]
OF_FOUR = [split_by_two_and_stored_by_two, split_by_four]


VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
OLD = "before 5.23 transformers shares no vocabulary that does not divide, and names no meshes: heads are gathered"


def available(test):
    test = pytest.mark.skipif(VERSION < (5, 23), reason=OLD)(test)
    return pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")(test)


@pytest.fixture(scope="module")
def reports():
    return processes.run_checks("tests.test_sharded_models", 2)


@pytest.fixture(scope="module")
def reports_of_four():
    return processes.run_checks("tests.test_sharded_models", 4)


@available
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(reports, check) -> None:
    processes.assert_passed(reports, check)


@available
@pytest.mark.parametrize("check", OF_FOUR, ids=lambda check: check.__name__)
def test_four_processes(reports_of_four, check) -> None:
    processes.assert_passed(reports_of_four, check)


if __name__ == "__main__":
    processes.main(CHECKS if os.environ["WORLD_SIZE"] == "2" else OF_FOUR)
