PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slurm drill lint clean

demo: $(VENV)/.runtime ## make a video with a tiny model, without a download
	$(BIN)/python -m wan_dist.run task=toy

test: $(VENV)/.dev ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

test-slurm: $(VENV)/.dev ## submit the scripts of slurm/ to a Slurm on this machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_slurm.py -rs

drill: $(VENV)/.runtime ## beat a run of 1000 jobs until it is done; half an hour on 2 cores
	$(BIN)/python -m bench.drill

lint: $(VENV)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
