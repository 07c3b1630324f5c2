"""`policy.generate(..., custom_generate=mixture_generate)`: transformers' front door to `generate_mixture`.

transformers prepares the configuration, the logits processors and the stopping criteria, then calls `mixture_generate`
with them; whatever of them the mixture cannot honour is refused by name. What is relied on of transformers stands in
README.md beside this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch

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

#: The warpers that our sampler takes over, in the order in which transformers and the sampler apply them.
_OURS: dict[type, str] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}

#: Settings of a GenerationConfig that cannot be honoured, and why.
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
    """transformers' output, with log-probabilities of the new tokens: see `MixtureGeneration`."""

    mask: torch.Tensor | None = None  # (B, T) bool
    policy_logprobs: torch.Tensor | None = None  # (B, T) float32
    reference_logprobs: torch.Tensor | None = None
    mixture_logprobs: torch.Tensor | None = None


def mixture_generate(
    model: Any,
    input_ids: torch.Tensor,  # (B, S), expanded by num_return_sequences
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
    """The `custom_generate` of `policy.generate`: decodes from the mixture of the policy and `reference_model`.

    beta, seed, row_ids, stream and vocab_size as in `generate_mixture`. do_sample, temperature, top_k, top_p, min_p,
    eos and lengths are generate()'s own. Other logits processors act on the mixture's logits. transformers hands no
    `streamer` to a custom function: pass it as `token_streamer`.
    """
    _require(model, reference_model, beta)
    frame = inspect.currentframe()
    _refuse_dropped(frame.f_back if frame else None)
    _refuse(generation_config, logits_processor, model_kwargs, synced_gpus)
    _refuse_inputs(input_ids, model_kwargs)
    if token_streamer is not None:
        token_streamer.put(input_ids.cpu())  # as generate() does for its own
    processors, sampling = _split(logits_processor, bool(generation_config.do_sample))
    every = generation_config.num_return_sequences or 1  # generate() has repeated the rows; row_ids and beta it has not
    mask = model_kwargs.get("attention_mask")
    result = generate_mixture(
        model,
        reference_model,
        input_ids[::every],
        None if mask is None else mask[::every],
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        beta=beta,
        **sampling,
        seed=seed,
        row_ids=row_ids,
        stream=stream,
        num_return_sequences=every,
        eos_token_id=(),  # stopping_criteria holds them
        pad_token_id=_pad_token_id(generation_config),
        vocab_size=vocab_size,
        logits_processor=processors,
        stopping_criteria=stopping_criteria,
        streamer=streamer if token_streamer is None else token_streamer,
        use_cache=bool(model_kwargs.get("use_cache", True)),
        logprobs=None if generation_config.return_dict_in_generate else (),
    )
    return _output(result, bool(generation_config.return_dict_in_generate))


def _require(model: Any, reference_model: torch.nn.Module | None, beta: Beta | None) -> None:
    if reference_model is None and not is_adapted(model):
        raise ValueError(
            f"{_OP}: reference_model: expected a causal language model; got None, which means the policy's own base, "
            f"and {type(model).__name__} has no adapters beside one"
        )
    if beta is None:
        raise ValueError(f"{_OP}: beta: expected a number, the reference's weight in the mixture; got None")


def _refuse_dropped(caller: FrameType | None) -> None:
    """generate() takes these two and hands them to no custom function: without a look at its frame they would be
    ignored, and a streamer's reader would wait for ever. Elsewhere, and should the names change, nothing is refused."""
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
    """What generate() prepares by itself is made anew for each model; what a caller chose otherwise cannot be."""
    positions = model_kwargs.get("position_ids")
    for name in CACHES:
        if _holds_text(model_kwargs.get(name)):
            raise ValueError(f"{_OP}: {name}: expected an empty cache: the reference has not read the same text")
    if positions is not None:
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        usual = mask.long().cumsum(-1) - 1
        if positions.ndim != 2 or ((positions != usual) & (mask != 0)).any():
            raise ValueError(f"{_OP}: position_ids: expected those that count each row's own tokens")


def _holds_text(cache: Any) -> bool:
    """Layers of attention count their tokens; recurrent layers only say that they have a state."""
    return any(
        (hasattr(layer, "get_seq_length") and layer.get_seq_length() > 0)
        or any(getattr(layer, "has_previous_state", {}).values())
        for layer in getattr(cache, "layers", ())
    )


def _split(processors: Sequence[Processor], do_sample: bool) -> tuple[list[Processor], dict[str, Any]]:
    """The processors to apply to the mixture's logits, and the settings of our sampler, which acts after them.

    Ours is the longest tail of the list whose order is the sampler's own; a warper before it (another follows that the
    sampler does not know, or order it differs) stays a processor like any other. So each is applied once, in its place.
    """
    kept = list(processors)
    if not do_sample:
        return kept, {"temperature": 0.0}
    order, sampling = list(_OURS), dict[str, Any]()
    last = len(order)
    while kept and type(kept[-1]) in order[:last] and _is_plain(kept[-1]):
        last = order.index(type(kept[-1]))
        name = _OURS[order[last]]
        sampling[name] = getattr(kept.pop(), name)
    return kept, sampling


def _is_plain(warper: Any) -> bool:
    """Does what the sampler's filter of that name does: drops entirely, and may leave a single token."""
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def _pad_token_id(config: GenerationConfig) -> int | None:
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    eos = config.eos_token_id
    return None if eos is None else int(torch.as_tensor(eos, dtype=torch.int64, device="cpu").flatten()[0])


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
