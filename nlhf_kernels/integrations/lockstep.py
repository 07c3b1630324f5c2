"""Two causal language models in lockstep: every token is drawn from their geometric mixture.

Uses transformers' call convention for models, logits processors and stopping criteria, and imports nothing of it. Each
model decodes with a cache of its own, which it makes itself; a model that makes none reads the whole text every step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch

from ..core.checks import INTEGERS, Sizes, check_integer, check_number, check_option, check_tensor
from ..ops import log_linear_sample, mixture_settings

_OP = "generate_mixture"
PADDING_TOLERANCE = 0.01  # what rounding may do to a logit, relative; padding that is read moves it far more
_LEAVES_PADDING_OUT: WeakSet[torch.nn.Module] = WeakSet()  # models seen to
LOGPROBS = ("policy", "reference", "mixture")
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # token ids (B, L), scores (B, V) -> scores
Criterion = Callable[[torch.Tensor, Any], "torch.Tensor | bool"]  # token ids (B, L), None -> (B,) bool
Beta = float | torch.Tensor


@dataclass(frozen=True)
class MixtureGeneration:
    """What `generate_mixture` drew. B rows, prompts of S tokens, T new tokens."""

    sequences: torch.Tensor  # (B, S + T) int64; the pad id after a row's end
    mask: torch.Tensor  # (B, T) bool: tokens the row generated, its end-of-sequence token included
    policy_logprobs: torch.Tensor | None  # (B, T) float32, at temperature 1, unfiltered; 0 where mask is False
    reference_logprobs: torch.Tensor | None  # likewise; None without a reference
    mixture_logprobs: torch.Tensor | None  # (B, T) float32, of what was drawn from: after temperature and filters
    ok: torch.Tensor  # (B,) bool; False: at some step the logits were no distribution (NaN), the token there is 0
    seed: int  # gives the same rows again

    @property
    def tokens(self) -> torch.Tensor:  # (B, T)
        return self.sequences[:, self.sequences.shape[1] - self.mask.shape[1] :]


@torch.no_grad()
def generate_mixture(
    policy: torch.nn.Module,
    reference: torch.nn.Module | None,  # None: the policy alone
    input_ids: torch.Tensor,  # (B, S) int64, padded on the left
    attention_mask: torch.Tensor | None = None,  # (B, S), 0 at padding; None: there is none
    *,
    max_new_tokens: int,
    beta: Beta | None = None,  # number, (B,) or one per returned row; needed with a reference
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    row_ids: torch.Tensor | None = None,  # (B,) or one per returned row, int64
    stream: int = 0,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | torch.Tensor | None = None,
    pad_token_id: int | None = None,
    min_new_tokens: int = 0,
    vocab_size: int | None = None,
    logits_processor: Sequence[Processor] = (),
    stopping_criteria: Sequence[Criterion] = (),
    streamer: Any = None,
    use_cache: bool = True,
    logprobs: Sequence[str] | None = None,
    backend: str | None = None,
) -> MixtureGeneration:
    """Decode with both models, token by token, from softmax(((1 - beta) z_policy + beta z_reference) / temperature).

    temperature, top_k, top_p, min_p, vocab_size, stream and backend are those of `mixture_sample`; temperature 0 is
    greedy. The noise of a row is a function of (seed, its row id, the new token's index, stream): not of the batch.
    seed None draws one from torch's default generator. row_ids None counts the returned rows; (B,) ids give returned
    sequence j of a prompt the id `row_id * num_return_sequences + j`.

    eos_token_id None means the policy's own, () none; pad_token_id None means the first of them. Processors see the
    mixture's raw logits, before temperature and filters. logprobs names what is kept, of policy, reference, mixture.
    Dropout is off meanwhile; the models' training flags come back as they were.
    """
    mask = _check_prompts(input_ids, attention_mask)
    rows = len(input_ids) * check_integer(_OP, "num_return_sequences", num_return_sequences, 1, 2**31)
    check_integer(_OP, "max_new_tokens", max_new_tokens, 1, 2**31)
    models = [_Model("policy", policy, use_cache)]
    if reference is not None:
        models.append(_Model("reference", reference, use_cache))
    device, expand = input_ids.device, num_return_sequences
    ids = _per_row("row_ids", row_ids, expand, rows, device)
    weights = _weights(beta, reference is not None, expand, rows, device)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    eos = _end_ids(policy, eos_token_id, device)
    seed = int(torch.randint(2**63 - 1, ())) if seed is None else check_integer(_OP, "seed", seed, -(2**63), 2**63 - 1)
    sampler = _Sampler(weights, filters, (seed, ids, stream), vocab_size, logits_processor, logprobs, device, backend)
    sampler.forbid(eos, check_integer(_OP, "min_new_tokens", min_new_tokens, 0, max_new_tokens))
    pad = int(eos[0]) if pad_token_id is None and len(eos) else pad_token_id
    input_ids = input_ids.repeat_interleave(expand, 0)
    mask = None if mask is None else mask.repeat_interleave(expand, 0)
    with _evaluating(policy, *([] if reference is None else [reference])):
        return _decode(models, sampler, input_ids, mask, max_new_tokens, eos, pad, stopping_criteria, streamer)


def _decode(
    models: Sequence[_Model],
    sampler: _Sampler,
    sequences: torch.Tensor,  # (B, S), grows by a column a step
    mask: torch.Tensor | None,  # (B, S)
    max_new_tokens: int,
    eos: torch.Tensor,  # (E,)
    pad: int | None,
    criteria: Sequence[Criterion],
    streamer: Any,
) -> MixtureGeneration:
    ones = torch.ones_like(sequences)
    # Positions count a row's own tokens, so that padding moves nothing; what padding itself has is masked anyway.
    positions = ((ones if mask is None else mask).cumsum(-1) - 1).clamp(min=0)
    finished = torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)
    ok = ~finished
    alive: list[torch.Tensor] = []
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in sampler.names}
    for step in range(max_new_tokens):
        sample, logprobs = sampler([model(sequences, mask, positions) for model in models], sequences, step)
        alive.append(~finished)
        for name, column in logprobs.items():
            columns[name].append(column.masked_fill(finished, 0.0))
        ok &= sample.ok | finished
        tokens = sample.tokens if pad is None else sample.tokens.masked_fill(finished, pad)
        sequences = torch.cat([sequences, tokens[:, None]], -1)
        mask = None if mask is None else torch.cat([mask, ones[:, :1]], -1)
        positions = torch.cat([positions, positions[:, -1:] + 1], -1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        finished = finished | torch.isin(tokens, eos)
        for criterion in criteria:
            finished = finished | criterion(sequences, None)
        if finished.all():
            break
        if pad is None and finished.any():
            raise ValueError(f"{_OP}: pad_token_id: expected an id, as a row ended before the others; got None")
    if streamer is not None:
        streamer.end()
    kept = {f"{name}_logprobs": torch.stack(columns[name], 1) if name in columns else None for name in LOGPROBS}
    return MixtureGeneration(sequences, torch.stack(alive, 1), **kept, ok=ok, seed=sampler.seed)


class _Model:
    """One model and its own cache: never handed in, never shared."""

    def __init__(self, role: str, model: torch.nn.Module, use_cache: bool) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{_OP}: {role}: expected a causal language model; got {type(model).__name__}")
        self.role, self.model, self.cache = role, model, None
        self.config: Any = getattr(model, "config", None)
        if getattr(self.config, "is_encoder_decoder", False):
            raise ValueError(f"{_OP}: {role}: expected a decoder-only model; got {type(model).__name__}")
        inner: Any = model
        if callable(unwrapped := getattr(model, "get_base_model", None)):
            inner = unwrapped()  # peft's own forward says nothing of its arguments
        self.accepted = inspect.signature(getattr(inner, "_orig_mod", inner).forward).parameters
        self.use_cache = use_cache and "past_key_values" in self.accepted
        self.device: torch.device = next(model.parameters()).device

    def __call__(self, sequences: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, (B, V). Only what the cache has not seen is read."""
        fresh = sequences.shape[1] if self.cache is None else 1
        inputs: dict[str, Any] = {
            "input_ids": sequences[:, -fresh:],
            "attention_mask": mask,
            "position_ids": positions[:, -fresh:],
            "past_key_values": self.cache,
            "use_cache": self.use_cache,
            "logits_to_keep": 1,
        }
        inputs = {name: self._here(value) for name, value in inputs.items() if name in self.accepted}
        if mask is not None and self.model not in _LEAVES_PADDING_OUT:
            self._check_padding(inputs)
        outputs = self.model(**inputs, return_dict=True)
        if self.use_cache:
            self.cache = getattr(outputs, "past_key_values", None)
        logits: torch.Tensor = outputs.logits[:, -1]
        return (logits.float() if logits.dtype == torch.float64 else logits).to(sequences.device)

    def _check_padding(self, inputs: dict[str, Any]) -> None:
        """Some recurrent models take an attention mask and read the padding all the same. Two prompts that differ only
        in padding tell, the first time a model sees any."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        highest = ids.max()
        other = torch.where(ids == highest, 0, highest)
        inputs = {name: value for name, value in inputs.items() if name not in ("past_key_values", "use_cache")}
        if "use_cache" in self.accepted:
            inputs["use_cache"] = False
        one, two = (
            self.model(**{**inputs, "input_ids": prompt}, return_dict=True).logits[:, -1].float()
            for prompt in (ids, ids if mask is None else torch.where(mask == 0, other, ids))
        )
        if mask is None or ((one - two).abs() > PADDING_TOLERANCE * one.abs().clamp(min=1.0)).any():
            raise ValueError(
                f"{_OP}: attention_mask: expected prompts of one length; got padding, which the {self.role}, "
                f"{type(self.model).__name__}, does not leave out"
            )
        _LEAVES_PADDING_OUT.add(self.model)

    def _here(self, value: Any) -> Any:
        moves = isinstance(value, torch.Tensor) and self.device.type != "meta"  # meta: its hooks know where to
        return value.to(self.device) if moves else value


class _Sampler:
    """What stays the same from step to step of one generation."""

    def __init__(
        self,
        weights: Sequence[Beta],  # one per model: number or (B,)
        filters: dict[str, Any],
        draw: tuple[int, torch.Tensor, int],  # seed, row ids (B,), stream
        vocab_size: int | None,
        processors: Sequence[Processor],
        logprobs: Sequence[str] | None,
        device: torch.device,
        backend: str | None,
    ) -> None:
        self.weights, self.processors = weights, processors
        self.seed, self.row_ids, self.stream = draw
        self.seed_tensor = torch.full((), self.seed, dtype=torch.int64, device=device)
        # Where processors have made a matrix of scores, that is what is drawn from: a further model, of weight 1.
        self.drawn = [*[0.0] * len(weights), 1.0] if processors else list(weights)
        self.settings = mixture_settings(self.drawn, **filters, device=device, op=_OP)
        self.vocab_size, self.backend = vocab_size, backend
        known = LOGPROBS[:: 3 - len(weights)]  # the policy alone has no reference
        self.names = [check_option(_OP, "logprobs", name, known) for name in (known if logprobs is None else logprobs)]
        self.eos, self.min_new_tokens = self.row_ids[:0], 0

    def forbid(self, eos: torch.Tensor, min_new_tokens: int) -> None:
        self.eos, self.min_new_tokens = eos, min_new_tokens if len(eos) else 0

    def __call__(
        self, logits: list[torch.Tensor], sequences: torch.Tensor, step: int
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        logits = self._same_vocabulary(logits)
        indices = {name: index for index, name in enumerate(LOGPROBS[: len(logits)])}
        if self.processors:
            scores = self._mixed(logits)
            for processor in self.processors:
                scores = processor(sequences, scores).float()
            logits = [*logits, scores]
        bias = None
        if step < self.min_new_tokens:
            bias = torch.zeros(logits[0].shape[1], device=sequences.device).index_fill_(0, self.eos, -torch.inf)
        sample = log_linear_sample(
            logits,
            self.drawn,
            settings=self.settings,
            seed=self.seed_tensor,
            row_ids=self.row_ids,
            step=step,
            stream=self.stream,
            bias=bias,
            logprobs=[indices.get(name, "mixture") for name in self.names],
            backend=self.backend,
        )
        found = {name: sample.mixture_logprob if name == "mixture" else sample.logprobs[indices[name]]
                 for name in self.names}  # fmt: skip
        return sample, {name: column for name, column in found.items() if column is not None}

    def _same_vocabulary(self, logits: list[torch.Tensor]) -> list[torch.Tensor]:
        widths = [model.shape[1] for model in logits]
        if self.vocab_size is not None:
            check_integer(_OP, "vocab_size", self.vocab_size, 1, min(widths))
            return [model[:, : self.vocab_size] for model in logits]
        if len(set(widths)) > 1:
            raise ValueError(
                f"{_OP}: expected policy and reference of one vocabulary; got {widths[0]} tokens and {widths[1]} "
                "(vocab_size=... leaves out the columns that only pad a head)"
            )
        return logits

    def _mixed(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """(B, V) float32. A model of weight 0 is not touched: 0 * -inf is NaN."""
        mixed = torch.zeros(logits[0].shape, device=logits[0].device)
        for weight, model in zip(self.weights, logits, strict=True):
            if isinstance(weight, torch.Tensor):
                column = weight.to(mixed.dtype).unsqueeze(-1)
                mixed = mixed + torch.where(column == 0, 0.0, column * model.float())
            elif weight != 0:
                mixed = mixed + weight * model.float()
        return mixed


@contextmanager
def _evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Dropout off; every submodule's own flag comes back, as some may have been frozen in evaluation mode."""
    flags = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _check_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask, or None where nothing is padding."""
    sizes: Sizes = {}
    check_tensor(_OP, "input_ids", input_ids, ("rows", "prompt"), INTEGERS, sizes)
    if not input_ids.numel():
        raise ValueError(f"{_OP}: input_ids: expected at least one row and one token; got {tuple(input_ids.shape)}")
    if attention_mask is None:
        return None
    dtypes = (torch.int64, torch.int32, torch.bool)
    check_tensor(_OP, "attention_mask", attention_mask, ("rows", "prompt"), dtypes, sizes, input_ids.device)
    mask = attention_mask.long()
    if not mask[:, -1].all():
        raise ValueError(f"{_OP}: attention_mask: expected padding on the left; got a row whose last token is masked")
    return None if mask.all() else mask


def _per_row(
    name: str, ids: torch.Tensor | None, expand: int, rows: int, device: torch.device
) -> torch.Tensor:  # (rows,)
    """Row ids of the returned rows, distinct wherever those of the prompts are."""
    if ids is None:
        return torch.arange(rows, device=device)
    check_tensor(_OP, name, ids, ("rows",), INTEGERS, {}, device)
    if len(ids) == rows:
        return ids
    if len(ids) * expand != rows:
        raise ValueError(f"{_OP}: {name}: expected {rows // expand}, one per prompt, or {rows}; got {len(ids)}")
    return (ids[:, None] * expand + torch.arange(expand, device=device)).flatten()


def _weights(beta: Beta | None, mixes: bool, expand: int, rows: int, device: torch.device) -> list[Beta]:
    if (beta is None) is mixes:
        raise ValueError(f"{_OP}: beta: expected with a reference and not without; got {beta!r}")
    if beta is None:
        return [1.0]
    if not isinstance(beta, torch.Tensor):
        beta = check_number(_OP, "beta", beta)
    else:
        beta = beta.to(device)
        if beta.ndim == 1 and len(beta) * expand == rows:
            beta = beta.repeat_interleave(expand)
        if beta.shape not in ((), (rows,)):
            raise ValueError(f"{_OP}: beta: expected a number or one per row, {rows}; got shape {tuple(beta.shape)}")
        beta = beta.expand(rows)
    return [1 - beta, beta]


def _end_ids(
    policy: Any, eos_token_id: int | Sequence[int] | torch.Tensor | None, device: torch.device
) -> torch.Tensor:  # (E,) int64
    if eos_token_id is None:
        eos_token_id = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    if isinstance(eos_token_id, int):
        eos_token_id = [eos_token_id]
    return torch.as_tensor(() if eos_token_id is None else eos_token_id, dtype=torch.int64, device=device).flatten()
