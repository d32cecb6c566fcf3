"""Eviction: documents leave the market when a new one needs their space within the quota."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from vllm_kvmarket.catalogue import eviction_policy
from vllm_kvmarket.catalogue.eviction_policy import Candidate
from vllm_kvmarket.market.garbage_collection import release_leftovers

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market


def make_room(market: Market, needed_bytes: int, protect: Collection[str] = frozenset()) -> int:
    """Make `needed_bytes` fit under the store's quota; how many bytes are free then.

    Chunks that no listing needs are deleted first. Then whole documents are evicted, in the order
    of the configured policy, until it fits. Documents in `protect` and pinned ones are never
    evicted, and those whose publisher paid for storage come last. When the bytes cannot fit at all,
    nothing is evicted. Nothing is done without a quota. With an object store, its quota counts, and
    the disk evicts by itself. No folder is scanned unless the disk's quota is used up. Raises
    CatalogueError, StoreError.
    """
    space = _Space(market, protect)
    free = space.free_bytes()
    if free >= needed_bytes or space.quota_bytes is None:
        return free
    market.catalogue.expire()
    release_leftovers(market)
    free = space.free_bytes()
    if free >= needed_bytes or needed_bytes > space.bytes_that_can_be_free():
        return free
    reason = f"the store needed {needed_bytes} bytes"
    victims = _victims(market, protect)
    while free < needed_bytes:
        chosen = list(_enough(victims, needed_bytes - free))
        if not chosen:
            break
        for victim in chosen:
            market.catalogue.evict(victim.document_id, reason)
        release_leftovers(market)
        free = space.free_bytes()
    return free


class _Space:
    """Where chunks are kept: the object store if there is one, else the chunks folder."""

    def __init__(self, market: Market, protect: Collection[str]) -> None:
        self._shares = market.catalogue.shares
        self._protect = protect
        self._disk = market.store.disk if market.store.objects is None else None
        self.quota_bytes = (
            market.config.object_store_quota_bytes if self._disk is None else self._disk.quota_bytes
        )

    def free_bytes(self) -> int:
        """Of a folder its real bytes count, of an object store those that the database knows."""
        if self._disk is not None:
            return self._disk.free_bytes()
        return (self.quota_bytes or 0) - self._shares.taken_bytes(self._protect)

    def bytes_that_can_be_free(self) -> int:
        return (self.quota_bytes or 0) - self._shares.taken_bytes(self._protect, fixed=True)


def _victims(market: Market, protect: Collection[str]) -> Iterator[Candidate]:
    # What stays still holds the chunks that others share with it.
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
