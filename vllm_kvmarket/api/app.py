"""All routes of the market, and what they need to start and to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import metadata
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI

from vllm_kvmarket.api import accounts, documents, quotes, receipts
from vllm_kvmarket.api.errors import MarketRoute
from vllm_kvmarket.api.models import ErrorBody
from vllm_kvmarket.api.publishing import Publications
from vllm_kvmarket.api.service import Service, ServiceOf
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.market.market import DATABASE_FILE, Market

PATH = "/v1/kvmarket"
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused: the request"},
    "5XX": {"model": ErrorBody, "description": "Not possible now: the server"},
}

Result = TypeVar("Result")


def build_router() -> APIRouter:
    """Every route under /v1/kvmarket; they find their Service in `app.state.kvmarket_service`."""
    router = APIRouter(prefix=PATH, responses=REFUSALS, route_class=MarketRoute)
    router.add_api_route("", info, methods=["GET"], tags=["kvmarket"])
    for part in (documents, quotes, accounts, receipts):
        router.include_router(part.router)
    return router


async def info(service: ServiceOf) -> dict[str, Any]:
    """What this server sells, at which prices, and what it is made of."""
    return service.info


def describe(
    config: MarketConfig, *, model: str, namespace: bytes | None, block_tokens: int | None
) -> dict[str, Any]:
    """The public part of the configuration."""
    return {
        "object": "kvmarket",
        "model": model,
        "namespace": None if namespace is None else namespace.hex(),
        "version": metadata.version("vllm-kvmarket"),
        "versions": {"kvmarket": metadata.version("vllm-kvmarket"), "vllm": _version("vllm")},
        "chunk_tokens": config.chunk_tokens,
        "block_tokens": block_tokens,
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


def open_service(config: MarketConfig, frontend: Any | None, model: str) -> Service:
    """Open a server's market; `frontend` is a connector.frontend.Frontend. Waits for the disk.

    Raises KVMarketError.
    """
    market = Market.open(config=config)
    market.catalogue.watch(config.refresh_interval_s)
    keys = Keys.open(market.home / DATABASE_FILE)
    service = Service(
        market=market,
        keys=keys,
        info=describe(
            config,
            model=model,
            namespace=None if frontend is None else frontend.namespace,
            block_tokens=None if frontend is None else frontend.block_tokens,
        ),
    )
    if frontend is not None:
        service.tokens = frontend
        service.publications = Publications(market, frontend, frontend.namespace)
        service.render = rendering_thread()
    return service


def rendering_thread() -> Callable[..., Any]:
    """A thread that tokenises: one text at a time, so that a big one costs no more than a core."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="kvmarket-render")

    async def render(step: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, step, *args)

    return render


async def close_service(service: Service) -> None:
    """Give up what is being published, and release the databases."""
    if service.publications is not None:
        await service.publications.close()
    await asyncio.to_thread(service.market.close)
    service.keys.close()


def close_with_server(app: FastAPI) -> None:
    """Close the app's service when the server stops; mutates the app.

    vLLM's app has a lifespan of its own, and no other hook at its end.
    """
    lifespan: Callable[[Any], AbstractAsyncContextManager[Any]] = app.router.lifespan_context

    @asynccontextmanager
    async def until_closed(served: Any) -> AsyncIterator[Any]:
        async with lifespan(served) as state:
            # Kept here, and closed inside: vLLM deletes the app's state at the end of its own.
            service = getattr(app.state, "kvmarket_service", None)
            try:
                yield state
            finally:
                app.state.kvmarket_service = None
                if service is not None:
                    await close_service(service)

    app.router.lifespan_context = until_closed


def name_of(served: str | Sequence[str]) -> str:
    """The model's first name."""
    return served if isinstance(served, str) else served[0]
