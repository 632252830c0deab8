# Everything runs in a virtual environment that the first command builds from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help train test test-faults test-launchers check audit bench lock clean

help: ## show these lines
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

# Tests run the losses of TRL beside ours; what else TRL depends on they do without.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; name one with PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trl -c constraints.txt
	@touch $@

train: $(READY) ## run an experiment: make train ARGS="model=llama beta=0.1"
	@$(BIN)/python train.py $(ARGS)

test: $(READY) ## run the tests: make test ARGS="-k attention"
	@$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-faults: $(READY) ## kills, full disks, damaged files, every resume; half an hour
	@$(BIN)/python -m pytest -n 2 --dist loadscope -m faults $(ARGS)

test-launchers: $(READY) ## run sweeps through submitit and on a Ray cluster, which takes minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,slurm,ray]" -c constraints.txt
	@$(BIN)/python -m pytest -m launchers $(ARGS)

check: $(READY) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(READY) ## ask for known vulnerabilities of the pinned versions
	@$(BIN)/python .ci/audit.py $(ARGS)

bench: $(READY) ## measure speed beside TRL: make bench ARGS="--quick"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,bench]" -c constraints.txt
	$(BIN)/python benchmarks/run.py $(ARGS)

# Local version tags, GPU wheels and the project itself stay out, so that one file serves every machine.
lock: ## write constraints.txt anew from a clean environment
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet -e ".[dev,bench,qlora,slurm,ray]" torch==2.13.0
	{ echo "# Exact versions for every machine; written by 'make lock', used with 'pip install -c'."; \
	  $(VENV)-lock/bin/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools \
	  | sed -E 's/\+[A-Za-z0-9.]+$$//' | grep -viE '^(nvidia|cuda|triton)[-_a-z0-9]*==' ; } > constraints.txt
	rm -rf $(VENV)-lock

clean: ## remove the environment and caches; outputs/ stays
	rm -rf $(VENV) $(VENV)-lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
