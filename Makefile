# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0
#
# Every target sets up what it needs. PYTHON=/path/to/python picks the interpreter of a new environment.

PYTHON ?= python3 python3.12 python3.11 python3.10
WORKERS ?= 2
BACKBONE ?= ViT-L-14-336

VENV := .venv
BIN := $(VENV)/bin
ENV := $(VENV)/.installed
ENV_DOCS := $(VENV)/.installed-docs
ENV_APP := $(VENV)/.installed-app
ENV_TEST := $(VENV)/.installed-test
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))
PIP_INSTALL := $(BIN)/python -m pip install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help env demo app test lint bench docs reproduce mutants clean

help: ## print this help
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

env: $(ENV) ## create or update the environment in .venv

demo: $(ENV) ## compare, train, predict and export, offline: make demo [DATA=folder with normal/ abnormal/ masks/]
	$(BIN)/python -W ignore::FutureWarning -m tools.demo $(if $(DATA),--data "$(DATA)") $(if $(PRETRAINED),--pretrained "$(PRETRAINED)")

app: $(ENV_APP) ## open a page in the browser: drop images, train, look, correct [ARGS="--port 8000"]
	$(BIN)/python -W ignore::FutureWarning -m anomalib_mvfa.app $(ARGS)

test: $(ENV_TEST) ## run every test and doctest
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(ENV) ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(ENV) ## measure speed and memory, well over an hour on two cores: make bench [BACKBONE=tiny]
	set -e; for topic in inference training bank prediction startup; do \
		$(BIN)/python -m benchmarks.$$topic --backbone $(BACKBONE); \
	done; $(BIN)/python -m benchmarks.metrics

reproduce: $(ENV) ## run the published protocols: make reproduce DATA=DIR LISTS=DIR [WEIGHTS=DIR] [ARGS="--sets Brain"]
	@test -n "$(DATA)" -a -n "$(LISTS)" || { echo "usage: make reproduce DATA=DIR LISTS=DIR [WEIGHTS=DIR]" >&2; exit 2; }
	$(BIN)/python -m tools.reproduce --data $(DATA) --lists $(LISTS) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(ARGS)

mutants: $(ENV) ## look for faults that the tests do not catch, hours: make mutants [AREA=statistics] [SAMPLE=120]
	$(BIN)/python -m tools.mutants $(AREA) $(if $(SAMPLE),--sample $(SAMPLE))

docs: $(ENV_DOCS) ## build the documentation in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

clean: ## remove the environment and everything built from the sources; results and data stay
	rm -rf $(VENV) build dist *.egg-info docs/_build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A usable .venv is kept and updated; otherwise the first supported Python makes a new one.
$(ENV): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import pip; $(SUPPORTED)' 2>/dev/null; then \
		for python in $(PYTHON); do \
			if $$python -c 'import ensurepip, venv; $(SUPPORTED)' 2>/dev/null; then \
				echo "$$python -m venv $(VENV)"; \
				exec $$python -m venv --clear $(VENV); \
			fi; \
		done; \
		echo "error: none of '$(PYTHON)' is a Python 3.10, 3.11 or 3.12 with the modules venv and ensurepip." >&2; \
		echo "Install one (Debian, Ubuntu: packages python3 and python3-venv) or name it: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi
	$(PIP_INSTALL) -e ".[medical,hf,dev]"
	@touch $@

$(ENV_APP): $(ENV)
	$(PIP_INSTALL) -e ".[app]"
	@touch $@

$(ENV_TEST): $(ENV_APP)
	$(PIP_INSTALL) -e ".[browser]"
	@touch $@

$(ENV_DOCS): $(ENV)
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@
