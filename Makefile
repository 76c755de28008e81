PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PEERS_INSTALLED := $(VENV)/peers_installed
STUDY_INSTALLED := $(VENV)/study_installed
DOCS_INSTALLED := $(VENV)/docs_installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Files of tests side by side: each keeps what its tests share in its own process.
# (In their order: by default those with few tests, which here are the slow ones, would all come last.)
# Bytecode is kept, whatever the environment says: tests start many processes, and rewriting what they assert takes long.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
KERNELS := src/mlframework/quantization/kernels
WITHOUT_AVX512 := $(VENV)/without_avx512.so
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)

.PHONY: demo test test-fast test-long test-avx2 test-arm gpu bench study docs lint format clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py $(ARGS)

test: $(INSTALLED)
	$(PYTEST) -m "not long"

# Of what all else stands on: arithmetic, operators, nodes, graphs, integer layers.
test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow and not interpreter" tests/test_*.py $(addprefix tests/,graph int8 kernels qat)

test-long: $(INSTALLED)
	$(PYTEST) -m long

# On a processor with AVX-512, the tests as on one without; it takes an Intel processor that lets CPUID fault. Inductor
# keeps what it compiles by the machine, and would mix up its two faces.
test-avx2: $(WITHOUT_AVX512)
	TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV)/inductor_avx2) LD_PRELOAD=$(abspath $(WITHOUT_AVX512)) $(PYTEST) -m "not long"

$(WITHOUT_AVX512): tests/processors/without_avx512.c $(INSTALLED)
	$(CC) -O2 -Wall -shared -fPIC -o $@ $< -ldl

# The microkernels of Arm processors, on emulated ones: on Debian and its kind.
test-arm: $(INSTALLED)
	command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64 || \
		{ $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends g++-aarch64-linux-gnu qemu-user; }
	$(PYTEST) tests/kernels/test_microkernels.py

# On a machine with a GPU, with the Python that has PyTorch there: nothing is installed. Eight minutes at the most.
gpu:
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

# About 50 minutes, on a machine that does nothing else.
bench: $(PEERS_INSTALLED)
	$(BIN)/python benchmarks/fake_quantize.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/zoo_inference.py
	$(BIN)/python benchmarks/processors.py
	$(BIN)/python benchmarks/reduce_range.py
	$(BIN)/python benchmarks/observers.py
	$(BIN)/python benchmarks/ddp_step.py --write

# Hours; interrupted, it goes on where it stopped. A part: make study ARGS="--network crepe --width W8A8"
study: $(STUDY_INSTALLED)
	$(BIN)/python benchmarks/pretrained.py $(ARGS)

# Pages in out/site, which open from there; to search them, too: python -m http.server --directory out/site
# Every link between pages and every anchor is checked. Links to other hosts are not fetched.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo out/site/index.html

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build out $(KERNELS)/_compiled*.so

# torch goes first: building the kernels takes its headers, which an isolated build environment would not have.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard $(KERNELS)/csrc/*.* $(KERNELS)/csrc/*/*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch "setuptools>=77"
	$(PIP) --no-build-isolation -e ".[test,lint]"
	touch $@

$(PEERS_INSTALLED): $(INSTALLED)
	$(PIP) --no-build-isolation -e ".[bench]"
	touch $@

$(STUDY_INSTALLED): $(PEERS_INSTALLED) benchmarks/pretrained/requirements.txt
	$(PIP) --no-build-isolation -e ".[study]"
	$(PIP) --no-deps -r benchmarks/pretrained/requirements.txt
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) --no-build-isolation -e ".[docs]"
	touch $@
