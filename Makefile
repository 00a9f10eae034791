# make demo | test | slow | lint | clean
# Settings: PYTHON (3.11 to 3.13), CONSTRAINTS (a file, or empty for none), PIP_ARGS (for example --index-url URL).

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALL = $(BIN)/python -m pip install $(PIP_ARGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help install demo test slow lint clean

help:
	@echo "make demo   install into .venv, profile the pocket model, answer questions on a fifth of the cache"
	@echo "make test   install development extras, run the quick tests"
	@echo "make slow   run the tests that take minutes"
	@echo "make lint   ruff check, ruff format --check, ty check"
	@echo "make clean  remove .venv, runs/demo and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "flowmm needs Python 3.11 to 3.13; found $$($(PYTHON) --version 2>&1). Say which: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(INSTALLED_DEV): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $(INSTALLED) $@

.typing/flowmm:
	@mkdir -p .typing && ln -sfn .. .typing/flowmm

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python -m flowmm.pocket.demo --out runs/demo

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m "not slow"

slow: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m slow || [ $$? -eq 5 ] # 5: no test is slow

lint: $(INSTALLED_DEV) .typing/flowmm
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

clean:
	rm -rf $(VENV) runs/demo .typing build flowmm.egg-info .pytest_cache .ruff_cache .hypothesis
