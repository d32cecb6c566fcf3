# Each target does everything on a fresh machine with Python 3.11 and make: the first call installs
# into .venv (`make check`: into .venv-check) and converts the model; a later call starts at once.
# PYTHON and MODEL can be overridden: make demo MODEL=Qwen/Qwen3-0.6B
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCAL_MODEL := .cache/models/SmolLM2-135M-Instruct
MODEL ?= $(LOCAL_MODEL)
BIN := .venv/bin
READY := .venv/.ready
CONVERTED := $(LOCAL_MODEL)/config.json
# A model of the user's own is none of ours to prepare.
MODEL_READY := $(if $(filter $(LOCAL_MODEL),$(MODEL)),$(CONVERTED))

# For models that see, beside .venv, where it breaks transformers: PyPI's is not built for this torch.
TORCHVISION := .cache/torchvision
VISION := PYTHONPATH=tests/support/vision:$(TORCHVISION)

CHECK := .venv-check/bin
CHECK_READY := .venv-check/.ready
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo check test test-unit test-servers test-engine test-long test-machine lint bench bench-models bench-paper \
	bench-peers bench-market soak env clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(READY) $(MODEL_READY) ## publish a document, buy it, see the money
	$(BIN)/kvmarket demo --model $(MODEL)

check: $(CHECK_READY) ## lint, types and quick unit tests, without vLLM and torch (two minutes)
	@$(CHECK)/python -m tools.parts \
		"lint=$(CHECK)/ruff check . && $(CHECK)/ruff format --check . && $(CHECK)/lint-imports" \
		"types=$(CHECK)/mypy" \
		"unit=$(CHECK)/python -m pytest -q -n auto -m 'not slow' tests/unit"

# AFTER_CHECK=1, as in .ci/run: without the unit tests that `make check` has just run.
test: $(READY) $(CONVERTED) test-machine ## all tests but the long ones, on real servers and engines (20 minutes on 2 cores that do nothing else)
	@$(BIN)/python -m tools.parts \
		"unit=$(PYTEST) -q -n auto $(if $(AFTER_CHECK),--after-check) tests/unit" \
		"+servers=$(PYTEST) -q tests/servers" \
		"engine=$(PYTEST) -q -m 'not long' --durations=15 tests/engine"

test-unit: $(READY) ## unit tests
	$(PYTEST) -n auto tests/unit

test-servers: $(READY) test-machine ## tests on real S3 (SeaweedFS) and PostgreSQL servers
	$(PYTEST) tests/servers

test-engine: $(READY) $(CONVERTED) test-machine ## every test on a real engine, long ones too
	$(PYTEST) tests/engine

test-long: $(READY) $(CONVERTED) test-machine $(TORCHVISION) ## what make test leaves out: kills, two engines, variations
	$(PYTEST) -m long tests/engine
	$(VISION) $(PYTEST) -k sees tests/engine/test_model_families.py

test-machine: ## install Chromium and PostgreSQL, where they are missing and may be installed
	tools/test_machine.sh

lint: $(READY) ## ruff, mypy and import-linter, in the full environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) $(MODEL_READY) ## speed of a reuse, of the store, of the ledger
	$(BIN)/python -m benchmarks.prefill_vs_reuse --model $(MODEL)
	$(BIN)/python -m benchmarks.under_load --model $(MODEL)
	$(BIN)/python -m benchmarks.miss_cost --model $(MODEL)
	$(BIN)/python -m benchmarks.store --model $(MODEL)
	$(BIN)/python -m benchmarks.ledger

bench-models: $(READY) $(MODEL_READY) $(TORCHVISION) ## every family of models, token for token: docs/MODELS.md
	$(VISION) $(BIN)/python -m benchmarks.models

bench-paper: $(READY) $(MODEL_READY) ## the paper's claims, one after the other
	$(BIN)/python -m benchmarks.paper --model $(MODEL)

bench-peers: $(READY) $(MODEL_READY) ## beside other systems, which it installs under .cache
	$(BIN)/python -m benchmarks.peers --model $(MODEL)

# As many documents as a third of the free memory holds. The simulated market takes each part's
# capacity from the results of the other benchmarks.
bench-market: $(READY) $(MODEL_READY) ## a million documents, a long past, two machines, and a simulated market
	$(BIN)/python -m benchmarks.catalogue
	$(BIN)/python -m benchmarks.ledger_history
	$(BIN)/python -m benchmarks.fleet --model $(MODEL)
	$(BIN)/python -m benchmarks.cdn_simulation

MINUTES ?= 30
soak: $(READY) $(CONVERTED) ## everything at once on a real server: make soak MINUTES=5 SEED=1
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

env: $(READY) ## what this machine can run
	$(BIN)/kvmarket env

$(READY): pyproject.toml tools/bootstrap.sh
	tools/bootstrap.sh $(PYTHON)
	@touch $@

# Light: wheels of a few megabytes each, none of them vLLM or torch.
$(CHECK_READY): pyproject.toml
	$(PYTHON) -m venv .venv-check
	$(CHECK)/python -m pip install -q --disable-pip-version-check -e '.[api,postgres,check]'
	@touch $@

# The release for the torch of the vLLM in tools/bootstrap.sh.
$(TORCHVISION): | $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $@ torchvision==0.28.0

# Order only: a newer environment is no reason to convert again.
$(CONVERTED): | $(READY)
	tools/fetch_model.sh $(LOCAL_MODEL)

clean: ## remove the environments, the model and the demo's market
	rm -rf .venv .venv-check .cache .demo
