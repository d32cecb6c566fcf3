# `make demo`, `make test`, `make lint` and `make bench` each do everything on a fresh machine with
# Python 3.11 and make: the first call installs into .venv and converts the model, a later one starts
# at once. PYTHON and MODEL can be overridden: make demo MODEL=Qwen/Qwen3-0.6B
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCAL_MODEL := .cache/models/SmolLM2-135M-Instruct
MODEL ?= $(LOCAL_MODEL)
BIN := .venv/bin
READY := .venv/.ready
CONVERTED := $(LOCAL_MODEL)/config.json
# A model of the user's own is none of ours to prepare.
MODEL_READY := $(if $(filter $(LOCAL_MODEL),$(MODEL)),$(CONVERTED))

.PHONY: demo test test-unit test-servers test-long test-engine test-machine lint bench bench-paper bench-peers bench-market soak env clean
.DELETE_ON_ERROR:

demo: $(READY) $(MODEL_READY)
	$(BIN)/kvmarket demo --model $(MODEL)

test: $(READY) $(CONVERTED) test-machine
	$(BIN)/python -m pytest -n auto tests/unit
	$(BIN)/python -m pytest tests/servers
	$(BIN)/python -m pytest -m "not long" tests/engine

test-unit: $(READY)
	$(BIN)/python -m pytest -n auto tests/unit

# Real servers: S3 (SeaweedFS, from a package) and PostgreSQL where it is installed.
test-servers: $(READY) test-machine
	$(BIN)/python -m pytest tests/servers

# What `make test` leaves out: kill -9 rounds, two engines at once, other layouts and ranks.
test-long: $(READY) $(CONVERTED) test-machine
	$(BIN)/python -m pytest -m long tests/engine

test-engine: $(READY) $(CONVERTED) test-machine
	$(BIN)/python -m pytest tests/engine

# Chromium and PostgreSQL, where they are missing and may be installed.
test-machine:
	tools/test_machine.sh

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) $(MODEL_READY)
	$(BIN)/python -m benchmarks.prefill_vs_reuse --model $(MODEL)
	$(BIN)/python -m benchmarks.store --model $(MODEL)
	$(BIN)/python -m benchmarks.ledger

# The paper's claims, one after the other.
bench-paper: $(READY) $(MODEL_READY)
	$(BIN)/python -m benchmarks.paper --model $(MODEL)

# Beside the peers, which it installs into folders of their own under .cache.
bench-peers: $(READY) $(MODEL_READY)
	$(BIN)/python -m benchmarks.peers --model $(MODEL)

# The catalogue at a million documents (as many as a third of the free memory holds), and a simulated
# market that takes each part's capacity from the results of the others.
bench-market: $(READY)
	$(BIN)/python -m benchmarks.catalogue
	$(BIN)/python -m benchmarks.cdn_simulation

# Half an hour of everything at once on a real server: make soak MINUTES=5 SEED=1
MINUTES ?= 30
soak: $(READY) $(CONVERTED)
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

env: $(READY)
	$(BIN)/kvmarket env

$(READY): pyproject.toml tools/bootstrap.sh
	tools/bootstrap.sh $(PYTHON)
	@touch $@

# Order only: a newer environment is no reason to convert again.
$(CONVERTED): | $(READY)
	tools/fetch_model.sh $(LOCAL_MODEL)

clean:
	rm -rf .venv .cache .demo
