# Every target does its own set-up: on a machine with nothing but Python >= 3.10, `make demo` and `make test` just work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Extra words for pip, e.g. PIP_ARGS="--find-links wheels/" to take a CPU build of torch from a folder.
PIP_ARGS ?=
# Two test processes with one thread each use two cores better than one process with two threads.
TEST_WORKERS ?= 2

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test test-page lint type unit format bench docs wheel clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: $(INSTALLED)  ## make .venv and install the pinned versions (the other targets do this by themselves)

# --no-compile halves the time: most modules of the packages are never imported, and those that are get compiled then.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	  "make: Python 3.10 or newer is needed, $(PYTHON) is %d.%d; give another: make PYTHON=python3.12 ..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## Shakespeare from download to a table of perplexities, on two CPU cores in minutes
	bash train_scripts/shakespeare-demo.sh

# The types are checked beside the tests: on one core alone they would keep the other one waiting for a minute.
test: lint  ## everything that must hold: style, types, tests
	@$(MAKE) --no-print-directory -j2 type unit

test-page: $(INSTALLED)  ## the explorer's page in Chromium (make test does the same where Chromium and playwright are there)
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || command -v chromium-browser >/dev/null || { echo \
	  "make test-page: Chromium is missing; install it (Debian: apt-get install chromium), or give CHROMIUM=PATH" >&2; \
	  exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) \
	  --constraint constraints.txt --editable '.[page]'
	PAGE_TESTS=always OMP_NUM_THREADS=1 python -m pytest -m page tests/explorer

lint: $(INSTALLED)
	ruff check .
	ruff format --check .

type: $(INSTALLED)
	mypy

unit: $(INSTALLED)
	OMP_NUM_THREADS=1 python -m pytest -n $(TEST_WORKERS) --dist worksteal

format: $(INSTALLED)  ## rewrite the sources in the project's style
	ruff check --fix .
	ruff format .

bench: $(INSTALLED)  ## run the benchmarks one after another; each prints its figures as JSON
	@for script in $(filter-out benchmarks/common.py benchmarks/plain_knnlm.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; python $$script || exit 1; done

docs: $(INSTALLED)  ## build the documentation site into site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) \
	  --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/make_api.py
	mkdocs build --strict

wheel: $(INSTALLED)  ## build a wheel into dist/
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:  ## remove what tests and tools leave behind
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	find fairseq fairseq_cli tests benchmarks train_scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## also remove .venv
	rm -rf $(VENV) *.egg-info
