"""What a prompt's reuse would cost, and whether a request is let through at that price."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from vllm_kvmarket.api.gate.refusals import Quote, Refusal, bad
from vllm_kvmarket.api.gate.wishes import Wish
from vllm_kvmarket.core.errors import NotFoundError
from vllm_kvmarket.market.market import Market


def adapter_of(app: Any, body: dict[str, Any]) -> str | None:
    """The adapter (LoRA) that a body's model names, None for the model itself."""
    loaded = getattr(getattr(app.state, "openai_serving_models", None), "lora_requests", None)
    model = body.get("model")
    return model if isinstance(model, str) and model in (loaded or {}) else None


def no_quote_for(adapter: str) -> Refusal:
    """Only the engine knows an adapter's namespace: what it would reuse is not known here."""
    return bad(
        f"{adapter!r} is an adapter: documents and quotes are of the model itself; "
        'ask that, or leave "document" and "require" away',
        "model",
        "adapter_not_quoted",
    )


def quote(market: Market, namespace: bytes, prompts: Sequence[Sequence[int]]) -> Quote:
    """The price of reusing what is on offer of these prompts; it may wait, as Market.match does."""
    matched = charge = without = 0
    document_id = None
    for tokens in prompts:
        found = market.match(namespace, tokens)
        if found is None:
            continue
        listing = found.listing
        terms = market.config.tariff.terms(listing.cache_read_nano_per_mtok, listing.royalty_ppm)
        # A prompt's last token is always computed.
        reused = min(found.token_count, len(tokens) - 1)
        matched += reused
        charge += terms.charge_nano(reused)
        without += terms.recompute_nano(reused)
        document_id = document_id or listing.document_id
    return Quote(
        document_id=document_id,
        prompt_tokens=sum(map(len, prompts)),
        matched_tokens=matched,
        charge_nano=charge,
        without_reuse_nano=without,
    )


async def quote_soon(market: Market, namespace: bytes, prompts: Sequence[Sequence[int]]) -> Quote:
    """The same, without holding up the event loop where the database may have to be waited for."""
    if market.catalogue.is_beyond_memory:
        return await asyncio.to_thread(quote, market, namespace, prompts)
    return quote(market, namespace, prompts)


async def with_funds(market: Market, offered: Quote, account: str | None) -> Quote:
    """The same quote with what the account can still spend."""
    if account is None:
        return offered
    try:
        available = (await asyncio.to_thread(market.ledger.account, account)).available_nano
    except NotFoundError:
        available = 0
    return Quote(
        document_id=offered.document_id,
        prompt_tokens=offered.prompt_tokens,
        matched_tokens=offered.matched_tokens,
        charge_nano=offered.charge_nano,
        without_reuse_nano=offered.without_reuse_nano,
        available_nano=available,
    )


def may_reuse(offered: Quote, wish: Wish, *, refuse_unfunded: bool) -> bool:
    """Whether to reuse at this quote, or to compute. Raises Refusal where computing is not what
    the client, or the server's configuration, wants in its place.
    """
    required = wish.reuse == "require"
    if offered.matched_tokens == 0:
        if required:
            raise Refusal(404, "no_match", "nothing of this prompt is on offer here", quote=offered)
        return True
    if wish.max_price_nano is not None and offered.charge_nano > wish.max_price_nano:
        if required:
            raise Refusal(
                402,
                "price_above_limit",
                f"reuse costs {offered.charge_nano} nano-units, "
                f"more than max_price_nano {wish.max_price_nano}",
                quote=offered,
            )
        return False
    short = offered.available_nano is not None and offered.available_nano < offered.charge_nano
    if short and (required or refuse_unfunded):
        raise Refusal(
            402,
            "insufficient_funds",
            f"reuse costs {offered.charge_nano} nano-units and the account "
            f"has {offered.available_nano}; make a deposit",
            quote=offered,
        )
    return True
