"""Tabular NLHF: preference games small enough to write down, and how far a policy is from their equilibrium."""

from .games import cyclic_game, dice_game, random_games
from .measures import exploitability, kl_divergence

__all__ = ["cyclic_game", "dice_game", "exploitability", "kl_divergence", "random_games"]
