"""Check everything that a market has stored, and repair what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.catalogue.listing import ON_OFFER
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    KVMarketError,
    LayoutMismatchError,
    StoreError,
)
from vllm_kvmarket.market.market import Market

# Called with the number of steps that are done, and of all.
Progress = Callable[[int, int], object]


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a check; `problems` are in words, and `ok` means that there are none.

    `stored_bytes` are those of chunk files; `used_bytes` also count drafts and quarantine, which
    the quota does too. `quarantined` has name, reason, bytes and at_s of each file.
    """

    ok: bool
    home: str
    problems: list[str]
    chunks_verified: int
    chunks_damaged: int
    chunks_unlisted: int
    documents_damaged: list[str]
    stored_bytes: int
    used_bytes: int
    quota_bytes: int | None
    free_bytes: int
    drafts: int
    quarantined: list[dict[str, Any]]


class RepairReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a repair, by document: `healed` needed no engine, `failed` has the reasons."""

    chunks_verified: int
    chunks_damaged: int
    healed: list[str]
    repaired: list[str]
    failed: dict[str, str]


def check(market: Market, verify: bool = True, on_progress: Progress | None = None) -> CheckReport:
    """Check ledger, catalogue and, with `verify`, every byte of every chunk on offer.

    Changes nothing; `repair` does. What is delisted meanwhile is not missed.
    """
    problems = [f"ledger: {problem}" for problem in market.ledger.check_integrity()]
    problems += [f"catalogue: {problem}" for problem in market.catalogue.check_integrity()]
    market.identity.confirm()
    on_offer = [listing for listing in market.catalogue.listings() if listing.state in ON_OFFER]
    holders = {key: listing for listing in reversed(on_offer) for key in listing.chunk_keys}
    bad = []
    for number, (key, holder) in enumerate(holders.items() if verify else (), 1):
        try:
            market.verify(key)
        except StoreError as error:
            if market.catalogue.chunk_is_listed(key):
                bad.append(f"store: {error} (document {holder.document_id})")
        if on_progress is not None:
            on_progress(number, len(holders))
    stored = list(market.store.disk.keys())
    usage = market.store.disk.usage()
    return CheckReport(
        ok=not problems and not bad,
        home=str(market.home),
        problems=problems + bad,
        chunks_verified=len(holders) if verify else 0,
        chunks_damaged=len(bad),
        chunks_unlisted=len(set(stored) - market.catalogue.needed_chunks(stored)),
        documents_damaged=[
            listing.document_id for listing in on_offer if listing.state == "damaged"
        ],
        stored_bytes=market.store.disk.bytes_used(),
        used_bytes=usage.bytes_used,
        quota_bytes=usage.quota_bytes,
        free_bytes=usage.free_bytes,
        drafts=usage.drafts,
        quarantined=[
            {"name": file.name, "reason": file.reason, "bytes": file.bytes, "at_s": file.at_s}
            for file in market.store.disk.quarantined()
        ],
    )


def repair(
    market: Market,
    document_ids: Sequence[str] | None,
    publish: Callable[[str], Listing],
    on_progress: Progress | None = None,
) -> RepairReport:
    """Make documents whole: verify their chunks, and publish those again that miss some.

    Without `document_ids`, every document on offer. A damaged chunk goes into quarantine and no
    longer matches; a chunk that was only marked as damaged matches again. Publications of dead
    processes are ended first. `publish` is called for each document that is still damaged (or was
    evicted or has failed, if it is named) and must list it again, as Market.republish does; a
    KVMarketError that it raises goes into `failed`.
    Raises NotFoundError for an unknown document, before anything is done.
    """
    market.identity.confirm()
    market.catalogue.fail_abandoned()
    if document_ids is None:
        chosen = [listing for listing in market.catalogue.listings() if listing.state in ON_OFFER]
    else:
        chosen = [market.catalogue.get(name) for name in dict.fromkeys(document_ids)]
    failed = {
        listing.document_id: f"it is {listing.state}; publish it again"
        for listing in chosen
        if listing.state in ("delisted", "expired", "publishing")
    }
    keys = {
        key: listing.document_id
        for listing in chosen
        if listing.state in ON_OFFER
        for key in listing.chunk_keys
    }
    damaged = 0
    for number, (key, document_id) in enumerate(keys.items(), 1):
        try:
            damaged += not _settle_chunk(market, key)
        except StoreError as error:
            failed[document_id] = str(error)
        if on_progress is not None:
            on_progress(number, len(keys))
    healed: list[str] = []
    repaired: list[str] = []
    lost = [
        listing.document_id
        for listing in chosen
        if listing.document_id not in failed
        and (listing.state != "live" or market.catalogue.get(listing.document_id).state != "live")
    ]
    for name in lost:
        # Also by the repair of another document that shares its chunks.
        if market.catalogue.get(name).state == "live":
            healed.append(name)
            continue
        try:
            _publish_again(market, name, publish)
        except KVMarketError as error:
            failed[name] = str(error)
        else:
            repaired.append(name)
    return RepairReport(
        chunks_verified=len(keys),
        chunks_damaged=damaged,
        healed=healed,
        repaired=repaired,
        failed=failed,
    )


def _settle_chunk(market: Market, key: bytes) -> bool:
    """Verify a chunk and let the catalogue know; whether it is whole.

    Raises StoreError when that cannot be found out.
    """
    try:
        market.verify(key)
    except (ChunkDamagedError, ChunkMissingError, LayoutMismatchError) as error:
        for share in market.store.disk.files(key):
            market.store.disk.quarantine(key, *share[:2], str(error), share.layout)
        market.catalogue.report_damage(key, str(error))
        return False
    market.catalogue.heal(key)
    return True


def _publish_again(market: Market, document_id: str, publish: Callable[[str], Listing]) -> None:
    publish(document_id)
    listing = market.catalogue.get(document_id)
    if listing.state != "live":
        raise StoreError(f"it is {listing.state} still: {listing.reason}")
