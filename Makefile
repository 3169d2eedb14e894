PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-toy test-slurm drill lint clean

demo: $(VENV)/.runtime ## make three videos with a tiny model on two CPU ranks, without a download
	$(BIN)/python -m launch local ranks=2 task=toy preset=toy-2step lora=toy/checkpoint/toy-2steps-lora.safetensors jobs=toy/demo.jsonl device=cpu output.dir=outputs/demo
	@echo
	@echo "The videos are in outputs/demo; outputs/demo/index.html shows them in a browser. Ask for something else, in English or Chinese:"
	@echo '  $(BIN)/python -m wan_dist.run task=toy prompt="a white star moving in a circle on a red background"'
	@echo 'toy/README.md says which shapes, colours and motions this model knows.'

test: $(VENV)/.dev ## run the tests
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal --durations=10

test-toy: $(VENV)/.dev ## score the tiny model on 64 captions, on one rank and on two; ten minutes on 2 cores
	WAN_DIST_CAPTIONS=64 $(BIN)/python -m pytest tests/test_toy_videos.py

test-slurm: $(VENV)/.dev ## submit the scripts of slurm/ to a Slurm on this machine; as root, with munge slurmctld slurmd slurm-client
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

drill: $(VENV)/.runtime ## inject 60 faults into a run of 1000 jobs; half an hour on 2 cores
	$(BIN)/python -m bench.drill

lint: $(VENV)/.dev ## style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
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
