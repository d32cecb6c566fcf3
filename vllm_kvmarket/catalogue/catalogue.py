"""All listings and the prefix tree over their chunks, kept in step with the market's database."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import apsw

from vllm_kvmarket.catalogue import audit, tables
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.listing import Listing, Match
from vllm_kvmarket.catalogue.owners import Owner
from vllm_kvmarket.catalogue.tree import PrefixTree
from vllm_kvmarket.errors import CatalogueError, ConfigError, NotFoundError
from vllm_kvmarket.identity import (
    CHUNK_TOKENS,
    TOKEN_BYTES,
    chunk_keys,
    document_id,
    pack_tokens,
    unpack_tokens,
)

OWNERS_FOLDER = "publishing"

logger = logging.getLogger(__name__)


class Catalogue:
    """One process's view of the catalogue; thread-safe.

    `match` reads memory only. Everything else goes to the database and raises CatalogueError when
    that cannot be used. `last_error` is why the last refresh failed, None when it did not; what was
    taken over before goes on matching.
    """

    def __init__(self, path: Path, chunk_tokens: int) -> None:
        self.last_error: Exception | None = None
        self._tree = PrefixTree(chunk_tokens)
        # Both are guarded by the reading connection's lock, and so is changing the tree.
        self._revision = 0
        self._data_version: int | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._owner = Owner(path.parent / OWNERS_FOLDER)
        self._db = Connections(path, tables.ROOM, tables.MIGRATIONS)
        with self._db.transaction() as db:
            chosen = tables.fix_chunk_tokens(db, chunk_tokens)
        if chosen != chunk_tokens:
            self.close()
            raise ConfigError(
                f"chunk_tokens is {chunk_tokens}, but the market in {path.parent} was made with "
                f"{chosen}: set it to {chosen}, or use another home"
            )
        self.refresh()

    @classmethod
    def open(cls, path: Path, chunk_tokens: int = CHUNK_TOKENS) -> Self:
        """Open the catalogue in the market's database, making its tables where there are none.

        Raises ConfigError when it was made with another chunk size, CatalogueError when the
        database cannot be used.
        """
        return cls(path, chunk_tokens)

    def close(self) -> None:
        """Stop watching and release the database; what this process was publishing is given up."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        self._db.close()
        self._owner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Matching

    def match(self, namespace: bytes, token_ids: Sequence[int]) -> Match | None:
        """Find the longest published prefix of `token_ids`, token by token, down to inside a chunk.

        It is paid to the listing that is wholly matched, else to the first listed of those that
        contain the whole match. Memory only, and as fresh as the last refresh.
        """
        return self._tree.match(namespace, token_ids)

    @property
    def chunk_count(self) -> int:
        """How many chunks can be matched."""
        return self._tree.chunk_count

    # Publishing

    def begin(self, listing: Listing, token_ids: Sequence[int]) -> Listing:
        """Note that a document is being published; returns its listing; mutates the database.

        A listing that is live comes back untouched, and so does one that another living process is
        publishing: whoever commits first puts it on offer. One that failed, was delisted, is
        damaged, or was left behind by a process that ended starts anew on the given terms. Raises
        CatalogueError for a listing that does not fit its tokens, ValueError for bad token ids.
        """
        chunks = self._split(listing, token_ids)
        fresh = dataclasses.replace(listing, state="publishing", reason="", stored_bytes=0)
        with self._changing() as db:
            existing = tables.find_listing(db, listing.document_id)
            if existing is None or not self._is_taken(db, existing):
                tables.write_listing(db, fresh)
                tables.write_chunks(db, listing.document_id, chunks)
                existing = self._read(db, listing.document_id)
            stored = tables.chunks_of(db, listing.document_id)
            if [(chunk.key, chunk.tokens) for chunk in stored] != chunks:
                raise CatalogueError(
                    f"{listing.document_id}: other tokens are stored under one of its keys; this "
                    "must never be: run `kvmarket fsck`"
                )
            if existing.state == "publishing":
                self._owner.announce()
                tables.add_publishing(db, listing.document_id, self._owner.name)
        return existing

    def _split(self, listing: Listing, token_ids: Sequence[int]) -> list[tuple[bytes, bytes]]:
        """Cut a document into chunks (key, packed tokens), and see that the listing fits them."""
        name = listing.document_id
        if not 0 < len(token_ids) == listing.token_count:
            raise CatalogueError(
                f"{name}: listed with {listing.token_count} tokens, given {len(token_ids)}"
            )
        width = self._tree.chunk_tokens * TOKEN_BYTES
        packed = pack_tokens(token_ids)
        keys = chunk_keys(listing.namespace, token_ids, self._tree.chunk_tokens)
        if document_id(keys[-1]) != name or listing.chunk_keys not in ((), tuple(keys)):
            raise CatalogueError(f"{name}: not the id, or not the chunk keys, of these tokens")
        starts = range(0, len(packed), width)
        return [
            (key, packed[start : start + width]) for key, start in zip(keys, starts, strict=True)
        ]

    def _is_taken(self, db: apsw.Connection, listing: Listing) -> bool:
        """Say whether a listing is live, or another living process is publishing it."""
        others = self._publishers(db, listing.document_id) - {self._owner.name}
        return listing.state == "live" or (listing.state == "publishing" and bool(others))

    def _publishers(self, db: apsw.Connection, name: str) -> set[str]:
        """Find which living processes publish a document; forgets the others."""
        owners = tables.owners_of(db, name)
        alive = {owner for owner in owners if self._owner.is_alive(owner)}
        for owner in owners - alive:
            tables.forget_owner(db, owner)
        return alive

    def commit(self, document_id: str, stored_bytes: int) -> Listing:
        """Put a document on offer, all of whose chunks are durable, in one transaction.

        A live one is returned as it is: another publisher of it was faster. One with a chunk that
        is marked as damaged becomes damaged; heal what was stored again first. Raises
        CatalogueError when it is not being published.
        """
        with self._changing() as db:
            listing = tables.find_listing(db, document_id)
            if listing is None or listing.state not in ("publishing", "live"):
                state = listing.state if listing else "unknown"
                raise CatalogueError(
                    f"{document_id} is {state}, not being published; begin it first"
                )
            if listing.state == "publishing":
                tables.set_stored_bytes(db, document_id, stored_bytes)
                tables.set_offered(db, document_id)
                tables.end_publishing(db, document_id)
            return self._read(db, document_id)

    def fail(self, document_id: str, reason: str) -> None:
        """Note that this process's publishing ended without a listing; mutates the database.

        The listing fails unless someone else is still publishing it; one that was on offer before
        (it was damaged) returns to that. Other states stay. Raises NotFoundError.
        """
        with self._changing() as db:
            if self._read(db, document_id).state != "publishing":
                return
            tables.end_publishing(db, document_id, self._owner.name)
            if self._publishers(db, document_id):
                return
            if tables.is_listed(db, document_id):
                tables.set_offered(db, document_id, reason)
            else:
                tables.set_state(db, document_id, "failed", reason)

    def delist(self, document_id: str) -> None:
        """Take a document off the market at once; mutates the database.

        Raises NotFoundError when it is not on it.
        """
        with self._changing() as db:
            if self._read(db, document_id).state == "delisted":
                raise NotFoundError(f"document {document_id} is delisted already")
            tables.set_state(db, document_id, "delisted")
            tables.end_publishing(db, document_id)

    # Reading

    def get(self, document_id: str) -> Listing:
        """Return one listing as the database has it now. Raises NotFoundError."""
        with self._db.snapshot() as db:
            return self._read(db, document_id)

    def listings(self, state: str | None = None, search: str | None = None) -> list[Listing]:
        """Return the listings in a state, newest first.

        `search` keeps those whose title, publisher or id contains it, in upper or lower case.
        """
        with self._db.snapshot() as db:
            found = tables.read_listings(db, "? IS NULL OR state = ?", (state, state))
        wanted = (search or "").casefold()
        return [
            listing
            for listing in found
            if any(
                wanted in field.casefold()
                for field in (listing.title, listing.publisher, listing.document_id)
            )
        ]

    def tokens_of(self, document_id: str) -> list[int]:
        """Return a document's token ids. Raises NotFoundError."""
        with self._db.snapshot() as db:
            self._read(db, document_id)
            chunks = tables.chunks_of(db, document_id)
        return unpack_tokens(b"".join(chunk.tokens for chunk in chunks))

    def chunk_is_listed(self, key: bytes) -> bool:
        """Say whether a listing on offer, live or damaged, holds this chunk."""
        with self._db.snapshot() as db:
            return bool(tables.holders(db, key, ("live", "damaged")))

    def needed_chunks(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of `keys` that a listing on offer or being published holds.

        The store may delete the others.
        """
        with self._db.snapshot() as db:
            return {
                key for key in keys if tables.holders(db, key, ("live", "damaged", "publishing"))
            }

    @staticmethod
    def _read(db: apsw.Connection, document_id: str) -> Listing:
        listing = tables.find_listing(db, document_id)
        if listing is None:
            raise NotFoundError(f"there is no document {document_id}; see `kvmarket list`")
        return listing

    # Damage

    def report_damage(self, key: bytes, reason: str = "a stored chunk could not be loaded") -> None:
        """Note that a chunk cannot be had; mutates the database.

        No process matches it any more, and the listings on offer that hold it are damaged; what
        lies before it still matches. A chunk that nobody knows is ignored.
        """
        with self._changing() as db:
            if tables.set_damaged(db, key, damaged=True):
                # Also those that were damaged before: what can be matched of them may be less now.
                for name in tables.holders(db, key, ("live", "damaged")):
                    tables.set_state(db, name, "damaged", reason)

    def heal(self, key: bytes) -> None:
        """Note that a chunk was stored again; mutates the database.

        It matches again, and listings whose chunks are all whole are live again.
        """
        with self._changing() as db:
            if tables.set_damaged(db, key, damaged=False):
                for name in tables.holders(db, key, ("damaged",)):
                    tables.set_offered(db, name)

    # Keeping up with the database

    def refresh(self) -> bool:
        """Take over what was committed since, by this process or another; whether anything was.

        Mutates the tree. Raises CatalogueError when the database cannot be read.
        """
        with self._db.reading() as db:
            # Changes with every commit by another connection, and costs no read of the database.
            data_version = int(db.pragma("data_version"))
            if data_version == self._data_version:
                return False
            with db:
                changed = self._take_over(db)
            self._data_version = data_version
            return changed

    def _take_over(self, db: apsw.Connection) -> bool:
        newest = tables.revision(db)
        if newest == self._revision:
            return False
        changes = tables.read_changes(db, self._revision)
        # In the order of their tokens, thousands of new chunks go to the end of their lists each.
        changes.sort(key=lambda change: (change.listing.namespace, change.chunks))
        for change in changes:
            if change.chunks and change.place is not None:
                self._tree.put(change.listing, change.place, change.chunks)
            else:
                self._tree.remove(change.listing.document_id)
        self._revision = newest
        return True

    @contextmanager
    def _changing(self) -> Iterator[apsw.Connection]:
        """Change the database, all or nothing, and then the tree."""
        with self._db.transaction() as db:
            yield db
        # The change is durable: that it could not be read back yet must not look like its failure.
        self._try_refresh()

    def watch(self, interval_s: float = 0.25) -> None:
        """Refresh from a thread of its own until closed; see `last_error`."""
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=self._watch, args=(interval_s,), name="kvmarket-catalogue", daemon=True
            )
            self._watcher.start()

    def _watch(self, interval_s: float) -> None:
        while not self._closing.wait(interval_s):
            self._try_refresh()

    def _try_refresh(self) -> None:
        try:
            self.refresh()
        except Exception as error:  # noqa: BLE001  # a dead watcher would sell stale listings for ever
            if repr(error) != repr(self.last_error):
                logger.warning("kvmarket: the catalogue is not up to date: %s", error)
            self.last_error = error
        else:
            self.last_error = None

    def check_integrity(self) -> list[str]:
        """Compare listings, chunks and tree; returns what is wrong, nothing when all is well."""
        with self._db.snapshot() as db:
            self._take_over(db)
            return audit.problems(db, self._tree)
