# make demo   sets up and runs SGPO end to end on a small task
# make test   sets up and runs the tests
# make lint   ruff, pyright
# make gpu-check  the tests that need a GPU; without one it says what was skipped
# make bench PAIRS=pairs.jsonl  DPO pairs per second, ours over TRL's; without PAIRS, made-up pairs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TORCH := torch==2.13.0
BENCH_VENV := .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
BENCH_STAMP := $(BENCH_VENV)/.ready
BENCH_ARGS ?=

.PHONY: help setup demo test test-slow gpu-check lint bench clean

help:
	@sed -n 's/^# make /make /p' Makefile

setup: $(STAMP)

# torch comes first and is held as a constraint: a range that admits a newer build would
# otherwise replace it with one of several gigabytes.
$(STAMP): requirements/cpu.txt requirements/dev.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check $(TORCH)
	printf '%s\n' '$(TORCH)' > $(VENV)/constraints.txt
	$(BIN)/pip install -qq --disable-pip-version-check -c $(VENV)/constraints.txt \
	    -r requirements/cpu.txt -r requirements/dev.txt
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/selfpref demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

gpu-check: setup
	$(BIN)/python -m pytest -m gpu -rs

# TRL lives apart: its requirements need not agree with ours.
$(BENCH_STAMP): requirements/bench.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_BIN)/pip install -qq --disable-pip-version-check $(TORCH)
	printf '%s\n' '$(TORCH)' > $(BENCH_VENV)/constraints.txt
	$(BENCH_BIN)/pip install -qq --disable-pip-version-check -c $(BENCH_VENV)/constraints.txt \
	    -r requirements/bench.txt
	touch $@

bench: setup $(BENCH_STAMP)
	$(BIN)/python benchmarks/dpo_vs_trl.py --trl-python $(BENCH_BIN)/python \
	    $(if $(PAIRS),--data $(PAIRS)) $(BENCH_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(BENCH_VENV) runs build dist *.egg-info
