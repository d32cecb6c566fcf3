"""Ways around kvmarket's checks and its gate: prepared correctly, or refused in one line."""

from __future__ import annotations

import argparse
import os
from importlib import metadata

import pytest
from vllm.config import KVTransferConfig

from vllm_kvmarket import ConfigError
from vllm_kvmarket.connector import flags
from vllm_kvmarket.connector.flags import check_prepared, ensure_gate, prepare
from vllm_kvmarket.core.config import load

MODULE = "vllm_kvmarket.connector.connector"


def transfer(name="kvmarket", **more):
    return KVTransferConfig(kv_connector=name, kv_role="kv_both", **more)


DETOURS = [
    transfer(
        "MultiConnector",
        kv_connector_extra_config={
            "connectors": [{"kv_connector": "kvmarket", "kv_role": "kv_both"}]
        },
    ),
    transfer("KVMarketConnector", kv_connector_module_path=MODULE),
    transfer("kvmarket", kv_connector_module_path=MODULE),
]


@pytest.mark.parametrize("given", DETOURS, ids=["multi", "class", "module"])
def test_kvmarket_is_the_only_connector_under_its_own_name(given):
    """Elsewhere its checks and its refusals would not take place."""
    for serving in (True, False):
        with pytest.raises(ConfigError, match="only connector"):
            prepare(given, serving)


def test_what_does_not_use_kvmarket_is_left_alone():
    """Other connectors change nothing."""
    given = transfer("MultiConnector", kv_connector_extra_config={"connectors": [{"a": 1}]})
    prepare(given, serving=True)
    assert given.kv_load_failure_policy == "fail"
    prepare(None, serving=True)


@pytest.mark.parametrize("serving", [True, False])
def test_an_engine_trusts_requests_only_when_nobody_else_can_send_any(serving):
    """Behind a server is anyone; the engine accepts what was prepared."""
    given = transfer()
    prepare(given, serving)
    config = load(given.kv_connector_extra_config | {"model_settings": "00"})
    assert config.trust_requests is not serving
    check_prepared(given, config)
    with pytest.raises(ConfigError, match="has not seen this engine's configuration"):
        check_prepared(given, load(given.kv_connector_extra_config))


@pytest.mark.parametrize(
    "given",
    [
        transfer(),
        transfer(kv_load_failure_policy="recompute"),
        transfer(kv_connector_extra_config={"trust_requests": True}),
        transfer("KVMarketConnector", kv_connector_module_path=MODULE),
    ],
)
def test_an_engine_that_was_configured_by_hand_does_not_start(given):
    """It would trust anybody, or fail requests for a damaged chunk."""
    with pytest.raises(ConfigError):
        check_prepared(given, load(given.kv_connector_extra_config))


@pytest.fixture
def plugins(monkeypatch):
    """The environment of a server that is about to start."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    return monkeypatch


def test_a_server_loads_the_gate(plugins):
    """And every other plugin that is installed."""
    ensure_gate()
    assert "kvmarket" in os.environ["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("VLLM_USE_RUST_FRONTEND", "1"), ("VLLM_PLUGINS", ""), ("VLLM_PLUGINS", "lora")],
)
def test_a_server_without_the_gate_does_not_start(plugins, variable, value):
    """The Rust frontend has none, and plugins that are not named are not loaded."""
    plugins.setenv(variable, value)
    with pytest.raises(ConfigError, match="gate"):
        ensure_gate()


def test_a_grpc_server_does_not_start(plugins):
    """On the command line: one line, and no traceback."""
    args = argparse.Namespace(kv_transfer_config=transfer(), grpc=True)
    with pytest.raises(SystemExit, match=r"error: .*--grpc"):
        flags._apply_flags(args)


class Entry:
    """An entry point whose module cannot be imported."""

    def load(self):
        raise ImportError("no module named jinja2")


@pytest.mark.parametrize(("found", "reason"), [([Entry()], "jinja2"), ([], "not installed")])
def test_a_gate_that_cannot_be_imported_ends_the_start(plugins, found, reason):
    """VLLM would log it and serve without."""
    real = metadata.entry_points

    def entry_points(**wanted):
        return found if "name" in wanted else real(**wanted)

    plugins.setattr(metadata, "entry_points", entry_points)
    with pytest.raises(ConfigError, match=reason):
        ensure_gate()
