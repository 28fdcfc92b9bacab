# make demo, make test: both set up everything they need in .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs clean

demo: $(VENV)/.users
	$(BIN)/python cli.py demo --out demo

test: $(VENV)/.developers lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # threads of two processes would wait for each other

lint: $(VENV)/.developers
	$(BIN)/ruff check .

docs: $(VENV)/.users
	$(BIN)/python docs/make_cli.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.users: $(VENV)/bin/python requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.developers: $(VENV)/bin/python requirements.txt requirements-dev.txt requirements-parquet.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/.users

clean:
	rm -rf $(VENV) demo
