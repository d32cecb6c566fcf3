"""Pages that people look at: the catalogue, and a page for each document. No scripts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, Response

from vllm_kvmarket.api.documents import describe, is_on_offer
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.errors import NotFoundError
from vllm_kvmarket.market import Market
from vllm_kvmarket.tariff import format_nano

PAGE_ROWS = 50
CHART_READS = 10
_CHART_ZERO_Y, _CHART_TOP_Y = 200, 20

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    title: str
    publisher: str
    tokens: int
    charge: str
    recompute: str


def pages(market: Market) -> APIRouter:
    """The router of /kvmarket; all it shows is public. Its handlers run in threads."""
    router = APIRouter(prefix="/kvmarket", include_in_schema=False)
    here = resources.files(__package__)
    style = (here / "static" / "market.css").read_bytes()
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__ or __name__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )

    def render(name: str, status_code: int = 200, **facts: Any) -> HTMLResponse:
        return HTMLResponse(templates.get_template(name).render(facts), status_code, HEADERS)

    @router.get("")
    def catalogue(
        search: Annotated[str, Query(max_length=200)] = "",
        page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
    ) -> HTMLResponse:
        found = [
            each for each in market.catalogue.listings(search=search or None) if is_on_offer(each)
        ]
        start = (page - 1) * PAGE_ROWS
        return render(
            "catalogue.html",
            search=search,
            rows=[_row(market, each) for each in found[start : start + PAGE_ROWS]],
            next=page + 1 if len(found) > start + PAGE_ROWS else None,
        )

    @router.get("/documents/{document_id}")
    def document(document_id: str) -> HTMLResponse:
        try:
            listing = market.catalogue.get(document_id)
        except NotFoundError:
            return render("missing.html", 404)
        if not is_on_offer(listing):
            return render("missing.html", 404)
        return render("document.html", **_facts(market, listing))

    @router.get("/static/market.css")
    def stylesheet() -> Response:
        return Response(style, media_type="text/css", headers={"Cache-Control": "max-age=3600"})

    return router


def _prices(market: Market, listing: Listing) -> tuple[int, int]:
    terms = market.config.tariff.terms(listing.cache_read_nano_per_mtok, listing.royalty_ppm)
    return terms.charge_nano(listing.token_count), terms.recompute_nano(listing.token_count)


def _row(market: Market, listing: Listing) -> _Row:
    charge, recompute = _prices(market, listing)
    return _Row(
        listing.document_id,
        listing.title,
        listing.publisher,
        listing.token_count,
        format_nano(charge),
        format_nano(recompute),
    )


def _facts(market: Market, listing: Listing) -> dict[str, Any]:
    charge, recompute = _prices(market, listing)
    shown = describe(market, listing)
    back = shown.paid_back_after_reuses
    share = min(charge / recompute, 1.0) if recompute else 0.0
    reuse_y = round(_CHART_ZERO_Y - share * (_CHART_ZERO_Y - _CHART_TOP_Y))
    return {
        "row": _row(market, listing),
        "facts": [
            ("Id", listing.document_id),
            ("Publisher", listing.publisher),
            ("State", listing.state),
            ("Published as", listing.rendered_as),
            ("Tokens", listing.token_count),
            ("Price of a reading, reused", format_nano(charge)),
            ("Price of a reading, computed", format_nano(recompute)),
            ("Times reused", shown.reuse.count),
            ("Tokens saved", shown.reuse.tokens_saved),
            ("Bytes stored", shown.stored_bytes),
            ("Storing is paid back after", "never" if back is None else f"{back} reuses"),
            ("Last audit", "none" if shown.audit is None else shown.audit.result),
        ],
        "computed_10": format_nano(CHART_READS * recompute),
        "reused_10": format_nano(CHART_READS * charge),
        "reuse_y": reuse_y,
        # Not on top of the other line's label.
        "reuse_label_y": max(reuse_y + 4, 44),
    }
