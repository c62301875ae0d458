# scalesnn: `make help` lists the targets. Everything runs from .venv, which is made on first use.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-cuda13
# DeepSpeed's and our own run-time builds look for ninja on PATH, also where the environment is not activated.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)

# PyPI has torch for CUDA 12 up to 2.10 only; CuPy and DALI must be built for the CUDA that torch is built for.
ifneq ($(filter-out 13,$(CUDA)),)
$(error CUDA=$(CUDA): the tested versions are for CUDA 13 only (NVIDIA driver 580 or newer); leave CUDA out)
endif

.DEFAULT_GOAL := help
.PHONY: help install train test lint format lock clean gpu-check kernel-report mutants long-tests cluster-tests kill-tests soak benchmarks

help: ## list the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

install: $(INSTALLED) ## make .venv with the tested versions and scalesnn itself (again only when they change)

$(INSTALLED): requirements/tested.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the tested versions into $(VENV) (once; about 7 GB)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/installer.txt
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip sync -q --compile-bytecode $< requirements/installer.txt
	@# after the sync, which removes what its list lacks; editable: the checkout's own files run
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install -q --no-deps --no-build-isolation -e .
	@touch $@

train: install ## train a spiking ResNet-18 with DeepSpeed ZeRO-2 on the shipped images
	$(BIN)/deepspeed launch/train.py --deepspeed_config configs/zero2.json --config configs/recipes/sample.yaml

test: install lint ## lint, types and the whole test suite
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup

lint: install ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

gpu-check: ## on a machine with a GPU: everything that can only be checked there (offline, installs nothing)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py

kernel-report: install ## what the machine code says of every kernel's speed, into docs/kernels.md
	$(BIN)/python tools/kernel_report.py

mutants: install ## change the kernels' source in every place; the tests must notice (long)
	$(BIN)/python tools/mutants.py

long-tests: install ## the tests that take minutes, which `make test` leaves out: Slurm, kills, every kernel variant
	$(BIN)/python -m pytest tests -m long -n 2 --dist loadgroup --timeout=1200

cluster-tests: install ## every test on a real Slurm
	$(BIN)/python -m pytest tests/cluster -m "long or not long" --timeout=1200

kill-tests: install ## kill trainings at random moments: amid writing, in evaluations, while two runs compete (long)
	$(BIN)/python -m pytest tests/parallel/test_kill.py -m long

soak: install ## 30 minutes of random kills, signals, double starts and resumes; prints what it found
	nice $(BIN)/python tools/soak.py --minutes 30

benchmarks: install ## every claim of the docs, measured anew into benchmarks/results (about an hour)
	for claim in saved_bytes step_time memory_peak memory_plan data_throughput parquet_reading strategies tracking_overhead spike_counts shared_machine whole_run; do \
	  $(BIN)/python benchmarks/$$claim.py || exit 1; \
	done

format: install ## let ruff put the code in order
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lock: install ## write requirements/tested.txt anew from pyproject.toml
	$(BIN)/uv pip compile -q --universal --python-version 3.10 --no-annotate --no-header --upgrade \
	  --extra cuda13 --extra dev pyproject.toml -o requirements/tested.txt

clean: ## remove .venv, caches and runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache runs
