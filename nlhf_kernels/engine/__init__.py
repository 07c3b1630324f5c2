"""Rollouts: a policy and a reference decode in lockstep. Importing this package imports transformers."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("nlhf_kernels.engine needs transformers: pip install nlhf-kernels[transformers]") from error

from .engine import RolloutEngine
from .hooks import Hooks
from .memory import MemoryPlan
from .model_info import has_key_value_cache
from .request import Finish, Player, Responses, RolloutResult, RolloutSettings, nash_ema, nash_md

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
