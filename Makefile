# Every command sets itself up: the virtual environment is made on first use.
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# SGLang has an environment of its own for each release: its dependencies are not vLLM's.
SGLANG_VENV ?= .venv-sglang
SGLANG_RELEASES := 0.5.23 0.5.15
SGLANG_READY := $(SGLANG_RELEASES:%=$(SGLANG_VENV)-%/.ready)

# vLLM's CPU engine in the other of its two shapes of KV allocation.
VLLM_VENV ?= .venv-vllm
VLLM_RELEASES := 0.28.0
VLLM_READY := $(VLLM_RELEASES:%=$(VLLM_VENV)-%/.ready)

GPU_VENV ?= .venv-gpu
GPU_PYTHON ?= $(GPU_VENV)/bin/python
GPU_SGLANG_VENV ?= .venv-gpu-sglang
GPU_SGLANG_PYTHON ?= $(GPU_SGLANG_VENV)/bin/python
export VLLM_PYTHON := $(abspath $(BIN)/python)
export SGLANG_PYTHON := $(abspath $(SGLANG_VENV)-0.5.23/bin/python)

.PHONY: setup demo test lint bench mutants gpu-check two-gpus-check prometheus-check check-locks new-engines clean

setup: $(READY)

$(READY): pyproject.toml examples/cpu_engine/install.sh examples/cpu_engine/overrides.txt
	examples/cpu_engine/install.sh $(VENV)
	touch $@

$(SGLANG_VENV)-%/.ready: pyproject.toml $(wildcard examples/sglang_cpu/*.* examples/sglang_cpu/*/*.*)
	examples/sglang_cpu/install.sh $(SGLANG_VENV)-$* $*
	touch $@

$(VLLM_VENV)-%/.ready: pyproject.toml $(wildcard examples/cpu_engine/*.*)
	examples/cpu_engine/install.sh $(VLLM_VENV)-$* $*
	touch $@

# ENGINES=vllm,sglang runs one of each.
demo: $(READY) $(if $(findstring sglang,$(ENGINES)),$(SGLANG_VENV)-0.5.23/.ready)
	$(BIN)/kvcached demo $(if $(ENGINES),--engines $(ENGINES))

test: $(READY) $(VLLM_READY) $(SGLANG_READY)
	$(BIN)/python -m pytest
	$(VLLM_VENV)-0.28.0/bin/python -m pytest tests/vllm/test_offline.py tests/vllm/test_block_pool.py \
	  tests/vllm/test_sleeping.py::test_a_quantised_cache_is_zeroed_at_a_wake_only_where_it_is_mapped
	$(SGLANG_VENV)-0.5.23/bin/python -m pytest -m sglang tests/sglang
	$(SGLANG_VENV)-0.5.15/bin/python -m pytest -m "sglang and not vllm" tests/sglang \
	  -k "not 1-none and not 16-radix and not latent_model and not (hybrid and none)"

# Every lock against its wheel on the package index; only the files that are needed are read, and kept.
check-locks: $(READY)
	$(BIN)/python -m kvcached_patches check

# Releases without a lock, and what to do about each; for a scheduled job, or by hand.
new-engines: $(READY)
	$(BIN)/python -m kvcached_patches new-engines

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Small faults, each planted in a copy of the tree: does a test see it? MUTANTS="keeper orders" plants
# those whose names hold one of these; with --write it writes tests/mutants/results.json.
mutants: $(READY) $(SGLANG_VENV)-0.5.23/.ready
	$(BIN)/python tests/mutants/run.py $(MUTANTS)

bench: $(READY)
	$(BIN)/python -m benchmarks run all-host

# A real Prometheus reads the metrics and the alerts: apt-get install prometheus.
prometheus-check: $(READY)
	$(BIN)/python -m pytest -m prometheus tests/core/test_prometheus.py

# On a machine with a GPU. GPU_PYTHON=python3 uses an environment that has vLLM already,
# GPU_SGLANG_PYTHON one that has SGLang.
gpu-check:
	[ -x "$$(command -v $(GPU_PYTHON))" ] || examples/gpu_engine/install.sh $(GPU_VENV)
	[ -x "$$(command -v $(GPU_SGLANG_PYTHON))" ] || \
	  examples/gpu_engine/install.sh $(GPU_SGLANG_VENV) sglang==0.5.15
	SGLANG_PYTHON=$(GPU_SGLANG_PYTHON) PYTHONPATH=$${PYTHONPATH:-}:tests $(GPU_PYTHON) -m pytest -m gpu --ignore tests/gpu/test_two_gpus.py tests/gpu
	SGLANG_PYTHON=$(GPU_SGLANG_PYTHON) $(GPU_PYTHON) -m benchmarks run all-gpu

# On a machine with two GPUs.
two-gpus-check:
	[ -x "$$(command -v $(GPU_PYTHON))" ] || examples/gpu_engine/install.sh $(GPU_VENV)
	PYTHONPATH=$${PYTHONPATH:-}:tests $(GPU_PYTHON) -m pytest -m gpu tests/gpu/test_two_gpus.py

clean:
	rm -rf $(VENV) $(SGLANG_VENV)-* $(VLLM_VENV)-* $(GPU_VENV) $(GPU_SGLANG_VENV) demo build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
