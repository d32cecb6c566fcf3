# `make demo` and `make test` do everything on a fresh machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCAL_MODEL := .cache/models/SmolLM2-135M-Instruct
MODEL ?= $(LOCAL_MODEL)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-unit test-engine lint bench env clean

demo: $(READY) $(LOCAL_MODEL)/config.json
	$(BIN)/kvmarket demo --model $(MODEL)

test: $(READY) $(LOCAL_MODEL)/config.json
	$(BIN)/python -m pytest tests/unit
	$(BIN)/python -m pytest tests/engine

test-unit: $(READY)
	$(BIN)/python -m pytest tests/unit

test-engine: $(READY) $(LOCAL_MODEL)/config.json
	$(BIN)/python -m pytest tests/engine

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) $(LOCAL_MODEL)/config.json
	$(BIN)/python benchmarks/prefill_vs_reuse.py --model $(MODEL)

env: $(READY)
	$(BIN)/kvmarket env

$(READY): pyproject.toml tools/bootstrap.sh
	tools/bootstrap.sh $(PYTHON)
	@touch $@

$(LOCAL_MODEL)/config.json: tools/convert_model.py | $(READY)
	tools/fetch_model.sh $(LOCAL_MODEL)
	@touch $@

clean:
	rm -rf .venv .cache .demo
