# `make demo` and `make test` set up what they need in .venv; nothing else has to be installed but Python 3.11 or 3.12.

PYTHON ?= $(shell sh tools/find_python.sh)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: demo test test-slow test-gpu check setup size clean

demo: $(VENV)/.ready
	$(BIN)/python -m dsv2 demo --out $(OUT)

test: $(VENV)/.ready-test check
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml tools/setup.sh
	PYTHON="$(PYTHON)" sh tools/setup.sh $(VENV)
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

size: $(VENV)/.ready
	$(BIN)/python tools/size.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
