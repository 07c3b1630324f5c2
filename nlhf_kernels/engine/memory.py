"""How much a rollout holds, by part, before the first token; and an error that helps where it will not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. Caches grow with rows x length, logits with rows x vocabulary; activations come on top."""

    parts: Mapping[str, int]
    rows: int
    length: int  # cache slots a row
    prompt: int  # of them for the prompt

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = "\n".join(f"  {name:<18} {_mib(size):>10}" for name, size in self.parts.items())
        return f"{self.rows} rows of {self.length} slots: {_mib(self.total)}\n{parts}"


def check_fits(op: str, plan: MemoryPlan, limit: int | None, device: torch.device) -> None:
    """`limit` in bytes; None: what the device has free."""
    available = limit if limit is not None else _free(device)
    if available is None or plan.total <= available:
        return
    row = max(1, plan.total // plan.rows)
    rows = available // row
    slots = int(available / plan.total * plan.length) - plan.prompt
    advice = [f"at most {rows} rows (prompts x samples of all players) a call"] if rows else []
    advice += [f"max_new_tokens at most {slots}"] if slots > 0 else []
    remedy = "lower to " + ", or ".join(advice) if advice else "shorten the prompts, or give it more memory"
    raise MemoryError(f"{op}: expected to fit into {_mib(available)}; {plan}\n{remedy}")


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
