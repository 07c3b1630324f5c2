"""Tabular NLHF: preference games as matrices, the algorithms that solve them, measures and baselines."""

from .baselines import bradley_terry_fit, dpo, ipo, rlhf
from .budget import at_budget, best_within, exploitability_within
from .cycling import cyclic_triple_share, taste_game, unrewarded_share
from .game import PreferenceGame
from .games import (
    bradley_terry_game,
    cyclic_game,
    dice_game,
    diversity_game,
    game_from_counts,
    low_rank_game,
    random_games,
)
from .measures import best_response, exploitability, kl_divergence, span, win_rates
from .solvers import ALGORITHMS, Solution, equilibrium, solve

__all__ = [
    "ALGORITHMS",
    "PreferenceGame",
    "Solution",
    "at_budget",
    "best_response",
    "best_within",
    "bradley_terry_fit",
    "bradley_terry_game",
    "cyclic_game",
    "cyclic_triple_share",
    "dice_game",
    "diversity_game",
    "dpo",
    "equilibrium",
    "exploitability",
    "exploitability_within",
    "game_from_counts",
    "ipo",
    "kl_divergence",
    "low_rank_game",
    "random_games",
    "rlhf",
    "solve",
    "span",
    "taste_game",
    "unrewarded_share",
    "win_rates",
]
