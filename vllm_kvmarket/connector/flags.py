"""`--kv-connector NAME` and `--kvmarket-config`, and the checks of each way to start an engine.

A server that was asked for kvmarket and would run without its gate does not start.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from vllm_kvmarket.connector.model_settings import digest_of_settings
from vllm_kvmarket.connector.namespaces import NOT_PREPARED
from vllm_kvmarket.connector.supported_models import check_model
from vllm_kvmarket.core.config import MarketConfig, load, to_mapping
from vllm_kvmarket.core.errors import ConfigError

NAME = "kvmarket"
_NAMES = (NAME, "KVMarketConnector")
POLICY_REASON = (
    'kv_load_failure_policy "fail" would fail a buyer\'s request for a damaged chunk; '
    'kvmarket recomputes instead: leave it out, or say "recompute"'
)
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_PATCHED = "_kvmarket_patched"


class _ConnectorAction(argparse.Action):
    """Checks the connector's name while arguments are parsed."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        known = sorted(KVConnectorFactory._registry)
        if values not in known:
            parser.error(
                f"argument {option_string}: unknown connector {values!r}; known: {', '.join(known)}"
            )
        setattr(namespace, self.dest, values)


class _ConfigAction(argparse.Action):
    """Checks the market's configuration while arguments are parsed."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            config = load(str(values))
        except ConfigError as error:
            parser.error(f"argument {option_string}: {error}")
        setattr(namespace, self.dest, to_mapping(config))


def _checked_transfer_config(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of `--kv-transfer-config`, with our part of it checked before the engine starts."""

    @functools.wraps(parse)
    def checked(text: str) -> Any:
        parsed = parse(text)
        if getattr(parsed, "kv_connector", None) == NAME:
            try:
                explicit = json.loads(text).get("kv_load_failure_policy")
            except (ValueError, AttributeError):
                explicit = None  # not JSON text: given by dotted keys, seen as one value here
            if explicit == "fail":
                raise argparse.ArgumentTypeError(POLICY_REASON)
            try:
                load(parsed.kv_connector_extra_config)
            except ConfigError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return parsed

    return checked


def _add_flags(parser: Any) -> Any:
    group = parser.add_argument_group(title="kvmarket", description="A market for KV caches.")
    group.add_argument(
        "--kv-connector",
        action=_ConnectorAction,
        default=None,
        metavar="NAME",
        help="KV connector to use, for example kvmarket; short for --kv-transfer-config.",
    )
    group.add_argument(
        "--kvmarket-config",
        action=_ConfigAction,
        default=None,
        metavar="JSON|PATH",
        help="The market's configuration: a JSON object, or the path of a .json or .toml file.",
    )
    for action in parser._actions:
        if action.dest == "kv_transfer_config" and callable(action.type):
            action.type = _checked_transfer_config(action.type)
    return parser


def _apply_flags(args: argparse.Namespace) -> None:
    """Turn our flags into vLLM's kv_transfer_config; exits with one line when they contradict."""
    name = getattr(args, "kv_connector", None)
    settings = getattr(args, "kvmarket_config", None)
    given = getattr(args, "kv_transfer_config", None)
    if name is not None and given is not None:
        raise SystemExit("error: give --kv-connector or --kv-transfer-config, not both")
    if name is not None:
        given = args.kv_transfer_config = KVTransferConfig(kv_connector=name, kv_role="kv_both")
    if settings is not None:
        if given is None or given.kv_connector != NAME:
            raise SystemExit(f"error: --kvmarket-config needs --kv-connector {NAME}")
        if given.kv_connector_extra_config:
            raise SystemExit(
                "error: give the configuration by --kvmarket-config "
                "or in --kv-transfer-config, not both"
            )
        given.kv_connector_extra_config = dict(settings)
    if given is not None and names_market(given):
        try:
            ensure_gate(is_grpc=bool(getattr(args, "grpc", False)))
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from None


def ensure_gate(*, is_grpc: bool = False) -> None:
    """Let the API server load our routes and the gate. Raises ConfigError where it would not.

    vLLM asks for endpoint plugins to be named, and goes on without one that it cannot import.
    Naming one filters every other group too, so all that are installed are named with it.
    """
    if is_grpc or os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ConfigError(
            "kvmarket's gate works in vLLM's Python HTTP server only; "
            "leave --grpc and VLLM_USE_RUST_FRONTEND out"
        )
    if "VLLM_PLUGINS" not in os.environ:
        names = {
            entry.name for group in _PLUGIN_GROUPS for entry in metadata.entry_points(group=group)
        }
        os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {NAME}))
    if NAME not in os.environ["VLLM_PLUGINS"].split(","):
        raise ConfigError(f"VLLM_PLUGINS leaves kvmarket's gate out; add {NAME!r} to it")
    found = metadata.entry_points(group="vllm.endpoint_plugins", name=NAME)
    try:
        for entry in found:
            entry.load()()
    except Exception as error:
        raise ConfigError(f"kvmarket's gate cannot be loaded: {error}") from error
    if not found:
        raise ConfigError("kvmarket's gate is not installed; install vllm-kvmarket again")


def names_market(transfer: KVTransferConfig) -> bool:
    """Whether a transfer configuration uses kvmarket, however it names it."""
    children = (transfer.kv_connector_extra_config or {}).get("connectors") or ()
    return transfer.kv_connector in _NAMES or any(
        isinstance(child, dict) and child.get("kv_connector") in _NAMES for child in children
    )


def check_name(transfer: KVTransferConfig) -> None:
    """Raise ConfigError where kvmarket is not the only connector, or has another name."""
    if transfer.kv_connector != NAME or transfer.kv_connector_module_path:
        raise ConfigError(
            "kvmarket must be the engine's only connector, under its own name: use --kv-connector "
            "kvmarket, neither MultiConnector nor kv_connector_module_path"
        )


def check_prepared(transfer: KVTransferConfig, config: MarketConfig) -> None:
    """Raise ConfigError in an engine whose configuration did not pass `prepare`."""
    check_name(transfer)
    if (
        config.trust_requests is None
        or config.model_settings is None
        or transfer.kv_load_failure_policy != "recompute"
    ):
        raise ConfigError(NOT_PREPARED)


def prepare(transfer: KVTransferConfig | None, serving: bool) -> None:
    """Check and complete an engine's transfer configuration; mutates it.

    Raises ConfigError, in one line, before the engine starts.
    """
    if transfer is None or not names_market(transfer):
        return
    check_name(transfer)
    config = load(transfer.kv_connector_extra_config)
    settings = to_mapping(config)
    if config.trust_requests is None:
        # Behind the offline API is the operator; behind an API server is anyone.
        settings["trust_requests"] = not serving
    transfer.kv_connector_extra_config = settings
    # vLLM's default is to fail; a KVTransferConfig does not say whether the operator chose that.
    transfer.kv_load_failure_policy = "recompute"


def _with_settings(transfer: KVTransferConfig, vllm_config: VllmConfig) -> KVTransferConfig:
    """A copy for this engine alone: others may be made from the same object."""
    copied = copy.copy(transfer)
    digest = {"model_settings": digest_of_settings(vllm_config)}
    copied.kv_connector_extra_config = dict(transfer.kv_connector_extra_config) | digest
    return copied


def install() -> None:
    """Add our flags and checks to vLLM's engine arguments; once a process."""
    if getattr(EngineArgs, _PATCHED, False):
        return
    add_cli_args = EngineArgs.add_cli_args
    create_engine_config = EngineArgs.create_engine_config
    from_cli_args = EngineArgs.from_cli_args.__func__

    @functools.wraps(add_cli_args)
    def add_cli_args_and_ours(parser: Any) -> Any:
        return _add_flags(add_cli_args(parser))

    @functools.wraps(create_engine_config)
    def create_checked(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        prepare(self.kv_transfer_config, serving=isinstance(self, AsyncEngineArgs))
        # vLLM fills the field in while it creates the configuration.
        caching_refused = self.enable_prefix_caching is False
        vllm_config = create_engine_config(self, *args, **kwargs)
        transfer = vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == NAME:
            check_model(vllm_config, caching_refused=caching_refused)
            vllm_config.kv_transfer_config = _with_settings(transfer, vllm_config)
        return vllm_config

    @functools.wraps(from_cli_args)
    def from_cli_args_and_ours(cls: type[EngineArgs], args: argparse.Namespace) -> Any:
        _apply_flags(args)
        return from_cli_args(cls, args)

    EngineArgs.add_cli_args = staticmethod(add_cli_args_and_ours)
    EngineArgs.create_engine_config = create_checked
    EngineArgs.from_cli_args = classmethod(from_cli_args_and_ours)
    setattr(EngineArgs, _PATCHED, True)
