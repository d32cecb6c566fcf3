"""Prices of reuse: POST /v1/kvmarket/quotes, and the gate's decision by price."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api.bodies import MarketRoute
from vllm_kvmarket.api.document_routes import CHARACTERS_A_TOKEN, find, is_on_offer, prices_of
from vllm_kvmarket.api.errors import ApiError, invalid, not_found
from vllm_kvmarket.api.models import Quote, QuoteLine, QuoteWish
from vllm_kvmarket.api.service import CallerOf, Frontend, Service, ServiceOf
from vllm_kvmarket.core.errors import CatalogueError, NotFoundError
from vllm_kvmarket.core.pricing import amount_nano
from vllm_kvmarket.market import quote as market_quote
from vllm_kvmarket.market.market import Market

router = APIRouter(prefix="/quotes", tags=["kvmarket quotes"], route_class=MarketRoute)


@router.post("", response_model=Quote)
async def quote(wish: QuoteWish, service: ServiceOf, caller: CallerOf) -> Quote:
    """Say what a prompt matches, and what it costs with and without reuse.

    A document's id stands for a prompt that begins with it. Output is not priced here.
    Quotes are for the model itself, not for its adapters.
    """
    caller.need_reader()
    if wish.document is not None:
        return await run_in_threadpool(_of_document, service.market, wish.document, caller.account)
    frontend = service.frontend
    if frontend is None:
        raise ApiError(503, "no_engine", "this server has no engine; ask for a document")
    tokens = await _tokens_of(service, frontend, wish)
    return await run_in_threadpool(
        _quote, service.market, frontend.namespace, tokens, len(tokens) - 1, caller.account
    )


async def _tokens_of(service: Service, frontend: Frontend, wish: QuoteWish) -> list[int]:
    context = frontend.context_tokens
    tokens = wish.token_ids
    if tokens is None:
        messages = None if wish.messages is None else [each.model_dump() for each in wish.messages]
        characters = len(wish.prompt or "") + sum(len(each["content"]) for each in messages or [])
        if characters <= context * CHARACTERS_A_TOKEN:
            tokens = await service.tokenize(frontend.prompt, wish.prompt, messages)
    if tokens is None or len(tokens) > context:
        raise ApiError(
            413, "prompt_too_long", f"the prompt is longer than the model's context, {context}"
        )
    return tokens


def _of_document(market: Market, document_id: str, account: str | None) -> Quote:
    listing = find(market, document_id)
    if listing is None or not is_on_offer(listing):
        raise not_found(f"there is no document {document_id} on offer")
    tokens = market.catalogue.tokens_of(document_id)
    return _quote(market, listing.namespace, tokens, len(tokens), account, named=True)


def _quote(
    market: Market,
    namespace: bytes,
    tokens: list[int],
    most: int,
    account: str | None,
    *,
    named: bool = False,
) -> Quote:
    """At most `most` tokens can be reused: of a whole prompt, the last is always computed."""
    # A document that was shown as live a moment ago is quoted, too.
    with contextlib.suppress(CatalogueError):
        market.catalogue.refresh()
    priced = market.quote(namespace, tokens, most=most, named=named)
    listing = None if priced.match is None else priced.match.listing
    prices = prices_of(market, listing)
    charge = priced.charge_nano
    without = amount_nano(len(tokens), prices.input_nano_per_mtok)
    with_reuse = charge + amount_nano(len(tokens) - priced.tokens, prices.input_nano_per_mtok)
    return Quote(
        prompt_tokens=len(tokens),
        matched_tokens=priced.tokens,
        document=None if listing is None else listing.document_id,
        title=None if listing is None else listing.terms.title,
        publisher=None if listing is None else listing.terms.publisher,
        prices=prices,
        lines=[
            QuoteLine(
                document=line.listing.document_id,
                title=line.listing.terms.title,
                publisher=line.listing.terms.publisher,
                start=line.start,
                end=line.end,
                cache_read_nano_per_mtok=line.terms.cache_read_nano_per_mtok,
                charge_nano=line.charge_nano,
            )
            for line in priced.lines
        ],
        charge_nano=charge,
        with_reuse_nano=with_reuse,
        without_reuse_nano=without,
        saving_nano=without - with_reuse,
        affordable=None if account is None else _available_nano(market, account) >= charge,
    )


def _available_nano(market: Market, account: str) -> int:
    try:
        return market.ledger.account(account).available_nano
    except NotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class Offer:
    """The price of reusing a request's prompts, in nano-units.

    `matched_tokens` would be reused; computing them costs `without_reuse_nano`.
    """

    document_id: str | None
    prompt_tokens: int
    matched_tokens: int
    charge_nano: int
    without_reuse_nano: int
    available_nano: int


async def offer_of(
    service: Service,
    prompts: Sequence[Sequence[int]],
    account: str,
    document_tokens: int | None = None,
    max_cache_read_nano_per_mtok: int | None = None,
) -> Offer:
    """Quote a request's prompts, or the document in front of them, beside the event loop.

    Without a document, only what the engine would buy under the price cap.
    """
    assert service.frontend is not None
    quote = partial(
        service.market.quote,
        service.frontend.namespace,
        named=document_tokens is not None,
        max_cache_read_nano_per_mtok=max_cache_read_nano_per_mtok,
    )
    return await asyncio.to_thread(_offer, service.market, quote, prompts, account, document_tokens)


def _offer(
    market: Market,
    quote: Callable[..., market_quote.Quote],
    prompts: Sequence[Sequence[int]],
    account: str,
    document_tokens: int | None,
) -> Offer:
    matched = charge = without = 0
    document_id = None
    for tokens in prompts:
        # A prompt's last token is always computed.
        bought = tokens if document_tokens is None else tokens[:document_tokens]
        most = min(len(bought), len(tokens) - 1)
        priced = quote(bought, most=most)
        if priced.match is None:
            continue
        matched += priced.tokens
        charge += priced.charge_nano
        without += priced.recompute_nano
        document_id = document_id or priced.match.listing.document_id
    return Offer(
        document_id=document_id,
        prompt_tokens=sum(map(len, prompts)),
        matched_tokens=matched,
        charge_nano=charge,
        without_reuse_nano=without,
        available_nano=_available_nano(market, account),
    )


def may_reuse(
    offer: Offer, *, required: bool, max_price_nano: int | None, refuse_unfunded: bool
) -> bool:
    """Whether to reuse at this offer, or to compute.

    Raises ApiError if the client requires reuse, or the server refuses unfunded requests.
    """
    if offer.matched_tokens == 0:
        if required:
            raise ApiError(
                404, "no_match", "nothing of this prompt is on offer here", quote=asdict(offer)
            )
        return True
    if max_price_nano is not None and offer.charge_nano > max_price_nano:
        if required:
            raise ApiError(
                402,
                "price_above_limit",
                f"reuse costs {offer.charge_nano} nano-units, "
                f"more than max_price_nano {max_price_nano}",
                quote=asdict(offer),
            )
        return False
    if offer.available_nano < offer.charge_nano and (required or refuse_unfunded):
        raise ApiError(
            402,
            "insufficient_funds",
            f"reuse costs {offer.charge_nano} nano-units and the account "
            f"has {offer.available_nano}; make a deposit",
            quote=asdict(offer),
        )
    return True


def no_quote_for(adapter: str) -> ApiError:
    """Only the engine knows an adapter's namespace, so what it would reuse is unknown here."""
    return invalid(
        f"{adapter!r} is an adapter: documents and quotes are for the model itself; "
        'ask the model, or leave "document" and "require" out',
        "model",
        "adapter_not_quoted",
    )
