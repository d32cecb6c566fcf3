"""kvmarket turns vLLM's automatic prefix caching into a market for KV caches.

`Market` is the one entry point; everything it raises on purpose is a `KVMarketError`.
"""

from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.core.errors import (
    CatalogueError,
    ChunkDamagedError,
    ChunkMissingError,
    ConfigError,
    KVMarketError,
    LayoutMismatchError,
    LedgerError,
    NotFoundError,
    NotPublishableError,
    PublishFailedError,
    RefusedError,
    StoreError,
    StoreFullError,
    UnavailableError,
    VersionError,
)
from vllm_kvmarket.core.pricing import Tariff
from vllm_kvmarket.market.market import Market

__all__ = [
    "CatalogueError",
    "ChunkDamagedError",
    "ChunkMissingError",
    "ConfigError",
    "KVMarketError",
    "LayoutMismatchError",
    "LedgerError",
    "Market",
    "MarketConfig",
    "NotFoundError",
    "NotPublishableError",
    "PublishFailedError",
    "RefusedError",
    "StoreError",
    "StoreFullError",
    "Tariff",
    "UnavailableError",
    "VersionError",
]
