"""Pages for people, under /kvmarket. No scripts, and nothing from other hosts."""

from __future__ import annotations

from fastapi import APIRouter, Response

from vllm_kvmarket.api.errors import not_found
from vllm_kvmarket.api.pages import money_pages, provider_page, public_pages, publisher_pages
from vllm_kvmarket.api.pages.page import BASE, PageRoute, VisitorOf

__all__ = ["build_pages"]


def build_pages() -> APIRouter:
    """The router of /kvmarket; pages find their Service in `app.state.kvmarket_service`."""
    router = APIRouter(prefix=BASE, include_in_schema=False, route_class=PageRoute)
    # FastAPI has no empty path in a part of a router.
    router.add_api_route("", public_pages.catalogue, methods=["GET"])
    for part in (public_pages, money_pages, publisher_pages, provider_page):
        router.include_router(part.router)
    router.add_api_route("/{rest:path}", _missing, methods=["GET"])
    return router


async def _missing(rest: str, visitor: VisitorOf) -> Response:
    """Anything else below /kvmarket."""
    if not rest:
        return visitor.go("")
    raise not_found("there is no such page here")
