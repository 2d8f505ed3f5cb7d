# Two commands set everything up: `make demo` and `make test`. Both need Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
# Without compiling what nobody may import: a fifth of the space, and some of the time.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable

.PHONY: demo check test test-all docs clean

demo: .venv/installed
	$(BIN)/scorelm demo

# Lint, types and the fast tests, for every change.
check: .venv/installed lint
	$(BIN)/pytest -m 'not thorough and not slow'

# What CI runs.
test: .venv/complete lint
	$(BIN)/pytest -m 'not slow'

# Long campaigns too; docs/testing.md has the last result.
test-all: .venv/complete lint
	$(BIN)/pytest

# The documentation, into docs/_build; any warning is an error.
docs: .venv/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build
	@echo docs/_build/index.html

.PHONY: lint
lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[dev]'
	touch $@

.venv/complete: .venv/installed
	$(INSTALL) '.[ci]'
	touch $@

.venv/docs: .venv/installed
	$(INSTALL) '.[docs]'
	touch $@

clean:
	rm -rf .venv runs docs/_build
