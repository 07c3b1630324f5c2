"""The algorithms: who answers beside the policy, what is trained on whose answers. One table, no branches elsewhere.

y ~ policy, y' ~ opponent^(1 - beta) reference^beta, token by token; a judge says P(y > y')

policy gradient   climbs P(y > y') - tau KL(policy, reference), on y alone
ipo               regresses log-ratios of y and y' on the preference; both come from the sampler of y'
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.rng import Stream
from ..engine import Player


@dataclass(frozen=True)
class Algorithm:
    name: str
    summary: str
    loss: str = "policy-gradient"  # or "ipo"
    beta: float | None = None  # fixed by the algorithm; None: the configuration's
    opponent: str = "policy"  # parameters y' is drawn with: policy, "average" (EMA) or "snapshot"
    judged_by: str = "judge"  # or "reward"

    @property
    def own_parameters(self) -> bool:
        """Whether the opponent keeps parameters of its own."""
        return self.opponent != "policy"

    def players(self, beta: float, samples: int, row_ids: object) -> tuple[Player, ...]:
        """Who answers. IPO trains on both answers, so both come from one mixture."""
        parameters = "opponent" if self.own_parameters else "policy"
        first = Player(beta if self.loss == "ipo" else 0.0, Stream.POLICY, samples, row_ids)  # type: ignore[arg-type]
        second = Player(beta, Stream.OPPONENT, samples, row_ids, parameters)  # type: ignore[arg-type]
        return (first,) if self.judged_by == "reward" else (first, second)


ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("nash-md", "the policy against its geometric mixture with the reference"),
        Algorithm("self-play", "the policy against itself: Nash-MD with beta 0", beta=0.0),
        Algorithm("best-response", "the policy against the reference: Nash-MD with beta 1", beta=1.0),
        Algorithm("nash-ema", "the policy against a moving average of its weights", beta=0.0, opponent="average"),
        Algorithm("nash-mp", "mirror prox: against a snapshot, held near another", beta=0.0, opponent="snapshot"),
        Algorithm("online-ipo", "IPO on two answers of the policy, judged with soft preferences", loss="ipo", beta=0.0),
        Algorithm("ipo-md", "online IPO on two answers of the mixture with the reference", loss="ipo"),
        Algorithm("rlhf", "policy gradient against a reward, for comparison", beta=0.0, judged_by="reward"),
    )
}
