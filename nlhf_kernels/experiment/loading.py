"""Models and tokenizers by name: from a folder or the hub, with errors that say in a line what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core.optional import need
from ..core.places import locate
from .console import calm

OP = "experiment"


def load_tokenizer(name: str, trust: bool = False) -> Any:
    """With a padding token: the end token serves where there is none, as padding is masked."""
    import transformers

    place = locate(OP, name)
    folder = Path(place)
    if folder.is_dir() and not any(any(folder.glob(kind)) for kind in ("tokenizer*", "vocab*", "*.model")):
        raise ValueError(f"{OP}: {name}: expected tokenizer files; got a folder without")
    load = transformers.AutoTokenizer.from_pretrained
    tokenizer = _loaded("tokenizer", name, lambda: load(place, trust_remote_code=trust))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{OP}: {name}: expected a tokenizer with an end token; got one without")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(name: str, device: torch.device | str = "cpu", trust: bool = False) -> Any:
    """A causal language model in float32, in evaluation mode; a folder of peft's is read with its base."""
    import transformers

    kind: Any = transformers.AutoModelForCausalLM
    place = locate(OP, name)
    if (Path(place) / "adapter_config.json").is_file():
        kind = need("peft", f"{OP}: {name}").AutoPeftModelForCausalLM
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust, "use_safetensors": True}
    return _loaded("model", name, lambda: kind.from_pretrained(place, **options)).to(device).eval()


def _loaded(what: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        with calm():
            return load()
    except Exception as error:  # of many kinds; the first line of each says what is wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{OP}: {name}: cannot load a {what}: {reason}") from error
