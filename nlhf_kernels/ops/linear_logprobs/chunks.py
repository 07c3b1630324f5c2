"""From hidden states to log-probabilities and back, a chunk of rows at a time: the logits are never stored whole.

One buffer of logits serves all chunks and both models: the reference is scored first and only its log-probabilities are
kept, unless an output compares the models over the vocabulary (KL, mixture); then a chunk holds the logits of both. The
gradient is written over the policy's logits and multiplied from there (README.md, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...core.native import free_bytes, is_capturing
from ...core.registry import Backend
from ..logprobs.layout import (
    IGNORED,
    Extra,
    LogprobsBackwardInputs,
    LogprobsInputs,
    Normalizer,
    Output,
    Settings,
    real_dtype,
)
from .products import add_weight_gradient, logits_into

_TILE = 128  # rows that a matrix product handles at a time on a GPU: a chunk is a multiple where it can
CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}  # of logits at a time, both models together
#: Forward and backward of 8192 rows in bfloat16, milliseconds with chunks of 512 MiB, 1 GiB and 2 GiB on an H200:
#: D 4096, V 128256: 56.9, 56.3, 53.4; D 896, V 151936: 18.1, 17.4, 18.5.
_WIDE = 2048  # hidden sizes from here on gain from 2 GiB, others from 1 GiB
_FREE_SHARE = 8  # a chunk takes no more than this part of the free memory


def choose_chunk_bytes(device: torch.device, hidden_size: int, compares: bool) -> int:
    """Return the bytes of logits to hold at a time: more than the default on a GPU that has memory to spare.

    Every chunk but the first reads and writes the head's float32 gradient again. So a chunk of both models' logits gets
    twice the bytes, and with them the rows of a chunk of one model's.

    It is a power of two, so that the sums of a gradient are rounded alike from call to call unless memory runs short.
    During a graph capture it is the default, since a graph keeps its memory.

    Args:
        device: of the logits.
        hidden_size: of the policy.
        compares: whether a chunk holds both models' logits.
    """
    if device.type != "cuda" or is_capturing(device):
        return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return chunk_bytes_with(free_bytes(device), hidden_size, compares)


def chunk_bytes_with(free: int, hidden_size: int, compares: bool) -> int:
    """Return `choose_chunk_bytes` of a GPU.

    Args:
        free: bytes of memory that it has free.
        hidden_size: of the policy.
        compares: whether a chunk holds both models' logits.
    """
    chunk, least = (2 << 30) if hidden_size >= _WIDE else (1 << 30), CHUNK_BYTES["cuda"]
    if compares:
        chunk *= 2
    while chunk > least and chunk * _FREE_SHARE > free:
        chunk //= 2
    return chunk


def compares_models(settings: Settings) -> bool:
    """Return whether both models' logits are needed at once."""
    return bool(settings.extras & (Extra.KL | Extra.MIXTURE))


def chunk_rows(rows: int, vocabulary: int, itemsize: int, compares: bool, chunk_bytes: int) -> int:
    """Return how many rows of logits are held at a time.

    Args:
        rows: of the call.
        vocabulary: entries of a row.
        itemsize: bytes of an entry.
        compares: whether a chunk holds both models' logits.
        chunk_bytes: of logits at a time.
    """
    fitting = chunk_bytes // max(1, vocabulary * itemsize * (2 if compares else 1))
    return max(1, min(rows, fitting // _TILE * _TILE or fitting))


class Side(NamedTuple):
    """What one model's logits are computed from."""

    hidden: torch.Tensor  # (N, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)

    def to(self, dtype: torch.dtype) -> Side:
        return Side(self.hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def shares_head_with(self, other: Side) -> bool:
        return _same(self.weight, other.weight) and _same(self.bias, other.bias)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Return whether both are None, or the same elements of the same memory."""
    if one is None or other is None:
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


class ScoredRows(NamedTuple):
    """The rows whose logits are computed: on the CPU those that are scored; on a GPU all of them, since counting them
    would wait for the device."""

    indices: torch.Tensor | None  # (K,); None: all
    total: int  # N

    @staticmethod
    def of(targets: torch.Tensor) -> ScoredRows:
        scored = targets != IGNORED
        if targets.device.type != "cpu" or bool(scored.all()):
            return ScoredRows(None, targets.numel())
        return ScoredRows(scored.nonzero().squeeze(1), targets.numel())

    def pick(self, values: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Return the K of all N along `dim`."""
        return values if self.indices is None else values.index_select(dim, self.indices)

    def spread(self, values: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Return N values along `dim` from those of K rows, 0 for the others."""
        if self.indices is None:
            return values
        shape = list(values.shape)
        shape[dim] = self.total
        return values.new_zeros(shape).index_copy_(dim, self.indices, values)

    def offsets(self, offsets: torch.Tensor) -> torch.Tensor:
        """Return where sequences begin among the K rows."""
        return offsets if self.indices is None else torch.searchsorted(self.indices, offsets)


@dataclass(frozen=True)
class Chunked:
    """A call of a linear op, to be computed chunk by chunk. Its N rows are the caller's scored rows."""

    policy: Side
    reference: Side | None
    targets: torch.Tensor  # (N,)
    beta: torch.Tensor | None  # () or (N,)
    settings: Settings
    backend: Backend  # of the room logprobs; runs on rows of logits
    chunk_bytes: int
    scored: ScoredRows

    @property
    def compares(self) -> bool:
        return compares_models(self.settings)

    @property
    def columns(self) -> int:
        """Return the columns of a row of logits by which chunks are sized."""
        return self.policy.weight.shape[0]

    @property
    def rows_per_chunk(self) -> int:
        sizes = self.columns, self.policy.weight.element_size(), self.compares, self.chunk_bytes
        return chunk_rows(self.targets.numel(), *sizes)

    def buffer(self) -> torch.Tensor:
        rows = self.rows_per_chunk * (2 if self.compares else 1)
        return torch.empty(
            (rows, self.policy.weight.shape[0]), dtype=self.policy.weight.dtype, device=self.targets.device
        )

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[slice]:
        last = self.targets.numel() if last is None else last
        for start in range(first, last, self.rows_per_chunk):
            yield slice(start, min(start + self.rows_per_chunk, last))

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate values and normalizers of all rows."""
        real, count = real_dtype(self.policy.weight.dtype), self.targets.numel()
        shapes = ((len(Output), count), (len(Normalizer), count))
        values, normalizers = (torch.zeros(shape, dtype=real, device=self.targets.device) for shape in shapes)
        return values, normalizers

    def reference_logprobs(self, buffer: torch.Tensor) -> torch.Tensor:  # (N,)
        """Score the reference alone, as if it were the policy."""
        assert self.reference is not None, "there is a reference"
        settings = Settings(self.settings.temperature, self.settings.reference)
        parts = []
        for rows in self.chunks():
            logits = _logits(self.reference, rows, buffer)
            parts.append(self.score_rows(logits, None, rows, settings))
        values, normalizers = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return self.merged(values, normalizers, slice(0, values.shape[1]), settings)[0][Output.POLICY]

    def logits(self, rows: slice, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the logits of the policy, and of the reference where the outputs compare them, in `buffer`."""
        if not self.compares or self.reference is None:
            return _logits(self.policy, rows, buffer), None
        count = rows.stop - rows.start
        if self.policy.shares_head_with(self.reference):
            stacked = torch.cat([self.policy.hidden[rows], self.reference.hidden[rows]])
            both = logits_into(buffer[: 2 * count], stacked, self.policy.weight, self.policy.bias)
            return both[:count], both[count:]
        return _logits(self.policy, rows, buffer), _logits(self.reference, rows, buffer[count:])

    def score(self, rows: slice, logits: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the local columns; `merged` combines them to results over the vocabulary."""
        return self.score_rows(*logits, rows, self.settings)

    def score_rows(
        self, policy: torch.Tensor, reference: torch.Tensor | None, rows: slice, settings: Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        beta = self.beta_of(rows) if settings.computes(Extra.MIXTURE) else None
        inputs = LogprobsInputs(policy, reference, self.targets[rows], beta, settings, self.backend.name)
        result: tuple[torch.Tensor, torch.Tensor] = self.backend.run(inputs)
        return result

    def merged(
        self, values: torch.Tensor, normalizers: torch.Tensor, rows: slice, settings: Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Combine the results of `score` for `rows` over the vocabulary; unchanged where all columns are local."""
        return values, normalizers

    def logits_gradient(
        self,
        rows: slice,
        logits: tuple[torch.Tensor, torch.Tensor | None],
        values: torch.Tensor,  # (5, C)
        normalizers: torch.Tensor,  # (6, C)
        upstream: torch.Tensor,  # (5, C), of values
    ) -> torch.Tensor:
        """Write the gradient of the policy's logits over them."""
        policy, reference = logits
        targets, beta = self.gradient_targets(rows), self.beta_of(rows)
        forward = LogprobsInputs(policy, reference, targets, beta, self.settings, self.backend.name)
        saved = (values.contiguous(), normalizers.contiguous(), upstream.contiguous())
        self.backend.run_backward(LogprobsBackwardInputs(*saved, forward), policy)
        return policy

    def gradient_targets(self, rows: slice) -> torch.Tensor:
        return self.targets[rows]

    def gradient_tensors(self, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sums over all chunks, as an operator's result."""
        return gradients.tensors(self.scored)

    def beta_of(self, rows: slice) -> torch.Tensor | None:
        return self.beta[rows] if self.beta is not None and self.beta.ndim else self.beta


def _logits(side: Side, rows: slice, buffer: torch.Tensor) -> torch.Tensor:
    return logits_into(buffer[: rows.stop - rows.start], side.hidden[rows], side.weight, side.bias)


class Needs(NamedTuple):
    """Which inputs require a gradient; no other gradients are computed."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients:
    """The gradients of hidden states, weight and bias, summed over the chunks; the head's in float32 or better."""

    def __init__(self, side: Side, needs: Needs) -> None:
        real = real_dtype(side.weight.dtype)
        self.side = side
        self.hidden = torch.empty_like(side.hidden) if needs.hidden else None
        self.weight = torch.empty_like(side.weight, dtype=real) if needs.weight else None
        self.bias = torch.zeros_like(side.weight[:, 0], dtype=real) if needs.bias else None
        self.empty = True

    def add(self, rows: slice, logits_gradient: torch.Tensor) -> None:
        if self.hidden is not None:
            torch.mm(logits_gradient, self.side.weight, out=self.hidden[rows])
        if self.weight is not None:
            add_weight_gradient(self.weight, logits_gradient, self.side.hidden[rows], first=self.empty)
        if self.bias is not None:
            self.bias += logits_gradient.sum(0, dtype=self.bias.dtype)
        self.empty = False

    def scale(self, ratio: torch.Tensor) -> None:  # ()
        """Multiply all that has been added so far by `ratio`."""
        for part in (self.hidden, self.weight, self.bias):
            if part is not None:
                part.mul_(ratio)

    def tensors(self, scored: ScoredRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients as an operator's result: those not needed are empty."""
        if self.empty and self.weight is not None:
            self.weight.zero_()
        spread = None if self.hidden is None else scored.spread(self.hidden, 0)
        empty = self.side.weight.new_empty(0)
        hidden, weight, bias = (empty.clone() if part is None else part for part in (spread, self.weight, self.bias))
        return hidden, weight, bias
