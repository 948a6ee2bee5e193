# make demo: PPO on a real language model (ARGS="--run.seed 1"). make test: the suite.
# Both set up .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

# Two processes: a file's cases stay together, since they share models and ranks. The files' order
# is that of tests/conftest.py.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-processors test-all lint gpu-check

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gearshift needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c requirements.lock torch
	$(BIN)/pip install -q -c requirements.lock -e '.[demo,test]'
	touch $@

demo: setup
	$(BIN)/gearshift demo $(ARGS)

test: setup
	$(PYTEST) -m "not slow and not gpu"

# What compares bits, with PyTorch's CPU kernels of the processors below this one: without AVX-512,
# and without AVX2.
BELOW := {"AVX512": ["avx2", "default"], "AVX2": ["default"]}
HERE := torch.backends.cpu.get_cpu_capability()

test-processors: setup
	@for below in $$($(BIN)/python -c 'import torch; print(*$(BELOW).get($(HERE), []))'); do \
	  echo "ATEN_CPU_CAPABILITY=$$below"; \
	  ATEN_CPU_CAPABILITY=$$below $(PYTEST) -m "bits and not slow and not gpu" || exit 1; \
	done

test-all: setup
	$(PYTEST) -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy knows gearshift by its folders: under the names that pyproject.toml gives them.
	@rm -rf build/types && mkdir -p build/types/gearshift
	@for room in engine kernels launch; do ln -s ../../../$$room build/types/gearshift/; done
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	  gearshift/engine gearshift/kernels

# On a GPU machine, with a Python that has torch and triton: nothing is installed or downloaded.
PART ?= all
OUT ?= docs/results

gpu-check:
	$(PYTHON) launch/gpu/check.py --part $(PART) $(if $(WHEELS),--wheels $(WHEELS)) --out $(OUT)
