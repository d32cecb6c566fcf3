"""The flags on vLLM's own parser, and the checks on every road to an engine."""

from __future__ import annotations

import json
import os

import pytest
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvmarket import ConfigError, Market, plugin
from vllm_kvmarket.plugin import register

LONG = {"kv_connector": "kvmarket", "kv_role": "kv_both"}


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line as `vllm serve` does, up to the engine's arguments."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    parser = make_arg_parser(FlexibleArgumentParser())

    def parsed(*flags):
        return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "m", *flags]))

    return parsed


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-connector", "kvmarket", "--kvmarket-config", '{"home": "/tmp/h"}'],
        ["--kvmarket-config", '{"home": "/tmp/h"}', "--kv-connector", "kvmarket"],
        [
            "--kv-transfer-config",
            json.dumps(LONG | {"kv_connector_extra_config": {"home": "/tmp/h"}}),
        ],
    ],
)
def test_the_short_and_the_long_form_mean_the_same(parse, flags):
    """The connector, both roles, the configuration; and the server will load our routes."""
    transfer = parse(*flags).kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_role) == ("kvmarket", "kv_both")
    assert transfer.kv_connector_extra_config["home"] == "/tmp/h"
    assert "kvmarket" in os.environ["VLLM_PLUGINS"].split(",")


def test_the_configuration_may_be_a_file(parse, tmp_path):
    """TOML here."""
    path = tmp_path / "market.toml"
    path.write_text('home = "/tmp/h"\n[tariff]\nroyalty_ppm = 1\n')
    transfer = parse(
        "--kv-connector", "kvmarket", "--kvmarket-config", str(path)
    ).kv_transfer_config
    assert transfer.kv_connector_extra_config["tariff"]["royalty_ppm"] == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--kv-connector", "kvmarked"], "unknown connector 'kvmarked'"),
        (
            ["--kv-connector", "kvmarket", "--kvmarket-config", '{"chunk_token": 1}'],
            "unknown configuration key 'chunk_token'; did you mean 'chunk_tokens'?",
        ),
        (
            ["--kv-connector", "kvmarket", "--kvmarket-config", '{"tariff": {"royalty_ppm": -1}}'],
            "tariff.royalty_ppm",
        ),
        (["--kv-connector", "kvmarket", "--kvmarket-config", "no/such.toml"], "no/such.toml"),
        (["--kvmarket-config", "{}"], "--kvmarket-config needs --kv-connector kvmarket"),
        (
            ["--kv-connector", "kvmarket", "--kv-transfer-config", json.dumps(LONG)],
            "not both",
        ),
        (
            ["--kv-transfer-config", json.dumps(LONG | {"kv_load_failure_policy": "fail"})],
            "kvmarket recomputes instead",
        ),
        (
            [
                "--kv-transfer-config",
                json.dumps(LONG | {"kv_connector_extra_config": {"hom": "x"}}),
            ],
            "unknown configuration key 'hom'; did you mean 'home'?",
        ),
    ],
)
def test_a_wrong_flag_is_one_clear_line(parse, capsys, flags, complaint):
    """It names what is wrong, before any engine starts."""
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    last = [*capsys.readouterr().err.strip().splitlines(), str(stop.value)][-2:]
    assert any(complaint in line for line in last), last


def test_the_python_form_is_checked_too():
    """A bad key ends LLM(...) before an engine starts."""
    bad = KVTransferConfig(**LONG, kv_connector_extra_config={"chunk_token": 1})
    with pytest.raises(ConfigError, match="did you mean 'chunk_tokens'"):
        EngineArgs(model="m", kv_transfer_config=bad).create_engine_config()


def test_loads_that_fail_are_recomputed(tmp_path):
    """Explicitly asking for "fail" is refused with the reason."""
    with Market.open(tmp_path) as market:
        assert market.transfer_config()["kv_load_failure_policy"] == "recompute"
        with pytest.raises(ConfigError, match="would fail a request"):
            market.transfer_config(kv_load_failure_policy="fail")
        with pytest.raises(ConfigError, match="'chunk_token'"):
            market.transfer_config(chunk_token=3)


def test_registering_again_changes_nothing():
    """vLLM calls register in every process, and may call it more than once."""
    register()
    before = (EngineArgs.add_cli_args, EngineArgs.create_engine_config)
    register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == before


def test_another_vllm_version_is_told_in_one_line(monkeypatch, caplog):
    """The plugin stays out of the way."""
    monkeypatch.setattr(plugin, "installed_vllm", lambda: "0.31.2")
    with caplog.at_level("WARNING", logger="vllm.kvmarket"):
        register()
    (record,) = [each for each in caplog.records if each.name == "vllm.kvmarket"]
    assert record.getMessage() == (
        "kvmarket supports vLLM 0.32 to below 0.34, not 0.31.2; "
        "install a supported vLLM or another vllm-kvmarket"
    )
