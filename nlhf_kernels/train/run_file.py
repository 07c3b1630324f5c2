"""A training run as a YAML file: models, judges, data, and every field of NashConfig under `training`.

Unknown keys are refused, with the nearest known key, as are values of wrong types. No model or data is loaded here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.optional import need
from ..core.text import EXCERPT, excerpt, read_text
from .config import NashConfig

OP = "train"
DTYPES = ("float32", "bfloat16", "auto")
MOST = 10_000  # values of a run file


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class JudgeSpec:
    """What compares two answers. One of preference_model, reward_model and function."""

    preference_model: str | None = field(default=None, metadata=_help("a folder that `nlhf-kernels prefer train` made"))
    reward_model: str | None = field(
        default=None, metadata=_help("the same with --kind reward: P = sigmoid(difference / scale)")
    )
    function: str | None = field(
        default=None, metadata=_help("module:name or file.py:name, called with prompts, first, second")
    )
    scale: float | None = field(default=None, metadata=_help("of a reward model's differences; none: 1"))
    batch_size: int | None = field(default=None, metadata=_help("pairs at once through a preference model; none: 16"))
    weight: float | None = field(default=None, metadata=_help("in the mean of several judges; none: 1"))

    def check(self, place: str) -> None:
        _one_of(place, self, ("preference_model", "reward_model", "function"))
        for name, owner in (("scale", "reward_model"), ("batch_size", "preference_model")):
            if getattr(self, name) is not None and getattr(self, owner) is None:
                raise ValueError(f"{OP}: {place}.{name}: expected with {owner}; got it without")


@dataclass
class RewardSpec:
    """What rlhf maximises; measured in evaluations of every algorithm. One of reward_model and function."""

    reward_model: str | None = field(
        default=None, metadata=_help("a folder of `nlhf-kernels prefer train --kind reward`")
    )
    function: str | None = field(
        default=None, metadata=_help("module:name or file.py:name, called with prompts, responses")
    )

    def check(self, place: str) -> None:
        _one_of(place, self, ("reward_model", "function"))


@dataclass
class DataSpec:
    """Prompts: files (.jsonl, .json, .csv, .parquet), folders of save_to_disk, names on the hub; column `prompt`."""

    train: str = field(metadata=_help("prompts to train on"))
    train_split: str | None = field(default=None, metadata=_help("part of a hub data set; none: train"))
    evaluation: str | None = field(default=None, metadata=_help("prompts to evaluate on"))
    evaluation_split: str | None = field(default=None, metadata=_help("likewise"))

    def check(self, place: str) -> None:
        if self.evaluation is None and self.evaluation_split is not None:
            raise ValueError(f"{OP}: {place}.evaluation_split: expected with evaluation; got it without")


@dataclass
class RunFile:
    """The file's own keys."""

    model: str = field(
        metadata=_help(
            "the policy: a folder or a name on the hub, safetensors only; an adapter of peft's is trained further"
        )
    )
    data: DataSpec = field(metadata=_help("see below"))
    training: dict[str, Any] = field(metadata=_help("fields of NashConfig; output_dir is needed"))
    judge: list[JudgeSpec] | None = field(default=None, metadata=_help("one (see below), or a list of them, averaged"))
    reward: RewardSpec | None = field(default=None, metadata=_help("see below; needed by rlhf, which needs no judge"))
    reference_model: str | None = field(
        default=None,
        metadata=_help("none: the policy as it is at the beginning, or its base where it has an adapter"),
    )
    eval_opponent: str | None = field(default=None, metadata=_help("a model to compare with in evaluations"))
    tokenizer: str | None = field(default=None, metadata=_help("none: the policy's"))
    dtype: str = field(
        default="float32", metadata=_help("of weights: float32, bfloat16 or auto; bf16 under training needs float32")
    )
    lora: dict[str, Any] | None = field(
        default=None, metadata=_help("fields of peft's LoraConfig; none: all weights are trained")
    )
    trust_remote_code: bool = field(default=False, metadata=_help("run Python code that comes with a model"))

    def config(self) -> NashConfig:
        return NashConfig(**self.training)


def read_run_file(path: Path, changes: Iterable[str] = ()) -> RunFile:
    """Return the run of a YAML file; raise where a key or value is wrong.

    Args:
        path: the file.
        changes: "training.beta=0.25", each replacing what the file has there.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"{OP}: {path}: {error}") from error
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{OP}: {path}: expected keys and values; got {type(content).__name__}")
    for change in changes:
        _change(content, change)
    return _checked(content)


def option_names() -> dict[str, str]:
    """Return arguments of NashConfig and NashTrainer, as errors name them -> keys of the file."""
    return {entry.name: f"training.{entry.name}" for entry in dataclasses.fields(NashConfig)} | {
        "train_dataset": "data.train",
        "eval_dataset": "data.evaluation",
        "processing_class": "tokenizer",
        "peft_config": "lora",
        "resume_from_checkpoint": "--resume",
        **{name: name for name in ("model", "reference_model", "eval_opponent", "judge", "reward")},
    }


def _checked(content: dict[str, Any]) -> RunFile:
    judges = content.get("judge")
    if judges is not None:
        many = isinstance(judges, list)
        entries = [(f"judge[{i}]", one) for i, one in enumerate(judges)] if many else [("judge", judges)]
        if not entries:
            raise ValueError(f"{OP}: judge: expected at least one; got an empty list")
        content = {**content, "judge": [_spec(place, JudgeSpec, one) for place, one in entries]}
    for name, kind in (("reward", RewardSpec), ("data", DataSpec)):
        if content.get(name) is not None:
            content = {**content, name: _spec(name, kind, content[name])}
    _check_keys("", content, RunFile)
    run = RunFile(**content)
    if run.dtype not in DTYPES:
        raise ValueError(f"{OP}: dtype: expected one of {', '.join(DTYPES)}; got {excerpt(run.dtype)}")
    _check_keys("training", run.training, NashConfig)
    if not run.training.get("output_dir"):
        raise ValueError(f"{OP}: training: expected output_dir among its keys; got none")
    if run.lora is not None:
        _check_keys("lora", run.lora, need("peft", "train: lora").LoraConfig, typed=False)
    return run


def _spec(place: str, kind: Any, content: Any) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"{OP}: {place}: expected keys and values; got {excerpt(content)}")
    _check_keys(place, content, kind)
    spec = kind(**content)
    spec.check(place)
    return spec


def _one_of(place: str, spec: Any, names: tuple[str, ...]) -> None:
    present = [name for name in names if getattr(spec, name) is not None]
    if len(present) != 1:
        raise ValueError(f"{OP}: {place}: expected one of {', '.join(names)}; got {' and '.join(present) or 'none'}")


def _check_keys(place: str, content: Mapping[Any, Any], kind: Any, typed: bool = True) -> None:
    """Check that `content` has fields of the dataclass `kind`, all without a default, with values of their types."""
    entries = {entry.name: entry for entry in dataclasses.fields(kind) if entry.init}
    dot = f"{place}." if place else ""
    for key in content:
        if key not in entries:
            name = key if isinstance(key, str) else excerpt(key)
            near = difflib.get_close_matches(name, entries, 1, 0.5)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"{OP}: {dot}{name[:EXCERPT]}: no such key{hint}")
    for name, entry in entries.items():
        needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if needed and content.get(name) is None:
            raise ValueError(f"{OP}: {dot}{name}: expected a value; got none")
    hints = typing.get_type_hints(kind) if typed else {}
    for name, value in content.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{OP}: {dot}{name}: expected {_shown(hints[name])}; got {excerpt(value)}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a YAML value has a type; NashConfig checks what YAML cannot write (functions, enumerations)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    base = typing.get_origin(hint) or hint
    if base is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(base, type) and isinstance(value, base)


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else re.sub(r"\b(\w+\.)+", "", str(hint)).replace("NoneType", "none")


def _change(content: dict[str, Any], change: str) -> None:
    keys, separator, value = change.partition("=")
    if not separator or not keys:
        raise ValueError(f"{OP}: --set: expected key=value, as in training.beta=0.25; got {excerpt(change)}")
    *above, last = keys.split(".")
    place: Any = content
    for key in above:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise ValueError(f"{OP}: --set: {keys}: expected keys and values at {'.'.join(above)}; got something else")
    place[last] = _parse(value, f"--set {keys}")


def _parse(text: str, place: str) -> Any:
    yaml = need("yaml", "train")
    try:
        content = yaml.load(text, _loader(yaml))
        count = _count(content, {})
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # numbers, dates, keys that cannot be
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{OP}: {place}: expected YAML: {reason}") from error
    if count > MOST:
        raise ValueError(f"{OP}: {place}: expected at most {MOST} values; got {count}, every alias written out")
    return content


def _count(value: Any, counts: dict[int, int]) -> int:
    """Return the number of values in `value`, aliases expanded: a page of aliases of aliases can stand for billions."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if counts.get(id(value)) == 0:
        raise ValueError("an alias that holds itself")
    if id(value) not in counts:
        counts[id(value)] = 0  # being counted
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        counts[id(value)] = 1 + sum(_count(part, counts) for part in parts)
    return counts[id(value)]


def _loader(yaml: Any) -> Any:
    """Return YAML's safe loader, except that 1e-5 is a number and a repeated key is an error."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if name in names:
                    raise yaml.MarkedYAMLError(problem=f"{name!r} is there twice", problem_mark=key.start_mark)
                names.add(name)
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader
