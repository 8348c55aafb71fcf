# Every command sets itself up: the virtual environment is made on first use.
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint bench clean

setup: $(READY)

$(READY): pyproject.toml examples/cpu_engine/install.sh examples/cpu_engine/overrides.txt
	examples/cpu_engine/install.sh $(VENV)
	touch $@

demo: $(READY)
	$(BIN)/kvcached demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/block_pool.py --json benchmarks/results/block_pool.json
	$(BIN)/python benchmarks/host_memory.py --json benchmarks/results/host_memory.json
	$(BIN)/python benchmarks/cpu_throughput.py --json benchmarks/results/cpu_throughput.json

clean:
	rm -rf $(VENV) demo build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
