"""Which rows are still open, as the host last heard. On a GPU the answer is copied while the next steps run, so that
looking never stalls the stream; it may be a few steps old, and as rows never reopen, an old answer is only cautious."""

from __future__ import annotations

from typing import Any

import torch


class OpenRows:
    def __init__(self) -> None:
        self._latest: list[bool] | None = None
        self._pending: tuple[torch.Tensor, Any] | None = None

    def post(self, is_open: torch.Tensor) -> None:  # (rows,) bool
        if is_open.device.type != "cuda":
            self._latest = is_open.tolist()
        elif self._pending is None:  # one question at a time
            host = torch.empty(is_open.shape, dtype=torch.bool, device="cpu", pin_memory=True)
            host.copy_(is_open, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (host, event)

    def read(self) -> list[bool] | None:
        """The latest answer, once; None while there is no new one."""
        if self._pending is not None and self._pending[1].query():
            self._latest, self._pending = self._pending[0].tolist(), None
        latest, self._latest = self._latest, None
        return latest
