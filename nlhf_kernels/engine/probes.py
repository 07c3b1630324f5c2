"""Short texts, read in every way the engine reads them, beside the model's own forward pass over the whole text.

Whether a model attends to padding, counts slots instead of tokens, takes a mask from the length of its cache or looks
ahead is written nowhere that could be asked. Numbers tell: in a causal model every prefix of one text has its logits in
one forward pass, so a few rows of padded prefixes, decoded a few tokens on, are compared with those. What is found
holds for the model's code and configuration, and is remembered with the model.
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

from ..core.upstream import attention_name, experts_name
from .attention import attending, takes_decode_attention
from .caches import FarLayer
from .clock import Clock
from .models import ModelFacts, evaluating, in_turn, plainly
from .readers import CachedReader, Reader, WholeTextReader
from .request import Prompts

TOKENS, STEPS = 16, 4  # of the text, at least; of them, those that are decoded
SHORT_WINDOW, LONG_WINDOW = 64, 1024  # the text goes past windows up to the first, a bucket past those up to the second
#: What rounding may do to logits, of their spread. In float32 at every position; in halves, where it may also send
#: tokens to other experts, at the median one.
ROUNDING, ROUNDING_OF_HALVES = 1e-3, 0.1
#: Among rows of one shape, whose arithmetic is the same.
ROUNDING_IN_PLACE, ROUNDING_IN_PLACE_OF_HALVES = 1e-4, 0.02
_found: WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Findings:
    refused: str | None = None  # why it cannot be read this way at all
    padding: str | None = None  # what is wrong with padded prompts: "the policy, NAME, ..."
    decode_attention: bool = False


def examine(facts: ModelFacts, may_replace_attention: bool, op: str) -> ModelFacts:
    """`facts` completed by what comparisons find; a model that is wrong without padding, too, is refused."""
    if _is_meta(facts.model):
        return facts
    question = "examined", may_replace_attention
    found: Findings = _remembered(facts, question, lambda: _examine(facts, may_replace_attention))
    if found.refused is not None:
        raise ValueError(f"{op}: {facts.role}: {found.refused}")
    return replace(facts, padding=found.padding, decode_attention=found.decode_attention)


def why_not_standing(facts: ModelFacts, slots: int) -> str | None:
    """Why steps may not read a cache that is longer than the text, in buckets of `slots`; None where they may."""
    if _is_meta(facts.model) or not facts.cached:
        return None
    question = "standing", facts.decode_attention, facts.padding, slots
    answer: str | None = _remembered(facts, question, lambda: _why_not_standing(facts, slots))
    return answer


def _remembered(facts: ModelFacts, question: tuple[Any, ...], answer: Callable[[], Any]) -> Any:
    with in_turn(facts.model):
        config = facts.model.config
        chosen = (attention_name(config), experts_name(config))
        wrapper = id(vars(facts.model).get("forward"))  # an autocast of accelerate's, say
        key = *question, facts.layers, facts.dtype, facts.device, wrapper, *chosen
        known = _found.setdefault(facts.model, {})
        if key not in known:
            with plainly(facts.device), evaluating(facts.model), exact_products():
                known[key] = answer()
        return known[key]


def _is_meta(model: torch.nn.Module) -> bool:
    return next(model.parameters()).device.type == "meta"


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products as float32: TF32 would hide small effects in its rounding."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the text and its logits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    ids: torch.Tensor  # (T,) int64
    logits: torch.Tensor  # (T, V): of what follows each prefix
    halves: bool  # whether anything is computed in 16 bits

    def differ(self, got: torch.Tensor, want: torch.Tensor, exact: bool = False) -> bool:  # (n, V), (n, V)
        """Whether two computations of n logits differ by more than rounding. `exact`: computations of one shape."""
        spread = (want - want.mean(-1, keepdim=True)).abs().mean(-1)
        off = (got.float() - want).abs().mean(-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
        off = off.nan_to_num(nan=torch.inf)[want.isfinite().all(-1)]  # a NaN of the model's own says nothing
        if not len(off):
            return False
        if self.halves:
            return bool(off.median() > (ROUNDING_IN_PLACE_OF_HALVES if exact else ROUNDING_OF_HALVES))
        return bool(off.max() > (ROUNDING_IN_PLACE if exact else ROUNDING))


def _windows(config: Any) -> list[int]:
    """Lengths at which a model's attention may change, by its configuration."""
    named = {**config.to_dict(), **config.get_text_config(decoder=True).to_dict()}
    sizes = [value for name, value in named.items() if re.search("window|chunk|local", name) and type(value) is int]
    return [size for size in sizes if size > 0]


def plain_ids(facts: ModelFacts) -> torch.Tensor:
    """Different tokens, none of them special by the configuration: images, ends and the like have ways of their own."""
    config: Any = facts.model.config
    named = {**config.to_dict(), **config.get_text_config(decoder=True).to_dict()}
    special = {value for name, value in named.items() if re.search("token|_id$|_index$", name) and type(value) is int}
    short = [window for window in _windows(config) if window <= SHORT_WINDOW]
    length = min([max([TOKENS, *(2 * window + STEPS for window in short)]), *_bounds(facts)])
    count = min(facts.vocabulary, _embeddings(facts) or facts.vocabulary)
    plain = [id for id in range(min(count, length + len(special) + 1)) if id not in special] or [0]
    order = [plain[index * 7 % len(plain)] for index in range(length)]
    return torch.tensor(order, dtype=torch.int64, device=facts.device)


def _bounds(facts: ModelFacts) -> list[int]:
    """Lengths up to which texts are read alike."""
    return [bound for bound in (facts.positions, facts.turns) if bound is not None]


def _embeddings(facts: ModelFacts) -> int | None:
    return getattr(facts.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]


def _pad(facts: ModelFacts) -> int:
    """The id that a model may take for padding by itself, whatever the mask says."""
    config: Any = facts.model.config
    id = getattr(config.get_text_config(decoder=True), "pad_token_id", None)
    return id if isinstance(id, int) and 0 <= id < (_embeddings(facts) or facts.vocabulary) else 0


def _whole(facts: ModelFacts, ids: torch.Tensor, positions: bool) -> torch.Tensor:  # (n, T) -> (n, T, V)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if positions:
        inputs["position_ids"] = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device).expand_as(ids)
    accepted = {name: value for name, value in inputs.items() if name in facts.accepted}
    logits: torch.Tensor = facts.model(**accepted, return_dict=True).logits
    return logits.float()


@contextmanager
def precisions(model: torch.nn.Module) -> Iterator[set[torch.dtype]]:
    """The dtypes of what modules give, an autocast of the model's own included."""
    seen: set[torch.dtype] = set()

    def look(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            seen.add(output.dtype)

    handles = [module.register_forward_hook(look) for module in model.modules() if not any(module.children())]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ---- questions -------------------------------------------------------------------------------------------------------


def _examine(facts: ModelFacts, may_replace_attention: bool) -> Findings:
    text = _read(facts)
    if isinstance(text, str):
        return Findings(refused=text)
    by_kernel = [False]
    if may_replace_attention and facts.cached and takes_decode_attention(facts.model, _far_step(facts)):
        by_kernel = [True, False]
    refused, padding = None, None
    for kernel in by_kernel:
        refused = _wrong_without_padding(facts, text, kernel)
        padding = None if refused else _what_padding_does(facts, text, kernel)
        if refused is None and padding is None:
            return Findings(decode_attention=kernel)
    return Findings(refused=refused, padding=padding)


def _read(facts: ModelFacts) -> _Text | str:
    """The text, or why there is none with which anything could be compared."""
    ids = plain_ids(facts)
    half = len(ids) // 2
    changed = torch.cat([ids[:half], torch.full_like(ids[half:], _pad(facts))])
    with precisions(facts.model) as seen:
        both = _whole(facts, torch.stack([ids, changed]), positions=False)
    exact = {torch.float32, torch.float64}
    text = _Text(ids, both[0], halves=not {facts.dtype, *seen} <= exact)
    if text.differ(both[1, :half], both[0, :half], exact=True):
        return (
            f"expected a model that reads from left to right; the logits of {facts.name} change with tokens that come "
            "later (a model of both directions, or is_decoder=False)"
        )
    placed = _whole(facts, ids[None], positions=True)[0]
    if text.differ(placed, text.logits):
        return f"expected tokens at positions 0, 1, 2, ...; {facts.name} counts them otherwise by itself"
    return replace(text, logits=placed)


def _wrong_without_padding(facts: ModelFacts, text: _Text, by_kernel: bool) -> str | None:
    try:
        wrong = "it gives other logits" if _Rows(facts, text, (0,), by_kernel).wrong else None
    except Exception as error:
        wrong = _failure(error)
    if wrong is None:
        return None
    if facts.cached:
        return (
            f"expected steps over a cache to say what the whole text says; {facts.name} does not ({wrong}; "
            "use_cache=False reads the whole text every step)"
        )
    return f"expected logits that depend on the text so far alone; those of {facts.name} do not ({wrong})"


def _what_padding_does(facts: ModelFacts, text: _Text, by_kernel: bool) -> str | None:
    """Several amounts, the most of it before a text too short for a recurrent model to forget it; two fillers there."""
    prompt = len(text.ids) - STEPS
    try:
        rows = _Rows(facts, text, (0, 1, prompt // 2, prompt - 2, prompt - 2), by_kernel)
    except Exception as error:
        return f"fails on it ({_failure(error)})"
    if not rows.wrong:
        return None
    return "reads it" if text.differ(rows.logits[3], rows.logits[4]) else "gives other logits after it"


def _why_not_standing(facts: ModelFacts, slots: int) -> str | None:
    text = _read(facts)
    assert isinstance(text, _Text), "examined before"
    beyond = max([0, *(window for window in _windows(facts.model.config) if window <= LONG_WINDOW)])
    bucket = -(-(len(text.ids) + beyond + 1) // slots) * slots
    padding = 0 if facts.padding else (len(text.ids) - STEPS) // 2
    try:
        wrong = _Rows(facts, text, (0, padding), facts.decode_attention, bucket).wrong
    except Exception as error:
        return f"fails on a cache longer than the text ({_failure(error)})"
    return "takes the cache's length for the text's" if wrong else None


def _failure(error: Exception) -> str:
    """What a model makes of a text that it does not take. Memory that is short says nothing of the model."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        raise error
    return f"{type(error).__name__}: {error}"


class _Rows:
    """Prefixes of the text after padding, decoded to its end by the engine's own readers.

    padding: of each row. bucket: the cache's length where shapes stand, 0 where they grow.
    """

    def __init__(
        self, facts: ModelFacts, text: _Text, padding: Sequence[int], by_kernel: bool, bucket: int = 0
    ) -> None:
        self.text, self.prompt = text, len(text.ids) - STEPS
        self.padding = torch.tensor(padding, dtype=torch.int64, device=facts.device)
        rows, length = len(padding), bucket or len(text.ids)
        clock = Clock(rows, length, facts.device)
        reader: Reader = (CachedReader if facts.cached else WholeTextReader)(facts, rows, length, clock)
        prompts = self._prompts(_pad(facts))
        every = torch.arange(rows, dtype=torch.int64, device=facts.device)
        clock.start(prompts, every, recorded=bucket > 0)
        with attending([facts.model]) if by_kernel else nullcontext():
            logits = [reader.start(prompts, every, {facts.role: (0, rows)})[facts.role]]
            for step in range(STEPS):
                clock.bucket = bucket
                clock.open_slot()
                logits.append(reader.step(text.ids[self.prompt + step - self.padding], clock)[facts.role])
                clock.close_slot()
                clock.filled += 1
        self.logits = torch.stack(logits, 1)  # (rows, STEPS + 1, V)

    def _prompts(self, pad: int) -> Prompts:
        """Filled with `pad` in even rows, with a token of the text in odd ones."""
        slots = torch.arange(self.prompt, dtype=torch.int64, device=self.padding.device) - self.padding[:, None]
        filler = torch.full_like(self.padding, pad)
        filler[1::2] = self.text.ids[-1]
        mask = (slots >= 0).long()
        ids = torch.where(mask == 1, self.text.ids[slots.clamp(min=0)], filler[:, None])
        return Prompts(ids, mask, padded=bool(self.padding.any()))

    @property
    def wrong(self) -> bool:
        steps = torch.arange(-1, STEPS, dtype=torch.int64, device=self.padding.device)
        places = self.prompt - self.padding[:, None] + steps
        return any(self.text.differ(got, self.text.logits[row]) for got, row in zip(self.logits, places, strict=True))


def _far_step(facts: ModelFacts) -> Callable[[], tuple[int, int, int]]:
    """A step past every window, over a cache that holds nothing. It returns how many layers kept keys, and the range
    [start, end) of slots that the step may see."""
    start, device = 1, facts.device
    last = max([TOKENS, *_windows(facts.model.config)]) + 1
    last = max(start + 1, min([last, *(bound - 1 for bound in _bounds(facts))]))

    def step() -> tuple[int, int, int]:
        layers = [FarLayer(last) for _ in facts.layers]
        mask = torch.ones(1, last + 1, dtype=torch.int64, device=device)
        mask[:, :start] = 0
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        inputs = {"input_ids": token, "attention_mask": mask, "position_ids": token + last - start, "use_cache": True}
        accepted = {name: value for name, value in inputs.items() if name in facts.accepted}
        facts.model(**accepted, **{str(facts.cache_argument): Cache(layers=list(layers))}, return_dict=True)
        return sum(layer.shape is not None for layer in layers), start, last + 1

    return step
