"""What is asked of a rollout: prompts, who answers them, and how tokens are drawn. All checks happen here, before work.

A player is a distribution that answers every prompt: y ~ pi is `Player()`, y' ~ pi^beta is `Player(beta, OPPONENT)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.checks import INTEGERS, Sizes, check_integer, check_number, check_option, check_tensor
from ..core.rng import Stream

LOGPROBS = ("policy", "reference", "mixture")
PARAMETERS = ("policy", "opponent")
_MASKS = (torch.int64, torch.int32, torch.bool)


@dataclass(frozen=True)
class Player:
    """Answers every prompt `samples` times with draws from p^(1 - beta) mu^beta, token by token.

    p is the policy, or the engine's opponent where `parameters` says so. The noise of sample j of a prompt is a
    function of (seed, its row id * samples + j, the token's index, stream): two players of one stream that answer the
    same prompts would share their noise.
    """

    beta: float | torch.Tensor = 0.0  # number, (P,) one per prompt, or (P * samples,) one per response
    stream: int = Stream.POLICY
    samples: int = 1
    row_ids: torch.Tensor | None = None  # (P,) or (P * samples,) int64; None counts the prompts
    parameters: str = "policy"  # or "opponent"


def nash_md(beta: float | torch.Tensor, samples: int = 1, row_ids: torch.Tensor | None = None) -> tuple[Player, Player]:
    """y ~ pi and y' ~ pi^beta, independent of each other."""
    return Player(0.0, Stream.POLICY, samples, row_ids), Player(beta, Stream.OPPONENT, samples, row_ids)


def nash_ema(
    beta: float | torch.Tensor = 0.0, samples: int = 1, row_ids: torch.Tensor | None = None
) -> tuple[Player, Player]:
    """y ~ pi, and y' from the engine's opponent parameters, mixed with the reference where beta is not 0."""
    return Player(0.0, Stream.POLICY, samples, row_ids), Player(beta, Stream.OPPONENT, samples, row_ids, "opponent")


@dataclass(frozen=True)
class RolloutSettings:
    """How tokens are drawn and when a response ends. The filters are those of `mixture_sample`."""

    max_new_tokens: int
    min_new_tokens: int = 0  # no end token before
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None draws one from torch's default generator
    end_ids: int | Sequence[int] | torch.Tensor | None = None  # None: the policy's own; () none
    pad_id: int | None = None  # None: the first end id, or 0
    logprobs: Sequence[str] | None = None  # what is computed and kept, of policy, reference, mixture; None: all
    backend: str | None = None  # of the sampler


@dataclass(frozen=True)
class Prompts:
    ids: torch.Tensor  # (P, S) int64, padded on the left
    mask: torch.Tensor  # (P, S) int64, 0 at padding
    padded: bool  # whether anything is

    @property
    def width(self) -> int:
        return self.ids.shape[1]


def check_prompts(op: str, ids: Any, mask: Any, device: torch.device) -> Prompts:
    """The one place where a mask's values are read."""
    sizes: Sizes = {}
    check_tensor(op, "input_ids", ids, ("rows", "prompt"), INTEGERS, sizes, device)
    if not ids.numel():
        raise ValueError(f"{op}: input_ids: expected at least one row and one token; got {tuple(ids.shape)}")
    if mask is None:
        return Prompts(ids, torch.ones_like(ids), padded=False)
    check_tensor(op, "attention_mask", mask, ("rows", "prompt"), _MASKS, sizes, device)
    mask = mask.long()
    empty = (mask.sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{op}: attention_mask: expected a token in every prompt; got only padding in rows {empty}")
    if not mask[:, -1].all():
        raise ValueError(f"{op}: attention_mask: expected padding on the left; got a row whose last token is masked")
    holes = (mask.diff(dim=1) < 0).any(1).nonzero().flatten().tolist()
    if holes:
        raise ValueError(f"{op}: attention_mask: expected padding on the left only; got holes in rows {holes}")
    return Prompts(ids, mask, padded=not bool(mask.all()))


def check_settings(op: str, settings: RolloutSettings) -> None:
    check_integer(op, "max_new_tokens", settings.max_new_tokens, 1, 2**31)
    check_integer(op, "min_new_tokens", settings.min_new_tokens, 0, settings.max_new_tokens)
    check_number(op, "temperature", settings.temperature, 0.0)
    check_integer(op, "top_k", settings.top_k, 0, 2**24)
    check_number(op, "top_p", settings.top_p, 0.0, 1.0, open_low=True)
    check_number(op, "min_p", settings.min_p, 0.0, 1.0)
    if settings.seed is not None:
        check_integer(op, "seed", settings.seed, -(2**63), 2**63 - 1)
    if settings.pad_id is not None:
        check_integer(op, "pad_id", settings.pad_id, -(2**63), 2**63 - 1)


def check_players(op: str, players: Sequence[Player], has_reference: bool, has_opponent: bool) -> None:
    if not players or not all(isinstance(player, Player) for player in players):
        raise ValueError(f"{op}: players: expected at least one Player; got {players!r}")
    for index, player in enumerate(players):
        name = f"players[{index}]"
        check_integer(op, f"{name}.samples", player.samples, 1, 2**31)
        check_integer(op, f"{name}.stream", player.stream, 0, 255)
        if check_option(op, f"{name}.parameters", player.parameters, PARAMETERS) == "opponent" and not has_opponent:
            raise ValueError(f"{op}: {name}.parameters: expected an engine with an opponent; got one without")
        if not has_reference and (isinstance(player.beta, torch.Tensor) or player.beta != 0):
            raise ValueError(f"{op}: {name}.beta: expected 0, as the engine has no reference; got {player.beta!r}")


def weights(op: str, player: Player, prompts: int, device: torch.device) -> list[float | torch.Tensor]:
    """(1 - beta, beta) of the player's rows: numbers, or tensors of one per row."""
    beta = player.beta
    if not isinstance(beta, torch.Tensor):
        beta = check_number(op, "beta", beta)
        return [1 - beta, beta]
    rows = prompts * player.samples
    if beta.ndim == 1 and len(beta) == prompts:
        beta = beta.repeat_interleave(player.samples)
    if beta.shape not in ((), (rows,)):
        raise ValueError(f"{op}: beta: expected a number or one per row, {rows}; got shape {tuple(beta.shape)}")
    beta = beta.to(device).expand(rows)
    return [1 - beta, beta]


def row_ids(op: str, player: Player, prompts: int, device: torch.device) -> torch.Tensor:  # (P * samples,)
    """Distinct wherever the prompts' ids are."""
    ids, rows = player.row_ids, prompts * player.samples
    if ids is None:
        return torch.arange(rows, dtype=torch.int64, device=device)
    check_tensor(op, "row_ids", ids, ("rows",), INTEGERS, {}, device)
    if len(ids) == rows:
        return ids
    if len(ids) != prompts:
        raise ValueError(f"{op}: row_ids: expected {prompts}, one per prompt, or {rows}; got {len(ids)}")
    of_sample = torch.arange(player.samples, dtype=torch.int64, device=device)
    return (ids[:, None] * player.samples + of_sample).flatten()


def end_ids(op: str, policy: Any, given: Any, vocabulary: int) -> tuple[int, ...]:
    if given is None:
        given = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    if isinstance(given, int):
        given = [given]
    given = () if given is None else given
    ids = tuple(torch.as_tensor(given, dtype=torch.int64, device="cpu").flatten().tolist())
    for id in ids:
        check_integer(op, "end_ids", id, 0, vocabulary - 1)
    return ids
