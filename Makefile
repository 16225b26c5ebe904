# make train, make test, make nightly (the long tests): everything needed on a fresh machine, nothing twice.
#   ARGS="--steps 20"    more arguments for `longhaul train`, pytest or the benchmark
#   WORKERS=0            processes that run tests, whole files each; 0: none but pytest itself
#   PYTHON=python3.12    the interpreter that the virtual environment is made from
#   TORCH="torch==2.12.0"  another build of torch; empty to take what pip or the image offers
#   VENV_FLAGS=--system-site-packages TORCH=   use the torch that a GPU image already holds

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
TORCH ?= torch==2.13.0
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
# The files in the order they are collected in, each by whichever process is free: a pool of ranks and a run that several
# tests read are made once for their file.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/.longhaul-installed
CHECK_PYTHON := import sys; sys.exit("Longhaul needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)

.PHONY: train test nightly lint bench clean

train: $(INSTALLED)
	$(BIN)/longhaul train $(ARGS)

test: lint
	$(BIN)/python -m pytest -q $(SPREAD) $(ARGS)

nightly: $(INSTALLED)
	$(BIN)/python -m pytest -q -m nightly $(ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.step $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch goes first and by exact version: that finds a small CPU build where one is offered,
# and the looser range in setup.py is then already satisfied.
$(INSTALLED): setup.py
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(strip $(TORCH)),$(BIN)/python -m pip install "$(TORCH)")
	$(BIN)/python -m pip install -e ".[dev,report]"
	@touch $@
