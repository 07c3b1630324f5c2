"""The algorithms in one table: the opponent that y' is sampled from, and the loss with the answers it is taken on.

y ~ policy, y' ~ opponent^(1 - beta) reference^beta, token by token; a judge returns P(y > y')

policy gradient   maximises P(y > y') - tau KL(policy, reference), on y alone
ipo               regresses log-ratios of y and y' on the preference; both answers are sampled as y' is
dpo               classifies y and y' by their log-ratios, the preference being the label; sampled likewise
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.rng import Stream
from ..engine import Player


@dataclass(frozen=True)
class Algorithm:
    """A row of the table.

    Args:
        name: as in `NashConfig.algorithm`.
        summary: one line for documents.
        loss: "policy-gradient", "ipo" or "dpo".
        beta: the reference's weight in the opponent's mixture, fixed by the algorithm; None: the configuration's.
        opponent: weights that sample y': "policy", "average" (a moving average of the policy's) or "snapshot".
        judged_by: "judge" or "reward".
    """

    name: str
    summary: str
    loss: str = "policy-gradient"
    beta: float | None = None
    opponent: str = "policy"
    judged_by: str = "judge"

    @property
    def own_parameters(self) -> bool:
        """Whether the opponent has weights of its own."""
        return self.opponent != "policy"

    @property
    def trains_pairs(self) -> bool:
        """Whether the loss is of both answers."""
        return self.loss != "policy-gradient"

    def players(self, beta: float, samples: int, row_ids: object) -> tuple[Player, ...]:
        """Return the players of a rollout. A loss of both answers has both sampled from one mixture.

        Args:
            beta: the reference's weight in the opponent's mixture.
            samples: pairs of answers to every prompt.
            row_ids ((B,)): numbers of the prompts, which determine the noise.
        """
        parameters = "opponent" if self.own_parameters else "policy"
        first = Player(beta if self.trains_pairs else 0.0, Stream.POLICY, samples, row_ids)  # type: ignore[arg-type]
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
        Algorithm("online-dpo", "DPO on two answers of the policy, judged with soft preferences", loss="dpo", beta=0.0),
        Algorithm("ipo-md", "online IPO on two answers of the mixture with the reference", loss="ipo"),
        Algorithm("rlhf", "policy gradient against a reward, for comparison", beta=0.0, judged_by="reward"),
    )
}
