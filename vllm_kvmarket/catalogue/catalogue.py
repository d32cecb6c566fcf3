"""All listings of a market: the facade over their tables and the index that matches them."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from vllm_kvmarket.catalogue import queries, use_queries
from vllm_kvmarket.catalogue.chunk_shares import ChunkShares
from vllm_kvmarket.catalogue.connections import open_connections
from vllm_kvmarket.catalogue.eviction_policy import Candidate
from vllm_kvmarket.catalogue.index import Index
from vllm_kvmarket.catalogue.leftovers import Leftovers
from vllm_kvmarket.catalogue.listing import (
    NEEDED,
    ON_OFFER,
    Audit,
    Listing,
    ListingFilter,
    Match,
    PublisherLimits,
    Usage,
    Use,
)
from vllm_kvmarket.catalogue.store_record import StoreRecord
from vllm_kvmarket.core.database import BusyError, Connection
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import (
    CatalogueError,
    CatalogueRefusedError,
    ConfigError,
    NotFoundError,
)
from vllm_kvmarket.core.model_identity import CHUNK_TOKENS, unpack_tokens
from vllm_kvmarket.core.pricing import Tariff

INDEX_FOLDER = "index"
EXPIRED_REASON = "its time to live is over"
# Computing has no price that a listing could exceed.
_ANY_PRICE = Tariff(input_nano_per_mtok=2**63 - 1)

logger = logging.getLogger(__name__)


class Catalogue:
    """One process's view of the catalogue; thread-safe.

    Matching reads the machine's index. Everything else goes to the database and raises
    CatalogueError when that cannot be used. `last_error` is why the last refresh failed, None when
    it did not; what was taken over before goes on matching until its time to live is over.
    """

    def __init__(
        self, place: Path | str, chunk_tokens: int, index_folder: Path | None, tariff: Tariff
    ) -> None:
        self.last_error: Exception | None = None
        self.chunk_tokens = chunk_tokens
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._db = open_connections(place)
        self._owner = self._db.owner
        self.store_record = StoreRecord(self._db)
        self.leftovers = Leftovers(self._db)
        self.shares = ChunkShares(self._db, lambda: self._attempt(self.refresh))
        if index_folder is None and isinstance(place, Path):
            index_folder = place.parent / INDEX_FOLDER
        try:
            with self._db.transaction() as db:
                chosen, identity = queries.fix_identity(db, chunk_tokens)
            if chosen != chunk_tokens:
                raise ConfigError(
                    f"chunk_tokens is {chunk_tokens}, but the market in {self._db.place} was made "
                    f"with {chosen}: set it to {chosen}, or use another home or database"
                )
            self.index = Index(self._db, index_folder, identity, chunk_tokens, tariff)
        except BaseException:
            self._db.close()
            raise
        self.match_later, self.match_anywhere = self.index.match_later, self.index.match_anywhere

    @classmethod
    def open(
        cls,
        place: Path | str,
        chunk_tokens: int = CHUNK_TOKENS,
        index_folder: Path | None = None,
        tariff: Tariff = _ANY_PRICE,
    ) -> Self:
        """Open the catalogue in the market's database, making its tables where there are none.

        `place` is the path of a SQLite file or a `postgresql://` URL. The index is in
        `index_folder`, on a local disk: beside a SQLite file without it, and beside PostgreSQL in a
        folder that is removed when the catalogue is closed. A listing that `tariff` makes dearer
        than computing owns only what no other listing contains. Raises ConfigError when it was made
        with another chunk size, CatalogueError when the database cannot be used.
        """
        return cls(place, chunk_tokens, index_folder, tariff)

    def close(self) -> None:
        """Stop watching and release the database; what this process was publishing is given up."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        self.index.close()
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Matching

    def match(self, namespace: bytes, token_ids: Sequence[int]) -> Match | None:
        """Find the longest published prefix of `token_ids`, token by token, down to inside a chunk.

        Each token belongs to the listing that was the first to offer the prefix up to it. As fresh
        as the last refresh. Where the database is on another machine, a match that ends inside a
        chunk may end before it: see `match_later`.
        """
        return self.index.match(namespace, token_ids)

    def refresh(self) -> None:
        """Take over what any process committed since, and drop what has ended.

        A large index is made in several steps, and matches nothing before the last. Raises
        CatalogueError when the database cannot be read; what has ended goes even then.
        """
        self.index.refresh()

    def check_integrity(self) -> list[str]:
        """Compare listings, chunks and index; returns what is wrong, nothing when all is well."""
        uncounted = self.shares.uncounted_bytes()
        problems = [f"{uncounted} bytes of chunks are not counted"] if uncounted else []
        return self.index.check_integrity() + problems

    # Keeping up with the clock and with other processes

    def watch(self, interval_s: float = 0.25) -> None:
        """Start a thread that refreshes until the catalogue is closed; see `last_error`."""
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=self._watch, args=(interval_s,), name="kvmarket-catalogue", daemon=True
            )
            self._watcher.start()

    def _watch(self, interval_s: float) -> None:
        while self._db.wait_for_change(interval_s, self._closing):
            self._attempt(self._look)

    def _look(self) -> None:
        self.refresh()
        if self.index.overdue:
            self._write_ended()

    def _write_ended(self) -> None:
        """Tell the database what has ended, or leave it for later; never waits for other writers.

        The index knows already, and must be kept up to date meanwhile.
        """
        try:
            self.index.overdue = False
            self.expire(wait=False)
        except BusyError:
            self.index.overdue = True
        except BaseException:
            self.index.overdue = True
            raise

    def _attempt(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001  # a dead watcher would sell stale listings for ever
            if repr(error) != repr(self.last_error):
                logger.warning("kvmarket: the catalogue is not up to date: %s", error)
            self.last_error = error
        else:
            self.last_error = None

    def expire(self, now_s: float | None = None, *, wait: bool = True) -> list[str]:
        """Note that listings on offer whose time to live is over have expired; returns which.

        Mutates the database, and does not write to it when there are none. The watcher does this
        unasked. Raises BusyError where someone else is writing and `wait` is false.
        """
        now_s = time.time() if now_s is None else now_s
        with self._db.snapshot() as db:
            if not queries.ended(db, now_s):
                return []
        with self._changing(wait=wait) as db:
            ended = queries.ended(db, now_s)
            for document_id in ended:
                queries.set_state(db, document_id, "expired", EXPIRED_REASON)
        return ended

    @contextmanager
    def _changing(self, *, wait: bool = True) -> Iterator[Connection]:
        """Change the database, all or nothing, and then the index."""
        with self._db.transaction(wait=wait) as db:
            yield db
        # The change is durable: that it could not be read back yet must not look like its failure.
        self._attempt(self.refresh)

    @staticmethod
    def _read(db: Connection, document_id: str) -> Listing:
        listing = queries.find_listing(db, document_id)
        if listing is None:
            raise NotFoundError(f"there is no document {document_id}; see `kvmarket document list`")
        return listing

    # How a document gets on offer, and how it leaves: each step is one transaction

    def begin(
        self,
        listing: Listing,
        document: DocumentChunks,
        limits: PublisherLimits | None = None,
        needed_bytes: int = 0,
    ) -> Listing:
        """Note that a document is being published; returns its listing; mutates the database.

        A live listing comes back unchanged. So does one that another living process is publishing:
        the first of them to commit puts it on offer. Any other listing starts anew on the given
        terms. From now on the store keeps the chunks of the document that it has. Raises
        CatalogueRefusedError for a listing that does not fit its tokens, or that would exceed its
        publisher's `limits` with `needed_bytes` more; a repair is not limited.
        """
        chunks = self._check(listing, document)
        # What it will store counts from now on.
        fresh = dataclasses.replace(
            listing, state="publishing", reason="", stored_bytes=needed_bytes
        )
        with self.leftovers.undisturbed(document.keys, self._changing) as db:
            if limits is not None and not queries.is_listed(db, listing.document_id):
                queries.check_limits(db, listing, limits, needed_bytes)
            begun = self._start(db, fresh, chunks)
            if begun.state == "publishing":
                self._owner.announce(db)
                queries.add_publishing(db, begun.document_id, self._owner.name)
        return begun

    def _start(self, db: Connection, fresh: Listing, chunks: list[tuple[bytes, bytes]]) -> Listing:
        """Write a listing and its chunks unless it is taken; returns the listing that holds."""
        name = fresh.document_id
        self.store_record.check(db)
        existing = queries.find_listing(db, name)
        if existing is None or not self._is_taken(db, existing):
            queries.write_listing(db, fresh)
            queries.write_chunks(db, name, chunks)
            existing = self._read(db, name)
        if [(chunk.key, chunk.tokens) for chunk in queries.chunks_of(db, name)] != chunks:
            raise CatalogueError(
                f"{name}: other tokens are stored under one of its keys; this must never be: run "
                "`kvmarket store check`"
            )
        return existing

    def adopt(self, listing: Listing, document: DocumentChunks, *, force: bool = False) -> Listing:
        """Put a document on offer at once, all of whose chunks are stored; one transaction.

        Returns its listing. One that is on offer already comes back untouched, and one that was
        delisted here stays so unless `force`: look at its state. One that another process is
        publishing goes on offer on that one's terms. With a chunk that is marked as damaged it
        becomes damaged; heal what was stored again first. Raises CatalogueRefusedError for a
        listing that does not fit its tokens or whose time to live is over.
        """
        name = listing.document_id
        chunks = self._check(listing, document)
        fresh = dataclasses.replace(listing, state="publishing", reason="")
        with self.leftovers.undisturbed(document.keys, self._changing) as db:
            existing = queries.find_listing(db, name)
            if existing is not None and (
                existing.state in ON_OFFER or (existing.state == "delisted" and not force)
            ):
                return existing
            if listing.is_over(time.time()):
                raise CatalogueRefusedError(f"{name}: its time to live is over; ask for a new one")
            self._start(db, fresh, chunks)
            self._offer(db, name, listing.stored_bytes)
            return self._read(db, name)

    @staticmethod
    def _offer(db: Connection, document_id: str, stored_bytes: int) -> None:
        queries.set_stored_bytes(db, document_id, stored_bytes)
        queries.set_offered(db, document_id)
        queries.end_publishing(db, document_id)

    @staticmethod
    def _check(listing: Listing, document: DocumentChunks) -> list[tuple[bytes, bytes]]:
        """Return a document's chunks (key, packed tokens); see that the listing fits them."""
        name = listing.document_id
        if not 0 < document.token_count == listing.token_count:
            raise CatalogueRefusedError(
                f"{name}: listed with {listing.token_count} tokens, given {document.token_count}"
            )
        if document.document_id != name or listing.chunk_keys not in ((), document.keys):
            raise CatalogueRefusedError(
                f"{name}: not the id, or not the chunk keys, of these tokens"
            )
        return list(zip(document.keys, document.tokens, strict=True))

    def _is_taken(self, db: Connection, listing: Listing) -> bool:
        """Say whether a listing is live, or another living process is publishing it."""
        others = self._publishers(db, listing.document_id) - {self._owner.name}
        return listing.state == "live" or (listing.state == "publishing" and bool(others))

    def _publishers(self, db: Connection, name: str) -> set[str]:
        """Find which living processes publish a document; forgets the others."""
        owners = queries.owners_of(db, name)
        alive = {owner for owner in owners if self._owner.is_alive(db, owner)}
        for owner in owners - alive:
            queries.forget_owner(db, owner)
        return alive

    def commit(self, document_id: str, stored_bytes: int) -> Listing:
        """Put a document on offer, all of whose chunks are durable, in one transaction.

        A live one is returned as it is: another publisher of it was faster. One with a chunk that
        is marked as damaged becomes damaged; heal what was stored again first. Raises
        CatalogueError when it is not being published, or not by this process any more: its chunks
        may have been deleted since it was given up.
        """
        with self._changing() as db:
            listing = queries.find_listing(db, document_id)
            if listing is None or listing.state not in ("publishing", "live"):
                state = listing.state if listing else "unknown"
                raise CatalogueRefusedError(
                    f"{document_id} is {state}, not being published; begin it first"
                )
            if listing.state == "publishing":
                if self._owner.name not in queries.owners_of(db, document_id):
                    raise CatalogueRefusedError(
                        f"{document_id} is not being published by this process any more; publish "
                        "it again"
                    )
                self._offer(db, document_id, stored_bytes)
            return self._read(db, document_id)

    def fail(self, document_id: str, reason: str) -> None:
        """Note that this process's publishing ended without a listing; mutates the database.

        The listing fails unless someone else is still publishing it; one that was on offer before
        (it was damaged) returns to that. Other states stay. Raises NotFoundError.
        """
        with self._changing() as db:
            if self._read(db, document_id).state != "publishing":
                return
            queries.end_publishing(db, document_id, self._owner.name)
            self._fail_unless_published(db, document_id, reason)

    def _fail_unless_published(self, db: Connection, document_id: str, reason: str) -> bool:
        if self._publishers(db, document_id):
            return False
        if queries.is_listed(db, document_id):
            queries.set_offered(db, document_id, reason)
        else:
            queries.set_stored_bytes(db, document_id, 0)
            queries.set_state(db, document_id, "failed", reason)
        return True

    def fail_abandoned(self) -> list[str]:
        """Fail what was being published by processes that have ended since; returns which.

        Mutates the database, and does not write to it when nothing is being published. A document
        that was on offer before returns to that.
        """
        with self._db.snapshot() as db:
            if not queries.being_published(db):
                return []
        with self._changing() as db:
            return [
                document_id
                for document_id in queries.being_published(db)
                if self._fail_unless_published(db, document_id, "its publisher ended")
            ]

    def delist(self, document_id: str) -> None:
        """Take a document off the market at once; mutates the database.

        Raises NotFoundError when it is not on it.
        """
        with self._changing() as db:
            if self._read(db, document_id).state == "delisted":
                raise NotFoundError(f"document {document_id} is delisted already")
            queries.set_state(db, document_id, "delisted")
            queries.end_publishing(db, document_id)

    def evict(self, document_id: str, reason: str) -> bool:
        """Take a document off the market because the store needs its space; mutates the database.

        Returns whether it was done: not for one that is not on offer, or was pinned since it was
        chosen. Its chunks can be released then. Raises NotFoundError.
        """
        with self._changing() as db:
            listing = self._read(db, document_id)
            if listing.state not in ON_OFFER or listing.pinned:
                return False
            use_queries.remember_uses(db, document_id)
            queries.set_state(db, document_id, "evicted", reason)
            return True

    def set_expiry(self, document_id: str, expires_at_s: float | None) -> Listing:
        """Say until when a document is on offer, None for good; mutates the database.

        A time that is over takes it off the market at once. Raises NotFoundError, and
        CatalogueRefusedError for a document that is neither on offer nor on its way.
        """
        return self._set_field(document_id, "expires_at_s", expires_at_s)

    def set_price(self, document_id: str, cache_read_nano_per_mtok: int | None) -> Listing:
        """Set what reusing a million of a document's tokens costs, None for the tariff's price;
        mutates the database.

        Reservations made before keep the price that they were made at. Raises as `set_expiry`.
        """
        return self._set_field(document_id, "cache_read_nano_per_mtok", cache_read_nano_per_mtok)

    def set_pinned(self, document_id: str, pinned: bool) -> Listing:
        """Pin a document, or unpin it, in whatever state; mutates the database. Raises as
        `set_expiry` when it is to be pinned.
        """
        return self._set_field(document_id, "pinned", pinned, in_any_state=not pinned)

    def _set_field(
        self,
        document_id: str,
        column: Literal["expires_at_s", "pinned", "cache_read_nano_per_mtok"],
        value: float | None,
        *,
        in_any_state: bool = False,
    ) -> Listing:
        with self._changing() as db:
            state = self._read(db, document_id).state
            if state not in NEEDED and not in_any_state:
                raise CatalogueRefusedError(f"{document_id} is {state}; publish it again first")
            queries.set_field(db, document_id, column, value)
            return self._read(db, document_id)

    # Reading

    def get(self, document_id: str) -> Listing:
        """Return one listing as the database has it now. Raises NotFoundError."""
        with self._db.snapshot() as db:
            return self._read(db, document_id)

    def listings(self, state: str | None = None) -> list[Listing]:
        """Return all listings, or those in a state, newest first."""
        with self._db.snapshot() as db:
            return queries.read_listings(db, "? IS NULL OR state = ?", (state, state))

    def page(
        self,
        wanted: ListingFilter,
        limit: int = -1,
        *,
        after: tuple[float, str] | None = None,
        offset: int = 0,
    ) -> list[tuple[Listing, float]]:
        """Return (the first `limit`) listings, each with the number that it is ordered by.

        `after` is the number and the id of the last one before. Only these are read whole.
        """
        now_s = time.time()
        with self._db.snapshot() as db:
            page = queries.read_page(db, wanted, now_s, after=after, limit=limit, offset=offset)
            return [(self._read(db, name), number) for name, number in page]

    def ids(self, wanted: ListingFilter) -> list[str]:
        """Return the ids of all listings that a filter shows, in its order."""
        with self._db.snapshot() as db:
            return [name for name, _ in queries.read_page(db, wanted, time.time())]

    def count(self, wanted: ListingFilter) -> int:
        """Return how many listings a filter shows."""
        with self._db.snapshot() as db:
            return queries.count(db, wanted, time.time())

    def tokens_of(self, document_id: str) -> list[int]:
        """Return a document's token ids. Raises NotFoundError, also when they were removed."""
        with self._db.snapshot() as db:
            self._read(db, document_id)
            chunks = queries.chunks_of(db, document_id)
        if not chunks:
            raise NotFoundError(f"the tokens of {document_id} were removed; publish its text again")
        return unpack_tokens(b"".join(chunk.tokens for chunk in chunks))

    def chunk_is_listed(self, key: bytes) -> bool:
        """Say whether a listing on offer, live or damaged, holds this chunk."""
        with self._db.snapshot() as db:
            return queries.is_held(db, key, ON_OFFER)

    def needed_chunks(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of `keys` that a listing on offer or being published needs.

        Only `leftovers.release` may delete the others: a listing may begin to need them meanwhile.
        """
        with self._db.snapshot() as db:
            return queries.needed(db, list(keys))

    # Damage

    def report_damage(self, key: bytes, reason: str = "a stored chunk could not be loaded") -> None:
        """Note that a chunk cannot be had; mutates the database.

        No process matches it any more, and the listings on offer that hold it are damaged; what
        lies before it still matches. A chunk that no listing on offer or on its way holds is
        ignored: it may be gone for good reason.
        """
        with self._changing() as db:
            queries.report_damage(db, key, reason)

    def refute(self, keys: Iterable[bytes]) -> None:
        """Note that an audit has found wrong pages in these chunks; mutates the database.

        They are damaged, and no `heal` changes that before what is stored was deleted.
        """
        with self._changing() as db:
            for key in keys:
                queries.report_damage(db, key, "an audit found wrong pages")
                queries.refute(db, key)

    def refuted(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return those chunks that an audit has refuted; nothing on offer needs what is stored."""
        with self._db.snapshot() as db:
            return queries.refuted(db, keys)

    def heal(self, *keys: bytes) -> None:
        """Note that chunks were stored again, all in one transaction; mutates the database.

        They match again, and listings whose chunks are all whole are live again.
        """
        with self._changing() as db:
            for key in keys:
                if queries.set_damaged(db, key, damaged=False):
                    for name in queries.holders(db, key, ("damaged",)):
                        queries.set_offered(db, name)

    # Space in the store

    def candidates(self) -> list[Candidate]:
        """Return every document on offer as the eviction policies see it, in order of their ids."""
        with self._db.snapshot() as db:
            return use_queries.candidates(db)

    # Uses and audits

    def note_uses(self, uses: Sequence[Use]) -> None:
        """Count reuses of listings for the eviction policies; mutates the database, once.

        No listing changes by it. Uses of unknown documents are ignored.
        """
        if uses:
            with self._db.transaction() as db:
                use_queries.note_uses(db, uses)

    def usage_of(self, document_id: str) -> Usage:
        """Return what is known of a document's reuses. Raises NotFoundError."""
        with self._db.snapshot() as db:
            usage = use_queries.usage_of(db, document_id)
        if usage is None:
            raise NotFoundError(f"there is no document {document_id}; see `kvmarket document list`")
        return usage

    def record_audit(self, audit: Audit) -> None:
        """Keep an audit's result with its listing; mutates the database. Raises NotFoundError."""
        with self._db.transaction() as db:
            self._read(db, audit.document_id)
            use_queries.record_audit(db, audit)

    def audits_of(self, document_id: str) -> list[Audit]:
        """Return a document's audits, newest first; none for an unknown document."""
        with self._db.snapshot() as db:
            return use_queries.audits_of(db, document_id)
