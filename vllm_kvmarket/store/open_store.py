"""Which tiers a configuration asks for; every process of a market opens them here."""

from __future__ import annotations

from pathlib import Path

from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.store import CHUNKS_FOLDER, DiskStore, ObjectTier, Tiers


def store_of(config: MarketConfig) -> Tiers:
    """Open the disk tier in the market's home, and the object tier behind it where there is one.

    Raises StoreError, and ConfigError for an object store's URL or options that cannot be right.
    """
    objects: ObjectTier | None = None
    if config.object_store_url is not None:
        objects = ObjectTier(
            config.object_store_url,
            config.object_store_options,
            timeout_s=config.object_store_timeout_s,
        )
    disk = DiskStore(
        Path(config.home).expanduser() / CHUNKS_FOLDER,
        quota_bytes=config.disk_quota_bytes,
        quarantine_bytes=config.quarantine_bytes,
        codec=config.codec,
        is_cache=objects is not None,
    )
    return Tiers(disk, objects)
