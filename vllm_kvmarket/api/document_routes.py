"""/v1/kvmarket/documents: publish, find, change, withdraw and preload documents."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Query, Response
from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api.auth import ADMIN, PUBLISHER, Caller
from vllm_kvmarket.api.bodies import MarketRoute
from vllm_kvmarket.api.errors import ApiError, invalid, not_found
from vllm_kvmarket.api.models import (
    DOCUMENT_PATTERN,
    AuditState,
    Deleted,
    Document,
    DocumentChange,
    NewDocument,
    Page,
    Preloaded,
    Prices,
    Reuse,
    Sort,
)
from vllm_kvmarket.api.paging import After, Limit, decode_place, encode
from vllm_kvmarket.api.publication_queue import Publication
from vllm_kvmarket.api.service import CallerOf, Frontend, Service, ServiceOf
from vllm_kvmarket.catalogue import Listing, ListingFilter, ListingState, Usage
from vllm_kvmarket.catalogue.listing import ON_OFFER
from vllm_kvmarket.core.errors import CatalogueError, NotFoundError
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.ledger import PROVIDER
from vllm_kvmarket.market.market import Market

logger = logging.getLogger(__name__)
# A token seldom has more characters; a longer text cannot fit the context.
CHARACTERS_A_TOKEN = 32

DocumentPath = Annotated[str, Path(pattern=DOCUMENT_PATTERN, description="kvd_...")]
router = APIRouter(prefix="/documents", tags=["kvmarket documents"], route_class=MarketRoute)


@router.post(
    "",
    status_code=202,
    response_model=Document,
    responses={200: {"model": Document, "description": "It is on offer already"}},
)
async def publish(
    wish: NewDocument, service: ServiceOf, caller: CallerOf, response: Response
) -> Document:
    """Publish a document. Needs the scope publisher.

    The answer comes at once and has the document's id. Ask for the document until its state is
    live, or failed with a reason. One that is already on offer comes back with status 200.
    """
    account = caller.need(PUBLISHER)
    publisher = wish.publisher or account
    if not caller.owns(publisher):
        raise ApiError(403, "not_your_account", "only admins publish for others; leave it out")
    _check_price(service.market, caller, wish.cache_read_nano_per_mtok, wish.royalty_ppm)
    if service.frontend is None or service.publications is None:
        raise ApiError(503, "no_engine", "this server has no engine that could publish")
    tokens = await _tokens_of(service, service.frontend, wish)
    chunks = await run_in_threadpool(service.publications.chunks_of, tokens)
    name = chunks.document_id
    existing = await run_in_threadpool(find, service.market, name)
    if existing is not None and existing.state == "damaged":
        owner = existing.terms.publisher
        if not caller.owns(owner):
            raise ApiError(409, "not_your_document", f"{name} is {owner}'s to repair")
    as_chat = wish.messages is not None or wish.as_ == "chat"
    terms = ListingTerms(
        title=wish.title,
        publisher=publisher,
        rendered_as="chat" if as_chat else "text",
        cache_read_nano_per_mtok=wish.cache_read_nano_per_mtok,
        royalty_ppm=wish.royalty_ppm,
        expires_at_s=None if wish.ttl_s is None else time.time() + wish.ttl_s,
    )
    details = {"document_id": name, **msgspec.to_builtins(terms)}
    await run_in_threadpool(service.record, caller, "document publish", details)
    listing = await service.publications.add(Publication(tokens, chunks, terms))
    if listing.state != "publishing":
        response.status_code = 200
    response.headers["location"] = f"/v1/kvmarket/documents/{name}"
    return await run_in_threadpool(describe, service.market, listing)


@router.get("", response_model=Page[Document])
def documents(
    *,
    service: ServiceOf,
    caller: CallerOf,
    limit: Limit = 20,
    after: After = None,
    search: Annotated[
        str | None, Query(max_length=512, description="part of a title, publisher or id")
    ] = None,
    publisher: Annotated[str | None, Query(max_length=128)] = None,
    state: Annotated[ListingState | None, Query(description="default: live and damaged")] = None,
    sort: Annotated[
        Sort, Query(description="the newest first, the most reused, or the cheapest")
    ] = "age",
) -> Page[Document]:
    """List documents on offer. Owners also see their documents in other states, admins see all."""
    caller.need_reader()

    wanted = ListingFilter(
        search=search or "",
        publisher=publisher,
        state=state,
        seen_by=caller.account,
        sees_all=caller.is_admin,
        order=sort,
        default_price=service.market.config.tariff.terms().cache_read_nano_per_mtok,
    )
    last = None if after is None else decode_place(after, sort)
    found = service.market.catalogue.page(wanted, limit + 1, after=last)
    cursor = None
    if len(found) > limit:
        listing, number = found[limit - 1]
        cursor = encode((sort, number, listing.document_id))
    return Page.of([describe(service.market, each) for each, _ in found[:limit]], cursor)


@router.get("/{document_id}", response_model=Document)
def document(document_id: DocumentPath, service: ServiceOf, caller: CallerOf) -> Document:
    """Look at a document on offer, or at your own in any state."""
    caller.need_reader()
    return describe(service.market, _seen(service.market, document_id, caller), quoted=True)


@router.patch("/{document_id}", response_model=Document)
def change(
    document_id: DocumentPath, wish: DocumentChange, service: ServiceOf, caller: CallerOf
) -> Document:
    """Change the price or the time to live of your own document. Needs the scope publisher."""
    caller.need(PUBLISHER)
    _check_price(service.market, caller, wish.cache_read_nano_per_mtok, None)
    market = service.market
    details = {"document_id": document_id, **wish.model_dump(exclude_unset=True)}
    service.record(caller, "document change", details)
    _own(market, document_id, caller)
    if "cache_read_nano_per_mtok" in wish.model_fields_set:
        market.catalogue.set_price(document_id, wish.cache_read_nano_per_mtok)
    if "ttl_s" in wish.model_fields_set:
        ends = None if wish.ttl_s is None else time.time() + wish.ttl_s
        market.catalogue.set_expiry(document_id, ends)
    return describe(market, market.catalogue.get(document_id))


@router.delete("/{document_id}", response_model=Deleted)
def withdraw(document_id: DocumentPath, service: ServiceOf, caller: CallerOf) -> Deleted:
    """Withdraw your own document at once. Needs the scope publisher.

    Running requests are still served and charged. The disk space is freed later.
    """
    caller.need(PUBLISHER)
    service.record(caller, "document delist", {"document_id": document_id})
    _own(service.market, document_id, caller)
    service.market.delist(document_id)
    return Deleted(id=document_id)


@router.post("/{document_id}/preload", response_model=Preloaded)
async def preload(document_id: DocumentPath, service: ServiceOf, caller: CallerOf) -> Preloaded:
    """Bring a document into the engine's paged cache, so that its next buyer need not wait for the
    load. Free of charge. Needs the scope admin.

    With several data-parallel engines, vLLM chooses one of them.
    """
    caller.need(ADMIN)
    frontend = service.frontend
    if frontend is None:
        raise ApiError(503, "no_engine", "this server has no engine to load it into")
    listing = await run_in_threadpool(find, service.market, document_id)
    if listing is None or not is_on_offer(listing):
        raise not_found(f"there is no document {document_id} on offer")
    if listing.namespace != frontend.namespace or listing.token_count >= frontend.context_tokens:
        raise ApiError(
            409, "other_model", f"{document_id} was published for another model or a longer context"
        )
    await run_in_threadpool(
        service.record, caller, "document preload", {"document_id": document_id}
    )
    tokens = await run_in_threadpool(service.market.catalogue.tokens_of, document_id)
    params = service.market.credentials.sign_params({"preload": True})
    try:
        answer = await frontend.operate(tokens, params)
    except Exception as error:
        logger.error("kvmarket: %s could not be preloaded: %r", document_id, error)
        raise ApiError(
            503, "engine_unavailable", "the engine could not do it; see its log"
        ) from error
    return Preloaded(
        id=document_id,
        reused_tokens=answer.get("reused_tokens", 0),
        loaded_tokens=answer.get("loaded_tokens", 0),
        pinned_tokens=answer.get("pinned_tokens", 0),
        not_pinned=answer.get("not_pinned"),
    )


async def _tokens_of(service: Service, frontend: Frontend, wish: NewDocument) -> list[int]:
    """The tokens that are published. Raises ApiError, NotPublishableError."""
    context = frontend.context_tokens
    if wish.token_ids is not None:
        found = wish.token_ids
        if max(found) >= frontend.vocabulary_tokens:
            raise invalid(
                f"token_ids: {max(found)} is no token of this model, which has "
                f"{frontend.vocabulary_tokens}",
                "token_ids",
            )
    else:
        messages = None if wish.messages is None else [each.model_dump() for each in wish.messages]
        characters = len(wish.text or "") + sum(len(each["content"]) for each in messages or [])
        if characters > context * CHARACTERS_A_TOKEN:
            raise ApiError(
                413,
                "document_too_long",
                f"the document has {characters} characters, and the model's context is {context} "
                "tokens; publish it in parts",
                param="text" if messages is None else "messages",
            )
        as_ = wish.as_ or "text"
        found = await service.tokenize(frontend.document, wish.text, messages, as_)
    if len(found) >= context:
        raise ApiError(
            413,
            "document_too_long",
            f"the document has {len(found)} tokens and the model's context is {context}; "
            "publish it in parts",
        )
    if len(found) < frontend.block_tokens:
        raise invalid(
            f"the document has {len(found)} tokens, fewer than one block "
            f"({frontend.block_tokens}); reusing it would save nothing",
            code="document_too_short",
        )
    return found


def _check_price(
    market: Market, caller: Caller, price_nano: int | None, royalty_ppm: int | None
) -> None:
    """Only admins may sell above the price of computing, or raise the royalty above the tariff's.

    Requests reuse what they match, so a price above computing would be a trap. Raises ApiError.
    """
    if caller.is_admin:
        return
    tariff = market.config.tariff
    if price_nano is not None and price_nano > tariff.input_nano_per_mtok:
        raise invalid(
            f"cache_read_nano_per_mtok: computing costs {tariff.input_nano_per_mtok}; "
            "reuse must not cost more",
            "cache_read_nano_per_mtok",
        )
    if royalty_ppm is not None and royalty_ppm > tariff.royalty_ppm:
        raise invalid(
            f"royalty_ppm: this provider pays {tariff.royalty_ppm} at most", "royalty_ppm"
        )


def is_on_offer(listing: Listing) -> bool:
    """Whether a listing can be bought now."""
    return listing.state in ON_OFFER and not listing.is_over(time.time())


def _is_visible(listing: Listing, caller: Caller) -> bool:
    return is_on_offer(listing) or caller.owns(listing.terms.publisher)


def find(market: Market, document_id: str) -> Listing | None:
    """A listing in any state, None if there is none."""
    try:
        return market.catalogue.get(document_id)
    except NotFoundError:
        return None


def _seen(market: Market, document_id: str, caller: Caller) -> Listing:
    listing = find(market, document_id)
    if listing is None or not _is_visible(listing, caller):
        raise not_found(f"there is no document {document_id}")
    return listing


def _own(market: Market, document_id: str, caller: Caller) -> Listing:
    listing = _seen(market, document_id, caller)
    if not caller.owns(listing.terms.publisher):
        raise ApiError(403, "not_your_document", f"{document_id} is {listing.terms.publisher}'s")
    return listing


def prices_of(market: Market, listing: Listing | None) -> Prices:
    """The prices of a listing, or of the tariff."""
    terms = market.config.tariff.terms(listing.terms if listing else None)
    return Prices(
        currency=market.ledger.account(PROVIDER).currency,
        input_nano_per_mtok=terms.input_nano_per_mtok,
        cache_read_nano_per_mtok=terms.cache_read_nano_per_mtok,
        royalty_ppm=terms.royalty_ppm,
    )


def describe(market: Market, listing: Listing, *, quoted: bool = False) -> Document:
    """A listing as the API shows it; reads the database.

    If it is `quoted`, its charge is exactly the one of its sale: earlier listings may be paid for
    a part of its tokens. Without, it is what its own price makes, which lists show.
    """
    name, tokens = listing.document_id, listing.token_count
    terms = market.config.tariff.terms(listing.terms)
    charge, recompute = terms.charge_nano(tokens), terms.recompute_nano(tokens)
    royalty = terms.royalty_nano(charge)
    if quoted and is_on_offer(listing):
        # It may have become live a moment ago.
        with contextlib.suppress(CatalogueError):
            market.catalogue.refresh()
        quote = market.quote(listing.namespace, market.catalogue.tokens_of(name))
        if quote.tokens == tokens:
            charge = quote.charge_nano
            own = (line for line in quote.lines if line.listing.document_id == name)
            royalty = sum(line.royalty_nano for line in own)
    write = market.config.tariff.write_nano(tokens)
    return Document(
        id=name,
        title=listing.terms.title,
        publisher=listing.terms.publisher,
        state="expired" if _has_ended(listing) else listing.state,
        reason=listing.reason,
        rendered_as=listing.terms.rendered_as,
        created_at=listing.created_at_s,
        expires_at=listing.terms.expires_at_s,
        pinned=listing.pinned,
        tokens=tokens,
        chunks=len(listing.chunk_keys),
        stored_bytes=listing.stored_bytes,
        namespace=listing.namespace.hex(),
        prices=prices_of(market, listing),
        charge_nano=charge,
        recompute_nano=recompute,
        write_nano=write,
        reuse=_reuse(market.catalogue.usage_of(name)),
        break_even_reuses=_times(recompute, recompute - charge),
        paid_back_after_reuses=_times(write, royalty),
        audit=_audit(market, name),
    )


def _has_ended(listing: Listing) -> bool:
    return listing.state in ON_OFFER and listing.is_over(time.time())


def _times(cost: int, gain: int) -> int | None:
    """How often a gain is needed to make up for a cost."""
    if cost == 0:
        return 0
    return -(-cost // gain) if gain > 0 else None


def _reuse(usage: Usage) -> Reuse:
    return Reuse(
        count=usage.uses,
        tokens_saved=usage.tokens_reused,
        earned_nano=usage.earned_nano,
        last_used_at=usage.last_used_s if usage.uses else None,
    )


def _audit(market: Market, document_id: str) -> AuditState | None:
    audits = market.catalogue.audits_of(document_id)
    if not audits:
        return None
    last = audits[0]
    return AuditState(
        result=last.result,
        at=last.at_s,
        chunks=last.chunks,
        worst_difference=last.worst_difference,
    )
