"""Local folders or hub names: mistyped folders fail at once, the hub is queried once with a short timeout."""

from __future__ import annotations

import importlib
import sys

import pytest

from nlhf_kernels.cli.main import main
from nlhf_kernels.core.optional import need, require
from nlhf_kernels.core.places import locate

hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, errors  # noqa: E402


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "runs" / "policy").mkdir(parents=True)
    (tmp_path / "file").write_text("")


def answer(monkeypatch, outcome: BaseException | None) -> list[tuple]:
    """Replace the hub's reply to every query; return the list of queries."""
    asked = []

    def ask(self, name, timeout):
        asked.append((name, timeout))
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(hub.HfApi, "model_info", ask)
    monkeypatch.setattr(hub.HfApi, "dataset_info", ask)
    return asked


def test_folders_are_found(tmp_path, monkeypatch) -> None:
    asked = answer(monkeypatch, None)
    assert locate("x", "runs/policy") == "runs/policy"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("x", "~/runs") == str(tmp_path / "runs")
    assert not asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/polcy", r"no such folder: 'runs/polcy' \(is 'runs/policy' meant\?\)$"),
        ("./policy", r"no such folder: './policy'$"),
        ("/no/where", r"no such folder: '/no/where'$"),
        ("~/nowhere/x", "no such folder"),
        ("a/b/c", r"no such folder: 'a/b/c'$"),
        ("policy", "no such folder: 'policy'; a name on the hub is OWNER/NAME"),
        ("owner/", "no such folder"),
        ("", "no such folder"),
        ("file", "expected a folder or a name on the hub; got the file 'file'"),
    ],
)
def test_what_looks_like_a_path_is_one(name, message, monkeypatch) -> None:
    asked = answer(monkeypatch, None)
    with pytest.raises(ValueError, match=f"^op: option: .*{message}"):
        locate("op: option", name)
    assert not asked


def response(status: int):
    """Return a response as the hub's client wraps it, for either HTTP library."""
    client = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    return client.Response(status, request=client.Request("GET", "https://huggingface.co"))


def test_the_hub_is_asked_once(tmp_path, monkeypatch) -> None:
    asked = answer(monkeypatch, None)
    assert locate("x", "owner/name") == "owner/name" and [name for name, _ in asked] == ["owner/name"]
    answer(monkeypatch, errors.RepositoryNotFoundError("404", response=response(404)))
    with pytest.raises(ValueError, match="no such folder: 'owner/name', and no dataset of that name on the hub"):
        locate("x", "owner/name", "dataset")
    answer(monkeypatch, errors.GatedRepoError("403", response=response(403)))
    assert locate("x", "owner/name") == "owner/name"
    answer(monkeypatch, ConnectionError("no route"))
    with pytest.raises(ValueError, match="no model of that name was downloaded before; the hub cannot be reached: no"):
        locate("x", "owner/name")
    assert not constants.HF_HUB_OFFLINE
    (tmp_path / "cache" / "models--owner--name" / "snapshots").mkdir(parents=True)
    assert locate("x", "owner/name") == "owner/name" and constants.HF_HUB_OFFLINE
    asked = answer(monkeypatch, None)
    with pytest.raises(ValueError, match="no model of that name was downloaded before; HF_HUB_OFFLINE is set"):
        locate("x", "owner/other")
    assert locate("x", "owner/name") == "owner/name" and not asked


def test_names_that_the_hub_cannot_have(monkeypatch) -> None:
    with pytest.raises(ValueError, match="which is no name on the hub either"):
        locate("x", "a b/c d")


def test_a_mistyped_folder_is_one_line(capsys) -> None:
    assert main(["sample", "--policy", "runs/polcy", "--prompt", "x"]) == 2
    assert capsys.readouterr().err == (
        "nlhf-kernels: error: sample: --policy: there is no such folder: 'runs/polcy' (is 'runs/policy' meant?)\n"
    )


def test_missing_packages_are_named_with_their_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_inside.py").write_text("import yaml.nothing_of_this_name")
    (tmp_path / "needs_yaml.py").write_text("import yaml")
    (tmp_path / "damaged.py").write_text("raise ImportError('libfoo.so: cannot open')")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r'^x needs pyyaml: pip install "nlhf-kernels\[train\]"$'):
        need("needs_yaml", "x")  # the missing package is yaml, not the one that imports it
    with pytest.raises(ImportError, match="x needs damaged, which cannot be imported: libfoo"):
        need("damaged", "x")
    with pytest.raises(ImportError, match=r'x needs pyyaml, nowhere: pip install "nlhf-kernels\[all\]"'):
        require("x", ("sys", "yaml", "nowhere"), "all")
