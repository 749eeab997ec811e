# make demo: the shipped model on real input.  make app: a page to play with it.  make serve: OpenAI's interface.
# make test: the whole fast suite.  Each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: setup setup-dev demo app serve test test-slow wheel lint format clean

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

# the directory becomes the package `tokcom`, installed in place
$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/.ready-slow: $(VENV)/.ready-dev requirements-slow.txt
	$(BIN)/python -m pip install --quiet -r requirements-slow.txt
	touch $@

app: setup
	$(BIN)/tokcom app

serve: setup
	$(BIN)/tokcom serve

demo: setup
	$(BIN)/python examples/demo.py

test: setup-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready-slow
	$(BIN)/python -m pytest -m slow

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check_types.py

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
