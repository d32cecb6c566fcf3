"""GET /v1/kvmarket: what this server sells, and at which prices."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from vllm_kvmarket.config import MarketConfig, load

PATH = "/v1/kvmarket"


class MarketEndpoints:
    """An endpoint plugin in vLLM's sense."""

    name = "kvmarket"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.add_api_route(PATH, info, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep what the routes tell."""
        state.kvmarket = None
        if engine_client is None:
            return
        config = engine_client.vllm_config
        transfer = config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == self.name:
            state.kvmarket = describe(
                load(transfer.kv_connector_extra_config), config.model_config.served_model_name
            )


def describe(config: MarketConfig, model: Any) -> dict[str, Any]:
    """The public part of the configuration."""
    return {
        "object": "kvmarket",
        "model": model if isinstance(model, str) else model[0],
        "version": metadata.version("vllm-kvmarket"),
        "chunk_tokens": config.chunk_tokens,
        "min_reuse_tokens": config.min_reuse_tokens,
        "without_account": config.without_account,
        "tariff": msgspec.to_builtins(config.tariff.terms())
        | {"cache_write_nano_per_mtok": config.tariff.cache_write_nano_per_mtok},
    }


async def info(request: Request) -> JSONResponse:
    """What this server sells."""
    described = getattr(request.app.state, "kvmarket", None)
    if described is None:
        message = "this server was started without --kv-connector kvmarket"
        return JSONResponse({"error": {"message": message, "type": "not_found"}}, status_code=404)
    return JSONResponse(described)
