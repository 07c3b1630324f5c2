"""A head that several processes share: each scores its slice of the vocabulary; a few numbers per row are exchanged.

Every process runs the kernels of `logprobs` on its own columns, as if they were the whole vocabulary. The slices'
results (largest score, logarithm of the sum, entropy and so on) are merged to those of the whole vocabulary (README.md,
section 4), which are all that backward needs of the other slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.vocabulary import VocabularySlice, is_dtensor, same_slice, slice_of, trained_apart
from ..logprobs.layout import ELSEWHERE, IGNORED, Extra, LogprobsInputs, Normalizer, Output, Settings
from ..logprobs.oracle import mixed, transformed
from .chunks import Chunked, Gradients, compares_models
from .head import Head


def local_heads(op: str, head: Any, reference_head: Any) -> tuple[Any, Any, VocabularySlice | None]:
    """Return heads of plain tensors: this process's slice of both where tensor-parallel processes share the policy's,
    else both whole. The reference's, a constant, may be laid out in any way.

    Args:
        op (str): the operation's name, for errors.
        head, reference_head (Head or tensor): as given, yet to be checked; tensors may be DTensors.
    """
    head, reference_head = (Head(one) if isinstance(one, torch.Tensor) else one for one in (head, reference_head))
    if not any(is_dtensor(tensor) for one in (head, reference_head) if isinstance(one, Head) for tensor in one[:2]):
        return head, reference_head, None
    part = slice_of(head.weight) if isinstance(head, Head) and is_dtensor(head.weight) else None
    if part is None:
        return _whole(op, "head", head), _whole(op, "reference_head", reference_head), None
    if isinstance(reference_head, Head):
        weight, bias = (_own_rows(op, f"reference_head.{name}", getattr(reference_head, name), part)
                        for name in ("weight", "bias"))  # fmt: skip
        reference_head = reference_head._replace(weight=weight, bias=bias)
    bias = head.bias
    if bias is not None:
        if not is_dtensor(bias) or not same_slice(slice_of(bias), part):
            raise ValueError(f"{op}: head.bias: expected a DTensor sharded as head.weight; got {_layout(bias)}")
        bias = bias.to_local()
    return head._replace(weight=head.weight.to_local(), bias=bias), reference_head, part


def _whole(op: str, name: str, head: Any) -> Any:
    if not isinstance(head, Head):
        return head
    for part, tensor in (("weight", head.weight), ("bias", head.bias)):
        if is_dtensor(tensor) and tensor.requires_grad and torch.is_grad_enabled() and trained_apart(tensor):
            raise ValueError(
                f"{op}: {name}.{part}: expected the whole tensor, as it is inside the forward pass of FSDP's module, "
                f"which also adds up the gradients of processes with other texts; got {_layout(tensor)}"
            )
    whole: list[Any] = [tensor.full_tensor() if is_dtensor(tensor) else tensor for tensor in (head.weight, head.bias)]
    return head._replace(weight=whole[0], bias=whole[1])


def _own_rows(op: str, name: str, tensor: Any, part: VocabularySlice) -> Any:
    """Return the rows of this process's slice of a constant tensor in any layout."""
    if tensor is None or not isinstance(tensor, torch.Tensor):
        return tensor
    if not tensor.ndim or tensor.shape[0] != part.total:
        raise ValueError(f"{op}: {name}: expected {part.total} tokens, as head.weight; got {tuple(tensor.shape)}")
    if is_dtensor(tensor):
        if same_slice(slice_of(tensor), part):
            return tensor.to_local()
        tensor = tensor.full_tensor()
    return tensor[part.first : part.stop]


def _layout(tensor: Any) -> str:
    return f"a DTensor of {tensor.placements} on {tensor.device_mesh}" if is_dtensor(tensor) else "a plain tensor"


@dataclass(frozen=True)
class ChunkedSlice(Chunked):
    """A call over this process's slice of the vocabulary. Targets are tokens of the whole one."""

    part: VocabularySlice

    @property
    def columns(self) -> int:
        """Return the columns of the widest slice, so that all processes have the same chunks."""
        return self.part.widest

    def score_rows(
        self, policy: torch.Tensor, reference: torch.Tensor | None, rows: slice, settings: Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score this slice alone. A target in another slice is replaced by this slice's first token."""
        if not self.part.width:
            values, normalizers = (part[:, rows].clone() for part in self.outputs())
            for top, _, _ in _DISTRIBUTIONS:
                normalizers[top].fill_(-torch.inf)
            return values, normalizers
        targets = self._columns_of(rows, 0)
        beta = self.beta_of(rows) if settings.computes(Extra.MIXTURE) else None
        inputs = LogprobsInputs(policy, reference, targets, beta, settings, self.backend.name)
        values, normalizers = self.backend.run(inputs)
        if targets.device.type == "cpu" and bool(normalizers.isnan().any()):
            _find_empty(normalizers, inputs)
        return values, normalizers

    def merged(
        self, values: torch.Tensor, normalizers: torch.Tensor, rows: slice, settings: Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge the results of all slices: one collective."""
        if not values.shape[1]:
            return values, normalizers
        parts = self.part.gathered(torch.cat([values, normalizers]))  # (processes, 5 + 6, C)
        targets = self.targets[rows]
        of_values, of_normalizers = parts.split([len(Output), len(Normalizer)], 1)
        values, normalizers = merge(of_values, of_normalizers, self.part.owners(targets), settings)
        ignored = targets == IGNORED
        return values.masked_fill_(ignored, 0), normalizers.masked_fill_(ignored, 0)

    def logits_gradient(self, rows: slice, logits: Any, *saved: torch.Tensor) -> torch.Tensor:
        return super().logits_gradient(rows, logits, *saved) if self.part.width else logits[0]

    def gradient_targets(self, rows: slice) -> torch.Tensor:
        return self._columns_of(rows, ELSEWHERE)

    def gradient_tensors(self, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients: the head's of this slice, the hidden states' summed over slices by one collective."""
        if gradients.hidden is not None and gradients.hidden.numel():
            self.part.add_up(gradients.hidden)
        return super().gradient_tensors(gradients)

    def _columns_of(self, rows: slice, elsewhere: int) -> torch.Tensor:
        """Return targets as columns of this slice: `elsewhere` in another slice, one past the last for unknown ids."""
        targets, part = self.targets[rows], self.part
        known = (targets >= 0) & (targets < part.total)
        own = (targets >= part.first) & (targets < part.stop)
        columns = torch.where(own, targets - part.first, elsewhere)
        return columns.masked_fill_(~known, part.width).masked_fill_(targets == IGNORED, IGNORED)


def _find_empty(normalizers: torch.Tensor, inputs: LogprobsInputs) -> None:
    """Set the maximum of rows of -inf alone to -inf: the C++ kernel gives NaN, but such a slice only has no mass."""
    policy, reference, _, beta, settings, _ = inputs
    rows = normalizers.isnan().any(0).nonzero().squeeze(1)
    scores = [transformed(policy[rows].to(normalizers.dtype), settings.policy)]
    if reference is not None:
        scores.append(transformed(reference[rows].to(normalizers.dtype), settings.reference))
        if settings.computes(Extra.MIXTURE):
            scores.append(mixed(scores[0], scores[1], beta[rows] if beta is not None and beta.ndim else beta))
    for of_model, (top, _, _) in zip(scores, _DISTRIBUTIONS, strict=False):
        empty = (of_model == -torch.inf).all(1)
        normalizers[top, rows[empty]] = -torch.inf


#: Rows of `normalizers` and of `values` that belong to one distribution: policy, reference, mixture.
_DISTRIBUTIONS = (
    (Normalizer.POLICY_MAX, Normalizer.POLICY_LOG_SUM, Output.POLICY),
    (Normalizer.REFERENCE_MAX, Normalizer.REFERENCE_LOG_SUM, Output.REFERENCE),
    (Normalizer.MIXTURE_MAX, Normalizer.MIXTURE_LOG_SUM, Output.MIXTURE),
)


def merge(
    values: torch.Tensor, normalizers: torch.Tensor, owners: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values (5, N) and normalizers (6, N) of the whole vocabulary from those of its slices (README.md, 4).

    Args:
        values (S, 5, N): the outputs of `logprobs` for each slice alone.
        normalizers (S, 6, N): likewise; a maximum of -inf where a slice has no mass.
        owners (N,): the slice of each row's target; -1 where there is none: NaN.
        settings (Settings): temperature and requested outputs.
    """
    real, temperature = values.dtype, settings.temperature
    values, normalizers = values.double(), normalizers.double()
    result, whole = torch.zeros_like(values[0]), torch.zeros_like(normalizers[0])
    present = (True, compares_models(settings), settings.computes(Extra.MIXTURE))
    of_owner = owners.clamp(min=0)[None]
    log_shares = []
    for there, (top, log_sum, output) in zip(present, _DISTRIBUTIONS, strict=True):
        if not there:
            continue
        tops, sums = normalizers[:, top], normalizers[:, log_sum]
        whole[top] = tops.amax(0)
        series = torch.where(tops == -torch.inf, -torch.inf, (tops - whole[top]) / temperature + sums)
        whole[log_sum] = series.logsumexp(0)  # equation 9
        log_shares.append(series - whole[log_sum])  # equation 10
        log_p = torch.where(log_shares[-1] == -torch.inf, -torch.inf, values[:, output] + log_shares[-1])
        result[output] = log_p.gather(0, of_owner)[0]  # equation 11
    share = log_shares[0].exp()
    if settings.computes(Extra.ENTROPY):
        result[Output.ENTROPY] = _expected(share, values[:, Output.ENTROPY] - log_shares[0])  # equation 12
    if settings.computes(Extra.KL):
        ratio = values[:, Output.KL] + log_shares[0] - log_shares[1]
        ratio = torch.where(log_shares[1] == -torch.inf, torch.inf, ratio)
        result[Output.KL] = _expected(share, ratio).clamp(min=0)  # equation 13
    result.masked_fill_(owners < 0, torch.nan)
    return result.to(real), whole.to(real)


def _expected(share: torch.Tensor, of: torch.Tensor) -> torch.Tensor:  # (S, N), (S, N) -> (N,)
    """Return the sum of share * of; a slice without mass contributes 0, whatever its `of`."""
    return torch.where(share == 0, 0, share * of).sum(0)
