# One command each. "make help" lists them. Only Python >= 3.10 with venv, and make, have to be there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What follows pytest's name, for instance: make test ARGS="tests/core -k registry"
ARGS ?=

# The folders of tests, each of which is a part that can run beside any other. The longest first, for a good end.
FOLDERS := $(patsubst tests/%/,%,$(sort $(dir $(wildcard tests/*/test_*.py))))
LONGEST := core conformance backends training examples workspace engines
PARTS := $(addprefix test-of-,$(filter-out xla_engine,$(LONGEST) $(filter-out $(LONGEST),$(FOLDERS))))

DISTRIBUTIONS := fabric_core fabric_backends fabric_cuda fabric_xla fabric_deepspeed
MANIFESTS := $(addsuffix /pyproject.toml,$(DISTRIBUTIONS))
STAMP := $(VENV)/.installed
XLA_VENV := .venv-xla
XLA_STAMP := $(XLA_VENV)/.installed
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed
BENCH_PIP := $(BENCH_VENV)/bin/python -m pip
TESTED := $(VENV)/.installed-for-tests
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt

export PIP_NO_INPUT := 1
# The tests start some thousand processes: each would compile our modules anew where an environment keeps no bytecode.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo engines test install-xla test-xla $(PARTS) matrix check format docs docs-write bench wheels changelog clean distclean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the workspace into it

demo: $(STAMP) ## train the example on two processes
	$(BIN)/fabric run examples/image_classifier.py --strategy=ddp --devices=2

engines: ## install SLURM and Open MPI from Debian's packages, for their tests (as root)
	bash tests/engines/install.sh

ifdef ARGS
test: $(TESTED)
	$(BIN)/python -m pytest $(ARGS)
else
test: $(PARTS) ## run the whole test suite, folder by folder: "make -j2 test" runs two at a time
endif

install-xla: $(XLA_STAMP) ## create .venv-xla, for the tests that need torch_xla

test-xla: $(XLA_STAMP) ## run the tests that need torch_xla
	OMP_NUM_THREADS=1 $(XLA_VENV)/bin/python -m pytest tests/xla_engine $(ARGS)

# One thread each: those of two folders would wait for each other.
$(PARTS): test-of-%: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/$*

matrix: $(TESTED) ## compare every strategy and precision with a plain loop, and write docs/matrix.md
	FABRIC_WRITE_DOCS=1 $(BIN)/python -m pytest tests/training/test_matrix.py $(ARGS)

check: $(STAMP) ## lint, formatting, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## apply formatting and safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## check the documents: their links, and the code in them
	$(BIN)/python -m pytest tests/workspace/test_documents.py tests/workspace/test_plugin_*.py

docs-write: $(STAMP) ## write the parts of docs/plugins that come from the code
	$(BIN)/python docs/tools/generate.py docs/plugins

# Installed anew each time, and not as editable: each folder more on Python's path would slow some contenders down.
bench: $(BENCH_STAMP) ## measure ourselves beside PyTorch and other libraries, and write benchmarks/RESULTS.md
	$(BENCH_PIP) install -qq --constraint constraints.txt --no-build-isolation --no-deps --force-reinstall $(addprefix ./,$(DISTRIBUTIONS))
	$(BENCH_VENV)/bin/python benchmarks/run.py $(ARGS)

wheels: $(STAMP) ## build the five wheels into dist/
	rm -rf dist
	@set -e; for name in $(DISTRIBUTIONS); do \
		$(BIN)/python -m build --wheel --no-isolation --outdir dist $$name; \
	done

changelog: $(STAMP) ## show what the next release's changelog will say
	$(BIN)/towncrier build --draft --version next

clean: ## remove what the other commands made, except .venv
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(DISTRIBUTIONS) tests examples benchmarks docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv, .venv-xla and .venv-bench as well
	rm -rf $(VENV) $(XLA_VENV) $(BENCH_VENV)

# The distributions are installed together, so that pip takes each other's dependencies from this folder, and
# without build isolation, so that hatchling is not fetched five times, and DeepSpeed's build finds PyTorch.
$(STAMP): constraints.txt pyproject.toml $(MANIFESTS) | $(BIN)/python
	@echo "Installing the workspace into $(VENV); the first time takes a minute or two."
	$(PIP_INSTALL) "pip>=25.1"
	$(PIP_INSTALL) torch --group dev
	$(PIP_INSTALL) --no-build-isolation $(addprefix --editable ./,$(DISTRIBUTIONS))
	@touch $@

# Engines that only tests and examples use.
$(TESTED): $(STAMP)
	@echo "Installing what only the tests need."
	$(PIP_INSTALL) --no-build-isolation --group engines
	@touch $@

# torch_xla works with the PyTorch of its own version only, so it gets an environment of its own.
$(XLA_STAMP): tests/xla_engine/constraints.txt tests/xla_engine/make_environment.py constraints.txt $(MANIFESTS)
	@echo "Installing torch_xla into $(XLA_VENV); the first time takes a minute or two, and 2.3 GB."
	$(PYTHON) tests/xla_engine/make_environment.py $(XLA_VENV)
	@touch $@

# The libraries that we compare with stay out of the environment of the tests.
$(BENCH_STAMP): benchmarks/requirements.txt constraints.txt $(MANIFESTS)
	@echo "Installing the benchmarks' contenders into $(BENCH_VENV); the first time takes a minute or two."
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_PIP) install -qq --constraint constraints.txt "pip>=25.1"
	$(BENCH_PIP) install -qq --constraint constraints.txt torch --requirement benchmarks/requirements.txt
	$(BENCH_PIP) install -qq --constraint constraints.txt --no-build-isolation $(addprefix ./,$(DISTRIBUTIONS))
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed, and $(PYTHON) is not. Name another: make PYTHON=python3.11 install"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) lacks its venv module. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
