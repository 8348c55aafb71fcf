# Every command sets itself up: the virtual environment is made on first use, and again when what it
# is made from has changed: the hash of that is in the name of the file that says it is ready.
hash_of = $(shell { echo $(CURDIR) $(PYTHON); cat pyproject.toml $(1); } | sha256sum | cut -c -12)

VENV ?= .venv
BIN := $(VENV)/bin
VLLM_HASH := $(call hash_of,$(sort $(wildcard examples/cpu_engine/*.*)))
READY := $(VENV)/.ready-$(VLLM_HASH)

# SGLang has an environment of its own for each release: its dependencies are not vLLM's.
SGLANG_VENV ?= .venv-sglang
SGLANG_RELEASES := 0.5.23 0.5.15
SGLANG_HASH := $(call hash_of,$(sort $(wildcard examples/sglang_cpu/*.* examples/sglang_cpu/*/*.* \
  examples/sglang_cpu/*/*/*.*)))
SGLANG_READY := $(SGLANG_RELEASES:%=$(SGLANG_VENV)-%/.ready-$(SGLANG_HASH))

# vLLM's CPU engine in the other of its two shapes of KV allocation.
VLLM_VENV ?= .venv-vllm
VLLM_RELEASES := 0.28.0
VLLM_READY := $(VLLM_RELEASES:%=$(VLLM_VENV)-%/.ready-$(VLLM_HASH))

# Ray has an environment of its own, without an engine.
RAY_VENV ?= .venv-ray
RAY_READY := $(RAY_VENV)/.ready-$(call hash_of,examples/ray/install.sh)

# What builds the documentation as a site; it has no engine.
DOCS_VENV ?= .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready-$(call hash_of,)

# What validates the manifests of Kubernetes, and Dockerfiles; too large for the tests' environment.
MANIFESTS_VENV ?= .venv-manifests
MANIFESTS_READY := $(MANIFESTS_VENV)/.ready-$(call hash_of,examples/kubernetes/requirements.txt)
KUBERNETES_RELEASES := 1.31 1.37

# LiteLLM's proxy, whose dependencies are nobody else's.
LITELLM_VENV ?= .venv-litellm
LITELLM_READY := $(LITELLM_VENV)/.ready-$(call hash_of,examples/gateway/requirements-litellm.txt)

GPU_VENV ?= .venv-gpu
GPU_PYTHON ?= $(GPU_VENV)/bin/python
GPU_SGLANG_VENV ?= .venv-gpu-sglang
GPU_SGLANG_PYTHON ?= $(GPU_SGLANG_VENV)/bin/python
export VLLM_PYTHON := $(abspath $(BIN)/python)
export SGLANG_PYTHON := $(abspath $(SGLANG_VENV)-0.5.23/bin/python)
export LITELLM_PYTHON := $(abspath $(LITELLM_VENV)/bin/python)

# uv compiles nothing: the first process that imports an engine leaves its byte code for the others.
demo quick test test-every-release bench: export PYTHONDONTWRITEBYTECODE :=

# Since when the tests count their time.
ifndef STARTED
STARTED := $(shell date +%s)
endif
export STARTED

.PHONY: setup environments demo tiny-models images-check quick test test-every-release lint docs bench mutants gpu-check two-gpus-check \
  gpu-gateway prometheus-check check-locks check-manifests new-engines clean

setup: $(READY)

environments: $(READY) $(SGLANG_READY) $(VLLM_READY) $(RAY_READY)

$(READY):
	rm -f $(@D)/.ready*
	examples/cpu_engine/install.sh $(VENV)
	touch $@

$(SGLANG_VENV)-%/.ready-$(SGLANG_HASH):
	rm -f $(@D)/.ready*
	examples/sglang_cpu/install.sh $(SGLANG_VENV)-$* $*
	touch $@

$(VLLM_VENV)-%/.ready-$(VLLM_HASH):
	rm -f $(@D)/.ready*
	examples/cpu_engine/install.sh $(VLLM_VENV)-$* $*
	touch $@

$(RAY_READY):
	rm -f $(@D)/.ready*
	examples/ray/install.sh $(RAY_VENV)
	touch $@

$(DOCS_READY):
	rm -f $(@D)/.ready*
	[ -x $(DOCS_VENV)/bin/python ] || $${PYTHON:-python3} -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --no-compile ".[docs]"
	touch $@

$(MANIFESTS_READY):
	rm -f $(@D)/.ready*
	[ -x $(MANIFESTS_VENV)/bin/python ] || $${PYTHON:-python3} -m venv $(MANIFESTS_VENV)
	$(MANIFESTS_VENV)/bin/python -m pip install --quiet --no-compile -r examples/kubernetes/requirements.txt
	touch $@

$(LITELLM_READY):
	rm -f $(@D)/.ready*
	[ -x $(LITELLM_VENV)/bin/python ] || $${PYTHON:-python3} -m venv $(LITELLM_VENV)
	$(LITELLM_VENV)/bin/python -m pip install --quiet --no-compile -r examples/gateway/requirements-litellm.txt
	touch $@

# ENGINES=vllm,sglang runs one of each.
demo: $(READY) $(if $(findstring sglang,$(ENGINES)),$(firstword $(SGLANG_READY)))
	$(BIN)/kvcached demo $(if $(ENGINES),--engines $(ENGINES))

# The tiny models that the examples serve on the CPU.
tiny-models: $(READY)
	$(BIN)/python -m kvcached_demo.harness.tiny examples/tiny

# A way to use the gateway: make example-agents, or another folder of examples that has a run.py.
example-%: $(READY)
	$(BIN)/python examples/$*/run.py

# Without a server: what to run while working.
quick: $(READY) $(firstword $(SGLANG_READY))
	$(BIN)/python tests/run.py quick

# What CI runs.
test:
	$(MAKE) --no-print-directory -j3 environments
	$(BIN)/python tests/run.py test

# What takes longer: the older releases in full, the full demo, the multi-model benchmark. For a release.
# It needs a Prometheus, too: apt-get install prometheus.
test-every-release:
	$(MAKE) --no-print-directory -j3 environments $(LITELLM_READY)
	$(BIN)/python tests/run.py every-release

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

# The documentation as a site: without a warning, without a network, and nothing in a page comes from
# elsewhere. The variable silences an advertisement.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	! grep -rlE '<(script|link|img)[^>]*(src|href)="https?:' site
	@echo site/index.html

# The manifests against the schemas of the oldest and the newest Kubernetes that we mean; an object of a
# kind that is not Kubernetes' own is in pool.yaml, and tests look at that. Every Dockerfile, too.
check-manifests: $(MANIFESTS_READY)
	$(MANIFESTS_VENV)/bin/hadolint $(wildcard examples/*/Dockerfile*)
	@for release in $(KUBERNETES_RELEASES); do \
	  for file in $(filter-out %/pool.yaml,$(wildcard examples/kubernetes/*.yaml)); do \
	    $(MANIFESTS_VENV)/bin/kubernetes-validate --strict --quiet -k $$release $$file || exit 1; \
	  done; \
	done

# Small faults, each planted in a copy of the tree: does a test see it? MUTANTS="keeper orders" plants
# those whose names hold one of these; with --write it writes tests/mutants/results.json.
mutants: $(READY) $(firstword $(SGLANG_READY))
	$(BIN)/python tests/mutants/run.py $(MUTANTS)

bench: $(READY) $(RAY_READY)
	$(BIN)/python -m benchmarks run all-host

# A real Prometheus reads the metrics and the alerts: apt-get install prometheus.
prometheus-check: $(READY)
	$(BIN)/python -m pytest -m prometheus tests/core/test_prometheus.py

# The images of the gateway, each asked for its commands; where there is Docker, or CONTAINERS=podman.
CONTAINERS ?= docker
images-check:
	for engine in vllm sglang; do \
	  $(CONTAINERS) build -f examples/gateway/Dockerfile.$$engine -t kvcached-$$engine . && \
	  $(CONTAINERS) run --rm --entrypoint kvcached kvcached-$$engine serve --help || exit 1; \
	done

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
	$(GPU_PYTHON) -m benchmarks run all-two-gpus

# Many models behind one URL on a GPU: MODELS=4 for fewer; CARDS=2 moves one between two GPUs.
gpu-gateway:
	[ -x "$$(command -v $(GPU_PYTHON))" ] || examples/gpu_engine/install.sh $(GPU_VENV)
	$(GPU_PYTHON) -m benchmarks run gateway_gpu -- --models $(or $(MODELS),6) \
	  $(if $(filter 2,$(CARDS)),--cards 2 --parts move)

clean:
	rm -rf $(VENV) $(SGLANG_VENV)-* $(VLLM_VENV)-* $(RAY_VENV) $(GPU_VENV) $(GPU_SGLANG_VENV) $(DOCS_VENV) $(MANIFESTS_VENV) $(LITELLM_VENV) demo site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
