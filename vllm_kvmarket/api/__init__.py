"""The market as part of vLLM's API server: routes, pages, and the gate."""

from vllm_kvmarket.api.server import MarketEndpoints

__all__ = ["MarketEndpoints"]
