"""For users of TRL: its NashMDConfig and NashMDTrainer by their argument names, on NashTrainer; and `accelerate_trl()`,
which gives an installed TRL's own trainer these rollouts and losses. Only the latter needs TRL, and imports it when
called. docs/migrating_from_trl.md lists the differences."""

from .acceleration import Acceleration, accelerate_trl
from .config import NashMDConfig
from .trainer import NashMDTrainer

__all__ = ["Acceleration", "NashMDConfig", "NashMDTrainer", "accelerate_trl"]
