# `make help` lists what there is. Everything runs in .venv, made on first use and renewed when the dependencies change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Passed on to the program that a target runs: make quickstart ARGS="--seed 1"
ARGS ?=

# Nothing here may need the Hub: what a test or the quickstart trains, it makes.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint format bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# torch first and alone: it is by far the largest, and whatever comes after must fit the torch that is pinned.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed (by TRL), this is " + sys.version.split()[0] \
	    + "; set PYTHON=/path/to/python3" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(STAMP) ## create .venv and install the package with its dev extra

quickstart: $(STAMP) ## train a tiny model end to end (a few minutes on two cores)
	$(BIN)/python recipes/quickstart.py $(ARGS)

test: lint ## lint, then run the test suite, one process per core
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy trl_grpo_ext

format: $(STAMP) ## let ruff fix and format the code
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP) ## time optimizer steps against trl.GRPOTrainer (machine otherwise idle)
	$(BIN)/python benchmarks/step.py $(ARGS)

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
