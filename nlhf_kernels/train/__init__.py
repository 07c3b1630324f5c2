"""Training: NashTrainer and its NashConfig. Importing this folder imports transformers."""

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "nlhf_kernels.train needs transformers and accelerate: pip install nlhf-kernels[train]"
    ) from error

from .algorithms import ALGORITHMS, Algorithm
from .config import NashConfig
from .rewards import Reward
from .trainer import NashTrainer

__all__ = ["ALGORITHMS", "Algorithm", "NashConfig", "NashTrainer", "Reward"]
