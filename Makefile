# Everything a fresh machine with Python >= 3.11 and make needs: `make demo`, `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-upstream check lint format clean

# One stamp for all targets: the environment is made again only when the project's own requirements change.
$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Pretrains on scikit-learn's digits (no download, under 3 minutes on 2 cores) and compares k-NN accuracies.
demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		-m hf_vicreg.training.pretrain --config digits --output_dir runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# transformers' own tests of a model, on ours. They are in its source distribution alone, which a package index has to give.
test-upstream: $(VENV)/.installed
	$(BIN)/python tests/upstream/upstream_sources.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m upstream -W default -rs tests/upstream

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info
