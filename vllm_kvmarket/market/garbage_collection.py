"""Garbage collection: delete what no listing needs, also while others publish."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Set
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_kvmarket.catalogue.listing import NEEDED, ON_OFFER
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import CatalogueRefusedError, StoreError
from vllm_kvmarket.market import shared_bucket
from vllm_kvmarket.store import bucket_listings

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market


class GcReport(msgspec.Struct, frozen=True, kw_only=True):
    """What garbage collection did, or would do: documents by id, chunks, bytes, files."""

    dry_run: bool
    expired: list[str]
    abandoned: list[str]
    chunks_deleted: int
    bytes_freed: int
    drafts_swept: int
    objects_deleted: int


class PurgeReport(msgspec.Struct, frozen=True, kw_only=True):
    """How many documents had tokens that were removed, and how many objects in the bucket went."""

    purged: int = 0
    objects_deleted: int = 0


def collect_garbage(market: Market, *, dry_run: bool = False) -> GcReport:
    """Delete what no listing needs: chunks, drafts of writers that died, the bucket's old objects.

    First, listings whose time is over expire, and publications of dead processes fail. A chunk of a
    document that is on offer, or is being published, is never deleted, also when its publication
    began a moment ago. With `dry_run` nothing changes, and drafts and abandoned documents are left
    out.
    Raises CatalogueError, StoreError.
    """
    if dry_run:
        return _expected_garbage(market)
    expired = market.catalogue.expire()
    abandoned = market.catalogue.fail_abandoned()
    chunks, freed = release_unneeded(market, market.store.disk.keys())
    swept = market.store.disk.sweep_temporary(0)
    market.store.disk.recount()
    return GcReport(
        dry_run=False,
        expired=expired,
        abandoned=abandoned,
        chunks_deleted=chunks,
        bytes_freed=freed,
        drafts_swept=swept,
        objects_deleted=_collect_objects(market, dry_run=False),
    )


def _expected_garbage(market: Market) -> GcReport:
    now_s = time.time()
    listings = [listing for listing in market.catalogue.listings() if listing.state in NEEDED]
    over = [listing for listing in listings if listing.state in ON_OFFER and listing.is_over(now_s)]
    ended = {listing.document_id for listing in over}
    needed = {
        key
        for listing in listings
        if listing.document_id not in ended
        for key in listing.chunk_keys
    }
    unneeded = set(market.store.disk.keys()) - needed
    return GcReport(
        dry_run=True,
        expired=sorted(ended),
        abandoned=[],
        chunks_deleted=len(unneeded),
        bytes_freed=bytes_on_disk(market, unneeded),
        drafts_swept=0,
        objects_deleted=_collect_objects(market, dry_run=True),
    )


def release_leftovers(market: Market) -> tuple[int, int]:
    """Delete chunks of documents that left the market, as `release_unneeded`; scans no folder."""
    left = market.catalogue.leftovers.documents()
    return release_unneeded(market, market.catalogue.leftovers.keys_of(left))


def purge(market: Market, document_ids: Iterable[str] | None = None) -> PurgeReport:
    """Remove the tokens of documents that left the market, and what only they need on the disk.

    Their entries in the bucket go too. Without `document_ids`, those that were delisted, expired or
    failed longer ago than the configuration's retention; the bucket's objects are left to
    `collect_garbage` then, since it takes long to know who needs them. Raises as Leftovers.purge,
    and StoreError.
    """
    leftovers, kept_s = market.catalogue.leftovers, market.config.retention_s
    named = document_ids is not None
    if document_ids is None:
        document_ids = [] if kept_s is None else leftovers.overdue(time.time() - kept_s)
    chosen = list(document_ids)
    if not chosen:
        return PurgeReport()
    for document_id in chosen:
        if market.catalogue.get(document_id).state not in NEEDED:
            shared_bucket.withdraw(market, document_id)
    keys = set(leftovers.keys_of(chosen))
    purged = leftovers.purge(chosen, market.store.disk.forget)
    deleted = _collect_objects(market, only=keys) if named and keys else 0
    if isinstance(market.database, Path):
        sqlite.empty_log(market.database)
    return PurgeReport(purged=purged, objects_deleted=deleted)


def release_unneeded(market: Market, keys: Iterable[bytes]) -> tuple[int, int]:
    """Delete those chunks that no listing needs; how many, and how many bytes they had."""
    keys = list(keys)
    needed = market.catalogue.needed_chunks(keys)
    freed = 0

    def delete(key: bytes) -> None:
        nonlocal freed
        size = bytes_on_disk(market, [key])
        market.store.disk.delete(key)
        freed += size

    # Asked again under the catalogue's lock, one by one; most are needed and need not be.
    released = market.catalogue.leftovers.release(
        (key for key in keys if key not in needed), delete
    )
    return released, freed


def bytes_on_disk(market: Market, keys: Iterable[bytes]) -> int:
    """Count the bytes of these chunks' files on this machine's disk, every rank's."""
    disk, total = market.store.disk, 0
    for key in keys:
        for share in disk.files(key):
            # Another process may delete it just now.
            with contextlib.suppress(FileNotFoundError):
                total += disk.path(key, *share).stat().st_size
    return total


def _collect_objects(
    market: Market, *, dry_run: bool = False, only: Set[bytes] | None = None
) -> int:
    """Delete the bucket's objects that no home's listing needs, and its entries that are over.

    With `only`, objects of just these chunks. Raises StoreError when a home's needs cannot be read.
    """
    objects = market.store.objects
    if objects is None:
        return 0
    now_s = time.time()
    needed: set[bytes] = set()
    for listing in market.catalogue.listings():
        if listing.state in NEEDED:
            needed.update(listing.chunk_keys)
    market.identity.confirm()
    stored, entries = bucket_listings.read_whole(objects)
    for document_id, encoded in entries:
        try:
            entry = shared_bucket.decode(encoded, document_id)
            document = shared_bucket.chunks_of(entry, market.config.chunk_tokens)
        except CatalogueRefusedError as error:
            raise StoreError(
                f"the bucket's entry {document_id} cannot be read ({error}), so the "
                "objects that it needs are unknown; withdraw it, or update kvmarket"
            ) from None
        ends_at_s = entry.terms.expires_at_s
        if ends_at_s is not None and ends_at_s <= now_s:
            if not dry_run:
                bucket_listings.withdraw_listing(objects, document_id)
        else:
            needed.update(document.keys)
    return len(bucket_listings.collect(objects, stored, needed, only=only, dry_run=dry_run))
