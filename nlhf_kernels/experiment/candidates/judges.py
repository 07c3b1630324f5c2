"""Judges and rewards over the candidates that contestants train on, each a look-up table.

The annotators' P(y > y') is known for every pair; during training they return votes that are sampled from it. A
preference or reward model is evaluated once for every pair or answer, and looked up afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from .world import World

PRIOR = 0.1  # precision of the refitted rewards around 0, in units of one comparison's curvature at even odds


class TableJudge:
    """A judge that looks up P(first > second) in a table.

    Args:
        world (World): the prompts.
        preference (tensor (M, A, A)): [a, b] = P(a > b).
    """

    def __init__(self, world: World, preference: torch.Tensor) -> None:
        self.world, self.preference = world, preference

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        rows, chosen = self.world.index(prompts, first)
        return self.preference[rows, chosen, self.world.index(prompts, second)[1]]


class Votes:
    """A judge that returns one vote for each pair, 0 or 1, sampled from the annotators' probability.

    Args:
        annotators (TableJudge): probabilities of the votes.
        seed (int): of the votes; equal sequences of calls under one seed return equal votes.
    """

    def __init__(self, annotators: TableJudge, seed: int) -> None:
        self.annotators, self.asked = annotators, 0
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        chances = self.annotators(prompts, first, second)
        self.asked += len(chances)
        return (
            torch.rand(chances.shape, generator=self._generator, dtype=torch.float64, device="cpu") < chances
        ).double()


class TableReward:
    """A reward function that looks up its values in a table.

    Args:
        world (World): the prompts.
        rewards (tensor (M, A)): one for every candidate, and the last for all other answers.
    """

    def __init__(self, world: World, rewards: torch.Tensor) -> None:
        self.world, self.rewards = world, rewards

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        return self.rewards[self.world.index(prompts, responses)]


class OnlineReward:
    """RLHF's reward, refitted during training: before every update the annotators compare the policy's answers, and
    the reward is fitted to all votes so far.

    Of S answers to a prompt each is compared with the next, the last with the first: as many votes as answers, the
    number that Nash learning uses. The reward model is one table per prompt, fitted by Newton's method, so that neither
    its size nor its training limits it.

    Args:
        votes (Votes): the judge of the comparisons.
        log_reference (tensor (M, A)): rewards are shifted to a mean of 0 under it.
    """

    def __init__(self, votes: Votes, log_reference: torch.Tensor) -> None:
        self.votes, self.reference = votes, log_reference.exp()
        self.world = votes.annotators.world
        self.wins = torch.zeros_like(votes.annotators.preference)
        self.rewards = torch.zeros_like(self.reference)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        rivals: list[str] = []
        start = 0
        for _, same in groupby(prompts):
            answers = responses[start : start + len(list(same))]
            rivals += [*answers[1:], answers[0]]
            start += len(answers)
        rows, first = self.world.index(prompts, responses)
        second = self.world.index(prompts, rivals)[1]
        won = self.votes(prompts, responses, rivals)
        self.wins.index_put_((rows, first, second), won, accumulate=True)
        self.wins.index_put_((rows, second, first), 1 - won, accumulate=True)
        self.rewards = fit_rewards(self.wins, self.rewards)
        centred = self.rewards - (self.reference * self.rewards).sum(-1, keepdim=True)
        return centred[rows, first]


def fit_rewards(wins: torch.Tensor, start: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Fit Bradley-Terry rewards to the counts, with a weak Gaussian prior at 0, by Newton's method.

    Args:
        wins (..., A, A): how often a was preferred to b.
        start (..., A): initial rewards.
        steps: of Newton's method, none longer than 1.

    Returns:
        Rewards, (..., A).
    """
    pairs = wins + wins.mT
    rewards, prior = start, PRIOR / 4 * torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    for _ in range(steps):
        chance = torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))
        gradient = (wins - pairs * chance).sum(-1) - PRIOR / 4 * rewards
        curvature = pairs * chance * (1 - chance)
        curvature = curvature - torch.diag_embed(curvature.diagonal(dim1=-2, dim2=-1))
        hessian = torch.diag_embed(curvature.sum(-1)) - curvature + prior
        step: torch.Tensor = torch.linalg.solve(hessian, gradient)
        rewards = rewards + step / step.abs().amax(-1, keepdim=True).clamp_min(1.0)
    return rewards
