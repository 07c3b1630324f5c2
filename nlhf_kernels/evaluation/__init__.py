"""Evaluation: answers of policies, win rates between them with intervals, cycles. Importing this folder imports
transformers."""

from .answers import Answers, Sampling, response_kl, response_texts, sample_answers
from .cycles import Cycles, count_cycles, preference_table
from .intervals import Estimate, estimate_mean, plus_minus
from .tournament import Tournament, play_tournament

__all__ = [
    "Answers",
    "Cycles",
    "Estimate",
    "Sampling",
    "Tournament",
    "count_cycles",
    "estimate_mean",
    "play_tournament",
    "plus_minus",
    "preference_table",
    "response_kl",
    "response_texts",
    "sample_answers",
]
