# What people and CI type. The first use of any target makes .venv from pyproject.toml and
# constraints.txt; nothing is installed outside it. Make answers every failure with 2 and prints the
# real code ("Error 78"): a script that needs the code runs .venv/bin/runner itself.

PYTHON ?= python3
JOB ?=
SET ?=
ARGS ?=
# torchvision is a CUDA build: for machines that have a GPU only.
COMMA := ,
EXTRAS ?= train,tracking,dev$(if $(shell command -v nvidia-smi),$(COMMA)gpu)

SHELL := bash
BIN := .venv/bin
# Make hands its own variables to children; a job is read from JOB_FILE, JOB_YAML and JOB__*, never from these.
unexport JOB SET ARGS PYTHON

.DEFAULT_GOAL := help
.PHONY: help train validate submit test check chaos bench schema image image-test image-lock pin-bases clean has-job

help: ## Show this list
	@echo 'usage: make TARGET [NAME=value]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo 'JOB is a job file (or set JOB_FILE or JOB_YAML in the environment). PYTHON makes .venv: 3.11 or later.'
	@echo 'Exit codes: make turns each into 2 and prints it; $(BIN)/runner train JOB returns it.'

train: has-job .venv/.installed ## Train a job: make train JOB=jobs/demo-sft.yaml SET="training.max_steps=5"
	@exec $(BIN)/runner train $(if $(JOB),"$(JOB)") $(SET)

validate: has-job .venv/.installed ## Check a job without running it: make validate JOB=jobs/demo-sft.yaml
	@exec $(BIN)/runner validate $(if $(JOB),"$(JOB)") $(SET)

submit: has-job .venv/.installed ## Run a job on Kubernetes or AWS Batch: make submit JOB=jobs/mine.yaml ARGS="--watch"
	@exec $(BIN)/runner submit $(if $(JOB),"$(JOB)") $(SET) $(ARGS)

test: check .venv/torchvision-cpu .venv/browser .venv/trackio ## Run check and every test: make test ARGS="-k manifest"
	@$(BIN)/python -m pytest --numprocesses auto $(ARGS)

check: .venv/.installed ## Lint, check the format and the types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

chaos: .venv/.installed ## Kill runs 540 times, and see what became of them: make chaos ARGS="--seed 7"
	@$(BIN)/python -m tests.chaos --defects $(ARGS)
	@$(BIN)/python -m tests.chaos --kills 40 --duels 0 --minutes 30 \
	  --trainer "'$(CURDIR)/$(BIN)/python' -m runner.train" --job tests/chaos/real.json

bench: .venv/.installed .venv/torchvision-cpu ## Measure what the README promises, on this machine
	@$(BIN)/python bench/validate.py
	@$(BIN)/python bench/speed.py --minutes 12
	@$(BIN)/python bench/memory.py
	@PYTHONPATH="$(CURDIR)/tests/torchvision_shim:$(CURDIR)/.venv/torchvision-cpu" $(BIN)/python bench/memory_model.py
	@$(BIN)/python bench/slow_store.py
	@$(BIN)/python bench/checkpoints.py

schema: .venv/.installed ## Write runner/schema/, docs/job.md and docs/training-options.md again
	@$(BIN)/python -m runner.schema.generate

image: ## Build the container image: make image TARGET=gpu BUILDER=podman (docs/container.md)
	@docker/build.sh

image-test: .venv/.installed ## Build the image of the CPU, print its layers and run jobs in it
	@export TARGET=cpu IMAGE=vlm-runner:test IMAGE_UNDER_TEST=vlm-runner:test BUILDER="$$(docker/builder.sh)" && docker/build.sh && \
	$(BIN)/python -m pytest -s tests/image $(ARGS)

image-lock: .venv/.installed ## Write the hashed requirements of the image again, from constraints.txt
	@$(BIN)/python docker/lock.py

pin-bases: ## Write the digest of the base image into docker/Dockerfile
	@docker/pin-bases.sh

clean: ## Remove .venv and everything the tools made; runs/ stays
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find runner tests bench -name __pycache__ -prune -exec rm -rf {} +

# Before the set-up, not after it.
has-job:
	@if [ -z "$(JOB)$$JOB_FILE$$JOB_YAML" ]; then \
	  echo 'no job: name a file, make $(MAKECMDGOALS) JOB=jobs/demo-sft.yaml' >&2; exit 64; fi

# pip compiles on one core. What does not compile is for other Pythons, and pip says nothing of it either.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo '$(PYTHON) is not Python 3.11 or later: name one that is, make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 69; }
	@echo 'Setting up .venv: once, a minute or two and 2 GB (log: .venv/install.log)'
	@set -o pipefail; $(PYTHON) -m venv .venv && \
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]' 2>&1 \
	| tee .venv/install.log \
	| while IFS= read -r line; do if [ -t 1 ]; then printf '\r\033[K%.78s' "$$line"; fi; done \
	|| { echo; tail -n 20 .venv/install.log >&2; exit 69; }; \
	$(BIN)/python -m compileall -qq -j 0 .venv/lib; \
	if [ -t 1 ]; then printf '\r\033[K'; fi; echo ".venv is ready after $$SECONDS s"; \
	touch $@

# Beside the packages of .venv, not among them: the wheel is a CUDA build, which breaks transformers next to a
# torch without CUDA, unless tests/torchvision_shim goes before it. Without it the tests that need it are skipped.
.venv/torchvision-cpu: .venv/.installed
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --no-deps --upgrade \
	  --constraint constraints.txt --target $@ torchvision \
	|| echo 'torchvision cannot be downloaded: tests of the architectures that need it are skipped' >&2

# For the tests that look at reports; without it they are skipped. Nothing is fetched where a Chromium is installed.
.venv/browser: .venv/.installed
	@$(BIN)/python -m tests.browser $@ || echo 'tests of reports in a browser are skipped' >&2

# Beside them, too, and without what is there already: it declares a pillow below 13, and works with the one of .venv.
.venv/trackio: .venv/.installed
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --no-deps --upgrade \
	  --constraint constraints.txt --target $@ trackio brotli gradio_client httpcore httpx orjson python-multipart \
	|| echo 'trackio cannot be downloaded: its tests are skipped' >&2
