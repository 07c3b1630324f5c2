"""Rollouts: a policy and a reference decode in lockstep. Importing this folder imports transformers."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("nlhf_kernels.engine needs transformers: pip install nlhf-kernels[transformers]") from error

from .engine import RolloutEngine
from .hooks import Hooks
from .memory import MemoryPlan
from .models import has_key_value_cache
from .request import Player, RolloutSettings, nash_ema, nash_md
from .result import Finish, Responses, RolloutResult

__all__ = [
    "Finish",
    "Hooks",
    "MemoryPlan",
    "Player",
    "Responses",
    "RolloutEngine",
    "RolloutResult",
    "RolloutSettings",
    "has_key_value_cache",
    "nash_ema",
    "nash_md",
]
