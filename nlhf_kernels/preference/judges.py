"""Judges: callables that return P(first > second | prompt) for a batch of pairs, and the check around each of them.

A judge is any callable `judge(prompts, first, second) -> probabilities`, one for each pair, as a list, an array or a
tensor. `checked` wraps it: other return values and exceptions become a `JudgeError` that names the judge, the values
and the pair, and holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..core.checks import check_integer, check_number
from ..core.identity import describe
from ..core.stopping import Stopped
from ..core.text import excerpt
from .models import ComparisonModel, RewardModel


class Judge(Protocol):
    """A callable that returns N probabilities that `first` is preferred to `second`, as numbers or a tensor."""

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Any: ...


class JudgeError(RuntimeError):
    """An error of a judge, with its batch; an exception that the judge raised is the `__cause__`.

    Args:
        judge: the judge's name.
        problem: the expected and the returned value.
        batch: the pairs that the judge was called with.
        returned: its return value, where there was one.
    """

    def __init__(self, judge: str, problem: str, batch: Batch, returned: Any = None) -> None:
        super().__init__(f"judge {judge}: {problem}")
        self.judge, self.batch, self.returned = judge, batch, returned


@dataclass(frozen=True)
class Batch:
    """The arguments of a judge's call: N pairs."""

    prompts: list[str]
    first: list[str]
    second: list[str]

    @classmethod
    def of(cls, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Batch:
        for name, texts in (("prompts", prompts), ("first", first), ("second", second)):
            if isinstance(texts, str):
                raise TypeError(f"judge: {name}: expected a list of texts; got one string, {excerpt(texts)}")
        return cls(list(prompts), list(first), list(second))

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.first) == len(self.second):
            counts = f"{len(self.prompts)} prompts, {len(self.first)} first, {len(self.second)} second"
            raise ValueError(f"judge: expected as many prompts as first and second responses; got {counts}")

    def show(self, index: int) -> str:
        texts = (("prompt", self.prompts), ("first", self.first), ("second", self.second))
        return ", ".join(f"{name} {excerpt(column[index])}" for name, column in texts)


@dataclass(frozen=True)
class CheckedJudge:
    """A judge that returns (N,) float64 probabilities on the CPU, or raises a `JudgeError`.

    Args:
        judge: the judge.
        name: of the judge in errors.
    """

    judge: Judge
    name: str

    @property
    def identity(self) -> str:
        return describe(self.judge)

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        batch = Batch.of(prompts, first, second)
        if not batch.prompts:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        try:
            returned = self.judge(list(prompts), list(first), list(second))
        except (JudgeError, Stopped):
            raise  # a JudgeError of a judge inside this one names that judge
        except (Exception, SystemExit) as error:  # sys.exit in a judge would look like a finished run
            problem = f"raised {type(error).__name__}: {error} on {len(batch.prompts)} pairs, the first {batch.show(0)}"
            raise JudgeError(self.name, problem, batch) from error
        return self._check(returned, batch)

    def _check(self, returned: Any, batch: Batch) -> torch.Tensor:
        count = len(batch.prompts)
        try:
            values = torch.as_tensor(returned, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            got = f"{type(returned).__name__} {excerpt(returned)}"
            problem = f"expected {count} probabilities; got {got}: {error}"
            raise JudgeError(self.name, problem, batch, returned) from error
        if values.shape != (count,):
            got = f"shape {tuple(values.shape)}, {excerpt(values.tolist())}"
            problem = f"expected {count} probabilities, one for each pair; got {got}; the first pair: {batch.show(0)}"
            raise JudgeError(self.name, problem, batch, returned)
        bad = (~((values >= 0) & (values <= 1))).nonzero().flatten().tolist()  # NaN is neither
        if bad:
            listed = ", ".join(f"{float(values[index])} for pair {index}" for index in bad[:5])
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            problem = f"expected probabilities in [0, 1]; got {listed}{more}; pair {bad[0]}: {batch.show(bad[0])}"
            raise JudgeError(self.name, problem, batch, returned)
        return values


def checked(judge: Judge, name: str | None = None) -> CheckedJudge:
    """Return `judge` as a `CheckedJudge`; one that is checked already is returned as it is.

    Args:
        judge: any judge.
        name: of the judge in errors; None: its own.
    """
    if isinstance(judge, CheckedJudge) and name is None:
        return judge
    if not callable(judge):
        raise TypeError(f"judge: expected a callable (prompts, first, second); got {type(judge).__name__}")
    return CheckedJudge(judge, name or str(getattr(judge, "__name__", type(judge).__name__)))


@dataclass(frozen=True)
class PreferenceModelJudge:
    """A judge from a trained model, which reads both orders of each pair in one batch.

    Args:
        model: a preference or reward model.
        batch_size: pairs of a forward pass.
    """

    model: ComparisonModel
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_integer("PreferenceModelJudge", "batch_size", self.batch_size, 1, 10**6)

    @property
    def identity(self) -> str:
        return describe(self.model)

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        return self.model.probabilities(prompts, first, second, self.batch_size)


@dataclass(frozen=True)
class RewardJudge:
    """A judge from rewards: P = sigmoid((r(y) - r(y')) / scale).

    Args:
        rewards: a `RewardModel`, or a function (prompts, responses) -> numbers.
        scale: by which differences are divided.
    """

    rewards: RewardModel | Callable[[Sequence[str], Sequence[str]], Any]
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("RewardJudge", "scale", self.scale, 0.0, open_low=True)

    @property
    def identity(self) -> str:
        return f"sigmoid of differences / {self.scale} of {describe(self.rewards)}"

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        score = self.rewards.rewards if isinstance(self.rewards, RewardModel) else self.rewards
        sides = []
        for texts in (first, second):
            rewards = torch.as_tensor(score(prompts, texts), dtype=torch.float64, device="cpu").detach()
            if rewards.shape != (len(prompts),):
                raise ValueError(f"expected {len(prompts)} rewards; got shape {tuple(rewards.shape)}")
            if bad := (~rewards.isfinite()).nonzero().flatten().tolist():
                got = f"{float(rewards[bad[0]])} for number {bad[0]}, {excerpt(texts[bad[0]])}"
                raise ValueError(f"expected finite rewards; got {got}")
            sides.append(rewards)
        return ((sides[0] - sides[1]) / self.scale).sigmoid()


@dataclass(frozen=True)
class AverageJudge:
    """The weighted mean of several judges; an error names the member.

    Args:
        judges: at least one.
        weights: as many numbers, not negative, which are divided by their sum; None: equal ones.
    """

    judges: Sequence[Judge]
    weights: Sequence[float] | None = None
    _members: tuple[tuple[CheckedJudge, float], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weights = [1.0] * len(self.judges) if self.weights is None else list(self.weights)
        if not self.judges or len(weights) != len(self.judges):
            raise ValueError(
                f"AverageJudge: expected at least one judge and a weight for each; got {len(self.judges)} judges, "
                f"{len(weights)} weights"
            )
        for weight in weights:
            check_number("AverageJudge", "weights", weight, 0.0)
        if sum(weights) == 0:
            raise ValueError("AverageJudge: weights: expected one above 0; got none")
        members = tuple((checked(j), w / sum(weights)) for j, w in zip(self.judges, weights, strict=True))
        object.__setattr__(self, "_members", members)

    @property
    def identity(self) -> str:
        return " + ".join(f"{weight:g} {describe(judge)}" for judge, weight in self._members)

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        opinions = [weight * judge(prompts, first, second) for judge, weight in self._members]
        return torch.stack(opinions).sum(0).clamp(0.0, 1.0)  # rounding may leave the interval


def check_antisymmetry(
    judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], tolerance: float = 1e-6
) -> float:
    """Return the largest |P(y > y') + P(y' > y) - 1| of these pairs; raise a `JudgeError` if it exceeds `tolerance`.

    Args:
        judge: any judge.
        prompts, first, second: N texts each.
        tolerance: the largest value that is not an error.
    """
    check_number("check_antisymmetry", "tolerance", tolerance, 0.0)
    checked_judge = checked(judge)
    forward, backward = checked_judge(prompts, first, second), checked_judge(prompts, second, first)
    gap = (forward + backward - 1).abs()
    worst = float(gap.max()) if len(gap) else 0.0
    if worst > tolerance:
        index = int(gap.argmax())
        batch = Batch.of(prompts, first, second)
        problem = (
            f"expected P(y > y') + P(y' > y) = 1 within {tolerance}; got {float(forward[index]):.6f} + "
            f"{float(backward[index]):.6f} for pair {index}: {batch.show(index)}"
        )
        raise JudgeError(checked_judge.name, problem, batch, (forward, backward))
    return worst
