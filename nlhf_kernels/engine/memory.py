"""The memory that a rollout allocates, by part, before the first token, and the error where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..core.native import free_bytes
from .request import Player

COPIES_SHARE = 0.05  # two models of 0.5B on a GPU of 40 GB or more; larger ones wait for weights, not for launches


@dataclass(frozen=True)
class MemoryPlan:
    """The allocations of a rollout: caches grow with rows x length, logits with rows x vocabulary; activations add.

    Args:
        parts (mapping of str to int): bytes by part.
        rows (int): rows of the batch, all players'.
        length (int): cache slots per row.
        prompt (int): of them for the prompt.
    """

    parts: Mapping[str, int]
    rows: int
    length: int
    prompt: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = "\n".join(f"  {name:<18} {_mib(size):>10}" for name, size in self.parts.items())
        return f"{self.rows} rows of {self.length} slots: {_mib(self.total)}\n{parts}"


@dataclass(frozen=True)
class RequestSize:
    """The numbers of a request that its memory depends on and the caller can lower."""

    prompts: int
    samples: int  # of all players, to each prompt
    prompt_length: int
    new_tokens: int
    min_new_tokens: int


def rows_by_model(prompts: int, players: Sequence[Player], mixes: bool) -> dict[str, int]:
    """Return the number of rows that each model (policy, opponent, reference) reads in a rollout.

    Args:
        prompts: of the rollout.
        players: the distributions to sample from.
        mixes: whether there is a reference, which reads all rows.
    """
    rows = {
        role: prompts * sum(player.samples for player in players if player.parameters == role)
        for role in ("policy", "opponent")
    }
    rows = {role: count for role, count in rows.items() if count}
    return rows | {"reference": sum(rows.values())} if mixes else rows


def rollout_parts(
    caches: Mapping[str, int],
    rows: Mapping[str, int],
    responses: int,
    length: int,
    new_tokens: int,
    vocabulary: int,
    itemsize: int,
    kept_logprobs: int,
) -> dict[str, int]:
    """Return the bytes that a rollout allocates, by part.

    Args:
        caches: of the models, as they count them.
        rows: of the models, as `rows_by_model` counts them.
        responses: rows of the batch.
        length: cache slots of a row.
        new_tokens: of a response at most.
        vocabulary: columns of the logits.
        itemsize: bytes of a logit.
        kept_logprobs: kinds of log-probabilities that are kept.
    """
    return {
        **caches,
        "logits": sum(rows.values()) * vocabulary * itemsize,
        "results": responses * new_tokens * (8 + 1 + 4 * kept_logprobs),
        "masks": responses * length * 8,
    }


def has_room(plan: MemoryPlan, limit: int | None, device: torch.device) -> bool:
    """Whether the plan fits, with a tenth to spare for activations where the device's memory is the limit."""
    available = limit if limit is not None else _free(device)
    return available is None or plan.total <= (available if limit is not None else 0.9 * available)


def may_copy(size: int, limit: int | None, device: torch.device) -> bool:
    """Whether copies of weights are small enough to be the default: COPIES_SHARE of a GPU's memory, or of the limit.

    Copies stay allocated between rollouts, while a training step needs memory that the first rollout cannot foresee.
    """
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    available = total if limit is None else limit
    return available is None or size <= COPIES_SHARE * available


def check_fits(
    op: str,
    plan: MemoryPlan,
    limit: int | None,
    device: torch.device,
    size: RequestSize,
    total: Callable[[RequestSize], int],
) -> None:
    """Raise an error if the plan does not fit, with sizes that would.

    Args:
        op: the name that opens the error.
        plan: of the request.
        limit: in bytes; None: what the device has free.
        device: where the plan is allocated.
        size: of the request.
        total: returns the bytes of another size; the advice is found by calls of it, as not every part shrinks with
            every number.
    """
    available = limit if limit is not None else _free(device)
    if available is None or plan.total <= available:
        return
    room = available if limit is not None else int(0.95 * available)  # free memory may change meanwhile

    def largest(name: str, least: int) -> int | None:
        """Return the largest value of one number with which the request fits, the others unchanged."""
        low, high = least - 1, getattr(size, name)  # fits (if it is allowed), does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if total(replace(size, **{name: middle})) <= room else (low, middle)
        return low if low >= least else None

    advice = []
    if (prompts := largest("prompts", 1)) is not None:
        advice.append(f"at most {prompts * size.samples} rows (prompts x samples of all players) a call")
    if (new := largest("new_tokens", max(1, size.min_new_tokens))) is not None:
        advice.append(f"max_new_tokens at most {new}")
    if (length := largest("prompt_length", 1)) is not None:
        advice.append(f"prompts of at most {length} tokens")
    remedy = "lower to " + ", or ".join(advice) if advice else "fewer rows of fewer tokens, or more memory"
    raise MemoryError(f"{op}: expected to fit into {_mib(available)}; {plan}\n{remedy}")


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return free_bytes(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
