# Everything runs in virtual environments that the first command builds from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := .venv-bench
LAUNCHERS := .venv-launchers
SITE := .venv-docs
# Python compiles what it loads, once; pip would compile all files of torch and transformers.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
PYTEST := -m pytest -n 2 --dist loadscope --no-loadscope-reorder
SLOW := (slow or docs) and not long and not launchers and not faults
EVERY := not long and not launchers and not faults
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-docs test-all test-long test-faults test-launchers fuzz coverage docs picture mutations \
	check audit bench bench-gpu bench-rounds bench-sampling bench-sweep lock clean

help: ## show these lines
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

# $(call environment,FOLDER,EXTRAS): the package with what those extras name, in an environment.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; name one with PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(INSTALL) -e ".[$(2)]"
endef

# Tests run the losses of TRL beside ours; what else TRL depends on they do without.
$(READY): pyproject.toml constraints.txt
	$(call environment,$(VENV),dev)
	$(BIN)/python $(INSTALL) --no-deps trl
	@touch $@

# What the launchers and the benchmark need stays out of the environment of the tests. AlpacaEval
# imports pkg_resources, which newer setuptools have not.
$(LAUNCHERS)/.ready: pyproject.toml constraints.txt
	$(call environment,$(LAUNCHERS),$(strip dev,slurm,ray,mlflow))
	$(LAUNCHERS)/bin/python $(INSTALL) alpaca_eval==0.6.6 "setuptools<81"
	@touch $@

$(BENCH)/.ready: pyproject.toml constraints.txt
	$(call environment,$(BENCH),bench)
	@touch $@

train: $(READY) ## run an experiment: make train ARGS="model=llama beta=0.1"
	@$(BIN)/python train.py $(ARGS)

test: $(READY) ## run the tests but the slow ones: make test ARGS="-k attention"
	@$(BIN)/python $(PYTEST) $(ARGS)

test-slow: $(READY) ## run the slow tests, and those of the pages, alone
	@$(BIN)/python $(PYTEST) -m "$(SLOW)" $(ARGS)

test-docs: $(READY) ## run each command and snippet of the README and of docs/; many minutes
	@$(BIN)/python $(PYTEST) --dist worksteal -m docs $(ARGS)

test-all: $(READY) ## run both
	@$(BIN)/python $(PYTEST) -m "$(EVERY)" $(ARGS)

test-long: $(READY) ## several ranks, compiled steps, whole sweeps, online wandb; twenty minutes
	@$(BIN)/python $(PYTEST) -m "long and not docs" $(ARGS)

test-faults: $(READY) ## kills, full disks, damaged files, every resume; half an hour
	@$(BIN)/python $(PYTEST) -m faults $(ARGS)

test-launchers: $(LAUNCHERS)/.ready ## run sweeps through submitit and on a Ray cluster, mlflow, AlpacaEval; takes minutes
	@$(LAUNCHERS)/bin/python -m pytest -m launchers $(ARGS)

fuzz: $(READY) ## run the property tests on many times the examples, other ones each time
	@$(BIN)/python $(PYTEST) -m "hypothesis and $(EVERY)" --hypothesis-profile=long --timeout=3600 $(ARGS)

coverage: $(READY) ## branches that the tests of test-all reach, in every process they start
	@$(BIN)/python -m coverage erase
	@$(BIN)/python -m coverage run $(PYTEST) -m "$(EVERY)" --timeout=900 $(ARGS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

# The generator of the site needs no more than Python.
$(SITE)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python $(INSTALL) zensical
	@touch $@

docs: $(READY) $(SITE)/.ready ## regenerate the pages that are made from the code, and build site/ from docs/
	@$(BIN)/python -m dpo_lightning.settings.page > docs/settings.md
	@$(BIN)/python -m dpo_lightning.run.outcome_page > docs/outcomes.md
	@$(BIN)/python -m dpo_lightning.run.api_page > docs/api.md
	@$(SITE)/bin/zensical build --strict --clean

# The embedded task needs no data and no network.
picture: $(READY) ## draw docs/frontier.png again, from a sweep of six β; minutes
	@rm -rf build/frontier
	@$(BIN)/python train.py experiment=frontier logger=none hydra.sweep.dir=build/frontier
	@cp build/frontier/frontier.png docs/frontier.png

mutations: $(READY) ## change the code in small ways and see that a test notices each
	@$(BIN)/python -m tests.support.mutate $(ARGS)

check: $(READY) ## lint, format, types, first lines of docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_prose.py

audit: $(READY) ## ask for known vulnerabilities of the pinned versions
	@$(BIN)/python .ci/audit.py $(ARGS)

bench: $(BENCH)/.ready ## measure speed beside TRL, or beside a commit: make bench ARGS="--against HEAD~1"
	$(BENCH)/bin/python benchmarks/run.py $(ARGS)

bench-gpu: $(BENCH)/.ready ## measure speed, MFU and memory beside TRL on one GPU, within 30 minutes
	@$(BENCH)/bin/python benchmarks/gpu.py $(ARGS)

bench-sampling: $(BENCH)/.ready ## tokens a second of eight answers to a prompt, beside transformers' generate
	@$(BENCH)/bin/python benchmarks/sampling.py $(ARGS)

bench-sweep: $(BENCH)/.ready ## time whole sweeps beside TRL, or beside a commit: make bench-sweep ARGS="--against HEAD~1"
	@$(BENCH)/bin/python benchmarks/sweep.py $(ARGS)

bench-rounds: $(READY) ## train with and without on-policy rounds on the embedded task, exactly measured; twenty minutes
	@PYTHONPATH=benchmarks $(BIN)/python benchmarks/rounds.py --picture docs/rounds.png $(ARGS)

# Local version tags, GPU wheels and the project itself stay out, so that one file serves every machine.
lock: ## regenerate constraints.txt in a clean environment
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet -e ".[dev,bench,docs,qlora,slurm,ray,mlflow]" torch==2.13.0
	{ echo "# Exact versions for every machine; written by 'make lock', used with 'pip install -c'."; \
	  $(VENV)-lock/bin/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools \
	  | sed -E 's/\+[A-Za-z0-9.]+$$//' | grep -viE '^(nvidia|cuda|triton)[-_a-z0-9]*==' ; } > constraints.txt
	rm -rf $(VENV)-lock

clean: ## remove the environments and caches; outputs/ stays
	rm -rf $(VENV) $(VENV)-lock $(BENCH) $(LAUNCHERS) $(SITE) site build dist *.egg-info .pytest_cache .mypy_cache \
		.ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
