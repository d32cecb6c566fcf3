"""What vLLM's entry points call."""

from __future__ import annotations

import logging
from typing import Any

from vllm_kvmarket.core.errors import VersionError

NAME = "kvmarket"
CONNECTOR_MODULE = "vllm_kvmarket.connector.connector"
CONNECTOR_CLASS = "KVMarketConnector"

logger = logging.getLogger("vllm.kvmarket")


def register() -> None:
    """Make `kvmarket` known to vLLM as a connector, and add its flags. May be called many times.

    On a vLLM that is not supported it says so in one line, and leaves vLLM as it is.
    """
    from vllm_kvmarket.connector import versions

    try:
        versions.check()
    except VersionError as error:
        logger.warning("%s", error)
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_kvmarket.connector import flags

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, CONNECTOR_MODULE, CONNECTOR_CLASS)
    flags.install()


def endpoint_plugin() -> Any:
    """The routes that we add to vLLM's API server; see vllm.plugins.endpoint_plugins."""
    from vllm_kvmarket.api import MarketEndpoints

    return MarketEndpoints()
