"""All pages; they find their Service in `app.state.kvmarket_service`, as the API's routes do."""

from __future__ import annotations

from fastapi import APIRouter, Response

from vllm_kvmarket.api.errors import not_found
from vllm_kvmarket.api.pages import money, offers, people, provider, public
from vllm_kvmarket.api.pages.page import BASE, PageRoute, VisitorOf


def build_pages() -> APIRouter:
    """The router of /kvmarket."""
    router = APIRouter(prefix=BASE, include_in_schema=False, route_class=PageRoute)
    # FastAPI has no empty path in a part of a router.
    router.add_api_route("", public.catalogue, methods=["GET"])
    for part in (public, people, money, offers, provider):
        router.include_router(part.router)
    router.add_api_route("/{rest:path}", _missing, methods=["GET"])
    return router


async def _missing(rest: str, visitor: VisitorOf) -> Response:
    """Whatever else is asked for below /kvmarket."""
    if not rest:
        return visitor.go("")
    raise not_found("there is no such page here")
