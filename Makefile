# Two commands to know: `make finetune` and `make test`. Both set everything up on a bare machine (g++, and Python 3.11
# for the pinned versions of what we test with; nvcc is used when it is there) and cost nothing when already set up.
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements-dev.txt
BIN := $(VENV)/bin
# The GPU kernels are compiled here for one architecture to keep the build short; wheels build them all.
export PEFTKERN_CUDA_ARCHS ?= 90a
# OpenMP's threads wait for each other often. Where other programs want the cores too, those that spin while they wait keep
# the ones they wait for from running: three times slower on a machine with three times as many programs as cores.
export GOMP_SPINCOUNT ?= 10000
THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: finetune compare test test-oldest pytest lint format build setup clean

finetune: setup
	@$(BIN)/peftkern finetune --config examples/finetune.yaml --overwrite

compare: setup
	@$(BIN)/peftkern compare --config examples/compare.yaml --overwrite

test: setup lint pytest

pytest: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS)

# The same tests on the oldest versions that pyproject.toml promises. Linters read the newest only.
test-oldest:
	@$(MAKE) --no-print-directory pytest VENV=.venv-oldest PYTHON=python3.10 REQUIREMENTS=requirements-oldest.txt

lint: setup
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary peftkern
	@$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

format: setup
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

setup: $(VENV)/.installed build

$(VENV)/.installed: $(REQUIREMENTS) pyproject.toml
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@# Modules are compiled when they are imported: compiling all of them takes a minute, and most never are.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r $(REQUIREMENTS)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

build: $(VENV)/.installed
	@$(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf build dist peftkern/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
