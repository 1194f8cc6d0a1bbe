# One command each; every target creates the virtual environment first if it is missing.
PYTHON ?= python3
VENV ?= .venv
LATEST ?= .venv-latest
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUICK_KERNEL_TESTS := tests/rgkernels -k "segments or (matches_reference and not cpu-float16)"
SOURCES := rgkernels realgeneral recipes examples benchmarks tests setup.py

.PHONY: all demo test test-slow test-gpu test-peers test-latest venv lint types fmt bench gpu gpu-model report clean

all: lint types test

venv: $(STAMP)

# installed again when what is required changes
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/realgeneral demo

# a file's tests stay in one process; with one thread each, two processes are nearly twice as fast on two cores
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# diffusers' own tests on our classes: DIFFUSERS=a checkout of its repository, of about the version that is installed
test-peers: $(STAMP)
	@test -d "$(DIFFUSERS)/tests" || { echo "make test-peers: DIFFUSERS must be a checkout of diffusers" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/peers --diffusers=$(DIFFUSERS)

# the newest releases that the registry has, in a virtual environment of their own; see "Versions" in docs/design.md
test-latest:
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install -qq --upgrade pip
	$(LATEST)/bin/python -m pip install -qq --upgrade --upgrade-strategy eager --editable ".[dev]"
	$(LATEST)/bin/python -m pip list | grep -E "^(torch|triton|diffusers|peft|transformers|accelerate|numpy) "
	$(LATEST)/bin/python -m pytest -m "not slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(STAMP)
	$(BIN)/mypy

fmt: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# a broken kernel has no speed
bench: $(STAMP)
	@$(BIN)/python -m pytest -q -m "not slow" $(QUICK_KERNEL_TESTS) || \
		{ echo "make bench: the kernel tests are red, so nothing was timed" >&2; exit 1; }
	$(BIN)/python -m pytest benchmarks

# on a CUDA machine, with its own Python: torch, triton, pytest, numpy; gpu-model also diffusers, peft, transformers.
# GPU_ARGS="--minutes 20", GPU_ARGS="-- --shape 5b-480x720-b1"
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

gpu-model:
	$(PYTHON) -m benchmarks.gpu --models $(GPU_ARGS)

report: $(STAMP)
	$(BIN)/python -m benchmarks.report $(ROWS)

# not outputs/: trained adapters are there
clean:
	rm -rf $(VENV) $(LATEST) .pytest_cache .mypy_cache .ruff_cache *.egg-info
