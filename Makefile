# make demo, make test, make docs: each sets up everything it needs in .venv first.
# PYTHON=python3.12 chooses another Python; else the newest one here that can make a virtual environment.
PYTHONS := python3.14 python3.13 python3.12 python3.11 python3
PYTHON ?= $(firstword $(foreach name,$(PYTHONS),$(shell $(name) -c 'import ensurepip, venv, sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

OLDEST := .venv-oldest
# The oldest releases have packages for no newer Python.
OLDEST_PYTHON ?= $(firstword $(foreach name,python3.11 python3.12,$(shell $(name) -c 'import ensurepip, venv; print("$(name)")' 2>/dev/null)))

.PHONY: demo test test-oldest lint docs clean

demo: $(VENV)/.users
	$(BIN)/onceover demo --out demo

test: $(VENV)/.developers lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal  # threads of two processes would wait for each other

test-oldest: $(OLDEST)/.ready  # with the oldest releases that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2

lint: $(VENV)/.developers
	$(BIN)/ruff check .
	@mkdir -p $(VENV)/typing && ln -sfn "$(CURDIR)" $(VENV)/typing/onceover  # mypy sees the package by its import name
	$(BIN)/mypy

docs: $(VENV)/.developers
	$(BIN)/python docs/make_cli.py
	$(BIN)/python -W error docs/make_api.py --out docs/api

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python of 3.11 or later was found; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.users: $(VENV)/bin/python pyproject.toml
	$(PIP) -e ".[openvino,serve]"
	touch $@

$(VENV)/.developers: $(VENV)/bin/python pyproject.toml
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.users

$(OLDEST)/.ready: pyproject.toml requirements-oldest.txt
	@test -n "$(OLDEST_PYTHON)" || { echo "no Python 3.11 or 3.12 was found; name one: make test-oldest OLDEST_PYTHON=/path/to/python3"; exit 1; }
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -c requirements-oldest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo docs/api
