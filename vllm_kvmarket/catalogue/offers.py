"""How a document gets on offer, and how it leaves: each step one transaction."""

from __future__ import annotations

import dataclasses
import time

import apsw

from vllm_kvmarket.catalogue import queries, upkeep
from vllm_kvmarket.catalogue.index import View
from vllm_kvmarket.catalogue.listing import NEEDED, ON_OFFER, Listing, PublisherLimits
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import CatalogueError, CatalogueRefusedError, NotFoundError


class Offers(View):
    """What puts documents on offer, takes them off, and changes their terms; see Catalogue."""

    def begin(
        self,
        listing: Listing,
        document: DocumentChunks,
        limits: PublisherLimits | None = None,
        needed_bytes: int = 0,
    ) -> Listing:
        """Note that a document is being published; returns its listing; mutates the database.

        A listing that is live comes back untouched, and so does one that another living process is
        publishing: whoever commits first puts it on offer. Any other, or one that was left behind
        by a process that ended, starts anew on the given terms. From now on the store keeps the
        chunks that it has of it. Raises CatalogueRefusedError for a listing that does not fit its
        tokens, or that would exceed its publisher's `limits` with `needed_bytes` more; what is
        repaired is not limited.
        """
        chunks = self._check(listing, document)
        fresh = dataclasses.replace(listing, state="publishing", reason="", stored_bytes=0)
        with self._changing() as db:
            if limits is not None and not queries.is_listed(db, listing.document_id):
                self._check_limits(db, listing, limits, needed_bytes)
            begun = self._start(db, fresh, chunks)
            if begun.state == "publishing":
                self._owner.announce()
                queries.add_publishing(db, begun.document_id, self._owner.name)
        return begun

    @staticmethod
    def _check_limits(
        db: apsw.Connection, listing: Listing, limits: PublisherLimits, needed_bytes: int
    ) -> None:
        publisher = listing.terms.publisher
        count, stored_bytes = queries.held_by(db, publisher, listing.document_id)
        if limits.documents is not None and count >= limits.documents:
            raise CatalogueRefusedError(
                f"publisher {publisher!r} has {count} documents and may have {limits.documents}; "
                "withdraw one first"
            )
        if limits.bytes is not None and stored_bytes + needed_bytes > limits.bytes:
            raise CatalogueRefusedError(
                f"publisher {publisher!r} stores {stored_bytes} bytes and may store "
                f"{limits.bytes}, too few for {needed_bytes} more; withdraw a document first"
            )

    def _start(
        self, db: apsw.Connection, fresh: Listing, chunks: list[tuple[bytes, bytes]]
    ) -> Listing:
        """Write a listing and its chunks unless it is taken; returns the listing that holds."""
        name = fresh.document_id
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
        with self._changing() as db:
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
    def _offer(db: apsw.Connection, document_id: str, stored_bytes: int) -> None:
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

    def _is_taken(self, db: apsw.Connection, listing: Listing) -> bool:
        """Say whether a listing is live, or another living process is publishing it."""
        others = self._publishers(db, listing.document_id) - {self._owner.name}
        return listing.state == "live" or (listing.state == "publishing" and bool(others))

    def _publishers(self, db: apsw.Connection, name: str) -> set[str]:
        """Find which living processes publish a document; forgets the others."""
        owners = queries.owners_of(db, name)
        alive = {owner for owner in owners if self._owner.is_alive(owner)}
        for owner in owners - alive:
            queries.forget_owner(db, owner)
        return alive

    def commit(self, document_id: str, stored_bytes: int) -> Listing:
        """Put a document on offer, all of whose chunks are durable, in one transaction.

        A live one is returned as it is: another publisher of it was faster. One with a chunk that
        is marked as damaged becomes damaged; heal what was stored again first. Raises
        CatalogueError when it is not being published.
        """
        with self._changing() as db:
            listing = queries.find_listing(db, document_id)
            if listing is None or listing.state not in ("publishing", "live"):
                state = listing.state if listing else "unknown"
                raise CatalogueRefusedError(
                    f"{document_id} is {state}, not being published; begin it first"
                )
            if listing.state == "publishing":
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

    def _fail_unless_published(self, db: apsw.Connection, document_id: str, reason: str) -> bool:
        if self._publishers(db, document_id):
            return False
        if queries.is_listed(db, document_id):
            queries.set_offered(db, document_id, reason)
        else:
            queries.set_state(db, document_id, "failed", reason)
        return True

    def fail_abandoned(self, reason: str = "its publisher ended") -> list[str]:
        """Fail what was being published by processes that have ended since; returns which.

        Mutates the database, and does not write to it when nothing is being published. A document
        that was on offer before returns to that.
        """
        with self._db.snapshot() as db:
            if not upkeep.being_published(db):
                return []
        with self._changing() as db:
            return [
                document_id
                for document_id in upkeep.being_published(db)
                if self._fail_unless_published(db, document_id, reason)
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
        """Take a document off the market as the store needs its room; mutates the database.

        Returns whether it was done: not for one that is not on offer, or was pinned since it was
        chosen. Its chunks can be released then. Raises NotFoundError.
        """
        with self._changing() as db:
            listing = self._read(db, document_id)
            if listing.state not in ON_OFFER or listing.pinned:
                return False
            upkeep.remember_uses(db, document_id)
            queries.set_state(db, document_id, "evicted", reason)
            return True

    def set_expiry(self, document_id: str, expires_at_s: float | None) -> Listing:
        """Say until when a document is on offer, None for good; mutates the database.

        A time that is over takes it off the market at once. Raises NotFoundError, and
        CatalogueError for a document that is neither on offer nor on its way.
        """
        with self._changing() as db:
            self._check_needed(db, document_id)
            queries.set_field(db, document_id, "expires_at_s", expires_at_s)
            return self._read(db, document_id)

    def set_price(self, document_id: str, cache_read_nano_per_mtok: int | None) -> Listing:
        """Set what reusing a million of a document's tokens costs, None for what the tariff says;
        mutates the database.

        Reservations made before keep the price that they were made at. Raises NotFoundError, and
        CatalogueError for a document that is neither on offer nor on its way.
        """
        with self._changing() as db:
            self._check_needed(db, document_id)
            queries.set_field(db, document_id, "cache_read_nano_per_mtok", cache_read_nano_per_mtok)
            return self._read(db, document_id)

    def set_pinned(self, document_id: str, pinned: bool) -> Listing:
        """Pin a document, or unpin it; mutates the database.

        Raises NotFoundError, and CatalogueError when one is to be pinned that is neither on offer
        nor on its way.
        """
        with self._changing() as db:
            if pinned:
                self._check_needed(db, document_id)
            queries.set_field(db, document_id, "pinned", pinned)
            return self._read(db, document_id)

    def _check_needed(self, db: apsw.Connection, document_id: str) -> None:
        state = self._read(db, document_id).state
        if state not in NEEDED:
            raise CatalogueRefusedError(f"{document_id} is {state}; publish it again first")
