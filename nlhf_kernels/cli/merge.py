"""`nlhf-kernels merge`: add an adapter to its base, and save the whole model and its tokenizer as one folder.

The result needs no peft and loads wherever its base does. The sum is rounded once to the weights' dtype: --dtype
float32 keeps updates that are too small for a bfloat16 base.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core.adapters import is_adapter
from ..core.atomic import atomic_folder, check_folder
from ..core.loading import load_model, load_tokenizer, quiet
from ..core.optional import require
from ..core.places import locate
from .common import show_next
from .errors import BadInput

KIND = "merged model"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="a folder or a hub name; what `nlhf-kernels train` saves with `lora`")
    parser.add_argument("--output", type=Path, required=True, help="folder for the whole model")
    parser.add_argument("--overwrite", action="store_true", help="replace a merged model at --output")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of its weights (default auto: the base's own)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")


def run(arguments: argparse.Namespace) -> int:
    require("nlhf-kernels merge", ("transformers", "peft"), "train")
    try:
        check_folder(arguments.output, KIND, overwrite=arguments.overwrite)
    except OSError as error:
        raise BadInput(f"merge: --output: {error}") from error
    if not is_adapter(locate("merge: adapter", arguments.adapter)):
        raise BadInput(f"merge: adapter: expected an adapter of peft's; got a whole model, {arguments.adapter!r}")
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = load_tokenizer("merge: adapter", arguments.adapter, **options)
    model = load_model("merge: adapter", arguments.adapter, merge=True, dtype=arguments.dtype, **options)
    with quiet(), atomic_folder(arguments.output, KIND, overwrite=arguments.overwrite) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    print(f"Saved: {arguments.output}")
    show_next(["nlhf-kernels", "sample", "--policy", str(arguments.output), "--text", "--prompt", "..."])
    return 0
