# Two commands to know: `make finetune` and `make test`. Both set everything up on a bare machine (Python 3.11+, g++;
# nvcc is used when it is there) and cost nothing when already set up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The GPU kernels are compiled here for one architecture to keep the build short; wheels build them all.
export PEFTKERN_CUDA_ARCHS ?= 90a
THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: finetune compare test lint format build setup clean

finetune: setup
	@$(BIN)/peftkern finetune --config examples/finetune.yaml --overwrite

compare: setup
	@$(BIN)/peftkern compare --config examples/compare.yaml --overwrite

test: setup lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS)

lint: setup
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary peftkern
	@$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

format: setup
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

setup: $(VENV)/.installed build

$(VENV)/.installed: requirements-dev.txt pyproject.toml
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

build: $(VENV)/.installed
	@$(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf build dist runs peftkern/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
