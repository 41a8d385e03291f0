# Everything a developer does here, as targets. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
JOBS   ?= 2

# Tests and the demo never reach for a model hub: an unreachable one costs 20 s a call.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu lint format typecheck build clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with everything for development, and the demo's encoder

$(STAMP): pyproject.toml constraints.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v else f"camtl needs Python 3.10 or newer, this is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-demo.txt
	@touch $(STAMP)

demo: $(STAMP) ## train, evaluate and use one model on four small tasks (5 minutes on two CPU cores)
	$(BIN)/camtl train --config examples/demo.yaml
	@echo
	@echo "A few sentences through the trained model:"
	$(BIN)/camtl predict runs/demo --task demo_acceptability --text "The keys to the old cabinet is on the table."
	$(BIN)/camtl predict runs/demo --task demo_sentiment --text "The start was slow, but the ending was a delight."
	$(BIN)/camtl predict runs/demo --task demo_entailment --text "Every gardener watered the roses." "Some gardener watered the flowers."
	$(BIN)/camtl predict runs/demo --task demo_similarity --text "A boy is riding a horse." "A child rides an animal."

test: $(STAMP) ## run the tests (about 3 minutes on two CPU cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

test-slow: $(STAMP) ## run the tests that take longer
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: ## run the GPU tests in an existing environment (PYTHON=python3); needs no datasets, no network
	$(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/ops tests/models

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP) ## mypy on camtl/
	$(BIN)/mypy

build: $(STAMP) ## wheel and sdist into dist/
	$(BIN)/python -m build

clean: ## remove what was built or cached; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find camtl tests examples -name __pycache__ -type d -exec rm -rf {} +
