# `make` alone lists the targets. All of them work in a bare clone where only python3 is present.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON  ?= python3
VENV    ?= .venv
THREADS ?= 2
TRAIN   ?= m2-train +experiment=emoji run.resume=auto
SWEEP   ?= m2-train sweep=emoji
SERVE   ?= m2-serve index=drawings model=outputs/emoji/export open=true

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# As many processes as threads are given, a file of tests at a time. In their order: those that take longest come first.
PYTEST    := OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses=$(THREADS) --dist=loadfile --no-loadscope-reorder
MEASURED  := $(VENV)/.benchmark
BENCHES   := benchmark-encode benchmark-contrastive benchmark-data benchmark-data_plan benchmark-curation \
             benchmark-objectives benchmark-objective_mixtures benchmark-evaluation benchmark-export

##@ Start here

.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## "; print "\nM2-Encoder on Lightning: a bilingual zh/en image-text encoder\n"; \
	              print "  make TARGET [PYTHON=python3] [VENV=.venv] [THREADS=2]" } \
	      /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	      /^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 } \
	      END { print "" }' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(INSTALLED) ## .venv with the project and its tools, at the tested versions

.PHONY: train
train: install ## unpack the built-in zh/en data, train on it, evaluate, show the table
	$(BIN)/$(TRAIN)

.PHONY: sweep
sweep: install ## 16 short runs: what groups and micro-batches buy; table, picture; continues where it was stopped
	$(BIN)/$(SWEEP)

.PHONY: test
test: install ## all tests that need neither a GPU, the network nor much patience, in THREADS processes
	$(PYTEST)

##@ Look

.PHONY: serve
serve: install ## a page that searches the built-in drawings by the trained model, in a browser
	$(BIN)/$(SERVE)

.PHONY: notebooks
notebooks: install ## execute all notebooks on small runs: outputs/notebooks/*.ipynb, with pictures
	$(BIN)/python scripts/run_notebooks.py --small

##@ Develop

.PHONY: check
check: install ## exactly what CI runs
	@$(MAKE) --no-print-directory --jobs=$(THREADS) --output-sync lint typecheck validate-config
	@$(MAKE) --no-print-directory test

.PHONY: format
format: install ## sort imports, mend what can be mended, lay out the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: lint
lint: install ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: typecheck
typecheck: install ## mypy, strict, on all of src
	$(BIN)/mypy

.PHONY: validate-config
validate-config: install ## compose and validate every experiment; touches no data
	$(BIN)/python -m m2_encoder.config.validate

.PHONY: test-slow
test-slow: install ## the tests that take minutes
	$(PYTEST) -m "slow and not gpu and not multi_gpu and not network"

##@ Measure and tidy

.PHONY: benchmark
benchmark: $(BENCHES) ## benchmarks, quickly; benchmark-NAME runs one (grouped_training needs root)

benchmark-%: $(MEASURED)
	$(BIN)/python benchmarks/$*.py --quick --threads $(THREADS)

# Every seed's runs are kept as they finish, so a second call goes on where the first was stopped.
.PHONY: mixtures
mixtures: $(MEASURED) ## what each objective adds: trains a dozen models, for hours
	$(BIN)/python benchmarks/objective_mixtures.py --threads $(THREADS) \
	  --json benchmarks/results/objective_mixtures-$(or $(MACHINE),here).json
	$(BIN)/python benchmarks/objective_mixtures.py --markdown

.PHONY: clean
clean: ## remove caches and builds; keeps .venv and outputs
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is newer than what decides its content, so a second install costs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

# The peers that benchmarks compare with.
$(MEASURED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev,benchmark]' --constraint constraints.txt
	@touch $@
