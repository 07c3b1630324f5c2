"""`policy.generate(..., custom_generate=mixture_generate)`: `generate_mixture` behind transformers' generate().

transformers prepares the configuration, the logits processors and the stopping criteria, then calls `mixture_generate`
with them; options that the mixture cannot honour are refused by name. README.md in this folder lists the parts of
transformers that this module relies on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch

from ..core.tokens import count_positions, flatten_ids
from ..core.upstream import CACHES, dropped_by_generate
from ..engine.hooks import Processor
from ..engine.peft_models import is_adapted
from .mixture import Beta, MixtureGeneration, generate_mixture

try:
    from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    from transformers.generation.stopping_criteria import StoppingCriteriaList
    from transformers.generation.utils import GenerateDecoderOnlyOutput
except ImportError as error:
    raise ImportError("nlhf_kernels.integrations needs transformers: pip install nlhf-kernels[transformers]") from error

_OP = "mixture_generate"

#: Warpers that become settings of the sampler, in the order in which transformers and the sampler apply them.
_SAMPLER_WARPERS: dict[type, str] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}

#: Settings of a GenerationConfig that are not supported, and why.
_REFUSED = {
    "output_scores": "the mixture's scores are never stored; the output has the tokens' log-probabilities instead",
    "output_logits": "the logits are never stored; the output has the tokens' log-probabilities instead",
    "output_attentions": "two models decode, and neither's attentions are kept",
    "output_hidden_states": "two models decode, and neither's hidden states are kept",
    "prefill_chunk_size": "both prompts are read in one piece",
}
#: Model inputs that generate() prepares and both models have of their own.
_PREPARED = {"attention_mask", "position_ids", *CACHES, "use_cache", "logits_to_keep"}


@dataclass
class MixtureGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output, with log-probabilities of the new tokens.

    Args:
        sequences ((B, S + T) int64): prompts and new tokens.
        scores, logits, attentions, hidden_states, past_key_values: None; they are not stored.
        mask ((B, T) bool): True at a row's new tokens, its end-of-sequence token included.
        policy_logprobs, reference_logprobs ((B, T) float32): of the new tokens, at temperature 1, unfiltered.
        mixture_logprobs ((B, T) float32): under the distribution that was sampled: after temperature and filters.
    """

    mask: torch.Tensor | None = None
    policy_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
    mixture_logprobs: torch.Tensor | None = None


def mixture_generate(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    reference_model: torch.nn.Module | None = None,
    beta: Beta | None = None,
    seed: int | None = None,
    row_ids: torch.Tensor | None = None,
    stream: int = 0,
    vocab_size: int | None = None,
    token_streamer: Any = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor | MixtureGenerateOutput:
    """Decode from the mixture of the policy and `reference_model`: the `custom_generate` of `policy.generate`.

    do_sample, temperature, top_k, top_p, min_p, eos and lengths are generate()'s own. Logits processors that the
    sampler does not implement act on the mixture's logits.

    Args:
        model: the policy, passed by generate().
        input_ids ((B, S) int64): passed by generate(), which has repeated each row num_return_sequences times.
        logits_processor, stopping_criteria, generation_config: made by generate() from its options.
        reference_model: a causal language model; None: the base of a policy with adapters.
        beta (number, (rows,) or (B,)): the reference's weight: one, one per prompt, or one per returned row.
        seed (int): None draws one from torch's default generator.
        row_ids ((rows,) or (B,) int64): ids that the noise depends on; see `generate_mixture`.
        stream (int): stream of the noise; see `mixture_sample`.
        vocab_size (int): columns of the heads that count; None: all, which must then be equally many.
        token_streamer: an object with `put(tokens)` and `end()`; generate() hands no `streamer` to a custom function.
        synced_gpus (bool): passed by generate(); refused where True.
        streamer: as `token_streamer`, for callers other than generate().
        model_kwargs: passed by generate(): attention mask, positions, an empty cache; others are refused.
    """
    _check_models(model, reference_model, beta)
    frame = inspect.currentframe()
    _refuse_dropped(frame.f_back if frame else None)
    _refuse(generation_config, logits_processor, model_kwargs, synced_gpus)
    _refuse_inputs(input_ids, model_kwargs)
    if token_streamer is not None:
        token_streamer.put(input_ids.cpu())  # as generate() does with its own streamer
    processors, sampling = _split(logits_processor, bool(generation_config.do_sample))
    samples = generation_config.num_return_sequences or 1  # generate() has repeated input_ids, not row_ids and beta
    mask = model_kwargs.get("attention_mask")
    pad_id = generation_config.pad_token_id
    result = generate_mixture(
        model,
        reference_model,
        input_ids[::samples],
        None if mask is None else mask[::samples],
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        beta=beta,
        **sampling,
        seed=seed,
        row_ids=row_ids,
        stream=stream,
        num_return_sequences=samples,
        eos_token_id=(),  # stopping_criteria holds them
        pad_token_id=next(iter(flatten_ids(generation_config.eos_token_id)), None) if pad_id is None else int(pad_id),
        vocab_size=vocab_size,
        logits_processor=processors,
        stopping_criteria=stopping_criteria,
        streamer=streamer if token_streamer is None else token_streamer,
        use_cache=bool(model_kwargs.get("use_cache", True)),
        logprobs=None if generation_config.return_dict_in_generate else (),
    )
    return _output(result, bool(generation_config.return_dict_in_generate))


def _check_models(model: torch.nn.Module, reference_model: torch.nn.Module | None, beta: Beta | None) -> None:
    if reference_model is None and not is_adapted(model):
        raise ValueError(
            f"{_OP}: reference_model: expected a causal language model; got None, which means the policy's own base, "
            f"and {type(model).__name__} has no adapters beside one"
        )
    if beta is None:
        raise ValueError(f"{_OP}: beta: expected a number, the reference's weight in the mixture; got None")


def _refuse_dropped(caller: FrameType | None) -> None:
    """Refuse arguments that generate() does not pass on to a custom function, as found in generate()'s frame.

    An ignored streamer, for one, would leave its consumer waiting for ever. Nothing is refused for other callers, or if
    generate()'s local names have changed.
    """
    dropped = dropped_by_generate(caller)
    if "streamer" in dropped:
        raise ValueError(f"{_OP}: streamer: generate() does not hand it on; expected as token_streamer=...")
    if "assistant_model" in dropped:
        raise ValueError(f"{_OP}: assistant_model: assisted generation cannot draw from a mixture")


def _refuse(
    config: GenerationConfig, processors: Sequence[Processor], model_kwargs: dict[str, Any], synced_gpus: bool
) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(f"{_OP}: expected greedy search or sampling (num_beams=1); got {mode.value}")
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise ValueError(f"{_OP}: {name}: not supported: {reason}")
    if config.cache_implementation not in (None, "dynamic", "hybrid"):
        got = config.cache_implementation
        raise ValueError(f"{_OP}: cache_implementation: expected dynamic, as each model makes its own; got {got!r}")
    for processor in processors:
        if "ClassifierFreeGuidance" in type(processor).__name__:
            raise ValueError(
                f"{_OP}: guidance_scale: {type(processor).__name__} runs the policy alone; "
                "beta outside [0, 1] guides by the reference"
            )
    if synced_gpus:
        raise ValueError(f"{_OP}: synced_gpus: not supported: rows that end early would leave other ranks waiting")
    unknown = sorted(name for name, value in model_kwargs.items() if value is not None and name not in _PREPARED)
    if unknown:
        raise ValueError(f"{_OP}: {', '.join(unknown)}: expected text as input_ids only, which both models can read")


def _refuse_inputs(input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
    """Refuse caches and positions from the caller: each model gets those that generate() would prepare."""
    positions = model_kwargs.get("position_ids")
    for name in CACHES:
        if _holds_text(model_kwargs.get(name)):
            raise ValueError(f"{_OP}: {name}: expected an empty cache: the reference has not read the same text")
    if positions is not None:
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if positions.ndim != 2 or ((positions != count_positions(mask)) & (mask != 0)).any():
            raise ValueError(f"{_OP}: position_ids: expected those that count each row's own tokens")


def _holds_text(cache: Any) -> bool:
    """Whether a cache is filled: attention layers count their tokens, recurrent layers only flag their state."""
    return any(
        (hasattr(layer, "get_seq_length") and layer.get_seq_length() > 0)
        or any(getattr(layer, "has_previous_state", {}).values())
        for layer in getattr(cache, "layers", ())
    )


def _split(processors: Sequence[Processor], do_sample: bool) -> tuple[list[Processor], dict[str, Any]]:
    """Split processors into those for the mixture's logits and settings of the sampler, which acts after them.

    The sampler takes the longest tail of the list that is in its own order. A warper before that tail remains a
    processor, so that each is applied once and in order.
    """
    remaining = list(processors)
    if not do_sample:
        return remaining, {"temperature": 0.0}
    order, sampling = list(_SAMPLER_WARPERS), dict[str, Any]()
    last = len(order)
    while remaining and type(remaining[-1]) in order[:last] and _is_plain(remaining[-1]):
        last = order.index(type(remaining[-1]))
        name = _SAMPLER_WARPERS[order[last]]
        sampling[name] = getattr(remaining.pop(), name)
    return remaining, sampling


def _is_plain(warper: Any) -> bool:
    """Whether a warper filters as the sampler does: to probability 0, and possibly down to a single token."""
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def _output(result: MixtureGeneration, as_dict: bool) -> torch.Tensor | MixtureGenerateOutput:
    if not result.ok.all():
        rows = (~result.ok).nonzero().flatten().tolist()
        raise ValueError(f"{_OP}: expected finite logits; got NaN, infinity or no token left to draw in rows {rows}")
    if not as_dict:
        return result.sequences
    return MixtureGenerateOutput(
        sequences=cast(torch.LongTensor, result.sequences),
        mask=result.mask,
        policy_logprobs=result.policy_logprobs,
        reference_logprobs=result.reference_logprobs,
        mixture_logprobs=result.mixture_logprobs,
    )
