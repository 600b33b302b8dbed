.DEFAULT_GOAL := help
.PHONY: help setup check lint types layers test soak format results build clean
BIN := .venv/bin

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-9s %s\n", $$1, $$2}'

setup:  ## make .venv with everything the checks need
	@scripts/setup dev

check: lint types layers test  ## all that a change has to pass, the tests last

lint: setup  ## style, order of imports, formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup  ## mypy, strict
	$(BIN)/mypy

layers: setup  ## a module imports only from layers below it
	$(BIN)/lint-imports

test: setup  ## the tests, all but the soak
	./scripts/test

soak: setup  ## kills at random moments, budgets of several sizes
	./scripts/test -m soak

format: setup  ## rewrite the code in the one format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

results: setup  ## write the README's results from docs/results/
	$(BIN)/python scripts/readme_results.py

build: setup  ## sdist and wheel into dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove what tools leave behind; runs/ and data/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
