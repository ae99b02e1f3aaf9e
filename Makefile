# `make demo`: install and generate text with the bundled model. `make test`: install what the tests need and run them.
# Both start from nothing but Python 3.11-3.13 and a network to the package registry; a second run reuses .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test test-slow lint bench clean

# The stamps say which of the two sets of packages .venv holds for these files, the compiled kernels among them.
BUILT := pyproject.toml setup.py $(wildcard hybrimoe_jax/host_kernels/native/*.cpp hybrimoe_jax/host_kernels/native/*.h hybrimoe_jax/host_kernels/native/*.inc)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.run: $(BUILT) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[onednn]'
	touch $@

# torch first and alone: its CPU build is all that the parity tests need, and a later resolution leaves it in place.
$(VENV)/.test: $(BUILT) | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --editable '.[onednn,test,baseline,plots]'
	touch $@ $(VENV)/.run

venv: $(VENV)/.test

demo: $(VENV)/.run
	$(BIN)/python -m hybrimoe_jax.generate --prompt "To be, or not to be" --max-tokens 80 --temperature 0.8 --top-p 0.95 --seed 1

# A worker for each core, each on one core of XLA's; a file's tests stay together (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto

test: venv lint
	$(PYTEST)

test-slow: venv
	$(PYTEST) --slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: venv
	$(BIN)/python -m hybrimoe_jax.bench engine

clean:
	rm -rf $(VENV) build *.egg-info
