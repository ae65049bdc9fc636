# make demo   sets up and runs SGPO end to end on a small task
# make test   sets up and runs the tests
# make rollout-env  the environment of the vLLM engines, .venv-rollout (no GPU needed)
# make test-slow, test-long  the longer tests; CI runs the first of them
# make test-faults  kills, crash points, damage, full disks, hung ranks, requests to stop: half an hour
# make test-slurm  the job scripts on a SLURM of this machine alone; needs slurm-wlm and munge
# make lint   ruff, pyright
# make gpu-check  checks, benchmarks and tests on a GPU; says what was skipped. DRY=1: the plan
# make bench PAIRS=pairs.jsonl  DPO pairs per second, ours over TRL's; without PAIRS, made-up pairs
# make bench-steps PAIRS=pairs.jsonl  what a step costs: losses, packing, sharing, EMA, segments, cache
# make bench-rollout  rollout servers over vLLM itself, new weights, steps ahead, judge, embedded
# make invariance  every parallel layout against one process: the largest differences
# make bench-head  memory, time and error of the log-prob head at a vocabulary of 131,072
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TORCH := torch==2.13.0
BENCH_VENV := .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
BENCH_STAMP := $(BENCH_VENV)/.ready
ROLLOUT_VENV := .venv-rollout
ROLLOUT_BIN := $(ROLLOUT_VENV)/bin
ROLLOUT_STAMP := $(ROLLOUT_VENV)/.ready
BENCH_ARGS ?=
GPU_ARGS ?=

.PHONY: help setup rollout-env demo test test-slow test-faults test-slurm test-long gpu-check lint bench bench-steps bench-rollout bench-head invariance clean

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

# vLLM's pins clash with NeMo's, so its engines have an environment, and processes, of their own.
rollout-env: $(ROLLOUT_STAMP)

$(ROLLOUT_STAMP): requirements/rollout-cpu.txt setup.py
	$(PYTHON) -m venv $(ROLLOUT_VENV)
	$(ROLLOUT_BIN)/pip install -qq --disable-pip-version-check $(TORCH)
	$(ROLLOUT_BIN)/pip install -qq --disable-pip-version-check --no-deps \
	    -r requirements/rollout-cpu.txt
	$(ROLLOUT_BIN)/pip install -qq --disable-pip-version-check --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/selfpref demo

test: setup rollout-env
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup rollout-env
	$(BIN)/python -m pytest -m "slow and not long"

test-faults: setup rollout-env
	$(BIN)/python -m pytest tests/faults
	$(BIN)/python -O -m pytest -m "not slow" tests/security

# A SLURM of this machine alone (Debian: slurm-wlm, munge); says so where there is none.
test-slurm: setup rollout-env
	$(BIN)/python -m pytest -rs tests/slurm

test-long: setup rollout-env
	$(BIN)/python -m pytest -m long

# The tests run even where a check failed: the two tell different things.
gpu-check: setup
ifdef DRY
	$(BIN)/python -m benchmarks.gpu_check --dry-run $(GPU_ARGS)
else
	status=0; \
	$(BIN)/python -m benchmarks.gpu_check $(GPU_ARGS) || status=1; \
	$(BIN)/python -m pytest -m gpu -rs || status=1; \
	exit $$status
endif

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

bench-steps: setup
	$(BIN)/python benchmarks/steps.py $(if $(PAIRS),--pairs $(PAIRS)) $(BENCH_ARGS)

bench-rollout: setup rollout-env
	$(BIN)/python benchmarks/rollout.py $(BENCH_ARGS)

bench-head: setup
	$(BIN)/python benchmarks/logprob_head.py --json runs/bench/logprob_head.json $(BENCH_ARGS)

invariance: setup
	$(BIN)/python benchmarks/invariance.py $(BENCH_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(ROLLOUT_VENV) runs build dist *.egg-info
