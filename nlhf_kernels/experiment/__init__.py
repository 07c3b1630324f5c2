"""The summarisation experiment: its stages, its presets, its report. Importing this folder imports transformers."""

from .annotators import Annotators
from .corpus import Material, train_tokenizer
from .docstrings import Collection, collect
from .pipeline import Experiment
from .presets import CONTESTANTS, PRESETS, Preset, overridden
from .report import write_report

__all__ = [
    "CONTESTANTS",
    "PRESETS",
    "Annotators",
    "Collection",
    "Experiment",
    "Material",
    "Preset",
    "collect",
    "overridden",
    "train_tokenizer",
    "write_report",
]
