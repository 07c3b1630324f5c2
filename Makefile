# Every target sets up what it needs in .venv; the second run finds it there. Packages come from .ci/locks, with their
# hashes checked, where those were made for this machine and Python, elsewhere from constraints.txt.
#
#   make demo         the library's main job, small, with what this machine has
#   make test         the tests
#   make test-newest  those that touch transformers, with the newest that pyproject.toml allows, and TRL
#   make lock         .ci/locks anew, after a change of constraints.txt or of a requirement
#   make bench        the benchmarks (BENCH="--preset tiny" and other options pass through)
#   make sanitize     the CPU backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer; random calls for longer
#   make lint         ruff and mypy; make format-check: the formatter alone; neither compiles anything
#
# VENV=0 uses the active Python and its packages instead of .venv, on a GPU machine with its own PyTorch, say; only
# the library itself is installed there, in place. Options: PYTHON=python3.12, TESTS="-k registry", BENCH="--list".

PYTHON ?= python3
VENV ?= .venv
TESTS ?=
BENCH ?=
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

ifeq ($(VENV),0)
PY := $(PYTHON)
READY := build/active-environment
PACKAGES :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/ready
PACKAGES := $(VENV)/packages
endif

INSTALLED := torch setuptools wheel pybind11 ninja cmake build numpy rich triton matplotlib scipy transformers accelerate \
  peft datasets pyyaml pytest pytest-timeout pytest-xdist ruff mypy
LOCKS := $(wildcard .ci/locks/*.txt)
PIP_INSTALL := -m pip install --disable-pip-version-check
HASHED := $(PIP_INSTALL) --require-hashes --no-deps
# Whether .ci/locks were made for this machine and Python.
LOCKED := $(shell $(PYTHON) -c 'import platform as p, sys; print(*("yes" for ok in [(p.python_implementation(), \
  sys.version_info[:2], p.system(), p.machine()) == ("CPython", (3, 11), "Linux", "x86_64")] if ok))' 2>/dev/null)

# Algorithms' learning and the sampler's statistics say nothing of transformers.
NEWEST := build/newest
NEWEST_TESTS := $(filter-out %/test_train_learning.py %/test_preference_loss.py, $(wildcard \
  $(patsubst %,tests/test_%.py,upstream adapters attention engine* generate* sharded_models train* trl* preference* cli_prefer cli_sample cli_train evaluation experiment)))

.PHONY: demo test test-newest sanitize lock bench lint format-check setup clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(PY) -m nlhf_kernels demo

test: $(READY)
	$(PY) -m pytest $(TESTS)

test-newest: $(NEWEST)/ready
	@echo "== $(words $(NEWEST_TESTS)) test files with transformers $$($(NEWEST)/bin/python -c 'import transformers; print(transformers.__version__)')"
	$(NEWEST)/bin/python -m pytest $(NEWEST_TESTS) $(TESTS)

sanitize: $(READY)
	$(PY) -m tests.support.sanitized $(TESTS)

bench: $(READY)
	$(PY) -m benchmarks.run $(BENCH)

lint: $(PACKAGES) format-check
	$(PY) -m ruff check .
	$(PY) -m mypy

format-check: $(PACKAGES)
	$(PY) -m ruff format --check .

setup: $(READY)

lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(PIP_INSTALL) -q -c constraints.txt uv
	build/lock/bin/python .ci/lock.py $(INSTALLED)

clean:
	rm -rf build dist .venv *.egg-info nlhf_kernels/_native_build.json nlhf_kernels/_c*.so

# Without the locks, torch first and alone: installed after, another package's wish for it could bring a different build.
$(VENV)/packages: constraints.txt pyproject.toml $(LOCKS)
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found; install Python 3.10 or newer (apt install python3 python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is older than 3.10; name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv; apt install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || echo "make: no C++ compiler: going on without the native kernels (apt install g++ brings them)"
	@echo "== creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCKED),yes)
	@echo "== installing packages, hashes checked (.ci/locks)"
	$(PY) $(HASHED) -r .ci/locks/torch-cpu.txt 2>/dev/null || $(PY) $(HASHED) -r .ci/locks/torch.txt
	$(PY) $(HASHED) -r .ci/locks/all.txt
	$(PY) -m pip check
else
	@echo "== installing packages by constraints.txt: .ci/locks are for CPython 3.11 on Linux x86-64"
	$(PY) $(PIP_INSTALL) -c constraints.txt torch
	$(PY) $(PIP_INSTALL) -c constraints.txt $(INSTALLED)
endif
	@touch $@

$(VENV)/ready: $(VENV)/packages $(SOURCES)
	@echo "== compiling the native kernels"
	$(PY) $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@$(PY) -c 'from nlhf_kernels.core import capabilities as c; [print("note:", r) for r in map(c.native_missing, ("_cpu", "_cuda")) if r]'
	@touch $@

# The packages of the environment above, and another transformers in front of them; TRL, and requests, which it imports and
# does not bring.
$(NEWEST)/ready: pyproject.toml constraints.txt $(LOCKS) | $(READY)
	$(PY) -m venv --clear --without-pip $(NEWEST)
	@base=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && $(NEWEST)/bin/python -c 'import pathlib, sys, sysconfig; \
	  pathlib.Path(sysconfig.get_path("purelib"), "base.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' "$$base"
	$(NEWEST)/bin/python $(PIP_INSTALL) -q --upgrade "$$(grep -o 'transformers>=[^"]*' pyproject.toml)"
ifeq ($(LOCKED),yes)
	$(NEWEST)/bin/python $(HASHED) -q -r .ci/locks/newest.txt
else
	$(NEWEST)/bin/python $(PIP_INSTALL) -q $$(grep -E '^(trl|requests)==' constraints.txt)
endif
	@touch $@

build/active-environment: $(SOURCES)
	@$(PY) -c 'import torch, pybind11, pytest' || { echo "make: VENV=0 needs torch, pybind11 and pytest in the active environment"; exit 1; }
	@echo "== compiling the native kernels for the active environment"
	$(PY) setup.py -q build_ext --inplace
	@mkdir -p $(@D) && touch $@
