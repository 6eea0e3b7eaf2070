# make demo   environment, build, then the whole of LEAML on the embedded endoscopy world
# make test   environment, build, then the test suite
# Each works on its own; a repeated call finds everything in place.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
export PYTHON VENV
# Threads that spin at barriers slow everything down many times where other processes want the cores too.
export OMP_WAIT_POLICY ?= PASSIVE
LEAML := $(VENV)/bin/leaml

.PHONY: environment demo test test-fast lint pretrain teacher gate bench clean

environment:
	@scripts/environment.sh

demo: environment
	$(LEAML) demo --output runs/demo

test: environment
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4

test-fast: environment
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 -m "not slow"

lint: environment
	$(VENV)/bin/python -m ruff check .

pretrain: environment
	$(LEAML) pretrain

teacher: environment
	$(VENV)/bin/python -m leaml_plugin.worlds.teacher

gate: environment
	$(LEAML) gate

bench: environment
	$(LEAML) bench kernels

clean:
	rm -rf build dist *.egg-info runs/demo leaml_plugin/*.so
