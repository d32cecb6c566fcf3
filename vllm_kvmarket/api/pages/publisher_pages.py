"""/kvmarket/publish and /kvmarket/offers: publish documents, watch and change them."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from vllm_kvmarket.api import document_routes
from vllm_kvmarket.api.auth import PUBLISHER
from vllm_kvmarket.api.bodies import FORM_FACTOR
from vllm_kvmarket.api.errors import ApiError, invalid, not_found, translate
from vllm_kvmarket.api.models import Document, DocumentChange, NewDocument
from vllm_kvmarket.api.pages.page import PageRoute, Visitor, VisitorOf
from vllm_kvmarket.catalogue import ListingFilter
from vllm_kvmarket.core.pricing import format_nano, parse_nano

MOST_OWN = 200
REFRESH_S = 2
HOUR_S = 3600
EMPTY = {"title": "", "text": "", "rendered_as": "text", "price": "", "ttl": ""}

router = APIRouter(route_class=PageRoute)


@router.get("/publish")
def form(visitor: VisitorOf) -> Response:
    """The form, and your documents."""
    visitor.caller.need(PUBLISHER)
    return _form(visitor, EMPTY)


@router.post("/publish")
async def publish(visitor: VisitorOf) -> Response:
    """Publish as POST /v1/kvmarket/documents does, then show the progress."""
    visitor.caller.need(PUBLISHER)
    fields = await visitor.form(FORM_FACTOR * visitor.service.market.config.max_body_bytes)
    given = {name: fields.get(name, "") for name in EMPTY}
    try:
        wish = _new_document(given)
        made = await document_routes.publish(wish, visitor.service, visitor.caller, Response())
    except Exception as error:
        refused = _of_fields(error)
        if refused is None or refused.status in (401, 403):
            raise
        return await run_in_threadpool(_form, visitor, given, refused)
    return visitor.go(f"/offers/{made.id}")


@router.get("/offers/{document_id}")
def offer(document_id: str, visitor: VisitorOf, wait: bool = True) -> Response:
    """Your own document in any state; the page reloads while it is being published."""
    visitor.caller.need(PUBLISHER)
    return _offer(visitor, _own(visitor, document_id), wait=wait)


@router.post("/offers/{document_id}/terms")
async def change(document_id: str, visitor: VisitorOf) -> Response:
    """Change the price and the time to live."""
    visitor.caller.need(PUBLISHER)
    fields = await visitor.form()
    shown = await run_in_threadpool(_own, visitor, document_id)
    try:
        terms: dict[str, Any] = {"cache_read_nano_per_mtok": _price(fields.get("price", ""))}
        if fields.get("ttl"):
            terms["ttl_s"] = _ttl_s(fields["ttl"])
        wish = DocumentChange(**terms)
        await run_in_threadpool(
            document_routes.change, document_id, wish, visitor.service, visitor.caller
        )
    except Exception as error:
        refused = _of_fields(error)
        if refused is None or refused.status in (401, 403, 404):
            raise
        return _offer(visitor, shown, wait=False, problem=refused)
    return visitor.go(f"/offers/{document_id}")


@router.post("/offers/{document_id}/delist")
async def delist(document_id: str, visitor: VisitorOf) -> Response:
    """Withdraw a document."""
    visitor.caller.need(PUBLISHER)
    await visitor.form()
    await run_in_threadpool(_own, visitor, document_id)
    await run_in_threadpool(document_routes.withdraw, document_id, visitor.service, visitor.caller)
    return visitor.go(f"/offers/{document_id}")


def _form(visitor: Visitor, given: dict[str, str], problem: ApiError | None = None) -> Response:
    market, account = visitor.service.market, visitor.caller.account
    wanted = ListingFilter(publisher=account, any_state=True, seen_by=account)
    own = market.catalogue.page(wanted, MOST_OWN)
    tariff = visitor.service.market.config.tariff
    return visitor.page(
        "publish.html",
        status=200 if problem is None else problem.status,
        given=given,
        problem=problem,
        own=[document_routes.describe(market, each) for each, _ in own],
        most=MOST_OWN,
        terms=tariff.terms(),
        write_nano_per_mtok=tariff.cache_write_nano_per_mtok,
        can_publish=visitor.service.publications is not None,
    )


def _offer(
    visitor: Visitor, shown: Document, *, wait: bool, problem: ApiError | None = None
) -> Response:
    refreshes = wait and shown.state == "publishing"
    price = shown.prices.cache_read_nano_per_mtok
    tariff = visitor.service.market.config.tariff.terms()
    follows = price == tariff.cache_read_nano_per_mtok
    return visitor.page(
        "offer.html",
        status=200 if problem is None else problem.status,
        # In a header, because the page works without it.
        headers={"Refresh": str(REFRESH_S)} if refreshes else None,
        document=shown,
        refreshes=refreshes,
        problem=problem,
        price="" if follows else format_nano(price),
    )


def _own(visitor: Visitor, document_id: str) -> Document:
    """Raises ApiError, the same for others' documents as for missing ones."""
    market = visitor.service.market
    listing = document_routes.find(market, document_id)
    if listing is None or not visitor.caller.owns(listing.terms.publisher):
        raise not_found("you have no such document")
    return document_routes.describe(market, listing)


def _new_document(given: dict[str, str]) -> NewDocument:
    """Raises ApiError and ValidationError."""
    fields: dict[str, Any] = {
        "title": given["title"].strip(),
        # Browsers end the lines of a form with both characters.
        "text": given["text"].replace("\r\n", "\n"),
        "as": given["rendered_as"] or "text",
        "cache_read_nano_per_mtok": _price(given["price"]),
    }
    if not fields["title"]:
        raise invalid("title: give it a name that people find it by", "title")
    if not fields["text"].strip():
        raise invalid("text: there is nothing to publish yet", "text")
    if given["ttl"]:
        fields["ttl_s"] = _ttl_s(given["ttl"])
    return NewDocument(**fields)


def _price(text: str) -> int | None:
    """A price in currency units per million tokens; None for the tariff's own."""
    if not text.strip():
        return None
    try:
        return parse_nano(text)
    except ValueError as error:
        raise invalid(f"price: {error}", "price") from None


def _ttl_s(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not math.isfinite(hours) or hours <= 0:
        raise invalid("ttl: give a number of hours above 0, or nothing", "ttl")
    return hours * HOUR_S


def _of_fields(error: Exception) -> ApiError | None:
    """An error, named by the form's field; None for a bug."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        refused = invalid(f"{param}: {message}" if param else message, param)
    else:
        found = translate(error)
        if found is None:
            return None
        refused = found
    names = {"cache_read_nano_per_mtok": "price", "ttl_s": "ttl", "as": "rendered_as"}
    if refused.param in names:
        name = names[refused.param]
        message = refused.message.replace(f"{refused.param}:", f"{name}:")
        return ApiError(refused.status, refused.code, message, param=name)
    return refused
