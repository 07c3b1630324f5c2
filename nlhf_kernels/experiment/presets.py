"""Contestants and presets: the algorithms that are compared, and every number of an experiment in one place."""

from __future__ import annotations

import difflib
import itertools
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.checks import check_integer, check_number, check_option

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OP = "experiment"
START = "sft"  # the supervised policy: start and reference of all contestants


@dataclass(frozen=True)
class Contestant:
    """An algorithm that is trained.

    Args:
        label (str): its name in tables and figures.
        algorithm (str): of `NashConfig`.
        beta (float or None): weight of the reference in the opponent, of nash-md and ipo-md.
        taus (str): the preset's field with its grid of strengths of regularisation.
        averaged (bool): whether its opponent is a moving average.
    """

    label: str
    algorithm: str
    beta: float | None = None
    taus: str = "taus"
    averaged: bool = False

    def options(self, preset: Any, index: int) -> dict[str, Any]:
        """Return the contestant's options of `NashConfig`, beside the budget.

        Args:
            preset (Preset): with the grids and the decay of the average.
            index (int): which tau of its grid.
        """
        options: dict[str, Any] = {"algorithm": self.algorithm, "tau": getattr(preset, self.taus)[index]}
        if self.beta is not None:
            options["beta"] = self.beta
        if self.averaged:
            options["ema_decay"] = preset.ema_decay
        return options


NASH_BETAS = (0.0, 0.125, 0.25, 0.5, 1.0)
BASELINE = "rlhf"
CONTESTANTS: dict[str, Contestant] = {
    BASELINE: Contestant("RLHF", "rlhf", taus="reward_taus"),
    **{f"nash-md-{beta:g}": Contestant(f"Nash-MD {beta:g}", "nash-md", beta) for beta in NASH_BETAS},
    "nash-ema": Contestant("Nash-EMA", "nash-ema", averaged=True),
    "ipo-md": Contestant("IPO-MD 0.125", "ipo-md", 0.125, taus="ipo_taus"),
}


def label(name: str) -> str:
    """Return a policy's name in tables and figures."""
    return "SFT" if name == START else CONTESTANTS[name].label


def policy_name(contestant: str, index: int) -> str:
    """Return the name of a contestant's policies at one tau.

    Args:
        contestant (str): a key of `CONTESTANTS`.
        index (int): which tau of its grid.
    """
    return f"{contestant}-tau{index}"


def beta_of(name: str) -> float | None:
    """Return the weight of the reference in a Nash-MD contestant's opponent; None for others."""
    contestant = CONTESTANTS.get(name)
    return contestant.beta if contestant is not None and contestant.algorithm == "nash-md" else None


JUDGES = ("preference-model", "annotators")


@dataclass(frozen=True)
class Preset:
    """All numbers of an experiment.

    Args:
        examples (int): docstrings, or pairs of the user's data, at most.
        test_fraction (float): of modules, or of the pairs' prompts.
        text_characters (int): of a docstring's body.
        summary_characters (int): of its first line.
        vocabulary (int): tokens of the tokenizer that is trained.
        hidden, layers, heads (int): size of the model, where none is given.
        positions (int): tokens of prompt and answers together that the models can read.
        sft_steps, sft_batch (int): steps and batch size of supervised training.
        sft_learning_rate (float): of supervised training.
        pairs (int): of answers that the annotators compare.
        vote_scale (float): an annotator's scale, as a share of the usual difference of its scores.
        preference_steps, preference_batch (int): steps and batch size of preference and reward model.
        preference_learning_rate (float): of preference and reward model.
        cycle_responses (int): answers to each test prompt, among whose triples cycles are counted.
        contestants (tuple of str): keys of `CONTESTANTS`.
        seeds (int): training runs of each contestant at each tau.
        judge (str): of training, one of `JUDGES`; annotators exist for docstrings only.
        updates, prompts_per_update, samples_per_prompt (int): the budget of a training run.
        learning_rate (float): of a training run.
        taus (tuple of float): strengths of the regularisation, falling.
        reward_taus (tuple of float): of the reward baseline, as a reward is on another scale than a probability.
        ipo_taus (tuple of float): of ipo-md, whose targets 1 / (2 tau) are unbounded.
        budget (float): nats of KL from the supervised policy, per answer, at which policies are compared.
        ema_decay (float): of the opponent that is a moving average.
        prompt_tokens, answer_tokens (int): at most.
        evaluations (int): of each training run.
        test_prompts (int): of the tournament.
        answers (int): of each policy to each of them, at least 2: the policies share their noise.
        bfloat16 (bool): products in bfloat16.
        batch (int): rows in one batch, where only speed depends on it.
        response_starts (int): best responses trained against the first run of each contestant: 1 from the reference,
            2 from the contestant's weights too, 0 none.
        speed_updates (int): timed with each backend, twice.
        threads (int): of PyTorch on the CPU, as models this small are slower on several; 0: PyTorch's default.
        seed (int): of all random numbers.
    """

    examples: int
    test_fraction: float = 0.1
    text_characters: int = 240
    summary_characters: int = 80
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    positions: int = 512
    sft_steps: int = 300
    sft_batch: int = 32
    sft_learning_rate: float = 2e-3
    pairs: int = 4000
    vote_scale: float = 0.15
    preference_steps: int = 300
    preference_batch: int = 32
    preference_learning_rate: float = 5e-4
    cycle_responses: int = 5
    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    seeds: int = 1
    judge: str = "preference-model"
    updates: int = 40
    prompts_per_update: int = 16
    samples_per_prompt: int = 2
    learning_rate: float = 3e-4
    taus: tuple[float, ...] = (0.3, 0.1, 0.03)
    reward_taus: tuple[float, ...] = (1.0, 0.3, 0.1)
    ipo_taus: tuple[float, ...] = (1.0, 0.3, 0.1)
    budget: float = 1.0
    ema_decay: float = 0.95
    prompt_tokens: int = 160
    answer_tokens: int = 24
    evaluations: int = 4
    test_prompts: int = 128
    answers: int = 2
    bfloat16: bool = False
    batch: int = 64
    response_starts: int = 0
    speed_updates: int = 5
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "sft_batch", "preference_steps", "preference_batch", "seeds",
                     "updates", "prompts_per_update", "samples_per_prompt", "answer_tokens", "evaluations",
                     "batch"):  # fmt: skip
            check_integer(OP, name, getattr(self, name), 1, 10**9)
        for name, low in {"examples": 2, "sft_steps": 0, "positions": 8, "prompt_tokens": 2, "pairs": 10,
                          "cycle_responses": 3, "test_prompts": 2, "answers": 2, "speed_updates": 2, "seed": 0,
                          "threads": 0, "text_characters": 40, "summary_characters": 10,
                          "vocabulary": 258}.items():  # fmt: skip
            check_integer(OP, name, getattr(self, name), low, 2**31 - 1)
        for name in ("sft_learning_rate", "vote_scale", "preference_learning_rate", "learning_rate", "budget"):
            check_number(OP, name, getattr(self, name), 0.0, open_low=True)
        for name in ("taus", "reward_taus", "ipo_taus"):
            check_grid(name, getattr(self, name), open_low=name == "ipo_taus")
        check_integer(OP, "response_starts", self.response_starts, 0, 2)
        check_number(OP, "test_fraction", self.test_fraction, 0.0, 0.9, open_low=True)
        check_number(OP, "ema_decay", self.ema_decay, 0.0, 1.0)
        check_option(OP, "judge", self.judge, JUDGES)
        check_contestants(self.contestants, CONTESTANTS)
        if self.prompt_tokens + 2 * self.answer_tokens >= self.positions:
            raise ValueError(
                f"{OP}: positions: expected more than prompt_tokens + 2 answer_tokens = "
                f"{self.prompt_tokens + 2 * self.answer_tokens}; got {self.positions}"
            )

    def grid(self, contestant: str) -> tuple[float, ...]:
        """Return the contestant's taus, falling.

        Args:
            contestant (str): a key of `CONTESTANTS`.
        """
        values: tuple[float, ...] = getattr(self, CONTESTANTS[contestant].taus)
        return values

    def cells(self) -> list[tuple[str, int, int]]:
        """Return every training run: contestant, index of its tau, number of the run."""
        return [
            (name, index, seed)
            for name in self.contestants
            for index in range(len(self.grid(name)))
            for seed in range(self.seeds)
        ]


def check_contestants(names: Sequence[str], known: Iterable[str]) -> None:
    """Raise unless there are some, each once, all known.

    Args:
        names (sequence of str): of the contestants.
        known (iterable of str): the names there are.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{OP}: contestants: expected at least one, each once; got {names}")
    for name in names:
        check_option(OP, "contestants", name, tuple(known))


def check_heads(hidden: int, heads: int) -> None:
    """Raise unless the heads of a Llama have an even width, which rotary positions need.

    Args:
        hidden (int): width of the model.
        heads (int): their number.
    """
    if hidden % (2 * heads):
        raise ValueError(f"{OP}: hidden: expected a multiple of 2 heads = {2 * heads}; got {hidden}")


def check_grid(name: str, taus: Sequence[float], open_low: bool) -> None:
    """Raise unless the numbers are one or more, in range and falling.

    Args:
        name (str): the field.
        taus (sequence of float): its values.
        open_low (bool): whether 0 is out of range.
    """
    for tau in taus:
        check_number(OP, name, tau, 0.0, open_low=open_low)
    if not taus or any(later >= earlier for earlier, later in itertools.pairwise(taus)):
        raise ValueError(f"{OP}: {name}: expected one or more falling numbers; got {tuple(taus)}")


PRESETS = {
    # seconds: a smoke test of the pipeline
    "tiny": Preset(
        examples=60, test_fraction=0.3, text_characters=80, summary_characters=60, vocabulary=300, hidden=16, layers=1,
        heads=2, sft_steps=3, sft_batch=4, pairs=24, preference_steps=3, preference_batch=4, cycle_responses=3,
        contestants=("rlhf", "nash-md-0", "nash-md-0.25", "nash-md-1"), taus=(0.3, 0.03), reward_taus=(1.0, 0.1),
        updates=2, prompts_per_update=4, samples_per_prompt=1, prompt_tokens=48, answer_tokens=6, evaluations=1,
        test_prompts=6, speed_updates=2,
    ),
    # minutes on two CPU cores
    "small": Preset(
        examples=3600, text_characters=160, vocabulary=4096, hidden=96, layers=2, sft_steps=450, sft_batch=16,
        sft_learning_rate=5e-3, pairs=2560, preference_steps=160, preference_batch=16, preference_learning_rate=1e-3,
        contestants=("rlhf", "nash-md-0", "nash-md-0.25", "nash-md-1"), prompt_tokens=112, answer_tokens=20,
        evaluations=2, test_prompts=192, speed_updates=3,
    ),
    # one GPU, with several runs of each contestant
    "gpu": Preset(
        examples=11000, vocabulary=8192, hidden=512, layers=8, heads=8, sft_steps=2000, sft_batch=64,
        sft_learning_rate=6e-4, pairs=20000, preference_steps=800, preference_batch=64, preference_learning_rate=1e-4,
        contestants=("rlhf", "nash-md-0", "nash-md-0.25", "nash-md-1"), seeds=3, updates=110, prompts_per_update=64,
        learning_rate=1e-4, ema_decay=0.98, answer_tokens=32, test_prompts=512, answers=3, bfloat16=True, batch=256,
        threads=0, speed_updates=10, response_starts=2,
    ),
}  # fmt: skip


AnyPreset = TypeVar("AnyPreset", bound="DataclassInstance")


def overridden(preset: AnyPreset, settings: Sequence[str]) -> AnyPreset:
    """Return the preset with some fields changed.

    Args:
        preset (a frozen dataclass of numbers, texts and tuples): what is changed.
        settings (sequence of str): each "name=value"; the values of a tuple are separated by commas.
    """
    kinds = typing.get_type_hints(type(preset))
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in kinds or not equals:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f" (is {near[0]} meant?)" if near else ""
            raise ValueError(
                f"{OP}: --set: expected NAME=VALUE with a name of {', '.join(kinds)}; got {setting!r}{hint}"
            )
        values[name] = _parse(name, text, kinds[name])
    return replace(preset, **values)


def _parse(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        return check_option(OP, name, text.lower(), ("true", "false")) == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            expected = "a whole number" if kind is int else "a number"
            raise ValueError(f"{OP}: --set: {name}: expected {expected}; got {text!r}") from error
    if kind is str:
        return text
    inner, _ = typing.get_args(kind)  # tuple[inner, ...]
    return tuple(_parse(name, part.strip(), inner) for part in text.split(",") if part.strip())


def as_json(preset: Preset) -> dict[str, Any]:
    """Return the preset as a JSON document."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(preset).items()}
