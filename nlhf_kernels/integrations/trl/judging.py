"""TRL's `reward_funcs` and `judge` as a judge of this library: P(y > y') for pairs of texts.

Rewards (models, functions) are summed by their weights, and P = sigmoid of the difference, less TRL's penalty for an
answer without an end token. Judges (callables, TRL's judge objects, preference models) return P themselves.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...core.checks import check_number
from ...core.identity import describe
from ...core.loading import load_model, load_tokenizer
from ...data import encode_prompts
from ...preference import AverageJudge, Judge, PairwisePreferenceModel, PreferenceModelJudge, RewardModel
from ...train.experience import Experience, ExperienceCollector
from ...train.rewards import Reward, rewards
from .config import NashMDConfig
from .rows import OP, Rows, with_answer

_log = logging.getLogger(__name__)
Texts = Sequence[str]


@dataclass(frozen=True)
class RewardDifference:
    """P(y > y') = sigmoid(r(y) - r(y')), with r the weighted sum of rewards, less `penalty` where there is no end."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    penalty: float = 0.0
    unended: torch.Tensor | None = None  # (B, 2) bool; None: not known, nothing is taken off

    @property
    def identity(self) -> str:
        parts = zip(self.weights, self.rewards, strict=True)
        return " + ".join(f"{weight:g} {describe(reward)}" for weight, reward in parts) + f" - {self.penalty:g}"

    def __call__(self, prompts: Texts, first: Texts, second: Texts) -> torch.Tensor:
        difference = self._sum(prompts, first) - self._sum(prompts, second)
        if self.unended is not None:
            missing = self.unended.double()
            difference = difference - self.penalty * (missing[:, 0] - missing[:, 1])
        return difference.sigmoid()

    def _sum(self, prompts: Texts, answers: Texts) -> torch.Tensor:
        parts = [w * rewards(reward, prompts, answers) for reward, w in zip(self.rewards, self.weights, strict=True)]
        return torch.stack(parts).sum(0)


class PenalisingCollector(ExperienceCollector):
    """An ExperienceCollector that passes to a `RewardDifference` the mask of answers without an end token, since texts
    lack that token."""

    def judge_answers(self, experiences: Sequence[Experience]) -> list[Experience]:
        judge = self.judge
        if isinstance(judge, RewardDifference):
            self.judge = replace(judge, unended=torch.cat([part.unended for part in experiences]))
        try:
            return super().judge_answers(experiences)
        finally:
            self.judge = judge


class FunctionReward:
    """A TRL reward function: `function(prompts=, completions=, **columns)` -> numbers, or None for an answer."""

    def __init__(self, function: Callable[..., Any], rows: Rows) -> None:
        self.function, self.rows = function, rows
        self.__qualname__ = _title(function)
        parameters = inspect.signature(function).parameters
        for name in ("completion_ids", "trainer_state"):
            if name in parameters:
                raise ValueError(
                    f"{OP}: reward_funcs: {self.__qualname__}: expected a function of texts and columns; got one that "
                    f"asks for {name}"
                )
        every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.parameters = None if every else frozenset(parameters)  # None: it takes all columns
        self.identity = describe(function)
        rows.register(self.parameters)

    def __call__(self, prompts: Texts, answers: Texts) -> list[Any]:
        rows = [self.rows.row(prompt) for prompt in prompts]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        columns["prompts"] = columns.pop("prompt")
        columns["completions"] = [
            answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
            for prompt, answer in zip(columns["prompts"], answers, strict=True)
        ]
        arguments = {
            name: value for name, value in columns.items() if self.parameters is None or name in self.parameters
        }
        return [0.0 if value is None else value for value in self.function(**arguments)]


class ModelReward:
    """The score of an AutoModelForSequenceClassification over a decoder, at the end token after prompt and answer."""

    def __init__(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int) -> None:
        self.model, self.tokenizer, self.rows, self.batch_size = model.eval(), tokenizer, rows, batch_size
        self.identity = describe(model)
        self.__qualname__ = type(model).__name__
        body, score = getattr(model, getattr(model, "base_model_prefix", ""), None), getattr(model, "score", None)
        if body is None or getattr(score, "out_features", None) != 1:
            raise ValueError(
                f"{OP}: reward_funcs: expected a decoder with one linear score (AutoModelForSequenceClassification, "
                f"num_labels=1), or a function; got {self.__qualname__}"
            )
        width = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > width or tokenizer.eos_token_id is None:
            raise ValueError(
                f"{OP}: reward_processing_classes: expected the reward model's own tokenizer, with an end token and at "
                f"most {width} tokens; got {type(tokenizer).__name__} of {len(tokenizer)}"
            )
        rows.register(())
        self.body, self.room = body, getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def __call__(self, prompts: Texts, answers: Texts) -> torch.Tensor:
        rows = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        parts = [self._scores(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]
        return torch.cat(parts)

    def _encode(self, prompt: str, answer: str) -> list[int]:
        messages = self.rows.row(prompt)["prompt"]
        if not isinstance(messages, str) and getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(with_answer(messages, answer), tokenize=False)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids if self.room is None else ids[-self.room :]
        room = None if self.room is None else self.room - 1
        return [*encode_prompts(self.tokenizer, [prompt + answer], room)[0], self.tokenizer.eos_token_id]

    def _scores(self, rows: Sequence[list[int]]) -> torch.Tensor:
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64, device=device)
        last = torch.tensor([len(row) - 1 for row in rows], dtype=torch.int64, device=device)
        mask = (torch.arange(longest, dtype=torch.int64, device=device) <= last[:, None]).long()
        hidden = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        row = torch.arange(len(rows), dtype=torch.int64, device=device)
        scores: torch.Tensor = self.model.score(hidden[row, last])[:, 0]
        return scores.float().cpu()


class TrlJudge:
    """A judge object of TRL with `judge(prompts, pairs)`: its probabilities where it has some, else its choices."""

    def __init__(self, judge: Any) -> None:
        self.judge, self.__name__ = judge, type(judge).__name__
        self.soft = "return_scores" in inspect.signature(judge.judge).parameters

    def __call__(self, prompts: Texts, first: Texts, second: Texts) -> Any:
        pairs = [[one, two] for one, two in zip(first, second, strict=True)]
        if self.soft:
            return self.judge.judge(list(prompts), pairs, return_scores=True)
        better = list(self.judge.judge(list(prompts), pairs))
        if wrong := [value for value in better if value not in (0, 1, -1)]:
            raise ValueError(f"expected 0, 1, or -1 where it cannot say; got {wrong[0]!r}")
        if failed := better.count(-1):
            _log.warning("%s could not say of %d of %d pairs; they count as even", self.__name__, failed, len(better))
        return [{0: 1.0, 1: 0.0}.get(value, 0.5) for value in better]


class Comparison(NamedTuple):
    """The comparison of answers in a NashMDTrainer."""

    judge: Judge
    penalty: float  # that NashTrainer takes off P(y > y') for an answer without an end token
    reward_funcs: Any  # for `NashMDTrainer.reward_funcs`: loaded where they are named; None beside `judge`


def make_judge(
    args: NashMDConfig, reward_funcs: Any, judge: Any, tokenizers: Any, policy_tokenizer: Any, rows: Rows
) -> Comparison:
    """Combine all arguments that name judges or rewards into one judge."""
    sources = {"reward_funcs": reward_funcs, "judge": judge, "args.reward_model_path": args.reward_model_path}
    named = [name for name, value in sources.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"{OP}: expected one of {', '.join(sources)}; got {' and '.join(named) or 'none'}")
    value = sources[named[0]]
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    weights = _weights(args, len(items))
    kinds = {_is_judge(named[0], item) for item in items}
    if len(kinds) != 1:
        raise ValueError(f"{OP}: {named[0]}: expected judges or rewards; got {'both' if kinds else 'an empty list'}")
    penalty = args.missing_eos_penalty or 0.0
    if kinds == {True}:
        if tokenizers is not None:
            raise ValueError(f"{OP}: reward_processing_classes: expected with reward models; got judges beside them")
        judges = [_judge(item) for item in items]
        one = judges[0] if len(judges) == 1 and args.reward_weights is None else AverageJudge(judges, weights)
        return Comparison(one, penalty, _one_or_all(items) if named[0] == "reward_funcs" else None)
    tokenizers = _one_each(tokenizers, len(items))
    items = [_load(args, item) if isinstance(item, str) else item for item in items]
    reward_functions = [
        _reward(args, item, tokenizer, policy_tokenizer, rows)
        for item, tokenizer in zip(items, tokenizers, strict=True)
    ]
    return Comparison(RewardDifference(tuple(reward_functions), tuple(weights), penalty), 0.0, _one_or_all(items))


def _one_or_all(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _weights(args: NashMDConfig, count: int) -> list[float]:
    weights = [1.0] * count if args.reward_weights is None else list(args.reward_weights)
    if len(weights) != count:
        raise ValueError(f"{OP}: reward_weights: expected {count}, one for each; got {len(weights)}")
    return [check_number(OP, "reward_weights", weight) for weight in weights]


def _one_each(tokenizers: Any, count: int) -> list[Any]:
    many = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * (count if count == 1 else 0)
    if tokenizers is None:
        many = [None] * count
    if len(many) != count:
        raise ValueError(f"{OP}: reward_processing_classes: expected {count}, one for each reward; got {tokenizers!r}")
    return many


def _is_judge(name: str, item: Any) -> bool:
    if name == "judge" or isinstance(item, PairwisePreferenceModel) or callable(getattr(item, "judge", None)):
        return True
    if isinstance(item, (str, torch.nn.Module)):
        return False
    if not callable(item):
        raise TypeError(f"{OP}: {name}: expected a model, its name, a function or a judge; got {type(item).__name__}")
    signature = inspect.signature(item)
    if inspect.iscoroutinefunction(item) or inspect.iscoroutinefunction(getattr(item, "__call__", None)):  # noqa: B004
        raise TypeError(f"{OP}: {name}: expected functions that return numbers; got one that is async: {_title(item)}")
    if "completions" in signature.parameters:
        return False
    pairwise = _takes(signature, 1, 2, 3)
    if pairwise is _takes(signature, prompts=1, completions=2):
        raise ValueError(
            f"{OP}: {name}: expected a reward of (prompts, completions) or a judge of (prompts, first, second); cannot "
            f"tell which {_title(item)}{signature} is (a judge can be given as judge=)"
        )
    return pairwise


def _title(item: Any) -> str:
    return str(getattr(item, "__name__", type(item).__name__))


def _takes(signature: inspect.Signature, *positional: int, **named: int) -> bool:
    try:
        signature.bind(*positional, **named)
    except TypeError:
        return False
    return True


def _judge(item: Any) -> Judge:
    if isinstance(item, PairwisePreferenceModel):
        return PreferenceModelJudge(item)
    if callable(getattr(item, "judge", None)):
        return TrlJudge(item)
    if not callable(item):
        raise TypeError(f"{OP}: judge: expected a callable, or an object with judge(); got {type(item).__name__}")
    judge: Judge = item
    return judge


def _load(args: NashMDConfig, name: str) -> Any:
    options: Any = {"num_labels": 1, "trust_remote_code": args.trust_remote_code}
    return load_model(f"{OP}: reward_funcs", name, "AutoModelForSequenceClassification", **options)


def _reward(args: NashMDConfig, item: Any, tokenizer: Any, policy_tokenizer: Any, rows: Rows) -> Reward:
    if isinstance(item, torch.nn.Module) and not isinstance(item, RewardModel):
        return _model_reward(args, item, tokenizer, policy_tokenizer, rows)
    if tokenizer is not None:
        raise ValueError(f"{OP}: reward_processing_classes: expected None beside {type(item).__name__}; got one")
    if isinstance(item, RewardModel):
        return item.eval().to(args.device).rewards
    return FunctionReward(item, rows)


def _model_reward(args: NashMDConfig, model: Any, tokenizer: Any, policy_tokenizer: Any, rows: Rows) -> ModelReward:
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if tokenizer is None and name:
        tokenizer = load_tokenizer(f"{OP}: reward_funcs", name, trust_remote_code=args.trust_remote_code)
    elif tokenizer is None:
        tokenizer = policy_tokenizer
    model.requires_grad_(False).to(args.device)
    return ModelReward(model, tokenizer, rows, args.per_device_train_batch_size)
