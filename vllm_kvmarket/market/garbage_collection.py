"""Garbage collection: delete what no listing needs, also while others publish.

The database decides what is needed. Lists of files and objects only say what could be deleted, so
one that is empty or cut off leaves something over, and deletes nothing that is needed.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_kvmarket.catalogue.listing import NEEDED, ON_OFFER
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.store.chunk_format import chunk_name, is_chunk_file

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market

# Where several markets of one bucket told each other what they published.
_OLD_DIRECTORY = "listings"
# Chunks that the database is asked for at once.
_ASKED_AT_ONCE = 1000


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
    """Delete what no listing needs: chunks on this disk and in the bucket, drafts of dead writers.

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
    remover = _Remover(market)
    remover.release_objects()
    remover.release(market.catalogue.leftovers.unneeded())
    remover.release(market.store.disk.keys())
    swept = market.store.disk.sweep_temporary()
    market.catalogue.shares.recount()
    return GcReport(
        dry_run=False,
        expired=expired,
        abandoned=abandoned,
        chunks_deleted=remover.chunks,
        bytes_freed=remover.bytes_on_disk,
        drafts_swept=swept,
        objects_deleted=remover.objects,
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
    objects = market.store.objects
    names = objects.names() if objects is not None else ()
    chunks = [name for name in names if _is_chunk(name) and _key_of(name) not in needed]
    return GcReport(
        dry_run=True,
        expired=sorted(ended),
        abandoned=[],
        chunks_deleted=len(unneeded.union(map(_key_of, chunks))),
        bytes_freed=bytes_on_disk(market, unneeded),
        drafts_swept=0,
        objects_deleted=len(chunks),
    )


def release_leftovers(market: Market) -> None:
    """Delete chunks of documents that left the market, and what an earlier deletion left over.

    Looks at no folder, and lists nothing. Raises CatalogueError, StoreError.
    """
    leftovers = market.catalogue.leftovers
    left = leftovers.documents()
    _Remover(market).release([*leftovers.interrupted(), *leftovers.keys_of(left)])


def release_unneeded(market: Market, keys: Iterable[bytes]) -> None:
    """Delete those of these chunks that no document needs. Raises CatalogueError, StoreError."""
    _Remover(market).release(keys)


def release_refuted(market: Market, keys: Iterable[bytes]) -> None:
    """Delete what is stored of those of these chunks that an audit has refuted.

    Whoever stores them next would find them whole, and keep them. Raises as `release_unneeded`.
    """
    if refuted := market.catalogue.refuted(keys):
        _Remover(market).release(refuted)


def purge(market: Market, document_ids: Iterable[str] | None = None) -> PurgeReport:
    """Remove the tokens of documents that left the market, and the chunks that only they need.

    Without `document_ids`, those that were delisted, expired or failed longer ago than the
    configuration's retention. Raises as Leftovers.purge, and StoreError.
    """
    leftovers, kept_s = market.catalogue.leftovers, market.config.retention_s
    if document_ids is None:
        document_ids = [] if kept_s is None else leftovers.overdue(time.time() - kept_s)
    chosen = list(document_ids)
    if not chosen:
        return PurgeReport()
    remover = _Remover(market, thorough=True)
    purged = leftovers.purge(chosen, remover.delete)
    if isinstance(market.database, Path):
        sqlite.empty_log(market.database)
    return PurgeReport(purged=purged, objects_deleted=remover.objects)


def bytes_on_disk(market: Market, keys: Iterable[bytes]) -> int:
    """Count the bytes of these chunks' files on this machine's disk, every rank's."""
    disk, total = market.store.disk, 0
    for key in keys:
        for share in disk.files(key):
            # Another process may delete it just now.
            with contextlib.suppress(FileNotFoundError):
                total += disk.path(key, *share).stat().st_size
    return total


class _Remover:
    """Deletes chunks on this disk and in the bucket, and counts what went.

    If `thorough`, also files in quarantine, and objects that the database has no row of. Raises
    StoreError when the bucket is not this market's.
    """

    def __init__(self, market: Market, *, thorough: bool = False) -> None:
        self.chunks = self.bytes_on_disk = self.objects = 0
        self._catalogue = market.catalogue
        self._store = market.store
        self._thorough = thorough
        # Objects of chunks, by their names in a list; the database may have no rows of them.
        self._listed: dict[bytes, set[str]] = {}
        market.identity.confirm()

    def release(self, keys: Iterable[bytes]) -> None:
        """Delete those of these chunks that no document needs."""
        waiting = iter(keys)
        while batch := list(islice(waiting, _ASKED_AT_ONCE)):
            needed = self._catalogue.needed_chunks(batch)
            # Asked again in the transaction that marks them; most are needed and need not be.
            unneeded = (key for key in batch if key not in needed)
            self.chunks += self._catalogue.leftovers.release(unneeded, self.delete)

    def release_objects(self) -> None:
        """Look at every object, and delete those of chunks that no document needs."""
        objects = self._store.objects
        if objects is None:
            return
        if next(objects.names(_OLD_DIRECTORY), None) is not None:
            raise StoreError(
                f"{objects.url} has {_OLD_DIRECTORY}/ of an older kvmarket, where other markets "
                "may have documents; export these as bundles, and delete that folder"
            )
        names = filter(_is_chunk, objects.names())
        while batch := list(islice(names, _ASKED_AT_ONCE)):
            listed = defaultdict(set)
            for name in batch:
                listed[_key_of(name)].add(name)
            self._listed = listed
            self.release(listed)

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete all that is stored of these chunks; the caller has marked them."""
        disk, objects = self._store.disk, self._store.objects
        for key in keys:
            self.bytes_on_disk += disk.forget(key) if self._thorough else disk.delete(key)
        if objects is None:
            return
        names = {name for key in keys for name in self._listed.get(key, ())}
        names |= {
            chunk_name(each.key, each.rank, each.world_size, each.layout)
            for each in self._catalogue.shares.of(keys)
        }
        if self._thorough:
            names |= {chunk_name(key, *share) for key in keys for share in objects.files(key)}
        objects.delete(*sorted(names))
        self.objects += len(names)


def _is_chunk(name: str) -> bool:
    """Whether an object of this name is one of ours to delete: a chunk, where chunks are."""
    folder, _, last = name.rpartition("/")
    return is_chunk_file(last) and folder == last[:2]


def _key_of(name: str) -> bytes:
    return bytes.fromhex(name.rpartition("/")[2][:64])
