# `make compare` and `make test` need Python >= 3.11 and make, nothing else. Afterwards: . .venv/bin/activate
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := @echo "installing into $(VENV): minutes, and 1.6 GB with PyTorch for CPUs" && $(BIN)/pip install --constraint constraints.txt --editable

.PHONY: help compare test test-slow test-hosts bench docs lint types wheels clean

compare: $(VENV)/installed-all  ## train the five mechanisms on real handwritten digits (about two minutes)
	$(BIN)/better-attention compare digits

test: $(VENV)/installed-dev  ## unit tests and documentation examples (about five minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: $(VENV)/installed-dev  ## everything, the long tests too
	OMP_NUM_THREADS=1 JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/pytest -n 2 --dist worksteal -m "not gpu"

test-hosts: $(VENV)/installed-hosts  ## the layer inside peft, torchao, bitsandbytes, opacus, transformers, accelerate
	OMP_NUM_THREADS=1 $(BIN)/pytest -m hosts

BENCH ?= --flex
bench: $(VENV)/installed-bench  ## speed and memory against others (tens of minutes); less: make bench BENCH="--suite kernel --quick"
	$(BIN)/better-attention bench $(BENCH)

docs: $(VENV)/installed-dev  ## the documentation as a site in site/, strictly: a dead link is an error
	$(BIN)/python -m docs.tables --check
	$(BIN)/python -m zensical build --strict

lint: $(VENV)/installed-dev  ## formatting and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed-dev  ## static types
	$(BIN)/mypy

wheels: $(VENV)/installed-release  ## the files of a release in dist/, for every platform, and what was run of them here
	$(BIN)/python -m release.build
	$(BIN)/python -m release.check

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-all: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(INSTALL) ".[all]"
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(INSTALL) ".[dev]"
	touch $@ $(VENV)/installed-all

$(VENV)/installed-hosts: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(INSTALL) ".[dev,hosts]"
	touch $@ $(VENV)/installed-all $(VENV)/installed-dev

$(VENV)/installed-bench: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(INSTALL) ".[bench]"
	touch $@

$(VENV)/installed-release: $(VENV)/bin/pip release/requirements.txt
	$(BIN)/pip install --requirement release/requirements.txt
	touch $@

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist site .cache
