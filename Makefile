# Tidegate. `make help` lists the targets; each does its own set-up.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/pytest
ARGS ?=
# Every part is a Python process of its own: compiled once, they start in half the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## Make .venv and install what requirements/lock.txt pins

$(STAMP): requirements/lock.txt requirements/uv.txt pyproject.toml
	@echo "==> installing into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tidegate needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/lock.txt
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: binaries
binaries: setup ## Find, or build once, the control plane (etcd, kube-apiserver, …)
	@$(BIN)/tidegate local build

.PHONY: demo
demo: setup ## The main job, end to end, on this machine (ARGS="--keep" leaves it running)
	@$(BIN)/tidegate demo $(ARGS)

.PHONY: test
test: lint verify test-unit test-property test-conformance test-integration test-e2e ## Everything, the fast ones first

.PHONY: test-unit
test-unit: setup ## Tables, no I/O
	@$(PYTEST) -q tests/unit $(ARGS)

.PHONY: test-property
test-property: setup ## Invariants, by hypothesis
	@$(PYTEST) -q tests/property $(ARGS)

.PHONY: test-conformance
test-conformance: setup ## The Endpoint Picker suite, against our picker and against broken ones
	@$(PYTEST) -q tests/conformance $(ARGS)

.PHONY: test-integration
test-integration: binaries ## Each part against a real API server, scheduler, Envoy
	@$(PYTEST) -q tests/integration $(ARGS)

.PHONY: test-e2e
test-e2e: binaries ## All parts together, through Envoy, with faults
	@$(PYTEST) -q tests/e2e $(ARGS)

.PHONY: lint
lint: setup ## ruff, mypy --strict, import layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check -q
	@$(BIN)/mypy
	@$(BIN)/lint-imports --verbose | tail -n 3

.PHONY: verify
verify: setup ## Generated files are what their source says
	@$(BIN)/tidegate manifests write --check

.PHONY: generate
generate: setup ## Write the generated files again
	@$(BIN)/tidegate manifests write

.PHONY: bench
bench: binaries ## Every benchmark, then one table
	@$(BIN)/python tests/perf/run.py $(ARGS)

.PHONY: bench-smoke
bench-smoke: binaries ## Every benchmark, short: that it runs, not how fast
	@$(BIN)/python tests/perf/run.py --quick $(ARGS)

.PHONY: bench-picker
bench-picker: setup ## What the picker costs beside Envoy alone and its grpcio server, in one run
	@$(BIN)/python tests/perf/bench_picker.py $(ARGS)

.PHONY: bench-http2
bench-http2: setup ## CPU of one exchange in our HTTP/2 frames and in the h2 package
	@$(BIN)/python tests/perf/bench_http2.py $(ARGS)

.PHONY: h2spec
h2spec: setup ## h2spec against the HTTP/2 frames, where it is installed
	@$(BIN)/python tests/support/h2spec.py

.PHONY: bench-sim bench-sim-full bench-sim-quick
bench-sim: setup ## All that is measured in virtual time, by a stated grid: 90 minutes at most (resumable)
	@$(BIN)/python tests/perf/sim_all.py $(ARGS)

bench-sim-full: setup ## Every arm at every load, as long as it takes (resumable)
	@$(BIN)/python tests/perf/sim_all.py --full $(ARGS)

bench-sim-quick: setup ## What must hold of every arm, two minutes
	@$(BIN)/python tests/perf/bench_sim.py --quick $(ARGS)

.PHONY: lock
lock: setup ## Resolve the dependencies again and write requirements/*.txt
	@$(BIN)/uv pip compile -q requirements/uv.in --universal --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --no-header --upgrade -o requirements/uv.txt
	@$(BIN)/uv pip compile -q pyproject.toml requirements/build.in --all-extras --group dev --universal \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --python-version 3.11 \
	  --upgrade -o requirements/lock.txt

.PHONY: clean
clean: ## Stop local clusters of this folder and remove what was made (built binaries stay cached)
	@if [ -x $(BIN)/tidegate ]; then for d in .tidegate .tidegate/*/; do \
	  test -e "$$d/state.json" && $(BIN)/tidegate local down --dir "$$d"; done; true; fi
	@rm -rf .tidegate out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find operator tests -name __pycache__ -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## The same, and .venv
	@rm -rf $(VENV)
