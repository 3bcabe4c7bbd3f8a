# `make train` and `make test` are all a fresh machine needs; `make help` lists the rest.

PYTHON ?= python3
GPU_PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help install train test bench lint format gpu-build gpu-test gpu-bench gpu-sanitize clean

help:
	@echo "make train      install into $(VENV), train a GPT on text that ships with Python, sample from it"
	@echo "make test       install into $(VENV), run the tests"
	@echo "make bench      install into $(VENV), run all benchmarks (benchmarks/README.md)"
	@echo "make lint       ruff, mypy and clang-format"
	@echo "make format     let ruff and clang-format rewrite what they would complain about"
	@echo "make gpu-test   build in place with $(GPU_PYTHON) (torch and nvcc present, no network), run pytest -m gpu"
	@echo "make gpu-bench  the same build, then all benchmarks for a GPU in eight minutes"
	@echo "make gpu-sanitize  the same build, then the kernels' tests under compute-sanitizer"
	@echo "make clean      remove what was built, keep $(VENV)"

$(BIN)/python:
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements.txt | $(BIN)/python
	@echo "Installing requirements.txt (torch is large, this can take minutes)"
	@$(BIN)/pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements setup.py pyproject.toml $(NATIVE)
	@echo "Building fastformer"
	@$(BIN)/pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

install: $(VENV)/.installed
	@:

train: $(VENV)/.installed
	@$(BIN)/fastformer train gpt

test: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:benchmark -n $(JOBS) --dist loadgroup

bench: $(VENV)/.installed
	@$(BIN)/python -m pytest benchmarks -q --rounds 3 --benchmark-quiet -k "not (step-gpt-384-v50k or inference-gpt-384-v50k)"

lint: $(VENV)/.requirements
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/clang-format --dry-run -Werror $(NATIVE) tests/native/module.cpp
	@echo "Lint: no complaints"

format: $(VENV)/.requirements
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(NATIVE) tests/native/module.cpp

gpu-build:
	@FASTFORMER_CUDA=1 $(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build
	@$(GPU_PYTHON) -m pytest -q -m gpu

gpu-bench: gpu-build
	@FASTFORMER_EXPERIMENTAL=1 $(GPU_PYTHON) -m benchmarks.gpu

# Of each kind of error: memory, races in shared memory, barriers. The kernels' own tests suffice.
gpu-sanitize: gpu-build
	@for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(GPU_PYTHON) -m pytest -q -m gpu tests/ptx || exit 1; \
	done

clean:
	@rm -rf build dist *.egg-info fastformer/_C.so $(VENV)/.installed
