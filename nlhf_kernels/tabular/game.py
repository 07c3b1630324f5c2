"""A regularised preference game: a preference matrix, a reference policy and the strength tau of the KL penalty."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

TOLERANCE = 1e-6  # how far P + P^T may be from 1 and a reference's sum from 1: float32 inputs are fine


@dataclass(frozen=True)
class PreferenceGame:
    """One game or many: P_tau(p > q) = p^T P q - tau KL(p, reference) + tau KL(q, reference).

    A game with a NaN is flagged in `ok` (..., bool) and gives NaN, without effect on the others. Anything else that is
    not a game is refused: values outside [0, 1], P + P^T other than 1, a reference without full support.

    Args:
        preference (tensor (..., A, A), float32 or float64): [a, b] = P(a > b); leading dimensions are games.
        reference (tensor (..., A) or (A,), or None): probabilities of the reference policy; None: uniform.
        tau (float): strength of the KL penalty towards the reference, above 0.
        rho (tensor (X,) or None): probabilities of the contexts, which are the last leading dimension.
    """

    preference: torch.Tensor
    reference: torch.Tensor | None = None
    tau: float = 0.1
    rho: torch.Tensor | None = None
    ok: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        check_preference(self.preference)
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 < self.tau < float("inf"):
            raise ValueError(f"PreferenceGame: tau: expected a finite number above 0; got {self.tau!r}")
        object.__setattr__(self, "reference", _checked_reference(self.reference, self.preference))
        object.__setattr__(self, "ok", ~self.preference.isnan().flatten(-2).any(-1))
        if self.rho is not None:
            contexts = self.preference.shape[-3] if self.preference.ndim > 2 else 1
            _check_distribution("rho", self.rho, contexts)

    @property
    def actions(self) -> int:
        return self.preference.shape[-1]

    @property
    def log_reference(self) -> torch.Tensor:  # (..., A)
        assert self.reference is not None
        return self.reference.log()

    def expected(self, log_opponent: torch.Tensor) -> torch.Tensor:
        """Return P(a > opponent) of each action, (..., A).

        Args:
            log_opponent (tensor (..., A)): log-probabilities of the opponent.
        """
        return (self.preference @ log_opponent.exp().unsqueeze(-1)).squeeze(-1)

    def over_contexts(self, values: torch.Tensor) -> torch.Tensor:
        """Average over contexts, weighted by rho; without rho return the values unchanged.

        Args:
            values (tensor (..., X)): one value for each game.
        """
        return values if self.rho is None else (values * self.rho.to(values)).sum(-1)


def check_preference(preference: torch.Tensor, names: list[str] | None = None) -> None:
    """Raise if a matrix is not a preference, naming the first wrong pair; games with NaN are skipped."""
    if not isinstance(preference, torch.Tensor) or preference.dtype not in (torch.float32, torch.float64):
        kind = preference.dtype if isinstance(preference, torch.Tensor) else type(preference).__name__
        raise TypeError(f"PreferenceGame: preference: expected a float32 or float64 tensor; got {kind}")
    if preference.ndim < 2 or preference.shape[-1] != preference.shape[-2] or preference.shape[-1] == 0:
        shape = tuple(preference.shape)
        raise ValueError(f"PreferenceGame: preference: expected shape (..., A, A) with A > 0; got {shape}")
    whole = ~preference.isnan().flatten(-2).any(-1)[..., None, None]
    outside = whole & ((preference < 0) | (preference > 1))
    if outside.any():
        pair, value, _ = _first(outside, preference, names)
        raise ValueError(f"PreferenceGame: preference: expected values in [0, 1]; got P{pair} = {value:g}")
    unequal = whole & ((preference + preference.mT - 1).abs() > TOLERANCE)
    if unequal.any():
        pair, value, back = _first(unequal, preference, names)
        raise ValueError(
            f"PreferenceGame: preference: expected P(a > b) + P(b > a) = 1; got P{pair} = {value:g} "
            f"and {back:g} the other way round"
        )


def _first(mask: torch.Tensor, preference: torch.Tensor, names: list[str] | None) -> tuple[str, float, float]:
    *game, a, b = mask.nonzero()[0].tolist()
    where = f" in game {game}" if game else ""
    first, second = (names[a], names[b]) if names else (a, b)
    entry = preference[tuple(game)]
    return f"({first} > {second}){where}", entry[a, b].item(), entry[b, a].item()


def _check_distribution(name: str, values: torch.Tensor, size: int) -> None:
    if values.shape[-1] != size:
        raise ValueError(f"PreferenceGame: {name}: expected {size} probabilities; got {values.shape[-1]}")
    total = values.sum(-1)
    if not ((values >= 0).all() and ((total - 1).abs() <= TOLERANCE * size).all()):
        raise ValueError(f"PreferenceGame: {name}: expected probabilities that sum to 1; got {values.tolist()}")


def _checked_reference(reference: torch.Tensor | None, preference: torch.Tensor) -> torch.Tensor:
    batch, actions = preference.shape[:-2], preference.shape[-1]
    if reference is None:
        return torch.full((*batch, actions), 1 / actions, dtype=preference.dtype, device=preference.device)
    if not isinstance(reference, torch.Tensor) or reference.shape not in ((actions,), (*batch, actions)):
        got = tuple(reference.shape) if isinstance(reference, torch.Tensor) else type(reference).__name__
        raise ValueError(f"PreferenceGame: reference: expected shape ({actions},) or {(*batch, actions)}; got {got}")
    _check_distribution("reference", reference, actions)
    if not (reference > 0).all():
        action = (reference <= 0).nonzero()[0].tolist()[-1]
        raise ValueError(f"PreferenceGame: reference: expected full support; action {action} has probability 0")
    return reference.to(preference).expand(*batch, actions)
