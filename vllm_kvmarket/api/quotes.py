"""/v1/kvmarket/quotes: what a prompt would cost, before it is sent."""

from __future__ import annotations

import contextlib

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api.documents import CHARACTERS_A_TOKEN, is_on_offer, terms_of
from vllm_kvmarket.api.errors import ApiError, MarketRoute, not_found
from vllm_kvmarket.api.models import Quote, QuoteWish
from vllm_kvmarket.api.service import CallerOf, Service, ServiceOf
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.errors import CatalogueError, NotFoundError
from vllm_kvmarket.core.pricing import amount_nano
from vllm_kvmarket.market.market import Market

router = APIRouter(prefix="/quotes", tags=["kvmarket quotes"], route_class=MarketRoute)


@router.post("", response_model=Quote)
async def quote(wish: QuoteWish, service: ServiceOf, caller: CallerOf) -> Quote:
    """Say what a prompt matches, and what it costs with and without reuse.

    A document's id stands for a prompt that begins with it. Output is not priced here.
    Prompts are the model's: what its adapters reuse is not quoted.
    """
    caller.need_reader()
    if wish.document is not None:
        name = wish.document
        return await run_in_threadpool(lambda: _of_document(service.market, name, caller.account))
    if service.tokens is None:
        raise ApiError(503, "no_engine", "this server has no engine; ask for a document")
    namespace = service.tokens.namespace
    tokens = await _tokens_of(service, wish)
    return await run_in_threadpool(
        lambda: _quote(service.market, namespace, tokens, len(tokens) - 1, caller.account)
    )


async def _tokens_of(service: Service, wish: QuoteWish) -> list[int]:
    assert service.tokens is not None
    context = service.tokens.context_tokens
    tokens = wish.token_ids
    if tokens is None:
        messages = None if wish.messages is None else [each.model_dump() for each in wish.messages]
        characters = len(wish.prompt or "") + sum(len(each["content"]) for each in messages or [])
        if characters <= context * CHARACTERS_A_TOKEN:
            tokens = await service.render(service.tokens.prompt, wish.prompt, messages)
    if tokens is None or len(tokens) > context:
        raise ApiError(
            413, "prompt_too_long", f"the prompt is longer than the model's context, {context}"
        )
    return tokens


def _of_document(market: Market, name: str, account: str | None) -> Quote:
    try:
        listing = market.catalogue.get(name)
    except NotFoundError:
        listing = None
    if listing is None or not is_on_offer(listing):
        raise not_found(f"there is no document {name} on offer")
    tokens = market.catalogue.tokens_of(name)
    return _quote(market, listing.namespace, tokens, len(tokens), account)


def _quote(
    market: Market, namespace: bytes, tokens: list[int], most: int, account: str | None
) -> Quote:
    """`most` of the tokens can be reused: of a whole prompt, the last one is always computed."""
    # A document that was shown as live a moment ago is quoted, too.
    with contextlib.suppress(CatalogueError):
        market.catalogue.refresh()
    match = market.match(namespace, tokens)
    listing: Listing | None = None if match is None else match.listing
    matched = 0 if match is None else min(match.token_count, most)
    prices = terms_of(market, listing)
    charge = amount_nano(matched, prices.cache_read_nano_per_mtok)
    without = amount_nano(len(tokens), prices.input_nano_per_mtok)
    with_reuse = charge + amount_nano(len(tokens) - matched, prices.input_nano_per_mtok)
    return Quote(
        prompt_tokens=len(tokens),
        matched_tokens=matched,
        document=None if listing is None else listing.document_id,
        title=None if listing is None else listing.title,
        publisher=None if listing is None else listing.publisher,
        prices=prices,
        charge_nano=charge,
        with_reuse_nano=with_reuse,
        without_reuse_nano=without,
        saving_nano=without - with_reuse,
        affordable=None if account is None else _affords(market, account, charge),
    )


def _affords(market: Market, account: str, charge_nano: int) -> bool:
    try:
        return market.ledger.account(account).available_nano >= charge_nano
    except NotFoundError:
        return False
