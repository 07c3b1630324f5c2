"""Evaluation: answers of policies, win rates between them with intervals, cycles, win rates at equal KL, figures.

Importing this folder imports transformers.
"""

from .answers import Answers, Sampling, answer_measures, kl_values, response_kl, response_texts, sample_answers
from .cycles import Cycles, count_cycles, preference_table
from .frontier import Frontier, FrontierPoint, difference_at, rate_at_equal_kl, shared_range
from .intervals import Estimate, Weights, bootstrap, estimate_mean, plus_minus
from .plots import plot_estimates, plot_frontiers, plot_win_rates
from .tournament import Tournament, play_tournament

__all__ = [
    "Answers",
    "Cycles",
    "Estimate",
    "Frontier",
    "FrontierPoint",
    "Sampling",
    "Tournament",
    "Weights",
    "answer_measures",
    "bootstrap",
    "count_cycles",
    "difference_at",
    "estimate_mean",
    "kl_values",
    "play_tournament",
    "plot_estimates",
    "plot_frontiers",
    "plot_win_rates",
    "plus_minus",
    "preference_table",
    "rate_at_equal_kl",
    "response_kl",
    "response_texts",
    "sample_answers",
    "shared_range",
]
