"""The summarisation experiment: its stages, its presets, its report. Importing this folder imports transformers."""

from .annotators import Annotators
from .answers import Answers, Sampling, answer, load_answering
from .console import SILENT, Reporter
from .contestants import CONTESTANTS
from .corpus import Material
from .cycles import Cycles, count_cycles, pairwise
from .docstrings import Collection, collect
from .intervals import Estimate, estimate
from .pipeline import Experiment
from .presets import PRESETS, Preset, overridden
from .report import write_report
from .tournament import Tournament, play
from .vocabulary import train_tokenizer

__all__ = [
    "CONTESTANTS",
    "PRESETS",
    "SILENT",
    "Annotators",
    "Answers",
    "Collection",
    "Cycles",
    "Estimate",
    "Experiment",
    "Material",
    "Preset",
    "Reporter",
    "Sampling",
    "Tournament",
    "answer",
    "collect",
    "count_cycles",
    "estimate",
    "load_answering",
    "overridden",
    "pairwise",
    "play",
    "train_tokenizer",
    "write_report",
]
