# make demo: train on real data, print a table, write a picture.   make test: run the tests.
# make check: format, lint, types, the documentation.   make package: build what is published, and check it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check package format clean

demo: .venv/examples
	$(BIN)/python src/examples/fully_connected/main.py

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

package: .venv/dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

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
