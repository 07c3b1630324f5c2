"""A rollout's request and its result: prompts, players and settings; tokens and log-probabilities.

A player is a distribution over responses to a prompt: y ~ pi is `Player()`, y' ~ pi^beta is `Player(beta, OPPONENT)`.
All checks of a request are made here, before any forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from ..core.checks import INTEGERS, Sizes, check_integer, check_number, check_option, check_tensor
from ..core.rng import Stream
from ..core.text import excerpt
from ..core.tokens import end_token_ids, flatten_ids
from ..core.vocabulary import VocabularySlice
from .hooks import Hooks

LOGPROBS = ("policy", "reference", "mixture")
PARAMETERS = ("policy", "opponent")
_MASKS = (torch.int64, torch.int32, torch.bool)


# ---- the request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Player:
    """A distribution over responses: p^(1 - beta) mu^beta, sampled token by token.

    p is the policy or the engine's opponent, as set by `parameters`; mu is the reference. The noise of sample j of
    a prompt is a function of (seed, its row id * samples + j, the token's index, stream): two players of one stream
    that answer the same prompts share their noise.

    Args:
        beta (number, (P,) or (P * samples,)): the reference's weight: one, one per prompt, or one per response.
        stream (int in [0, 255]): stream of the noise; see `nlhf_kernels.core.rng.Stream`.
        samples (int): responses to each prompt.
        row_ids ((P,) or (P * samples,) int64): ids that the noise depends on; None numbers the prompts.
        parameters ("policy" or "opponent"): source of p's parameters.
    """

    beta: float | torch.Tensor = 0.0
    stream: int = Stream.POLICY
    samples: int = 1
    row_ids: torch.Tensor | None = None
    parameters: str = "policy"


def nash_md(beta: float | torch.Tensor, samples: int = 1, row_ids: torch.Tensor | None = None) -> tuple[Player, Player]:
    """Return the players of Nash-MD: y ~ pi and y' ~ pi^beta, independent of each other.

    Args:
        beta (number, (P,) or (P * samples,)): the reference's weight in y'.
        samples (int): responses of each player to each prompt.
        row_ids ((P,) or (P * samples,) int64): ids that the noise depends on; None numbers the prompts.
    """
    return Player(0.0, Stream.POLICY, samples, row_ids), Player(beta, Stream.OPPONENT, samples, row_ids)


def nash_ema(
    beta: float | torch.Tensor = 0.0, samples: int = 1, row_ids: torch.Tensor | None = None
) -> tuple[Player, Player]:
    """Return the players of Nash-EMA: y ~ pi, and y' from the engine's opponent parameters.

    Args:
        beta (number, (P,) or (P * samples,)): the reference's weight in y'; 0: the opponent alone.
        samples (int): responses of each player to each prompt.
        row_ids ((P,) or (P * samples,) int64): ids that the noise depends on; None numbers the prompts.
    """
    return Player(0.0, Stream.POLICY, samples, row_ids), Player(beta, Stream.OPPONENT, samples, row_ids, "opponent")


@dataclass(frozen=True)
class RolloutSettings:
    """How tokens are sampled and when a response ends. The filters are those of `mixture_sample`.

    Args:
        max_new_tokens (int): tokens of a response, at most.
        min_new_tokens (int): tokens before which no end token is sampled.
        temperature (float): 0 takes the likeliest token.
        top_k (int): 0 keeps all.
        top_p (float in (0, 1]): 1 keeps all.
        min_p (float in [0, 1]): 0 keeps all.
        seed (int): None draws one from torch's default generator.
        end_ids (int, sequence or tensor of ints): tokens that end a response; None: the policy's own; (): none.
        pad_id (int): token that fills a response after its end; None: the first end id, or 0.
        logprobs (sequence of "policy", "reference", "mixture"): what is computed and returned; None: all there are.
        backend (str): backend of the sampler; None: chosen by `use_backend`, or automatically.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    end_ids: int | Sequence[int] | torch.Tensor | None = None
    pad_id: int | None = None
    logprobs: Sequence[str] | None = None
    backend: str | None = None


# ---- the result ------------------------------------------------------------------------------------------------------


class Finish(IntEnum):
    """Why a response ended."""

    LENGTH = 0  # max_new_tokens
    END = 1  # an end token, which is the response's last
    STOPPED = 2  # a stopping criterion


@dataclass(frozen=True)
class Responses:
    """One player's responses: row `prompt * samples + sample`; R rows, T tokens.

    Args:
        tokens ((R, T) int64): the pad id after a row's end.
        mask ((R, T) bool): True at a row's tokens, its end token included.
        lengths ((R,) int64): tokens of each row, its end token included.
        finish ((R,) int8): values of `Finish`.
        policy_logprobs ((R, T) float32): under the player's parameters p, at temperature 1, unfiltered.
        reference_logprobs ((R, T) float32): likewise under the reference; None without one.
        mixture_logprobs ((R, T) float32): under the distribution that was sampled: after temperature and filters.
        ok ((R,) bool): False where at some step the logits were no distribution (a NaN); the token there is 0.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    finish: torch.Tensor
    policy_logprobs: torch.Tensor | None
    reference_logprobs: torch.Tensor | None
    mixture_logprobs: torch.Tensor | None
    ok: torch.Tensor

    def check_finite(self, op: str) -> None:
        """Raise FloatingPointError where a row was sampled from logits that were no distribution.

        Args:
            op (str): the name that opens the error.
        """
        wrong = int((~self.ok).sum())
        if wrong:
            raise FloatingPointError(
                f"{op}: expected finite logits; got NaN or infinity in {wrong} of {len(self.ok)} answers"
            )

    @property
    def finish_reasons(self) -> list[str]:
        """The names of `finish`, in lower case: "length", "end" or "stopped"."""
        return [Finish(reason).name.lower() for reason in self.finish.tolist()]


@dataclass(frozen=True)
class RolloutResult:
    """The responses of all players, in the order of the request; unpacks as `y, y_prime = engine.rollout(...)`.

    Args:
        responses (tuple of Responses): one per player.
        seed (int): reproduces the responses.
        end_ids (tuple of ints): tokens that ended a response.
        steps (int): tokens sampled per row, at most.
        row_steps (int): rows decoded, summed over steps; less than rows * steps where rows ended early.
        notes (tuple of str): fast paths that were not taken, and why.
    """

    responses: tuple[Responses, ...]
    seed: int
    end_ids: tuple[int, ...]
    steps: int
    row_steps: int
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Responses]:
        return iter(self.responses)

    def __getitem__(self, player: int) -> Responses:
        return self.responses[player]


# ---- a request, checked and resolved ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    ids: torch.Tensor  # (P, S) int64, padded on the left
    mask: torch.Tensor  # (P, S) int64, 0 at padding
    padded: bool  # whether any prompt is

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    @property
    def shape(self) -> tuple[int, int]:  # (P, S)
        return len(self.ids), self.width


@dataclass(frozen=True)
class Request:
    """One call of `RolloutEngine.rollout`, its defaults resolved."""

    prompts: Prompts
    players: Sequence[Player]
    settings: RolloutSettings
    hooks: Hooks
    seed: int
    end_ids: tuple[int, ...]
    pad_id: int
    logprobs: tuple[str, ...]  # of policy, reference, mixture
    has_reference: bool
    vocabulary: int  # columns of the heads that count
    part: VocabularySlice | None  # the columns that logits have here; None: all
    records_prompts: bool  # whether a pass over these prompts, padded to a whole bucket, may be recorded
    gather: bool  # whether FSDP's parameters are gathered once, for all steps
    any_open: Callable[[bool], bool] | None  # of processes in step: whether a row is open in any; None: they are not
    notes: tuple[str, ...]

    @property
    def eager(self) -> bool:
        """Whether steps are taken one by one, neither recorded nor compiled; a note says why."""
        return any(note.startswith("eager steps") for note in self.notes)

    @property
    def columns(self) -> slice:
        """The slice of the vocabulary whose logits are in this process."""
        if self.part is None:
            return slice(0, self.vocabulary)
        return slice(min(self.part.first, self.vocabulary), min(self.part.stop, self.vocabulary))


def check_prompts(op: str, ids: Any, mask: Any, device: torch.device) -> Prompts:
    """Check ids and mask. This is the one place that reads a mask's values on the host: once, where it is right."""
    sizes: Sizes = {}
    check_tensor(op, "input_ids", ids, ("rows", "prompt"), INTEGERS, sizes, device)
    if not ids.numel():
        raise ValueError(f"{op}: input_ids: expected at least one row and one token; got {tuple(ids.shape)}")
    if mask is None:
        return Prompts(ids, torch.ones_like(ids), padded=False)
    check_tensor(op, "attention_mask", mask, ("rows", "prompt"), _MASKS, sizes, device)
    mask = mask.long()
    empty, holes = mask.sum(1) == 0, (mask.diff(dim=1) < 0).any(1)  # (P,)
    facts = torch.stack([empty.any(), ~mask[:, -1].all(), holes.any(), ~mask.all()])
    any_empty, any_open_end, any_holes, padded = facts.tolist()
    if any_empty:
        rows = empty.nonzero().flatten().tolist()
        raise ValueError(f"{op}: attention_mask: expected a token in every prompt; got only padding in rows {rows}")
    if any_open_end:
        raise ValueError(f"{op}: attention_mask: expected padding on the left; got a row whose last token is masked")
    if any_holes:
        rows = holes.nonzero().flatten().tolist()
        raise ValueError(f"{op}: attention_mask: expected padding on the left only; got holes in rows {rows}")
    return Prompts(ids, mask, padded)


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


def mixture_weights(op: str, player: Player, prompts: int, device: torch.device) -> list[float | torch.Tensor]:
    """Return (1 - beta, beta) of a player's rows: two numbers, or two tensors of one value per row."""
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


def noise_row_ids(op: str, player: Player, prompts: int, device: torch.device) -> torch.Tensor:  # (P * samples,)
    """Return the ids that the noise of a player's rows depends on: distinct wherever the prompts' ids are."""
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


def resolve_end_ids(op: str, policy: Any, settings: RolloutSettings, vocabulary: int) -> tuple[int, ...]:
    """Return the request's end ids, by default the policy's own, checked against the vocabulary."""
    try:
        ids = end_token_ids(policy) if settings.end_ids is None else flatten_ids(settings.end_ids)
    except (TypeError, ValueError, RuntimeError):  # torch's, which name no argument
        raise TypeError(
            f"{op}: end_ids: expected token ids (a number, or several); got {excerpt(settings.end_ids)}"
        ) from None
    for id in ids:
        check_integer(op, "end_ids", id, 0, vocabulary - 1)
    return ids
