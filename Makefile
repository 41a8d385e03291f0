# Everything a developer does here, as targets. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
NATIVE := $(VENV)/.native
JOBS   ?= 2

# Nothing here builds CUDA kernels unless asked to (build-gpu is), also where there is a GPU.
export CAMTL_BUILD_CUDA ?= 0
CSRC   := $(sort $(shell find csrc tests/native/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'))

# Headers that would tie the kernels to one release of a framework.
FRAMEWORK := \#[[:space:]]*include[[:space:]]*[<"](torch|ATen|c10|caffe2)[/.]

# Tests and the demo never reach for a model hub: an unreachable one costs 20 s a call.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Triton decides at import whether to compile kernels or to interpret them: two processes.
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-interpreter test-slow test-gpu bench bench-gpu readme-tables lint format typecheck build build-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Somebody removed the compiled module: build it again.
ifeq ($(wildcard camtl/_native*),)
$(shell rm -f $(NATIVE))
endif

setup: $(NATIVE) ## make .venv with everything for development, and the demo's encoder

# The kernels are built in a step of their own, so that a change below csrc/ compiles only what changed.
$(NATIVE): $(STAMP) setup.py CMakeLists.txt $(shell find csrc -type f)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(NATIVE)

$(STAMP): pyproject.toml constraints.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v else f"camtl needs Python 3.10 or newer, this is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	CAMTL_BUILD_NATIVE=0 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-demo.txt
	@touch $(STAMP)

demo: $(NATIVE) ## train, evaluate and use one model on four small tasks (3 minutes on two quiet CPU cores after set-up)
	$(BIN)/camtl train --config examples/demo.yaml
	@echo
	@echo "A few sentences through the trained model:"
	$(BIN)/camtl predict runs/demo --task demo_acceptability --text "The keys to the old cabinet is on the table."
	$(BIN)/camtl predict runs/demo --task demo_sentiment --text "The start was slow, but the ending was a delight."
	$(BIN)/camtl predict runs/demo --task demo_entailment --text "Every gardener watered the roses." "Some gardener watered the flowers."
	$(BIN)/camtl predict runs/demo --task demo_similarity --text "A boy is riding a horse." "A child rides an animal."

test: $(NATIVE) ## run the tests (about 12 minutes on two CPU cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu and not interpreter"
	$(INTERPRETED) -n $(JOBS) -m "interpreter and not slow"

test-interpreter: $(NATIVE) ## run the Triton kernels' tests in Triton's interpreter (a part of make test)
	$(INTERPRETED) -n $(JOBS) -m "interpreter and not slow"

test-slow: $(NATIVE) ## run the tests that take longer
	$(BIN)/python -m pytest -m "slow and not gpu and not interpreter"
	$(INTERPRETED) -m "interpreter and slow"

# The targets for a GPU run in an environment that is there, and put nothing into it but this folder.
INSTALL = CAMTL_BUILD_CUDA=$(if $(CAMTL_CUDA_ARCHS),1,auto) $(PYTHON) -m pip install --no-deps --no-build-isolation -e .
INSTALLED = $(PYTHON) -c 'import camtl._native, camtl.kernels, camtl.benchmarks' 2>/dev/null || $(INSTALL)
WATCH = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool

test-gpu: ## run the GPU tests in an existing environment (PYTHON=python3); SANITIZE=1: small ones, watched
	@$(INSTALLED)
ifneq ($(SANITIZE),1)
	$(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/ops tests/models
else
	@command -v compute-sanitizer > /dev/null || { echo "SANITIZE=1 needs compute-sanitizer, a part of the CUDA toolkit, on the PATH"; exit 1; }
	$(WATCH) memcheck $(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/ops/test_gpu.py -k test_small_shapes
	$(WATCH) racecheck $(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/ops/test_gpu.py -k test_small_shapes
	$(WATCH) synccheck $(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/ops/test_gpu.py -k test_small_shapes
endif

SECTION ?= all
SHAPES  ?= quick
bench: $(NATIVE) ## time ops and models on this CPU against their rivals, in under 6 minutes (SECTION=ops|model)
	$(BIN)/camtl bench $(SECTION) --device cpu --shapes $(SHAPES) --seconds 330

bench-gpu: ## the same on a GPU, in under 9 minutes (PYTHON=python3, SECTION=ops|model, SHAPES=paper)
	@$(INSTALLED)
	$(PYTHON) -m camtl bench $(SECTION) --device cuda --shapes $(SHAPES) --seconds 480

readme-tables: $(NATIVE) ## write the tables and pictures of the newest records into README and benchmarks/NOTES.md
	$(BIN)/python -m camtl.benchmarks.tables

build-gpu: ## build the kernels for the GPU of an existing environment (PYTHON=python3), without network
	$(INSTALL)
	@$(PYTHON) -c 'import camtl._native as n; print("CUDA kernels for", n.cuda_architectures) if n.cuda_architectures else exit(f"no CUDA kernels: {n.cuda_reason}")'

lint: $(STAMP) ## ruff and clang-format: rules and format; no framework header below csrc/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	@! grep -rnE '$(FRAMEWORK)' csrc || { echo "csrc/ knows no deep-learning framework: pass pointers, sizes and strides"; exit 1; }

format: $(STAMP) ## ruff and clang-format: mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

typecheck: $(STAMP) ## mypy on camtl/
	$(BIN)/mypy

build: $(STAMP) ## wheel and sdist into dist/, the wheel with the kernels for this machine's processor family
	$(BIN)/python -m build

clean: ## remove what was built or cached; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find camtl tests examples -name __pycache__ -type d -exec rm -rf {} +
