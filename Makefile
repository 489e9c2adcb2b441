# Tasks of this repository, for the environment in .venv: `make PYTHON=python3.12 setup` makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help setup check types test slow docs bench release ci

help:  ## what each task does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*##/\1\t/' | expand -t 10

setup: $(BIN)/pip  ## the development environment
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[dev,docs]'

check: setup  ## style, spelling: what pre-commit runs, but for the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: setup  ## pyright
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

test: setup  ## the fast tests; `make slow` runs the others
	$(BIN)/pytest -q -n 2 --dist loadfile -m 'not slow'

slow: setup  ## the slow tests, the examples among them
	$(BIN)/pytest -q -n 2 --dist loadfile -m slow

docs: setup  ## the site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup  ## the CPU benchmarks that need a minute; each program of benchmarks/ has a --help
	$(BIN)/python benchmarks/time_to_first_token.py --repetitions 10
	$(BIN)/python benchmarks/trie.py --capacity 65536

release: setup  ## wheel and sdist into dist/, of a clean tree whose version CHANGELOG.md knows
	@git diff --quiet HEAD || { echo "the working tree has changes: commit them first" >&2; exit 1; }
	@version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("lookahead-jax"))'); \
	  grep -q "^## \[$$version\]" CHANGELOG.md || \
	  { echo "CHANGELOG.md has no section [$$version]: rename Unreleased" >&2; exit 1; }
	rm -rf dist
	$(BIN)/python -m build

ci:  ## everything, in a clean copy, as the workflow runs it
	.ci/run
