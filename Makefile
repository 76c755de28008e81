PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Files of tests side by side: each keeps what its tests share in its own process.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
KERNELS := src/mlframework/quantization/kernels

.PHONY: demo test test-fast lint format clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py $(ARGS)

test: $(INSTALLED)
	$(PYTEST)

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build out $(KERNELS)/_native*.so

# torch goes first: building the kernels takes its headers, which an isolated build environment would not have.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard $(KERNELS)/csrc/*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch "setuptools>=77"
	$(PIP) --no-build-isolation -e ".[test,lint]"
	touch $@
