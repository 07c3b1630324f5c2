"""Load models and tokenizers from a folder or the hub: complete and finite, or with a one-line error.

The package loads everything through this module, since transformers initialises missing weights at random and only logs
it. `place` begins every error: the caller, and the argument that named the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import adapters
from .manifest import has_manifest, verify
from .optional import need
from .places import locate
from .text import first_line
from .vocabulary import is_dtensor

#: Options of `from_pretrained` that say where from; adapters and tokenizers take them too.
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
Loaded = TypeVar("Loaded")


def load_model(
    place: str,
    name: str | Path,
    kind: str = "AutoModelForCausalLM",  # of transformers' classes
    *,
    device: torch.device | str = "cpu",
    trainable: bool = False,  # of an adapter, which is frozen otherwise
    merge: bool = False,  # an adapter with its base: one whole model
    **options: Any,
) -> Any:
    """Load a model in evaluation mode. For an adapter's folder, load its base likewise and attach the adapter.

    `options` go to transformers' `from_pretrained`; pickled weights are read only with use_safetensors=False.
    """
    options = {"use_safetensors": True, **options}

    def load(located: str) -> Any:
        if adapters.is_adapter(located, _where(options)):
            return _load_adapted(kind, located, trainable, merge, options)
        return _load_whole(kind, located, options)

    model = loading(place, name, load)
    model = (model if options.get("distributed_config") else model.to(device)).eval()  # a sharded one is on its devices
    check_finite(place, model, f" in {name}")
    return model


def load_configuration(place: str, name: str | Path, **options: Any) -> Any:
    """Return a model's configuration without its weights; an adapter's is its base's.

    Args:
        place: how an error begins.
        name: a folder or a name on the hub.
        options: for transformers' `from_pretrained`.
    """

    def load(located: str) -> Any:
        where = _where(options)
        located = adapters.base_of(located, where) if adapters.is_adapter(located, where) else located
        return need("transformers", place).AutoConfig.from_pretrained(located, **options)

    return loading(place, name, load, "configuration")


def load_tokenizer(place: str, name: str | Path, **options: Any) -> Any:
    """Load a tokenizer; for an adapter without tokenizer files, its base's.

    transformers creates an empty tokenizer for some folders that have none, so the files are looked for first.
    """
    transformers = need("transformers", place)
    where = _where(options)

    def load(located: str) -> Any:
        if adapters.is_adapter(located, where) and not _tokenizer_files(located):
            located = locate("its base", adapters.base_of(located, where))
        if Path(located).is_dir() and not _tokenizer_files(located):
            raise ValueError(f"expected tokenizer files; got a folder without, {located!r}")
        return transformers.AutoTokenizer.from_pretrained(located, **options)

    return loading(place, name, load, "tokenizer")


def load_generation_tokenizer(place: str, name: str | Path, **options: Any) -> Any:
    """Load a tokenizer with an end token and a padding token, by default the end token, as padding is masked."""
    tokenizer = load_tokenizer(place, name, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{place}: expected a tokenizer with an end token; got one without, {str(name)!r}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def loading(place: str, name: str | Path, load: Callable[[str], Loaded], what: str = "model") -> Loaded:
    """Return `load(folder or hub name)`; turn any error into a one-line ValueError about `name`."""
    located = locate(place, str(name))
    try:
        with quiet():
            return load(located)
    except Exception as error:  # of many kinds; the first line of each gives the reason
        reason = _bad_file(located) or first_line(error)
        raise ValueError(f"{place}: cannot load a {what} from {str(name)!r}: {reason}") from error


def check_finite(place: str, model: torch.nn.Module, where: str = "") -> None:
    """Raise for weights that are not finite: such a model generates nonsense that looks like text."""
    if (name := not_finite(model)) is not None:
        raise ValueError(f"{place}: expected finite weights; got NaN or infinity in {name}{where}")


@torch.no_grad()
def not_finite(model: torch.nn.Module) -> str | None:
    """Return the first weight with a NaN or an infinity. For a sharded model it is collective, with equal results."""
    weights = [(name, value) for name, value in model.named_parameters() if value.is_floating_point()]
    if not any(is_dtensor(value) for _, value in weights):
        return next((name for name, value in weights if not bool(value.isfinite().all())), None)
    parts = [value.to_local() if is_dtensor(value) else value for _, value in weights]
    wrong = torch.stack([(~part.isfinite()).any() for part in parts]).int()
    torch.distributed.all_reduce(wrong, torch.distributed.ReduceOp.MAX)
    first = wrong.tolist()
    return weights[first.index(1)][0] if 1 in first else None


def _bad_file(folder: str) -> str:
    """Return what is wrong with a file of a folder that cannot be loaded; transformers' errors omit its name."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    for path in files:
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with need("safetensors", "a model").safe_open(path, framework="pt"):
                    pass
        except Exception as error:  # of JSON, of Unicode, of safetensors
            return f"{path} is damaged or incomplete ({first_line(error)}): copy or download it again"
    pickled = [path.name for path in files if path.suffix in (".bin", ".pt", ".pth")]
    if pickled and not any(path.suffix == ".safetensors" for path in files):
        return f"{pickled[0]} is a pickle, which can run code when it is read: expected weights as safetensors"
    return ""


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings, which would disturb the package's; keep its errors."""
    log: Any = need("transformers", "a model").utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _load_whole(kind: str, name: str, options: dict[str, Any]) -> Any:
    _check_undamaged(name)
    load = getattr(need("transformers", "a model"), kind).from_pretrained
    model, loading_info = load(name, output_loading_info=True, **options)
    adapters.check_keys(type(model).__name__, loading_info["missing_keys"], loading_info["mismatched_keys"])
    classifiers = [each for each in model.config.architectures or () if each.endswith("ForSequenceClassification")]
    if classifiers and kind == "AutoModelForCausalLM":  # with a tied head no key is missing
        raise ValueError(f"expected a causal language model; got a {classifiers[0]}")
    return model


def _load_adapted(kind: str, name: str, trainable: bool, merge: bool, options: dict[str, Any]) -> Any:
    _check_undamaged(name)
    where = _where(options)
    base_name = locate(f"its base, base_model_name_or_path in {adapters.CONFIG}", adapters.base_of(name, where))
    if adapters.is_adapter(base_name):
        raise ValueError(f"expected a whole model as its base; got an adapter, {base_name!r} (merge that first)")
    try:
        base = _load_whole(kind, base_name, {key: value for key, value in options.items() if key not in HUB})
    except Exception as error:
        raise ValueError(f"its base, {base_name!r}: {first_line(error)}") from error
    model = adapters.attach(base, name, trainable=trainable, where=where)
    return adapters.merged(model) if merge else model


def _check_undamaged(name: str) -> None:
    """Verify the files of a folder that this library wrote."""
    if has_manifest(Path(name)):
        verify(Path(name))


def _where(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in HUB}


def _tokenizer_files(folder: str) -> bool:
    return any(any(Path(folder).glob(kind)) for kind in _TOKENIZER_FILES)
