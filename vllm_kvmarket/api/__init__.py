"""What the market adds to vLLM's API server."""

from vllm_kvmarket.api.server import MarketEndpoints

__all__ = ["MarketEndpoints"]
