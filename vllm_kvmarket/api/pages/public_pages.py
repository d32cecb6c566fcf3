"""Pages for everyone: the catalogue, documents, public keys, signing in and out."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from vllm_kvmarket.api.document_routes import describe, find, is_on_offer
from vllm_kvmarket.api.errors import not_found
from vllm_kvmarket.api.pages.charts import break_even, reuse_over_time
from vllm_kvmarket.api.pages.page import BASE, HEADERS, PageRoute, VisitorOf, asset, own_page
from vllm_kvmarket.api.receipt_routes import key_set
from vllm_kvmarket.catalogue import ListingFilter

PAGE_ROWS = 50
# A document's chart shows this many of its newest receipts.
MOST_RECEIPTS = 2000

router = APIRouter(route_class=PageRoute)


def catalogue(
    visitor: VisitorOf,
    search: Annotated[str, Query(max_length=200)] = "",
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
) -> Response:
    """The documents on offer, the newest first."""
    visitor.caller.need_reader()
    market = visitor.service.market
    wanted = ListingFilter(search=search)
    found = market.catalogue.page(wanted, PAGE_ROWS, offset=(page - 1) * PAGE_ROWS)
    rows = [describe(market, each) for each, _ in found]
    total = market.catalogue.count(wanted)
    return visitor.page(
        "catalogue.html",
        search=search,
        rows=rows,
        total=total,
        number=page,
        pages=-(-total // PAGE_ROWS),
        model=visitor.service.info["model"],
        currency=rows[0].prices.currency if rows else "",
    )


@router.get("/documents/{document_id}")
def document(document_id: str, visitor: VisitorOf) -> Response:
    """One document: its price, its reuse, and how to use it."""
    visitor.caller.need_reader()
    market = visitor.service.market
    listing = find(market, document_id)
    # The same for a withdrawn document as for one that never was.
    if listing is None or not is_on_offer(listing):
        raise not_found("there is no such document on offer")
    receipts = market.ledger.receipts(document_id=document_id, limit=MOST_RECEIPTS)
    shown = describe(market, listing, quoted=True)
    url = visitor.request.url
    return visitor.page(
        "document.html",
        document=shown,
        saved_share=1 - shown.charge_nano / shown.recompute_nano if shown.recompute_nano else None,
        figures=[break_even(shown), reuse_over_time(receipts, time.time())],
        is_own=visitor.caller.owns(shown.publisher),
        server=f"{url.scheme}://{url.netloc}{visitor.request.scope.get('root_path', '')}",
        model=visitor.service.info["model"],
    )


@router.get("/keys.jwks")
def keys(visitor: VisitorOf) -> Response:
    """The public keys that receipts are verified with."""
    visitor.caller.need_reader()
    return JSONResponse(key_set(visitor.service.market), headers=HEADERS)


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """A packaged file."""
    return asset(name)


@router.get("/signin")
async def sign_in_form(
    visitor: VisitorOf, next: Annotated[str, Query(max_length=500)] = ""
) -> Response:
    """Ask for a key."""
    return visitor.page("signin.html", next=BASE + own_page(next), wrong=False)


@router.post("/signin")
async def sign_in(visitor: VisitorOf) -> Response:
    """Begin a session with a key. The key itself is not kept."""
    fields = await visitor.form()
    service = visitor.service
    place = own_page(fields.get("next", ""))
    address = service.address_of(visitor.request.scope)
    principal = await service.key_checker.check(fields.get("key", "").strip(), address)
    if principal is None:
        return visitor.page("signin.html", status=401, next=BASE + place, wrong=True)
    # An earlier session of this browser ends.
    await visitor.end_session()
    answer = visitor.go(place)
    visitor.sign_in(answer, service.sessions.open(principal))
    return answer


@router.post("/signout")
async def sign_out(visitor: VisitorOf) -> Response:
    """End the session."""
    await visitor.form()
    answer = visitor.go("")
    await visitor.sign_out(answer)
    return answer
