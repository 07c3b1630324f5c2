"""Which tokens belong to which sequence, and sums over them: padded and packed batches in one form."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from ...core.checks import INTEGERS, Sizes, check_tensor
from ..logprobs.layout import IGNORED


class Sequences(NamedTuple):
    """B sequences one after the other in N tokens."""

    offsets: torch.Tensor  # (B + 1,) int64: sequence b is the tokens offsets[b] to offsets[b + 1]
    of_token: torch.Tensor  # (N,) the sequence of each token

    @staticmethod
    def from_offsets(offsets: torch.Tensor, tokens: int) -> Sequences:
        positions = torch.arange(tokens, dtype=torch.int64, device=offsets.device)
        last = torch.full((), offsets.numel() - 2, dtype=torch.int64, device=offsets.device)
        return Sequences(offsets, torch.minimum(torch.searchsorted(offsets[1:], positions, right=True), last))

    def sums(self, values: torch.Tensor) -> torch.Tensor:  # (N,) -> (B,) float64
        """Sum over each sequence: differences of one running sum, which float64 carries over any number of tokens."""
        return _between(values, self.offsets[:-1], self.offsets[1:])

    def sums_from(self, values: torch.Tensor) -> torch.Tensor:  # (N,) -> (N,) float64
        """Sum over each token and all after it in its sequence."""
        first = torch.arange(values.numel(), dtype=torch.int64, device=values.device)
        return _between(values, first, self.offsets[1:][self.of_token])


def _between(values: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Sum values[first:last]. A value that is not finite makes the sums over it NaN, and no others."""
    finite = values.isfinite()
    running = _running(torch.where(finite, values, 0))
    broken = _running(~finite)
    return torch.where(broken[last] > broken[first], torch.nan, running[last] - running[first])


def _running(values: torch.Tensor) -> torch.Tensor:  # (N,) -> (N + 1,), [n] = the sum of the first n
    return torch.nn.functional.pad(values.double().cumsum(0), (1, 0))


class Layout(NamedTuple):
    """A batch of sequences, flat."""

    targets: torch.Tensor  # (N,), -100 where masked
    sequences: int  # B
    symbols: tuple[str, ...]  # symbolic shape of per-token tensors
    cu_seqlens: torch.Tensor | None  # (B + 1,); None: sequences of equal length

    def offsets(self, device: torch.device) -> torch.Tensor:  # (B + 1,) int64
        """Return offsets (B + 1,); sequence b of a padded (B, T) batch is the tokens b T to (b + 1) T."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.to(device, torch.int64)
        length = self.targets.numel() // max(self.sequences, 1)
        return torch.arange(self.sequences + 1, dtype=torch.int64, device=device) * length


def layout_symbols(cu_seqlens: object) -> tuple[str, ...]:
    return ("sequences", "length") if cu_seqlens is None else ("tokens",)


def check_layout(
    op: str,
    targets: torch.Tensor,  # (B, T), or (N,) with cu_seqlens
    mask: torch.Tensor | None,  # as targets; 0 or False: not part of the response
    cu_seqlens: torch.Tensor | None,  # (B + 1,)
    sizes: Sizes,
    device: torch.device,
) -> Layout:
    symbols = layout_symbols(cu_seqlens)
    check_tensor(op, "targets", targets, symbols, INTEGERS, sizes, device)
    if mask is not None:
        allowed = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16, torch.float16)
        check_tensor(op, "mask", mask, symbols, allowed, sizes, device)
        targets = targets.masked_fill(mask == 0, IGNORED)
    count = targets.shape[0] if cu_seqlens is None else _check_offsets(op, cu_seqlens, targets.numel())
    if sizes.setdefault("sequences", count) != count:
        raise ValueError(f"{op}: cu_seqlens: expected one more than sequences={sizes['sequences']}; got {count + 1}")
    return Layout(targets.reshape(-1), count, symbols, cu_seqlens)


def _check_offsets(op: str, cu_seqlens: torch.Tensor, tokens: int) -> int:
    """Check the offsets; return the number of sequences."""
    check_tensor(op, "cu_seqlens", cu_seqlens, ("sequences + 1",), (torch.int64, torch.int32), {})
    if cu_seqlens.numel() < 2:
        raise ValueError(f"{op}: cu_seqlens: expected at least two offsets, 0 and {tokens}; got {cu_seqlens.numel()}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_offset_values(op, cu_seqlens.tolist(), tokens)
    return cu_seqlens.numel() - 1


def check_offset_values(op: str, offsets: list[int], tokens: int) -> None:
    rising = all(one <= other for one, other in pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != tokens or not rising:
        raise ValueError(f"{op}: cu_seqlens: expected to rise from 0 to tokens={tokens}; got {offsets}")
