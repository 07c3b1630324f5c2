"""A trained model as a folder, complete or absent: weights as safetensors, tokenizer, template.

preference_model.json    kind, template, max_length, overlong
head.safetensors
body/                    as transformers saves it
adapter/                 as peft saves it, where there is one; beside the body, whose weights it leaves as they are
tokenizer/
nlhf_manifest.json       size and checksum of every file
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..core.adapters import attach, base_weights
from ..core.atomic import atomic_folder
from ..core.loading import check_finite, load_model, load_tokenizer, loading
from ..core.manifest import has_manifest, verify
from ..core.optional import need
from .models import KINDS, ComparisonModel
from .template import InputFormat

DESCRIPTION = "preference_model.json"
FORMAT, ADAPTED = 1, 2  # a second format for adapters, so that versions without them refuse it
KIND = "preference model"


def save_preference_model(model: ComparisonModel, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a model to a folder, which is complete or absent afterwards.

    Weights are stored to the last bit. Tables that transformers computes when it loads a model (rotary frequencies) are
    not weights: after `model.to(torch.bfloat16)`, which rounds them too, a loaded model has the exact ones.

    Args:
        model: the model.
        folder: of the saved model.
        overwrite: replace a folder that holds such a model; another folder is never replaced.
    """
    weights = need("safetensors.torch", "save_preference_model")
    check_finite("save_preference_model", model)
    with atomic_folder(folder, KIND, overwrite=overwrite) as work:
        _save_body(model, work)
        model.tokenizer.save_pretrained(work / "tokenizer")
        weights.save_file({"weight": model.head.weight.detach().contiguous()}, work / "head.safetensors")
        description = {
            "format": ADAPTED if model.adapted else FORMAT,
            "kind": model.KIND,
            **dataclasses.asdict(model.input_format),
        }
        (work / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_preference_model(folder: str | Path, *, device: torch.device | str = "cpu", **options: Any) -> ComparisonModel:
    """Return the model that a folder holds, in evaluation mode.

    Every file is first compared with the manifest, because a damaged weight raises no error elsewhere.

    Args:
        folder: a folder of `save_preference_model`.
        device: of the model.
        options: for transformers' `from_pretrained` of the body.
    """
    weights = need("safetensors.torch", "load_preference_model")
    place = Path(folder).resolve()  # a relative one could be a name on the hub
    kind, input_format, adapted = _describe(place)
    if has_manifest(place):
        verify(place)
    trust = options.get("trust_remote_code", False)
    tokenizer = load_tokenizer("preference", place / "tokenizer", trust_remote_code=trust)
    body = load_model("preference", place / "body", "AutoModel", **{"dtype": "auto", **options})
    model = KINDS[kind](body, tokenizer, **dataclasses.asdict(input_format))
    if adapted:
        body = model.body
        model.body = loading("preference", place / "adapter", lambda path: attach(body, path, trainable=True))
        check_finite("preference", model.body, f" of the adapter in {folder}")
    model.head.load_state_dict(weights.load_file(place / "head.safetensors"))
    check_finite("preference", model.head, f" of the head in {folder}")
    return (model if options.get("distributed_config") else model.to(device)).eval()


def _save_body(model: ComparisonModel, work: Path) -> None:
    if not model.adapted:
        model.body.save_pretrained(work / "body")
        return
    body: Any = model.body
    body.get_base_model().save_pretrained(work / "body", state_dict=base_weights(body))
    body.save_pretrained(work / "adapter")


def _describe(place: Path) -> tuple[str, InputFormat, bool]:
    """Return a saved model's kind, its input format, and whether it has an adapter."""
    try:
        description = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"preference: {place}: expected a folder with {DESCRIPTION}; got {error}") from error
    known = isinstance(description, dict) and description.get("kind") in KINDS
    if not known or description.get("format") not in (FORMAT, ADAPTED):
        raise ValueError(
            f"preference: {place / DESCRIPTION}: expected format {FORMAT} or {ADAPTED} and a kind of {', '.join(KINDS)}"
        )
    kind, adapted = description.pop("kind"), description.pop("format") == ADAPTED
    try:
        return kind, InputFormat(**description), adapted
    except TypeError as error:
        expected = ", ".join(field.name for field in dataclasses.fields(InputFormat))
        raise ValueError(f"preference: {place / DESCRIPTION}: expected {expected}; got {[*description]}") from error
