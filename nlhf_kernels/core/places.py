"""Where a model or a data set is: a folder on this machine, or OWNER/NAME on the Hugging Face hub.

A name means the hub only if it has exactly one slash and its first part is no folder here; anything else is a path,
so that a mistyped folder is an error at once. The hub is queried once, with a timeout, before transformers or datasets
query it many times; where it cannot be reached (or HF_HUB_OFFLINE is set), the local cache is used.
"""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Any

from .text import first_line

TIMEOUT = 10.0  # seconds for the hub's first answer


def locate(what: str, name: str, kind: str = "model") -> str:
    """Return the folder (with ~ expanded) or the hub name that `name` stands for.

    Args:
        what: how an error begins, "train: model" say.
        name: what the user wrote.
        kind: "model" or "dataset", as the hub distinguishes them.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if name and path.exists():
        raise ValueError(f"{what}: expected a folder or a name on the hub; got the file {name!r}")
    if _is_path(name):
        hint = "" if "/" in name or "\\" in name else "; a name on the hub is OWNER/NAME"
        raise ValueError(f"{what}: there is no such folder: {name!r}{_nearest(path)}{hint}")
    _check_hub(what, name, kind)
    return name


def _is_path(name: str) -> bool:
    owner, _, rest = name.partition("/")
    plain = name.count("/") == 1 and bool(rest) and not name.startswith((".", "~")) and "\\" not in name
    return not plain or Path(owner).is_dir()


def _nearest(path: Path) -> str:
    """Return the entry of the same folder whose name is most like this one."""
    try:
        there = [entry.name for entry in path.absolute().parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, there, 1)
    return f" (is {str(path.parent / near[0])!r} meant?)" if near else ""


def _check_hub(what: str, name: str, kind: str) -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        return  # loading raises for the missing package
    from huggingface_hub import HfApi, constants, errors

    nowhere = f"{what}: there is no such folder: {name!r}, and no {kind} of that name"
    cached = (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots").is_dir()
    if constants.HF_HUB_OFFLINE:
        if not cached:
            raise ValueError(f"{nowhere} was downloaded before; HF_HUB_OFFLINE is set, so the hub is not asked")
        return
    ask: Any = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, timeout=TIMEOUT)
    except errors.HFValidationError:
        raise ValueError(f"{what}: there is no such folder: {name!r}, which is no name on the hub either") from None
    except errors.GatedRepoError:
        return  # it exists; loading raises with the address of its access form
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{nowhere} on the hub (a private one needs `hf auth login`)") from None
    except Exception as error:  # of the HTTP client's kinds: no network, a proxy, a hub that is down
        if not cached:
            reason = f"the hub cannot be reached: {first_line(error)}"
            raise ValueError(f"{nowhere} was downloaded before; {reason}") from error
        constants.HF_HUB_OFFLINE = True  # otherwise each file of the cached model waits for a minute of retries
