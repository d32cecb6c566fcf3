"""Prices of reuse: POST /v1/kvmarket/quotes, and the gate's decision by price."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api.auth import Caller
from vllm_kvmarket.api.bodies import MarketRoute
from vllm_kvmarket.api.document_routes import CHARACTERS_A_TOKEN, find, is_on_offer, prices_of
from vllm_kvmarket.api.errors import ApiError, invalid, not_found
from vllm_kvmarket.api.models import Quote, QuoteLine, QuoteWish
from vllm_kvmarket.api.service import CallerOf, Frontend, Service, ServiceOf
from vllm_kvmarket.core.errors import CatalogueError, NotFoundError
from vllm_kvmarket.core.pricing import amount_nano
from vllm_kvmarket.market import quote as market_quote
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.quote import NO_LIMIT, Budget

# Strangers see matches in steps of so many tokens: token by token they could guess a text.
STRANGERS_STEP = 64
NO_REUSE = (
    "this server's engine reuses nothing now: its self-test has not passed, or its weights have "
    "changed"
)

router = APIRouter(prefix="/quotes", tags=["kvmarket quotes"], route_class=MarketRoute)


@router.post("", response_model=Quote)
async def quote(wish: QuoteWish, service: ServiceOf, caller: CallerOf) -> Quote:
    """Say what a prompt matches, and what it costs with and without reuse.

    A document's id stands for a prompt that begins with it. Output is not priced here.
    Quotes are for the model itself, not for its adapters. Nothing behind a listing that is dearer
    than the caller's key may buy from is priced. Without a key, matches are multiples of 64 tokens.
    """
    caller.need_reader()
    frontend = service.frontend
    # A server without an engine sells for others.
    stopped = frontend.namespace if frontend and not await frontend.reuses() else None
    price = partial(_quote, service.market, caller=caller, stopped=stopped)
    if wish.document is not None:
        return await run_in_threadpool(_of_document, service.market, wish.document, price)
    if frontend is None:
        raise ApiError(503, "no_engine", "this server has no engine; ask for a document")
    tokens = await _tokens_of(service, frontend, wish)
    return await run_in_threadpool(price, frontend.namespace, tokens, len(tokens) - 1)


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


def _of_document(market: Market, document_id: str, price: Callable[..., Quote]) -> Quote:
    listing = find(market, document_id)
    if listing is None or not is_on_offer(listing):
        raise not_found(f"there is no document {document_id} on offer")
    tokens = market.catalogue.tokens_of(document_id)
    return price(listing.namespace, tokens, len(tokens), named=True)


def _quote(
    market: Market,
    namespace: bytes,
    tokens: list[int],
    most: int,
    *,
    caller: Caller,
    stopped: bytes | None,
    named: bool = False,
) -> Quote:
    """At most `most` tokens can be reused: of a whole prompt, the last is always computed.

    Of a namespace that is `stopped`, nothing can.
    """
    # A document that was shown as live a moment ago is quoted, too.
    with contextlib.suppress(CatalogueError):
        market.catalogue.refresh()
    budget = Budget(caller.limits.max_cache_read_nano_per_mtok)
    priced = market.quote_match(None)
    if namespace != stopped:
        priced = market.quote(namespace, tokens, most=most, named=named, budget=budget)
    if caller.is_anonymous and not named:
        shown = priced.tokens // STRANGERS_STEP * STRANGERS_STEP
        priced = market.quote_match(priced.match if shown else None, shown)
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
        affordable=_is_affordable(market, caller, priced, budget),
        declined=NO_REUSE if namespace == stopped else None,
    )


def _is_affordable(
    market: Market, caller: Caller, priced: market_quote.Quote, budget: Budget
) -> bool | None:
    """Whether the caller's account and key can buy what was quoted; None without a key."""
    if caller.account is None:
        return None
    match = priced.match
    is_within = match is None or market.affordable_part(match, budget) is match
    return is_within and _available_nano(market, caller.account) >= priced.charge_nano


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
    budget: Budget = NO_LIMIT,
) -> tuple[Offer, list[int]]:
    """Quote a request's prompts, or the document in front of them, beside the event loop.

    Returns the charge of each prompt too. Without a document, only what the engine would buy is
    quoted; but where it would buy nothing, all that is on offer below the price cap.
    """
    assert service.frontend is not None
    namespace = service.frontend.namespace if await service.frontend.reuses() else None
    quote = partial(_offer, service.market, prompts, account, document_tokens, budget)
    return await asyncio.to_thread(quote, namespace=namespace)


def _offer(
    market: Market,
    prompts: Sequence[Sequence[int]],
    account: str,
    document_tokens: int | None,
    budget: Budget,
    *,
    namespace: bytes | None,
) -> tuple[Offer, list[int]]:
    capped = Budget(budget.max_cache_read_nano_per_mtok)
    quotes = []
    for tokens in prompts:
        # A prompt's last token is always computed.
        bought = tokens if document_tokens is None else tokens[:document_tokens]
        most = min(len(bought), len(tokens) - 1)
        named = document_tokens is not None
        priced = market.quote_match(None)
        if namespace is not None:
            priced = market.quote(namespace, bought, most=most, named=named, budget=capped)
        quotes.append((priced, most))
    found = [each for each, _ in quotes]
    if document_tokens is None and budget.max_price_nano is not None:
        bought_parts = _within(market, quotes, budget.max_price_nano)
        if any(each.tokens for each in bought_parts):
            found = bought_parts
    matches = [each.match for each in found if each.match is not None]
    offer = Offer(
        document_id=matches[0].listing.document_id if matches else None,
        prompt_tokens=sum(map(len, prompts)),
        matched_tokens=sum(each.tokens for each in found),
        charge_nano=sum(each.charge_nano for each in found),
        without_reuse_nano=sum(each.recompute_nano for each in found),
        available_nano=_available_nano(market, account),
    )
    return offer, [each.charge_nano for each in found]


def _within(
    market: Market, quotes: Sequence[tuple[market_quote.Quote, int]], left_nano: int
) -> list[market_quote.Quote]:
    """What the engine buys of quoted prompts, one after another, for an amount in all."""
    found = []
    for quote, most in quotes:
        budget = Budget(max_price_nano=left_nano)
        part = quote.match and market.affordable_part(quote.match, budget, most)
        found.append(market.quote_match(part, most))
        left_nano -= found[-1].charge_nano
    return found


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
