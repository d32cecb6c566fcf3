"""The market as part of vLLM's API server: an endpoint plugin that adds routes, pages and gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI

from vllm_kvmarket.api import (
    account_routes,
    document_routes,
    gate,
    quotes,
    receipt_routes,
    scrapes,
)
from vllm_kvmarket.api.bodies import MarketRoute
from vllm_kvmarket.api.gate import engine_answers
from vllm_kvmarket.api.models import ErrorBody
from vllm_kvmarket.api.pages import build_pages
from vllm_kvmarket.api.publication_queue import Publications
from vllm_kvmarket.api.service import Frontend, Service, ServiceOf, market_settings
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.auth.api_servers import ApiServers
from vllm_kvmarket.core.config import MarketConfig, load
from vllm_kvmarket.market.market import Market

PATH = "/v1/kvmarket"
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request was refused"},
    "5XX": {"model": ErrorBody, "description": "The server cannot do this now"},
}


class MarketEndpoints:
    """An endpoint plugin, as vllm.plugins.endpoint_plugins describes it."""

    name = "kvmarket"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and pages, and the gate in front of every route."""
        app.include_router(build_router())
        app.include_router(build_pages())
        gate.install(app)
        scrapes.install(app)
        close_with_server(app)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Open the market if the engine is on one. Raises KVMarketError: then no server starts."""
        state.kvmarket_service = None
        if engine_client is None:
            return
        if market_settings(engine_client.vllm_config.kv_transfer_config) is not None:
            state.kvmarket_service = await asyncio.to_thread(_open, engine_client, state)
            engine_answers.watch(engine_client)


def _open(engine_client: Any, state: Any) -> Service:
    # Imported here because it imports vLLM, and unit tests of the routes run without vLLM.
    from vllm_kvmarket.connector.frontend import Frontend as EngineFrontend

    vllm_config = engine_client.vllm_config
    config = load(market_settings(vllm_config.kv_transfer_config))
    renderer = getattr(state, "online_renderer", None)
    frontend = EngineFrontend(engine_client, renderer, Path(config.home).expanduser())
    served = vllm_config.model_config.served_model_name
    return open_service(config, frontend, served if isinstance(served, str) else served[0])


def build_router() -> APIRouter:
    """Every route under /v1/kvmarket; they find their Service in `app.state.kvmarket_service`."""
    router = APIRouter(prefix=PATH, responses=REFUSALS, route_class=MarketRoute)
    router.add_api_route("", info, methods=["GET"], tags=["kvmarket"])
    for part in (document_routes, quotes, account_routes, receipt_routes):
        router.include_router(part.router)
    return router


async def info(service: ServiceOf) -> dict[str, Any]:
    """The model, prices and versions of this server."""
    return service.info


def open_service(config: MarketConfig, frontend: Frontend | None, model: str) -> Service:
    """Open a server's market; waits for the disk. Raises KVMarketError."""
    market = Market.open(config=config)
    market.catalogue.watch(config.refresh_interval_s)
    return Service(
        market=market,
        keys=Keys(market.database),
        servers=ApiServers(market.database),
        info=_describe(config, frontend, model),
        frontend=frontend,
        publications=None if frontend is None else Publications(market, frontend),
    )


def _describe(config: MarketConfig, frontend: Frontend | None, model: str) -> dict[str, Any]:
    """The public part of the configuration."""
    return {
        "object": "kvmarket",
        "model": model,
        "namespace": None if frontend is None else frontend.namespace.hex(),
        "version": metadata.version("vllm-kvmarket"),
        "versions": {"kvmarket": metadata.version("vllm-kvmarket"), "vllm": _version("vllm")},
        "chunk_tokens": config.chunk_tokens,
        "block_tokens": None if frontend is None else frontend.block_tokens,
        "min_reuse_tokens": config.min_reuse_tokens,
        "max_body_bytes": config.max_body_bytes,
        "without_account": config.without_account,
        "anonymous": config.anonymous,
        "unfunded": config.unfunded,
        "tariff": msgspec.to_builtins(config.tariff.terms())
        | {"cache_write_nano_per_mtok": config.tariff.cache_write_nano_per_mtok},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


async def close_service(service: Service) -> None:
    """Give up running publications, and release the databases."""
    if service.publications is not None:
        await service.publications.close()
    service.tokenizing.shutdown(wait=False)
    if service.servers is not None:
        await asyncio.to_thread(service.servers.close)
    await asyncio.to_thread(service.market.close)
    service.keys.close()


def close_with_server(app: FastAPI) -> None:
    """Close the app's service when the server stops; mutates the app.

    vLLM's app has its own lifespan, and no other hook at its end.
    """
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[Any]] = app.router.lifespan_context

    @asynccontextmanager
    async def until_closed(served: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(served) as state:
            # Remembered here: vLLM deletes the app's state at the end of its own lifespan.
            service = getattr(app.state, "kvmarket_service", None)
            try:
                yield state
            finally:
                app.state.kvmarket_service = None
                if service is not None:
                    await close_service(service)

    app.router.lifespan_context = until_closed
