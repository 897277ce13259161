# Every target works alone in a fresh clone: it makes the virtual environment it needs first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What an installation compiles: a change of it asks for another.
KERNELS := src/gemcut/kernels/cpu/build.py $(shell find src/gemcut/kernels/cpu/src -name '*.cpp' -o -name '*.h')

# Processes that tests run in: a processor each, four at most, since each may hold a real model.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1); [ $$n -lt 4 ] && echo $$n || echo 4)

.PHONY: demo train-demo check test test-gpu test-gpus lint bench-cpu bench-gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/gemcut generate --model gemma-3-270m --max-new-tokens 64 --temperature 0 \
		--show-prompt --stats "The three primary colours are"
	@echo
	@echo 'To run it yourself: $(BIN)/gemcut generate -m gemma-3-270m -t 0 "The sky is"'
	@echo '(or, after . $(BIN)/activate, gemcut alone; gemcut --help lists the commands)'

# Text in, a model out: two to three minutes on two cores.
train-demo: $(VENV)/train.stamp
	rm -rf $(VENV)/train-demo
	JAX_PLATFORMS=cpu $(BIN)/gemcut train run configs/smoke.toml $(VENV)/train-demo
	$(BIN)/gemcut generate --model $(VENV)/train-demo/model --max-new-tokens 40 --temperature 0 "The model"

# What one runs between two changes: no slow tests.
check: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu"

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-gpu: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m gpu

# What needs several GPUs of one machine.
test-gpus: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m gpus

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes
	$(BIN)/mypy

bench-cpu: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/cpu_inference.py

# One user: make bench-gpu SIZES=2b takes one size.
SIZES ?= 2b,9b,27b
bench-gpu: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/gpu_inference.py --size $(SIZES) --weights nf4,nf4-head8,int8,bf16 \
		--contexts 128,8000 --prefill 128,512,1000,4096 --new 64 --repetitions 3

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gemcut needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/train.stamp: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@ $(VENV)/demo.stamp $(VENV)/train.stamp

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
