"""What every stage works with once there is a supervised policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.loading import load_model
from .console import Reporter
from .corpus import Corpus
from .presets import Preset


@dataclass(frozen=True)
class Setting:
    corpus: Corpus
    policy: Path  # the supervised one's folder
    preset: Preset
    device: torch.device
    report: Reporter

    def fresh_policy(self) -> Any:
        """The supervised policy, on the device, shared with nobody."""
        return load_model("experiment: policy", self.policy, device=self.device, dtype=torch.float32)
