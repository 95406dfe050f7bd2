# ensdistill: everything from a fresh Debian or Ubuntu machine.
#
#   make train            set up what is missing, then the main job (ARGS="--recipe fashion-mnist" passes arguments on)
#   make test             set up what is missing, then the tests (ARGS="-k metrics -x" passes arguments on)
#   make test-newest      a second environment with the newest PyTorch and Triton that are supported, and there what depends on them:
#                         kernels compiled ahead of time, then their tests in the interpreter (5.5 GB; ARGS as for `test`)
#   make gpu-check        set up what is missing, then what anyone runs first on a new GPU (9 minutes; docs/benchmarks.md)
#
# The set-up: Debian packages that are missing (as root or through sudo; else it prints the one command to run and stops), a virtual
# environment in .venv, PyTorch, FFCV (CMakeLists.txt) and this package, editable. What is there is kept, and a second `make` installs
# nothing. To start afresh: rm -rf .venv build.
#
# Variables:
#   PYTHON       the Python that .venv is made from, 3.11 or newer. Default: python3.
#   ARGS         arguments of the program that `train`, `test`, `chaos` or `gpu-check` runs, or CMake's options for `aot`.
#   VENV         the environment, a folder of the checkout. Default: .venv. A second one: make test VENV=.venv-2.12 TORCH='torch==2.12.*'
#   TORCH        PyTorch's requirement. Default: with an NVIDIA GPU (nvidia-smi answers) the newest CUDA build that is supported, else
#                the version that was tested without one. A PyTorch that the environment has already is kept.
#   TORCH_INDEX  package index for PyTorch alone. Most people's pip gives gigabytes of CUDA for a machine without a GPU; where PyTorch's
#                own CPU index can be reached, name it here and get 200 MB.
#   WHEELS       folder of wheels to install from first. With FFCV's own wheel in it (`make ffcv-wheel` on another machine) neither root
#                nor a compiler is needed; without a network put wheels of everything there and set PIP_NO_INDEX=1.
#   EXTRAS       pyproject.toml's extras to install. Default: test,dev,tested (exact versions). `EXTRAS=test` keeps what a machine has.
#   VENV_FLAGS   flags of `python -m venv`, e.g. --system-site-packages to use the PyTorch that the machine has.
#   PARTS, NETWORK, DEADLINE, SCALE, OUT, CACHE, DATA, COMMIT   of `gpu-check` alone: docs/benchmarks.md explains them.
#   TRITON       `gpu-pack`: the Triton that the GPU machine has. Default: triton==3.6.0.
#
# A GPU machine without a network, whose python3 has PyTorch with CUDA, needs neither the set-up nor root nor a compiler: `make gpu-pack`
# on a machine with both makes a folder of wheels and compiled kernels; there: make gpu-check WHEELS=FOLDER CACHE=FOLDER/cache.tar.xz
# (docs/benchmarks.md, "Without a network").

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH ?=
TORCH_INDEX ?=
WHEELS ?=
EXTRAS ?= test,dev,tested
VENV_FLAGS ?=
PARTS ?=
NETWORK ?=
DEADLINE ?= 565
SCALE ?=
OUT ?=
CACHE ?=
DATA ?=
COMMIT ?=
TRITON ?= triton==3.6.0

MAKEFLAGS += --no-print-directory
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup train test chaos setup-newest test-newest gpu-check gpu-pack claims docs lint format aot ffcv-wheel clean

VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
MADE := $(VENV)/.made
# What ensdistill/runtime/releases.py supports: the range, what CI has, the upper end (which brings Triton 3.8).
TORCH_SUPPORTED := torch>=2.11,<2.15
TORCH_TESTED := torch==2.13.0
TORCH_NEWEST := torch==2.14.1
FFCV := ffcv==1.0.2
# Waiting threads that spin make two threads on a busy machine several times slower than one.
export OMP_WAIT_POLICY ?= passive
# --parts "…" where the variable $(2) is given
option = $(if $($(2)),--$(1) "$($(2))")
ifneq ($(WHEELS),)
export PIP_FIND_LINKS := $(PIP_FIND_LINKS) $(abspath $(WHEELS))
endif

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 20
	echo "Variables, and what the set-up does: the head of the Makefile."

setup: $(MADE)/package ## install what is missing

train: setup ## the main job: from data to one distilled network (without ARGS: and what that is worth on corrupted images)
	$(VENV_PYTHON) -m ensdistill.fast_train $(ARGS)
	$(if $(strip $(ARGS)),,$(VENV_PYTHON) -m ensdistill.evaluate runs/digits --data digits --corruptions)

test: setup ## all tests, on up to 8 cores (ARGS="-n 0" on one)
	$(VENV_PYTHON) -m pytest tests -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: setup ## the long campaigns of tests/chaos, with their counts: an hour or more (ARGS="--chaos 100" for less)
	$(VENV_PYTHON) -m pytest tests/chaos -s --chaos 1000 $(ARGS)

setup-newest:
	$(MAKE) setup VENV=.venv-newest TORCH="$(or $(TORCH),$(TORCH_NEWEST))" EXTRAS=test

test-newest: setup-newest ## what depends on PyTorch's and Triton's releases, with the newest ones
	.venv-newest/bin/python -m ensdistill.aot --recipes cifar100-wrn28x4 --cache build/aot-newest/cache
	.venv-newest/bin/python -m pytest tests/kernels tests/commands/test_aot.py tests/runtime/test_releases.py tests/engine/test_networks.py tests/training/test_step.py \
	    tests/commands/test_export.py tests/formats/test_hub.py \
	    -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# The machine's own Python where that has all it takes: one in a virtual environment lends its packages to no other. (`make setup` by
# name: a recipe that mentions MAKE would run under `make -n`.)
gpu-check: ## what to run first on a new GPU: correctness, speed, tuning, a real run
	@export PYTHONPATH="$(CURDIR):$(CURDIR)/build/gpu-check/site$${PYTHONPATH:+:$$PYTHONPATH}"
	if compgen -G "$(or $(WHEELS),/nowhere)/*.whl" > /dev/null; then
	    rm -rf build/gpu-check/site
	    $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
	        --target build/gpu-check/site "$(WHEELS)"/*.whl
	fi
	python=$(PYTHON)
	has_all='import importlib.util as i, torch; raise SystemExit(not (torch.version.cuda and i.find_spec("ffcv") and i.find_spec("tyro")))'
	if $(PYTHON) -c "$$has_all" 2> /dev/null; then
	    test -e ensdistill/kernels || ln -s ../kernels ensdistill/kernels
	else
	    unset PYTHONPATH
	    make setup
	    python=$(VENV_PYTHON)
	fi
	$(strip $$python -m bench.gpu_check --seconds $$(($(DEADLINE) - SECONDS)) $(call option,parts,PARTS) \
	    $(call option,network,NETWORK) $(call option,scale,SCALE) $(call option,out,OUT) $(call option,cache,CACHE) \
	    $(call option,data,DATA) $(call option,commit,COMMIT) $(ARGS))

GPU_WHEELS := msgspec tyro typeguard docstring-parser
GPU_RECIPES := cifar100-wrn28x4 cifar10-wrn28x1
GPU_PACK_MIB ?= 64

# PYTHON is to be of the GPU machine's version. Its own torch and triton compile the kernels if it has them, else those of an environment
# made for it: driver, CUDA and PyTorch do not matter to the cache, Triton and the version of Python do.
gpu-pack: ## what a GPU machine without a network needs for `gpu-check`: build/gpu-pack/
	@pack=build/gpu-pack python="$$(command -v $(PYTHON))"
	tag=$$($$python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
	compgen -G "build/wheels/ffcv-*-$$tag-*.whl" > /dev/null || make ffcv-wheel
	rm -rf $$pack && mkdir -p $$pack/wheels
	cp build/wheels/ffcv-*-$$tag-*.whl $$pack/wheels
	$$python -m pip download --quiet --disable-pip-version-check --only-binary :all: --no-deps --dest $$pack/wheels $(GPU_WHEELS)
	test -e ensdistill/kernels || ln -s ../kernels ensdistill/kernels
	export PYTHONPATH="$(CURDIR)"
	has_triton='import ensdistill.aot, triton; raise SystemExit("$(TRITON)" != "triton==" + triton.__version__)'
	if ! $$python -c "$$has_triton" 2> /dev/null; then
	    python=build/gpu-pack-env/bin/python
	    test -x $$python || $(PYTHON) -m venv build/gpu-pack-env
	    pip="$$python -m pip install --quiet --disable-pip-version-check"
	    $$pip $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(or $(TORCH),$(TORCH_TESTED))"
	    $$pip "$(TRITON)" msgpack msgspec numba numpy opencv-python-headless pillow rich safetensors setuptools tensorboard tqdm tyro
	fi
	for plan in ENSDISTILL_FOLDED_NORMS=1 ENSDISTILL_FOLDED_NORMS=0 ENSDISTILL_DEPENDENT_LAUNCH=0; do  # which gpu-check compares
	    env $$plan $$python -m ensdistill.aot --recipes $(GPU_RECIPES) --cache build/gpu-pack-$$tag/cache | tail -n 1
	done
	tar cJf $$pack/cache.tar.xz -C build/gpu-pack-$$tag/cache .
	$(if $(DATA),cp "$(DATA)" $$pack)
	find $$pack -type f -exec du -b {} +
	size=$$({ git ls-files -z || true; find $$pack -type f -print0; } 2> /dev/null | du -cb --files0-from=- | tail -n 1 | cut -f 1)
	echo "with the checkout $$((size >> 20)) of $(GPU_PACK_MIB) MiB"
	test $$((size >> 20)) -lt $(GPU_PACK_MIB) || { echo "error: $$pack is too large: leave DATA out, or give GPU_PACK_MIB" >&2; exit 2; }

claims: setup ## rewrite the README's table of claims from what is committed
	$(VENV_PYTHON) -m bench.claims $(ARGS)

# mypy and import-linter see the tree as it is installed, kernels/ inside ensdistill/: links to this checkout's files. (-S: without
# the editable install's hook, which would show import-linter the checkout instead.)
docs: setup ## the site of the guides and the reference: build/docs/index.html
	@rm -rf build/docs
	$(VENV_PYTHON) -m sphinx -q -W --keep-going -d build/doctrees docs build/docs
	echo "build/docs/index.html"

lint: setup ## formatting, lint, types and the rule of imports
	@status=0
	venv="$(CURDIR)/$(VENV)"
	$$venv/bin/ruff format --check . || status=1
	$$venv/bin/ruff check . || status=1
	rm -rf build/typing && mkdir -p build/typing
	cp -rs "$(CURDIR)/ensdistill" build/typing/
	rm -rf build/typing/ensdistill/kernels
	cp -rs "$(CURDIR)/kernels" build/typing/ensdistill/kernels
	cd build/typing
	$$venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache ensdistill ../../tests/own_loop/typed_use.py || status=1
	packages="$$($$venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	PYTHONPATH=".:$$packages" $$venv/bin/python -S $$venv/bin/lint-imports --no-logo ../../pyproject.toml --cache-dir ../../.mypy_cache/imports || status=1
	exit $$status

format: setup ## rewrite the sources as `make lint` wants them
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

aot: setup ## the kernels compiled ahead of time, without a GPU: build/aot/
	cmake -S . -B build -DPYTHON_EXECUTABLE="$(CURDIR)/$(VENV_PYTHON)" $(ARGS)
	cmake --build build --target aot

ffcv-wheel: $(MADE)/system ## FFCV for machines without root or network: build/wheels/
	cmake -S . -B build -DPYTHON_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build --target ffcv-wheel

clean: ## remove what was built; .venv and runs/ stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +

# ---- the set-up, step by step: each leaves a stamp in .venv/.made -------------------------------------------------------

$(MADE)/system: Makefile
	@missing=()
	if command -v $(PYTHON) > /dev/null; then
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	        echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed: install one and name it, e.g. make PYTHON=python3.12" >&2
	        exit 2
	    }
	    python=$$($(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
	    $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || missing+=($$python-venv)
	    include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
	else
	    python=python3 include=/nowhere
	    missing+=(python3 python3-venv)
	fi
	has_header() { echo "#include <$$1>" | c++ -I/usr/include/opencv4 -x c++ -E - > /dev/null 2>&1; }
	if ! compgen -G "$(or $(WHEELS),/nowhere)/ffcv-*.whl" > /dev/null; then  # FFCV is built here
	    test -e "$$include/Python.h" || missing+=($$python-dev)
	    command -v c++ > /dev/null || missing+=(g++)
	    command -v cmake > /dev/null || missing+=(cmake)
	    command -v pkg-config > /dev/null || missing+=(pkg-config)
	    has_header opencv2/core.hpp || missing+=(libopencv-core-dev)
	    has_header opencv2/imgproc.hpp || missing+=(libopencv-imgproc-dev)
	    has_header turbojpeg.h || missing+=(libturbojpeg0-dev)
	fi
	if [ $${#missing[@]} -gt 0 ]; then
	    install=(apt-get install --yes --no-install-recommends "$${missing[@]}")
	    if [ "$$(id -u)" = 0 ]; then
	        as_root=(env DEBIAN_FRONTEND=noninteractive)
	    elif sudo -n true 2> /dev/null; then
	        as_root=(sudo -n env DEBIAN_FRONTEND=noninteractive)
	    else
	        as_root=(false)
	    fi
	    echo "setup: $${install[*]}"
	    "$${as_root[@]}" "$${install[@]}" > /dev/null 2>&1 ||
	        { "$${as_root[@]}" apt-get update && "$${as_root[@]}" "$${install[@]}"; } || {
	        echo "error: packages are missing and cannot be installed from here. Run this once, then make again:" >&2
	        echo "    sudo sh -c 'apt-get update && $${install[*]}'" >&2
	        echo "or, without root, give a folder with FFCV's own wheel: make WHEELS=FOLDER (made by make ffcv-wheel elsewhere)" >&2
	        exit 2
	    }
	fi
	mkdir -p $(MADE) && touch $@

$(MADE)/venv: $(MADE)/system
	@$(VENV_PYTHON) -m pip --version > /dev/null 2>&1 || { echo "setup: $(VENV)"; $(PYTHON) -m venv $(VENV_FLAGS) $(VENV); }
	touch $@

$(MADE)/torch: $(MADE)/venv
	@if ! $(VENV_PYTHON) -c 'import torch' 2> /dev/null; then
	    torch="$(TORCH)"
	    if [ -z "$$torch" ]; then
	        if nvidia-smi -L > /dev/null 2>&1; then torch="$(TORCH_SUPPORTED)"; else torch="$(TORCH_TESTED)"; fi
	    fi
	    echo "setup: $$torch"
	    $(PIP) install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$$torch"
	fi
	touch $@

# The package comes before FFCV, whose set-up script wants setuptools on Python 3.12 and whose import wants the rest.
$(MADE)/dependencies: $(MADE)/torch pyproject.toml CMakeLists.txt
	@extras="$(EXTRAS)"
	own_triton='import importlib.metadata as m, sys; sys.exit(not any(r.startswith("triton") for r in m.requires("torch")))'
	$(VENV_PYTHON) -c "$$own_triton" || extras="$$extras,triton"
	echo "setup: this package with its dependencies [$$extras]"
	$(PIP) install --editable ".[$$extras]"
	touch $@

$(MADE)/package: $(MADE)/dependencies
	@if compgen -G "$(or $(WHEELS),/nowhere)/ffcv-*.whl" > /dev/null; then
	    $(PIP) install --no-deps --only-binary ffcv $(FFCV)
	else
	    cmake -S . -B build -DPYTHON_EXECUTABLE="$(CURDIR)/$(VENV_PYTHON)"
	    cmake --build build --target ffcv
	fi
	cd / && "$(CURDIR)/$(VENV_PYTHON)" -c 'import ffcv, ensdistill.kernels'
	touch "$(CURDIR)/$@"
