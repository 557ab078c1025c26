# make demo: train on real data, print a table, write a picture.   make test: run the tests.   make check: format, lint, types.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check format clean

demo: .venv/examples
	$(BIN)/python src/examples/fully_connected/main.py

test: .venv/dev
	$(BIN)/python -m pytest --cov --cov-report=xml --cov-report=term:skip-covered

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/examples .venv/dev: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) --editable ".[$(notdir $@)]"
	touch $@

clean:
	rm -rf .venv build dist .coverage coverage.xml .pytest_cache .ruff_cache
