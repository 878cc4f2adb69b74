# Everything a fresh machine with Python >= 3.11 and make needs: `make demo`, `make test`, `make docs`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# pip speaks of what it leaves alone and setuptools of what will change in it; errors still show, and fail.
PLAINLY := PYTHONWARNINGS=ignore
QUIETLY := 2>&1 | { grep -vE "^WARNING: |^ *\[notice\]|^\[notice\]|^ *$$" || true; }
SHELL   := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# Two workers by default, one thread each; `make test WORKERS=8` on a larger machine.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: demo test test-rounding test-package test-upstream check docs format clean

# One stamp for all targets: the environment is made again only when the project's own requirements change. Of its
# 19,000 modules most are never imported: each is compiled when it is.
$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PLAINLY) $(BIN)/python -m pip install --quiet --upgrade pip $(QUIETLY)
	$(PLAINLY) $(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]' $(QUIETLY)
	touch $@

# Pretrains on scikit-learn's digits (no download, under 3 minutes on 2 cores) and compares k-NN accuracies.
demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		-m hf_vicreg.training.pretrain --config digits --output_dir runs/demo

test: $(VENV)/.installed
	$(PYTEST)

# What must not hang on how a processor rounds: plain, AVX2 and native instructions, one thread and two.
PLAIN  := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
AVX2   := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
ROUND  := $(BIN)/python -m pytest -q -p no:xdist -m rounding
QUICK  := tests/training/evaluation/test_exact_cosine.py
test-rounding: $(VENV)/.installed
	$(PLAIN) OMP_NUM_THREADS=1 $(ROUND) tests/training tests/end_to_end
	$(PLAIN) OMP_NUM_THREADS=2 $(ROUND) $(QUICK)
	$(AVX2) OMP_NUM_THREADS=1 $(ROUND) $(QUICK)
	$(AVX2) OMP_NUM_THREADS=2 $(ROUND) $(QUICK)
	OMP_NUM_THREADS=1 $(ROUND) $(QUICK)
	OMP_NUM_THREADS=2 $(ROUND) $(QUICK)

# The wheel alone, in an environment of its own that borrows the dependencies: what is in it, and that it trains. Then
# a published model where the package is not.
test-package: $(VENV)/.installed
	rm -rf build dist
	$(PLAINLY) $(BIN)/python -m build --quiet . $(QUIETLY)
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/package/check_wheel.py dist
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:xdist -m slow -k linked tests/hub/test_loading.py

# transformers' own tests of a model, on ours. They are in its source distribution alone, which a package index has to give.
test-upstream: $(VENV)/.installed
	$(BIN)/python tests/upstream/upstream_sources.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m upstream -W default -rs tests/upstream

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, from guides and docstrings, into build/site. Nothing is fetched; a link or a name that leads nowhere fails.
# Not with --quiet: strict mode counts only the warnings that are shown.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info
