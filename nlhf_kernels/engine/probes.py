"""Compare short texts, read in every way the engine reads them, with the model's own forward pass over the whole text.

No configuration declares whether a model attends to padding, counts slots instead of tokens, takes a mask from the
length of its cache or attends to later tokens. The logits show it: in a causal model one forward pass gives the logits
of every prefix of a text, and those of a few padded prefixes, decoded a few tokens on, must equal them. Findings hold
for a model's code and configuration, and are cached per model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache

from ..core.modes import eval_mode
from ..core.upstream import attention_name, experts_name
from .attention import takes_decode_attention, use_attention
from .caches import FarLayer
from .contexts import exact_products, locked, no_autocast
from .decode_state import DecodeState
from .model_info import ModelInfo
from .request import Prompts
from .runners import CachedRunner, Runner, WholeTextRunner

TOKENS, STEPS = 16, 4  # of the text, at least; of them, those that are decoded
SHORT_WINDOW, LONG_WINDOW = 64, 1024  # the text goes past windows up to the first, a bucket past those up to the second
#: Tolerance of logits in shares of their spread: in float32 at every position; where anything is in 16 bits, which may
#: also send tokens to other experts, at the median position.
ROUNDING, ROUNDING_16_BIT = 1e-3, 0.1
#: The same among rows of one shape, whose arithmetic is the same.
ROUNDING_ONE_SHAPE, ROUNDING_ONE_SHAPE_16_BIT = 1e-4, 0.02
_answers: WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Findings:
    refused: str | None = None  # why the engine cannot read this model at all
    padding_fault: str | None = None  # what is wrong with padded prompts: "the policy, NAME, ..."
    decode_attention: bool = False


def examine(info: ModelInfo, may_replace_attention: bool, op: str) -> ModelInfo:
    """Complete `info` with the findings of comparisons; refuse a model that is wrong even without padding."""
    if _is_meta(info.model):
        return info
    question = "examined", may_replace_attention
    findings: Findings = _cached(info, question, lambda: _examine(info, may_replace_attention))
    if findings.refused is not None:
        raise ValueError(f"{op}: {info.role}: {findings.refused}")
    return replace(info, padding_fault=findings.padding_fault, decode_attention=findings.decode_attention)


def why_not_static(info: ModelInfo, slots: int) -> str | None:
    """Why steps may not read a cache that is longer than the text, in buckets of `slots`; None where they may."""
    if _is_meta(info.model) or not info.cached:
        return None
    question = "static", info.decode_attention, info.padding_fault, slots
    answer: str | None = _cached(info, question, lambda: _why_not_static(info, slots))
    return answer


def _cached(info: ModelInfo, question: tuple[Any, ...], answer: Callable[[], Any]) -> Any:
    """Return a property of a model, computed once per state of its configuration."""
    with locked(info.model):
        config = info.model.config
        implementations = (attention_name(config), experts_name(config))
        wrapper = id(vars(info.model).get("forward"))  # an autocast of accelerate's, say
        key = *question, info.layers, info.dtype, info.device, wrapper, *implementations
        answers = _answers.setdefault(info.model, {})
        if key not in answers:
            with no_autocast(info.device), eval_mode(info.model), exact_products():
                answers[key] = answer()
        return answers[key]


def _is_meta(model: torch.nn.Module) -> bool:
    return next(model.parameters()).device.type == "meta"


# ---- properties of a model -------------------------------------------------------------------------------------------


def _examine(info: ModelInfo, may_replace_attention: bool) -> Findings:
    text = _read_whole(info)
    if isinstance(text, str):
        return Findings(refused=text)
    by_kernel = [False]
    if may_replace_attention and info.cached and takes_decode_attention(info.model, _far_step(info)):
        by_kernel = [True, False]
    refused, padding_fault = None, None
    for kernel in by_kernel:
        refused = _fault_without_padding(info, text, kernel)
        padding_fault = None if refused else _fault_of_padding(info, text, kernel)
        if refused is None and padding_fault is None:
            return Findings(decode_attention=kernel)
    return Findings(refused=refused, padding_fault=padding_fault)


def _read_whole(info: ModelInfo) -> _Text | str:
    """Return the text with its logits, or why this model's logits cannot be compared."""
    ids = plain_ids(info)
    half = len(ids) // 2
    changed = torch.cat([ids[:half], torch.full_like(ids[half:], _pad_id(info))])
    with output_dtypes(info.model) as dtypes:
        both = _whole_logits(info, torch.stack([ids, changed]), positions=False)
    text = _Text(ids, both[0], in_16_bits=not {info.dtype, *dtypes} <= {torch.float32, torch.float64})
    if text.differ(both[1, :half], both[0, :half], one_shape=True):
        return (
            f"expected a model that reads from left to right; the logits of {info.name} change with tokens that come "
            "later (a model of both directions, or is_decoder=False)"
        )
    with_positions = _whole_logits(info, ids[None], positions=True)[0]
    if text.differ(with_positions, text.logits):
        return f"expected tokens at positions 0, 1, 2, ...; {info.name} counts them otherwise by itself"
    return replace(text, logits=with_positions)


def _fault_without_padding(info: ModelInfo, text: _Text, by_kernel: bool) -> str | None:
    try:
        fault = "it gives other logits" if _DecodedRows(info, text, (0,), by_kernel).differ else None
    except Exception as error:
        fault = failure(error)
    if fault is None:
        return None
    if info.cached:
        return (
            f"expected steps over a cache to say what the whole text says; {info.name} does not ({fault}; "
            "use_cache=False reads the whole text every step)"
        )
    return f"expected logits that depend on the text so far alone; those of {info.name} do not ({fault})"


def _fault_of_padding(info: ModelInfo, text: _Text, by_kernel: bool) -> str | None:
    """Compare several amounts of padding, and two pad tokens before a text too short for a recurrent model to forget
    them."""
    prompt = len(text.ids) - STEPS
    try:
        rows = _DecodedRows(info, text, (0, 1, prompt // 2, prompt - 2, prompt - 2), by_kernel)
    except Exception as error:
        return f"fails on it ({failure(error)})"
    if not rows.differ:
        return None
    return "reads it" if text.differ(rows.logits[3], rows.logits[4]) else "gives other logits after it"


def _why_not_static(info: ModelInfo, slots: int) -> str | None:
    text = _read_whole(info)
    assert isinstance(text, _Text), "examined before"
    beyond = max([0, *(window for window in _windows(info.model.config) if window <= LONG_WINDOW)])
    bucket = -(-(len(text.ids) + beyond + 1) // slots) * slots
    padding = 0 if info.padding_fault else (len(text.ids) - STEPS) // 2
    try:
        fault = _DecodedRows(info, text, (0, padding), info.decode_attention, bucket).differ
    except Exception as error:
        return f"fails on a cache longer than the text ({failure(error)})"
    return "takes the cache's length for the text's" if fault else None


def failure(error: Exception) -> str:
    """Return a model's error as the reason; an error of too little memory is no property of the model and is raised."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        raise error
    return f"{type(error).__name__}: {error}"


# ---- the text and its logits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    ids: torch.Tensor  # (T,) int64
    logits: torch.Tensor  # (T, V): of the token after each prefix
    in_16_bits: bool  # whether anything is computed in 16 bits

    def differ(self, logits: torch.Tensor, expected: torch.Tensor, one_shape: bool = False) -> bool:  # (n, V), (n, V)
        """Whether two computations of n logits differ by more than rounding. `one_shape`: of batches of one shape."""
        spread = (expected - expected.mean(-1, keepdim=True)).abs().mean(-1)
        error = (logits.float() - expected).abs().mean(-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
        error = error.nan_to_num(nan=torch.inf)[expected.isfinite().all(-1)]  # the model's own NaNs are not compared
        if not len(error):
            return False
        if self.in_16_bits:
            return bool(error.median() > (ROUNDING_ONE_SHAPE_16_BIT if one_shape else ROUNDING_16_BIT))
        return bool(error.max() > (ROUNDING_ONE_SHAPE if one_shape else ROUNDING))


def plain_ids(info: ModelInfo) -> torch.Tensor:
    """Return a text without the tokens that the configuration names (images, ends), which models treat specially."""
    config: Any = info.model.config
    values = {**config.to_dict(), **config.get_text_config(decoder=True).to_dict()}
    special = {value for name, value in values.items() if re.search("token|_id$|_index$", name) and type(value) is int}
    short = [window for window in _windows(config) if window <= SHORT_WINDOW]
    length = min([max([TOKENS, *(2 * window + STEPS for window in short)]), *_bounds(info)])
    count = min(info.vocabulary, _embeddings(info) or info.vocabulary)
    plain = [id for id in range(min(count, length + len(special) + 1)) if id not in special] or [0]
    order = [plain[index * 7 % len(plain)] for index in range(length)]
    return torch.tensor(order, dtype=torch.int64, device=info.device)


def _windows(config: Any) -> list[int]:
    """Lengths at which a model's attention may change, by its configuration."""
    values = {**config.to_dict(), **config.get_text_config(decoder=True).to_dict()}
    sizes = [value for name, value in values.items() if re.search("window|chunk|local", name) and type(value) is int]
    return [size for size in sizes if size > 0]


def _bounds(info: ModelInfo) -> list[int]:
    """Lengths up to which all texts are read alike."""
    return [bound for bound in (info.max_positions, info.rotation_turn) if bound is not None]


def _embeddings(info: ModelInfo) -> int | None:
    return getattr(info.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]


def _pad_id(info: ModelInfo) -> int:
    """Return the id that a model may treat as padding whatever the mask."""
    config: Any = info.model.config
    id = getattr(config.get_text_config(decoder=True), "pad_token_id", None)
    return id if isinstance(id, int) and 0 <= id < (_embeddings(info) or info.vocabulary) else 0


def _whole_logits(info: ModelInfo, ids: torch.Tensor, positions: bool) -> torch.Tensor:  # (n, T) -> (n, T, V)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if positions:
        inputs["position_ids"] = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device).expand_as(ids)
    accepted = {name: value for name, value in inputs.items() if name in info.accepted}
    logits: torch.Tensor = info.model(**accepted, return_dict=True).logits
    return logits.float()


@contextmanager
def output_dtypes(model: torch.nn.Module) -> Iterator[set[torch.dtype]]:
    """Collect the dtypes of what modules return, under an autocast of the model's own too."""
    dtypes: set[torch.dtype] = set()

    def collect(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            dtypes.add(output.dtype)

    handles = [module.register_forward_hook(collect) for module in model.modules() if not any(module.children())]
    try:
        yield dtypes
    finally:
        for handle in handles:
            handle.remove()


# ---- the same text, decoded ------------------------------------------------------------------------------------------


class _DecodedRows:
    """Prefixes of the text after padding, decoded to its end by the engine's own runners.

    `padding`: tokens of it before each row. `bucket`: the cache's length where shapes are static, 0 where they grow.
    """

    def __init__(self, info: ModelInfo, text: _Text, padding: Sequence[int], by_kernel: bool, bucket: int = 0) -> None:
        self.text, self.prompt = text, len(text.ids) - STEPS
        self.padding = torch.tensor(padding, dtype=torch.int64, device=info.device)
        rows, length = len(padding), bucket or len(text.ids)
        state = DecodeState(rows, length, info.device)
        runner: Runner = (CachedRunner if info.cached else WholeTextRunner)(info, rows, length, state)
        prompts = self._prompts(_pad_id(info))
        fan_out = torch.arange(rows, dtype=torch.int64, device=info.device)
        state.reset(prompts, fan_out, recorded=bucket > 0)
        with use_attention([info.model]) if by_kernel else nullcontext():
            runner.assign({info.role: (0, rows)})
            logits = [runner.prefill(prompts, fan_out)[info.role]]
            for step in range(STEPS):
                state.bucket = bucket
                state.open_slot()
                logits.append(runner.decode(text.ids[self.prompt + step - self.padding], state)[info.role])
                state.advance()
                state.filled += 1
        self.logits = torch.stack(logits, 1)  # (rows, STEPS + 1, V)

    def _prompts(self, pad_id: int) -> Prompts:
        """Padded with `pad_id` in even rows, with a token of the text in odd ones."""
        slots = torch.arange(self.prompt, dtype=torch.int64, device=self.padding.device) - self.padding[:, None]
        filler = torch.full_like(self.padding, pad_id)
        filler[1::2] = self.text.ids[-1]
        mask = (slots >= 0).long()
        ids = torch.where(mask == 1, self.text.ids[slots.clamp(min=0)], filler[:, None])
        return Prompts(ids, mask, padded=bool(self.padding.any()))

    @property
    def differ(self) -> bool:
        """Whether any row's logits are not those of the whole text."""
        steps = torch.arange(-1, STEPS, dtype=torch.int64, device=self.padding.device)
        places = self.prompt - self.padding[:, None] + steps
        rows = zip(self.logits, places, strict=True)
        return any(self.text.differ(logits, self.text.logits[row_places]) for logits, row_places in rows)


def _far_step(info: ModelInfo) -> Callable[[], tuple[int, int, int]]:
    """A step past every window, over a cache that stores nothing.

    It returns how many layers stored keys, and the range [start, end) of slots that the step may see.
    """
    start, device = 1, info.device
    last = max([TOKENS, *_windows(info.model.config)]) + 1
    last = max(start + 1, min([last, *(bound - 1 for bound in _bounds(info))]))

    def step() -> tuple[int, int, int]:
        layers = [FarLayer(last) for _ in info.layers]
        mask = torch.ones(1, last + 1, dtype=torch.int64, device=device)
        mask[:, :start] = 0
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        inputs = {"input_ids": token, "attention_mask": mask, "position_ids": token + last - start, "use_cache": True}
        accepted = {name: value for name, value in inputs.items() if name in info.accepted}
        info.model(**accepted, **{str(info.cache_argument): Cache(layers=list(layers))}, return_dict=True)
        return sum(layer.shape is not None for layer in layers), start, last + 1

    return step
