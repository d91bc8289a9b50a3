# The commands of this repository. Each sets up what it needs, so any of them works in a fresh clone.
#
#   make test PYTHON=python3.12     another interpreter than the newest
#   make unit PYTEST="-n 0 -x"      other pytest options
#   make demo DEMO=--quick          options of `hola demo`
#   make test-torch TORCH=FILE      a CPU build of torch; what PyPI has for Linux brings gigabytes of CUDA

PYTHON ?=
PYTEST ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
BIN := .venv/bin
OLDEST := .venv-oldest/bin
TORCH ?= torch==2.13.0
DOCS := .venv-docs/bin
TORCHED := .venv-torch/bin
TYPED := $(wildcard hola_jax train pallas_kernels tools/docs)

.PHONY: help setup test lint unit oldest test-torch docs format demo bench-cpu bench-tpu-compile bench-gpu-compile clean
.NOTPARALLEL:

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 26

# The tested versions, newest first; what is newer than they are is a last resort.
setup: ## .venv with the library in it, from the newest Python here
	@PYTHON="$(PYTHON)" sh tools/setup.sh .venv 3.13 3.12 3.11 3.14 3.15

test: lint unit oldest ## everything CI runs: lint, all tests, the laws on the oldest Python and jax

lint: setup ## ruff and mypy
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy $(TYPED)

unit: setup ## all tests, the slow ones too
	$(BIN)/python -m pytest $(PYTEST)

# What may break there is an API that the code calls, not a law: so a case of each law, mixer and way of computing, forward
# and backward, marked `oldest`, calls every module of the memory; all other cases are of the newest jax alone.
oldest: setup ## the laws on Python 3.11 and the oldest jax, where Python 3.11 is found
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	    echo "oldest: .venv is Python 3.11 already, its tests were these"; exit 0; \
	fi; \
	PYTHON= sh tools/setup.sh .venv-oldest 3.11 && status=0 || status=$$?; \
	case $$status in \
	    0) set -x; $(OLDEST)/python -m pytest tests/laws -m oldest -q $(PYTEST) ;; \
	    3) echo "oldest: no Python 3.11 here, so the laws ran on .venv's Python alone" ;; \
	    *) exit $$status ;; \
	esac

# Apart from `make test`, which never downloads torch. TORCH=... names another build or a wheel.
test-torch: ## what needs torch, in an environment of its own: imported weights against transformers, the lm-eval adapter
	@PYTHON="$(PYTHON)" sh tools/setup.sh .venv-torch 3.11 3.12 3.13
	$(TORCHED)/python -c "import torch, transformers, lm_eval" 2>/dev/null || \
	    $(TORCHED)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(TORCH) transformers lm_eval
	$(TORCHED)/python -m pytest tests/weights/test_agreement.py tests/evals/test_harness.py -rs $(PYTEST)

# Docstrings are read without importing anything, so the environment of the site holds no jax; notebooks run in .venv.
docs: export JAX_PLATFORMS := cpu
docs: setup ## the site, site/index.html, from the documents, the docstrings and the notebooks, which it executes
	@PYTHON="$(PYTHON)" SETUP_PACKAGES="mkdocs-material mkdocstrings[python] latex2mathml ruff" \
	    sh tools/setup.sh .venv-docs 3.13 3.12 3.11 3.14 3.15
	@for notebook in $(wildcard notebooks/*.py); do \
	    $(BIN)/python tools/docs/notebooks.py $$notebook build/notebooks || exit 1; done
	$(DOCS)/python tools/docs/stage.py build/docs build/notebooks
	NO_MKDOCS_2_WARNING=1 $(DOCS)/python -m mkdocs build

format: setup ## rewrite the sources as ruff likes them
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

demo: setup ## train small models with three memories and show on one page what HOLA's cache keeps
	$(BIN)/hola demo $(DEMO)

bench-cpu: setup ## time the memory against its peers on one core
	$(BIN)/python benchmarks/cpu.py

bench-tpu-compile: setup ## what the TPU kernels move and hold, compiled by libtpu without a TPU
	$(BIN)/python benchmarks/tpu_compile.py

# JAX's CUDA plugin compiles for a GPU that is not there, and needs none of the CUDA packages it depends on for that.
bench-gpu-compile: ## registers, spills and bytes of the GPU kernels, compiled for an H200
	@PYTHON="$(PYTHON)" sh tools/setup.sh .venv-gpu-compile 3.13 3.12 3.11 3.14 3.15
	@set -e; python=.venv-gpu-compile/bin/python; version=$$($$python -c 'import jax; print(jax.__version__)'); \
	$$python -c "import importlib.metadata as m, sys; sys.exit(m.version('jax-cuda13-plugin') != '$$version')" 2>/dev/null || \
	    $$python -m pip --disable-pip-version-check install --quiet --no-deps \
	        jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	.venv-gpu-compile/bin/python benchmarks/gpu_compile.py

clean: ## remove caches and builds, not the environments
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
