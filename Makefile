# The few commands that people and CI share. Each makes .venv itself, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
BENCHMARKS := $(sort $(wildcard benchmarks/[!_]*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## Make .venv with all that the other targets need (PYTHON=python3.12 picks another Python)

# torch goes first and at an exact version: a looser request could bring another build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "eps-resnet needs Python 3.10 or later, which '$(PYTHON)' is not; pick one: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH) hatchling
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

demo: ## Train, compact, deploy and predict on digits, in a fresh folder demo/run-N
	@./demo.sh

test: $(READY) ## Run the tests, but for those marked slow (ARGS='-k gate' passes options to pytest)
	$(BIN)/pytest -m 'not slow' $(ARGS)

check: $(READY) ## Lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## Run every benchmark, one after another
	@set -e; for script in $(BENCHMARKS); do echo "$$script"; $(BIN)/python "$$script"; done

wheel: $(READY) ## Build the wheel into dist/
	$(BIN)/hatchling build -t wheel -d dist

clean: ## Remove what the other targets made, but for .venv
	rm -rf dist .hypothesis .mypy_cache .pytest_cache .ruff_cache demo/run-[0-9]*
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
