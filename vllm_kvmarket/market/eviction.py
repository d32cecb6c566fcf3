"""Eviction: documents leave the market when a new one needs their space within the quota."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from vllm_kvmarket.catalogue import Listing, eviction_policy
from vllm_kvmarket.catalogue.eviction_policy import Candidate
from vllm_kvmarket.catalogue.listing import ON_OFFER
from vllm_kvmarket.market import shared_bucket
from vllm_kvmarket.market.garbage_collection import bytes_on_disk, release_unneeded

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market


def make_room(market: Market, needed_bytes: int, protect: Collection[str] = frozenset()) -> int:
    """Make `needed_bytes` fit under the disk quota; how many bytes are free then.

    Chunks that no listing needs are deleted first. Then whole documents are evicted, in the order
    of the configured policy, until it fits. Documents in `protect` and pinned ones are never
    evicted, and those whose publisher paid for storage come last. When the bytes cannot fit at all,
    nothing is evicted. Nothing is done without a quota, or with an object store behind the disk,
    which then evicts by itself. Raises CatalogueError, StoreError.
    """
    usage = market.store.disk.usage()
    quota = usage.quota_bytes
    if usage.free_bytes >= needed_bytes or quota is None or market.store.objects is not None:
        return usage.free_bytes
    market.catalogue.expire()
    release_unneeded(market, market.store.disk.keys())
    usage = market.store.disk.usage()
    if usage.free_bytes >= needed_bytes:
        return usage.free_bytes
    if needed_bytes > quota - _bytes_that_stay(market, protect):
        return usage.free_bytes
    reason = f"the store needed {needed_bytes} bytes"
    victims = _victims(market, protect)
    while usage.free_bytes < needed_bytes:
        chosen = list(_enough(victims, needed_bytes - usage.free_bytes))
        if not chosen:
            break
        for victim in chosen:
            if market.catalogue.evict(victim.document_id, reason):
                keys = market.catalogue.get(victim.document_id).chunk_keys
                release_unneeded(market, keys)
        usage = market.store.disk.usage()
    return usage.free_bytes


def _victims(market: Market, protect: Collection[str]) -> Iterator[Candidate]:
    # What is protected still holds the chunks that others share with it.
    candidates = [
        dataclasses.replace(candidate, pinned=True)
        if candidate.document_id in protect
        else candidate
        for candidate in market.catalogue.candidates()
    ]
    return iter(
        eviction_policy.order(
            candidates,
            market.config.eviction,
            time.time(),
            input_nano_per_mtok=market.config.tariff.input_nano_per_mtok,
        )
    )


def _enough(victims: Iterator[Candidate], missing: int) -> Iterator[Candidate]:
    """Take the next victims that free `missing` bytes, by estimate; at least one, if there is."""
    for victim in victims:
        yield victim
        missing -= victim.bytes
        if missing <= 0:
            return


def _bytes_that_stay(market: Market, protect: Collection[str]) -> int:
    keys = {
        key
        for listing in market.catalogue.listings()
        if listing.state == "publishing"
        or (listing.state in ON_OFFER and (listing.pinned or listing.document_id in protect))
        for key in listing.chunk_keys
    }
    return bytes_on_disk(market, keys)


def set_time_to_live(market: Market, document_id: str, expires_at_s: float | None) -> Listing:
    """Say until when a document is on offer, here and in the bucket; None for good.

    Raises NotFoundError, CatalogueError for one that is not on offer, StoreError.
    """
    listing = market.catalogue.set_expiry(document_id, expires_at_s)
    if listing.state == "live":
        shared_bucket.offer(market.store, market.catalogue, document_id)
    return listing
