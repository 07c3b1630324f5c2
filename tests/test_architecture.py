"""The rules of AGENTS.md that can be checked: import directions, sizes, environment reads, complete rooms."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from nlhf_kernels.core import settings
from nlhf_kernels.core.registry import ops

pytestmark = pytest.mark.files
ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nlhf_kernels"

#: Folders that each folder of the package may import besides itself; all are listed above it.
ARROWS = {
    "core": set(),
    "ops": {"core"},
    "tabular": {"core", "ops"},
    "data": {"core"},
    "engine": {"core", "ops"},
    "preference": {"core", "ops", "data"},
    "evaluation": {"core", "data", "engine", "preference"},
    "train": {"core", "ops", "data", "engine", "preference", "evaluation"},
    "experiment": {"core", "ops", "tabular", "data", "engine", "preference", "evaluation", "train"},
    "integrations": {"core", "ops", "data", "engine", "preference", "evaluation", "train"},
    "cli": {
        "core",
        "ops",
        "tabular",
        "data",
        "engine",
        "preference",
        "evaluation",
        "train",
        "experiment",
        "integrations",
        "__init__",
    },
}
#: Ops that call other ops instead of repeating their mathematics. The order excludes import cycles.
ROOMS_CALL = {
    "linear_logprobs": {"logprobs"},
    "nash_pg_loss": {"logprobs", "linear_logprobs"},
    "preference_loss": {"logprobs", "linear_logprobs", "nash_pg_loss"},
    "mixture_sample": {"row_uniforms"},
}
#: Functions of torch whose result takes the default dtype or device where none is named.
ALLOCATING = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices"),
    *("triu_indices", "zeros"),
}
MODULES = {"Embedding", "LayerNorm", "Linear", "RMSNorm"}  # of torch.nn, which allocate their parameters
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 500, 80, 120

PYTHON = [path for folder in ("nlhf_kernels", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
NATIVE = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imported_folders(path: Path) -> set[str]:
    """Top-level folders of the package that a file imports, relative and absolute, wherever in the file."""
    inside = path.relative_to(PACKAGE).parts
    folders = set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets: list[list[str]] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(inside[: len(inside) - node.level])
            parts = (node.module or "").split(".") if node.module else []
            targets = [base + (parts or [alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nlhf_kernels"):
            parts = (node.module or "").split(".")[1:]
            targets = [parts or [alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [a.name.split(".")[1:] for a in node.names if a.name.startswith("nlhf_kernels.")]
        for target in targets:
            is_folder = target and (PACKAGE / target[0]).is_dir()
            folders.add(target[0] if is_folder else "__init__")
    return folders


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=_name)
def test_imports_point_one_way(path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return  # the package's __init__ re-exports the public names
    folder = parts[0]
    assert folder in ARROWS, f"{folder}: say in ARROWS what it may import"
    forbidden = _imported_folders(path) - ARROWS[folder] - {folder}
    assert not forbidden, f"{_name(path)} imports {sorted(forbidden)}"


@pytest.mark.parametrize("op", [op.name for op in ops()])
def test_rooms_import_only_the_rooms_they_are_built_on(op) -> None:
    others = {other.name for other in ops()} - {op} - ROOMS_CALL.get(op, set())
    for path in (PACKAGE / "ops" / op).glob("*.py"):
        rooms = set(re.findall(r"from [.]+(\w+)[\w.]* import", path.read_text()))
        assert not rooms & others, f"{_name(path)} imports the room {rooms & others}"


@pytest.mark.parametrize("path", PYTHON + NATIVE, ids=_name)
def test_files_are_short_and_open_with_what_they_are(path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE, f"{len(text.splitlines())} lines: is there a better cut?"
    if path.suffix != ".py":
        assert text.startswith("//"), "a file opens with what it is and why"
    elif path.name != "__init__.py" or text.strip():
        assert ast.get_docstring(ast.parse(text)), "a file opens with what it is and why"


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_functions_are_short(path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            lines = (node.end_lineno or 0) - node.lineno + 1
            if docstring := ast.get_docstring(node, clean=False):
                lines -= docstring.count("\n") + 1  # docstrings do not count
            assert lines <= (MAX_KERNEL if kernel else MAX_FUNCTION), f"{node.name}: {lines} lines"


def allocation(node: ast.AST) -> str | None:
    """The dotted name of an allocating call of PyTorch."""
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    plain = name.startswith("torch.") and name.removeprefix("torch.") in ALLOCATING
    return name if plain or (name.startswith("torch.nn.") and name.removeprefix("torch.nn.") in MODULES) else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=_name)
def test_every_allocation_names_its_dtype_and_device(path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if (name := allocation(node)) is not None:
            keywords = {keyword.arg for keyword in node.keywords}
            missing = {"dtype", "device"} - keywords
            assert not missing, f"{path.name}:{node.lineno}: {name} without {' and '.join(sorted(missing))}"
        forbidden = isinstance(node, ast.ImportFrom) and node.module == "torch"
        names = {alias.name for alias in node.names} if forbidden else set()
        assert not names & ALLOCATING, (
            f"{path.name}:{node.lineno}: say torch.{names & ALLOCATING}, which this test sees"
        )


def _private_names(tree: ast.AST) -> set[str]:
    """Return the private attributes used on objects other than `self` and `cls`, directly or through getattr."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            names.update(one.value for one in node.args[1:2] if isinstance(one, ast.Constant))
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_private_names_of_other_libraries_stand_in_upstream() -> None:
    """Only core/upstream.py uses private names, each under a contract test."""
    own = {"_fields", "_make", "_replace", "_asdict", "_actions"}  # documented by named tuples and argparse
    sources = [path for path in PYTHON if path.is_relative_to(PACKAGE) or path.is_relative_to(ROOT / "benchmarks")]
    trees = {path: ast.parse(path.read_text()) for path in sources}
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Name)):
            own.add(node.id if isinstance(node, ast.Name) else node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            own.update(alias.name for alias in node.names if node.level)
    for path, tree in trees.items():
        foreign = set() if path.name == "upstream.py" else _private_names(tree) - own
        assert not foreign, f"{_name(path)}: {sorted(foreign)}"


def test_environment_is_read_in_one_file() -> None:
    readers = [
        _name(path)
        for path in [*PACKAGE.rglob("*.py"), *NATIVE]
        if re.search(r"\b(os\.environ|os\.getenv|getenv\s*\(|environ\[)", path.read_text())
    ]
    assert readers == ["nlhf_kernels/core/settings.py"]
    names = set(re.findall(r'"([A-Z][A-Z_]{5,})"', (PACKAGE / "core" / "settings.py").read_text()))
    assert names == set(settings.VARIABLES), "every variable read is listed, and the other way round"
    assert len(settings.VARIABLES) <= 4


def test_every_folder_under_ops_is_a_registered_room() -> None:
    folders = {path.name for path in (PACKAGE / "ops").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {op.name for op in ops()}


@pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
def test_rooms_are_complete(op) -> None:
    """Oracle, a kernel or a reason for every backend, README, test with examples, bench case; one name everywhere."""
    room = PACKAGE / "ops" / op.name
    for name in ("op.py", "oracle.py", "README.md"):
        assert (room / name).exists(), f"{op.name} lacks {name}"
    for backend in op.backends:
        module, _, function = backend.path.partition(":")
        source = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        home = op.built_on or op.name
        assert source.is_relative_to(PACKAGE / "ops" / home), f"{backend.name} of {op.name} lives elsewhere: {source}"
        assert re.search(rf"^def {function}\(", source.read_text(), re.M), backend.path
        assert function.startswith(home), f"{function}: one name everywhere"
    for backend, suffix in (("cpu", "_cpu.cpp"), ("cuda", "_cuda.cu")):
        source = ROOT / "csrc" / op.name / (op.name + suffix)
        expected = backend not in op.absent and not op.built_on
        assert source.exists() is expected, source
        assert (f'"{op.name}"' in (ROOT / "csrc" / f"bindings_{backend}.cpp").read_text()) is expected
    assert all(len(reason) > 10 for reason in op.absent.values()), "a reason that explains itself"
    assert getattr(importlib.import_module(f"tests.test_{op.name}"), "EXAMPLES", None), "examples for the shared tests"
    assert (ROOT / "benchmarks" / "cases" / f"{op.name}.py").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_gpu_*.py")), ids=_name)
def test_tests_of_the_gpu_are_marked(path) -> None:
    """Files named test_gpu_*.py carry the mark by which GPU runs select tests."""
    assert re.search(r"^pytestmark = pytest\.mark\.gpu$", path.read_text(), re.M)


def test_native_folders_are_rooms() -> None:
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common"}
    assert folders <= {op.name for op in ops()}


@pytest.mark.parametrize("path", NATIVE, ids=_name)
def test_shared_native_functions_have_internal_linkage(path) -> None:
    """Headers compiled at several SIMD levels export no symbol: the linker would keep an arbitrary level's copy."""
    if path.suffix == ".h" and path.parent.name == "common" and path.name != "levels.h":
        loose = re.findall(r"^inline [^;{]*\(", path.read_text(), re.M)
        assert not loose, f"use NLHF_HOST_DEVICE or static: {loose}"
