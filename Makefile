# The few commands that people and CI share. Each makes .venv itself, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
GPU := .venv-gpu/bin/python
JOBS ?= 2
MINUTES ?= 60
CUDA := $(CURDIR)/.venv-gpu/cuda
TRT := $(shell sed -n '/^trt = /,/^]/s/^ *"\([^;"]*\).*/\1/p' pyproject.toml)
TORCH := $(shell grep '^torch==' constraints.txt)
BENCHMARKS := $(sort $(wildcard benchmarks/[!_]*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo test check image-test bench gpu-report wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

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

test: $(READY) ## Run the tests, but for those marked slow, JOBS files at a time (ARGS='-k gate' goes to pytest)
	$(BIN)/pytest -m 'not slow' -n $(JOBS) --dist loadfile $(ARGS)

check: $(READY) ## Lint, format check, types, Dockerfile, compose file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml

image-test: $(READY) ## Build the serving image, start it, ask it, stop it (Docker; or podman, runc, debootstrap as root)
	$(BIN)/pytest -m image tests/image $(ARGS)

bench: $(READY) ## Run every benchmark, one after another
	@set -e; for script in $(BENCHMARKS); do echo "$$script"; $(BIN)/python "$$script"; done

# pycuda has no wheels: it is compiled with g++ against the headers that came with torch and a stand-in
# for the driver's library, as in the Dockerfile. By itself, so that a failure leaves TensorRT there.
gpu-report: ## On an NVIDIA GPU: run all that needs one, write one report to send back, in MINUTES
	@nvidia-smi -L >/dev/null 2>&1 || { echo "gpu-report: nvidia-smi lists no NVIDIA GPU here; nothing was run" >&2; exit 1; }
	test -x $(GPU) || $(PYTHON) -m venv .venv-gpu
	$(GPU) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH) hatchling
	$(GPU) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	-$(GPU) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(patsubst %,'%',$(filter-out pycuda%,$(TRT)))
	-$(GPU) -m pip install --quiet --disable-pip-version-check nvidia-cuda-profiler-api
	mkdir -p $(CUDA)
	-gcc -shared -x c /dev/null -Wl,-soname,libcuda.so.1 -o $(CUDA)/libcuda.so
	$(GPU) -c 'import pathlib, sysconfig; \
		headers = pathlib.Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include/cuda.h"); \
		print("CUDA_INC_DIR =", [str(path.parent) for path in headers]); \
		print("CUDADRV_LIB_DIR = [\"$(CUDA)\"]\nCUDA_ENABLE_CURAND = False")' > $(CUDA)/.aksetup-defaults.py
	-XDG_CONFIG_HOME="$${XDG_CONFIG_HOME:-$$HOME/.config}" HOME=$(CUDA) LDFLAGS=-Wl,--no-as-needed $(GPU) -m pip install \
		--quiet --disable-pip-version-check -c constraints.txt --no-binary pycuda $(patsubst %,'%',$(filter pycuda%,$(TRT)))
	$(GPU) -m pip uninstall --quiet -y onnxruntime
	$(GPU) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ort-gpu]'
	$(GPU) benchmarks/_gpu_report.py --minutes $(MINUTES)

wheel: $(READY) ## Build the wheel into dist/
	$(BIN)/hatchling build -t wheel -d dist

clean: ## Remove what the other targets made, but for .venv
	rm -rf dist .hypothesis .mypy_cache .pytest_cache .ruff_cache demo/run-[0-9]*
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
