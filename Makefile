# make demo   train both stages on the built-in images and draw 64 new ones
# make test   lint, types and all tests
# Either makes a virtual environment in .venv first, if there is none.

PYTHON ?= python3
DEMO ?= checkpoints/demo

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/python cli.py train-tokenizer --sharp --out $(DEMO)/tokenizer --resume
	$(BIN)/python cli.py train-prior --tokenizer $(DEMO)/tokenizer --out $(DEMO)/prior --resume
	$(BIN)/python cli.py sample --n 64 --tokenizer $(DEMO)/tokenizer --prior $(DEMO)/prior --out $(DEMO)/samples --force

test: .venv/installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -e .
	$(BIN)/python -c "open('.venv/installed', 'w')"

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -c "open('.venv/installed-dev', 'w')"

clean:
	rm -rf .venv
