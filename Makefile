# `make demo`: install, write a text with the bundled model, and have three systems race with it.
# `make test`: install what the tests need and run them.
# Both start from nothing but Python 3.11-3.13 and a network to the package registry; a second run reuses .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
comma := ,

.PHONY: venv demo check test test-slow test-nightly test-engine test-gpu-aot coverage lint types quick docs notebooks bench clean

# The stamps say which of the two sets of packages .venv holds for these files, the compiled kernels among them.
BUILT := pyproject.toml setup.py $(wildcard hybrimoe_jax/host_kernels/native/*.cpp hybrimoe_jax/host_kernels/native/*.h hybrimoe_jax/host_kernels/native/*.inc)

$(BIN)/python:
	@echo "* an environment of its own, $(VENV): some 5 seconds"
	@$(PYTHON) -m venv $(VENV)

# Bytecode is made when a module is first imported, which most are not.
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check
BUILD_NEEDS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")

# install EXTRAS VARIABLE: the native kernels are compiled outside pip, which would hide how long that takes and fetch a
# second jaxlib. For `make demo` alone they are compiled for this processor only, which takes two thirds of the time.
define install
	@echo "* jaxlib, and what else the native kernels are built with: some 15 seconds, and 130 MB to fetch"
	@$(BIN)/python -c '$(BUILD_NEEDS)' | $(PIP) --requirement /dev/stdin
	@$(2) $(BIN)/python setup.py --quiet build_ext --inplace
	@echo "* jax, flax and the other packages: some 15 seconds, and 85 MB to fetch"
	@$(2) $(PIP) --no-build-isolation --editable '.[$(1)]'
endef

$(VENV)/.run: $(BUILT) | $(BIN)/python
	$(call install,onednn,HYBRIMOE_NATIVE_ONLY_HERE=1)
	@touch $@

# TORCH=1: also what the tests need that compare with torch. Where Python is 3.12 or later they are
# skipped unless asked for, since torch would be a CUDA build with 18 NVIDIA packages. torch first and alone: a later resolution
# leaves it in place.
TORCH ?= $(shell $(or $(wildcard $(BIN)/python),$(PYTHON)) -c 'import sys; print(int(sys.version_info < (3, 12)))')
TEST_EXTRAS := onednn,test,plots$(if $(filter 1,$(TORCH)),$(comma)test-torch)

$(VENV)/.test: $(BUILT) | $(BIN)/python
	$(if $(filter 1,$(TORCH)),@echo "* torch to compare with: some 200 MB to fetch" && $(PIP) 'torch==2.13.0')
	$(call install,$(TEST_EXTRAS))
	@touch $@ $(VENV)/.run

venv: $(VENV)/.test

demo: $(VENV)/.run
	@$(BIN)/python -m hybrimoe_jax.demo

# A worker for each core, each on one core of XLA's; a file's tests stay together (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto

# After a change: lint, types and the tests of what needs no model, side by side.
check: venv
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target quick lint types

test: venv lint
	$(PYTEST)

# Also all values of every parameter, more random examples, and a share of the exactness matrix (nightly: all of it).
test-slow: venv $(VENV)/.notebooks
	$(PYTEST) --slow

# Also what takes hours, and other random examples in every run; then 50,000 tokens in one process, which must not grow.
test-nightly: venv
	$(PYTEST) --nightly
	$(BIN)/python tests/soak.py

# What shows whether another version of Python or jax serves.
test-engine: venv
	$(PYTEST) tests/test_engine*.py tests/test_models_*.py tests/test_budget.py tests/test_host_memory.py

# The programs of published models, compiled for an H100 on a machine without one; docs/gpu.md gets the table. The
# compiler's wheels (230 MB to fetch) lie in an environment of their own: beside them jax looks for a GPU at every start.
GPU_AOT := build/gpu-aot/env
GPU_AOT_NEEDS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["gpu-aot"], sep="\n")
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

$(GPU_AOT)/.made: $(VENV)/.test
	@rm -rf $(GPU_AOT) && $(BIN)/python -m venv $(GPU_AOT)
	@$(BIN)/python -c '$(PACKAGES)' > "$$($(GPU_AOT)/bin/python -c '$(PACKAGES)')/venv.pth"
	@$(BIN)/python -c '$(GPU_AOT_NEEDS)' | $(GPU_AOT)/bin/python -m pip install -qq --no-compile \
		--disable-pip-version-check --requirement /dev/stdin && touch $@ || echo "skipped: no wheels of the extra gpu-aot"

test-gpu-aot: venv $(GPU_AOT)/.made
	@test ! -e $(GPU_AOT)/.made || HYBRIMOE_GPU_AOT=1 PYTHONPATH=$(CURDIR) $(GPU_AOT)/bin/python -m pytest -n auto tests/gpu_aot
	@test ! -e $(GPU_AOT)/.made || PYTHONPATH=$(CURDIR) $(GPU_AOT)/bin/python tests/gpu_aot/table.py docs/gpu.md

# The package's lines that `make test` runs, in the commands that tests start as well, and those of whole benchmarks,
# which are slow tests; fewer than pyproject.toml says fail.
COVERAGE := COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/python -m coverage
WHOLE := tests/test_bench_*.py tests/test_compare.py tests/test_reproduce.py tests/test_simulate_command.py
coverage: venv
	rm -rf build/coverage && mkdir -p build/coverage
	$(COVERAGE) run -m pytest -n auto
	$(COVERAGE) run -m pytest -n auto --slow -m slow $(WHOLE)
	$(COVERAGE) combine --quiet
	$(COVERAGE) report --skip-covered

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# With so much room for its youngest objects (MB) pyright takes two thirds of the time.
types: venv
	NODE_OPTIONS=--max-semi-space-size=128 $(BIN)/pyright

# test_trace_record runs engines.
QUICK := $(filter-out %/test_trace_record.py,$(wildcard tests/test_decide_*.py tests/test_trace_*.py))

quick: venv
	$(BIN)/python -m pytest -q $(QUICK) tests/test_packing.py tests/test_rooms.py tests/test_imports.py

DOCS_NEEDS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

$(VENV)/.docs: pyproject.toml | $(VENV)/.run
	@echo "* Sphinx, and what else the site is made with: some 15 seconds"
	@$(BIN)/python -c '$(DOCS_NEEDS)' | $(PIP) --requirement /dev/stdin
	@touch $@

# The site, from docs/ and the docstrings. Warnings are errors; every link inside it is checked, and every type in a
# signature of the reference.
docs: $(VENV)/.docs
	@rm -rf build/docs
	@$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --fresh-env --quiet \
		--doctree-dir build/docs-trees docs build/docs
	@echo "build/docs/index.html"

# What executes notebooks, beside what the tests need: `make test` does without.
$(VENV)/.notebooks: pyproject.toml | $(VENV)/.test
	@echo "* jupytext, nbclient, a kernel and pandas: some 20 seconds, and 30 MB to fetch"
	@$(BIN)/python -c '$(subst "docs","notebooks",$(DOCS_NEEDS))' | $(PIP) --requirement /dev/stdin
	@touch $@

# Those of notebooks/*.py that changed are executed, and what their cells give is kept.
notebooks: venv $(VENV)/.notebooks
	$(BIN)/python scripts/notebooks.py

bench: venv
	$(BIN)/python -m hybrimoe_jax.bench engine

clean:
	rm -rf $(VENV) build *.egg-info
