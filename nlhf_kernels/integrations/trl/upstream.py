"""What is asked of an installed TRL beyond its documented interface, as it is in TRL 1.0 to 1.13.

Each entry has a contract test of its own in tests/test_trl_upstream.py, which fails by its name.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

OLDEST, BEFORE = (1, 0), (1, 14)  # versions; 1.14 has no NashMDTrainer
EXPECTED = "expected TRL 1.0 to 1.13"
MODULE = "trl.experimental.nash_md"
#: NashMDTrainer's methods that are replaced, and their arguments.
METHODS = {
    "_generate_completions": ("model", "prompts"),
    "_compute_logprobs": ("model", "model_data", "context_length"),
    "_compute_losses": ("model_logprobs_model_data", "ref_logprobs_model_data", "probability"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}
#: Attributes of a NashMDTrainer that are read: the schedules behind its properties `beta` and `mixture_coef`, what it
#: samples with, and its frozen reference, None where that is the policy's base.
ATTRIBUTES = ("_beta", "_mixture_coef", "generation_kwargs", "ref_model")
#: Where accelerate leaves a model's own forward when it wraps it: both in the instance's __dict__.
WRAPPED_FORWARD = ("forward", "_original_forward")


def trainer_class(op: str) -> Any:
    """Return the installed TRL's NashMDTrainer. Raise where there is none, or one that is not known."""
    version = _version(op)
    numbers = tuple(int(part) if part.isdigit() else -1 for part in version.split(".")[:2])
    if not OLDEST <= numbers < BEFORE:
        raise RuntimeError(
            f"{op}: {EXPECTED}; found {version} (NashMDTrainer of nlhf_kernels.integrations.trl needs none)"
        )
    try:
        return importlib.import_module(MODULE).NashMDTrainer
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "trl"):
            raise
        raise ImportError(
            f"{op}: TRL {version} imports {package} for its NashMDTrainer and does not bring it: pip install {package}"
        ) from error


def check_methods(op: str, trainer: Any) -> None:
    """Raise where the methods that are replaced take other arguments than TRL's do."""
    for name, arguments in METHODS.items():
        found = tuple(inspect.signature(getattr(trainer, name)).parameters)
        if found != ("self", *arguments):
            raise RuntimeError(
                f"{op}: {EXPECTED} as released; found {_version(op)} whose NashMDTrainer.{name} takes "
                f"{', '.join(found)}"
            )


def schedule(trainer: Any, name: str) -> Any:
    """Return `beta` or `mixture_coef` as it was given: a number, or a list by epoch."""
    return getattr(trainer, f"_{name}")


def _version(op: str) -> str:
    try:
        return str(getattr(importlib.import_module("trl"), "__version__", "unknown"))
    except ImportError as error:
        raise ImportError(f"{op}: {EXPECTED}; found none: pip install 'trl>=1.0,<1.14'") from error
