# make setup   .venv with everything that demo and tests need
# make demo    export a real small model with LoRA-Drop, verify it, generate text, show what it saved
# make test    the whole test suite
# make check   lint, types
.PHONY: setup demo test check clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[export,dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) .demo
