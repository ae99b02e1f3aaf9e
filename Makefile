# `make demo`: install and generate text with the bundled model. `make test`: install what the tests need and run them.
# Both start from nothing but Python 3.11-3.13 and a network to the package registry; a second run reuses .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
comma := ,

.PHONY: venv demo check test test-slow test-nightly test-engine coverage lint types quick docs bench clean

# The stamps say which of the two sets of packages .venv holds for these files, the compiled kernels among them.
BUILT := pyproject.toml setup.py $(wildcard hybrimoe_jax/host_kernels/native/*.cpp hybrimoe_jax/host_kernels/native/*.h hybrimoe_jax/host_kernels/native/*.inc)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# pip hides what the build says.
SAY_BUILD = @echo "installing; building the native kernels takes a minute or two on two cores, seconds where they have not changed"

$(VENV)/.run: $(BUILT) | $(BIN)/python
	$(SAY_BUILD)
	$(BIN)/python -m pip install --quiet --editable '.[onednn]'
	touch $@

# TORCH=1: also what the tests need that compare with torch. Where Python is 3.12 or later they are
# skipped unless asked for, since torch would be a CUDA build with 18 NVIDIA packages. torch first and alone: a later resolution
# leaves it in place.
TORCH ?= $(shell $(or $(wildcard $(BIN)/python),$(PYTHON)) -c 'import sys; print(int(sys.version_info < (3, 12)))')
TEST_EXTRAS := onednn,test,plots$(if $(filter 1,$(TORCH)),$(comma)test-torch)

$(VENV)/.test: $(BUILT) | $(BIN)/python
	$(SAY_BUILD)
	$(if $(filter 1,$(TORCH)),$(BIN)/python -m pip install --quiet 'torch==2.13.0')
	$(BIN)/python -m pip install --quiet --editable '.[$(TEST_EXTRAS)]'
	touch $@ $(VENV)/.run

venv: $(VENV)/.test

demo: $(VENV)/.run
	$(BIN)/python -m hybrimoe_jax.generate --prompt "To be, or not to be" --max-tokens 80 --temperature 0.8 --top-p 0.95 --seed 1

# A worker for each core, each on one core of XLA's; a file's tests stay together (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto

# After a change: lint, types and the tests of what needs no model, side by side.
check: venv
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target quick lint types

test: venv lint
	$(PYTEST)

# Also all values of every parameter, more random examples, and a share of the exactness matrix (nightly: all of it).
test-slow: venv
	$(PYTEST) --slow

# Also what takes hours, and other random examples in every run.
test-nightly: venv
	$(PYTEST) --nightly

# What shows whether another version of Python or jax serves.
test-engine: venv
	$(PYTEST) tests/test_engine*.py tests/test_models_*.py

# The package's lines that `make test` runs, in the commands that tests start as well; fewer than pyproject.toml says fail.
COVERAGE := COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/python -m coverage
coverage: venv
	rm -rf build/coverage && mkdir -p build/coverage
	$(COVERAGE) run -m pytest -n auto
	$(COVERAGE) combine --quiet
	$(COVERAGE) report --skip-covered

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/pyright

quick: venv
	$(BIN)/python -m pytest -q tests/test_decide_*.py tests/test_trace_*.py tests/test_packing.py tests/test_rooms.py

# The requirements of the extra alone: the package itself is there.
DOCS_EXTRA = import tomllib; \
	print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])

# The site, from docs/ and the docstrings: build/docs/index.html. Warnings are errors; every link inside it is checked,
# and every type in a signature of the reference.
$(VENV)/.docs: pyproject.toml | $(VENV)/.run
	$(BIN)/python -m pip install --quiet $$($(BIN)/python -c "$(DOCS_EXTRA)")
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --quiet \
		--doctree-dir build/docs-trees docs build/docs
	@echo "build/docs/index.html"

bench: venv
	$(BIN)/python -m hybrimoe_jax.bench engine

clean:
	rm -rf $(VENV) build *.egg-info
