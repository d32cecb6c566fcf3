"""All listings and the prefix tree over their chunks, kept in step with the market's database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from vllm_kvmarket.catalogue import queries, upkeep
from vllm_kvmarket.catalogue.eviction_policy import Candidate
from vllm_kvmarket.catalogue.listing import NEEDED, ON_OFFER, Audit, Listing, Usage, Use
from vllm_kvmarket.catalogue.offers import Offers
from vllm_kvmarket.core.errors import NotFoundError
from vllm_kvmarket.core.model_identity import unpack_tokens

# Files that are deleted in one transaction: publishers wait for it.
_RELEASED_AT_ONCE = 32
# Chunks from which on reading all that are needed is quicker than asking for each.
_MANY = 1000


class Catalogue(Offers):
    """One process's view of the catalogue; thread-safe.

    `match` reads memory only. Everything else goes to the database and raises CatalogueError when
    that cannot be used. `last_error` is why the last refresh failed, None when it did not; what was
    taken over before goes on matching until its time to live is over.
    """

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
            found = queries.read_listings(db, "? IS NULL OR state = ?", (state, state))
        wanted = (search or "").casefold()
        return [
            listing
            for listing in found
            if any(
                wanted in field.casefold()
                for field in (listing.terms.title, listing.terms.publisher, listing.document_id)
            )
        ]

    def page(
        self,
        limit: int,
        offset: int = 0,
        *,
        search: str = "",
        publisher: str | None = None,
        on_offer: bool = True,
    ) -> tuple[list[Listing], int]:
        """Return some of the listings that `search` keeps, newest first, and how many there are.

        Those on offer now, unless told; only what is returned is read whole. See `listings`.
        """
        wanted = search.casefold()
        with self._db.snapshot() as db:
            names = [
                fields[0]
                for fields in queries.read_names(db, publisher, time.time() if on_offer else None)
                if any(wanted in field.casefold() for field in fields)
            ]
            return [self._read(db, name) for name in names[offset : offset + limit]], len(names)

    def tokens_of(self, document_id: str) -> list[int]:
        """Return a document's token ids. Raises NotFoundError."""
        with self._db.snapshot() as db:
            self._read(db, document_id)
            chunks = queries.chunks_of(db, document_id)
        return unpack_tokens(b"".join(chunk.tokens for chunk in chunks))

    def chunk_is_listed(self, key: bytes) -> bool:
        """Say whether a listing on offer, live or damaged, holds this chunk."""
        with self._db.snapshot() as db:
            return queries.is_held(db, key, ON_OFFER)

    def needed_chunks(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of `keys` that a listing on offer or being published holds.

        Only `release` may delete the others: a listing may begin to need them at any moment.
        """
        asked = set(keys)
        with self._db.snapshot() as db:
            if len(asked) > _MANY:
                return asked & queries.all_held(db, NEEDED)
            return {key for key in asked if queries.is_held(db, key, NEEDED)}

    # Damage

    def report_damage(self, key: bytes, reason: str = "a stored chunk could not be loaded") -> None:
        """Note that a chunk cannot be had; mutates the database.

        No process matches it any more, and the listings on offer that hold it are damaged; what
        lies before it still matches. A chunk that no listing on offer or on its way holds is
        ignored: it may be gone for good reason.
        """
        with self._changing() as db:
            if queries.is_held(db, key, NEEDED) and queries.set_damaged(db, key, damaged=True):
                # Also those that were damaged before: what can be matched of them may be less now.
                for name in queries.holders(db, key, ON_OFFER):
                    queries.set_state(db, name, "damaged", reason)

    def heal(self, key: bytes) -> None:
        """Note that a chunk was stored again; mutates the database.

        It matches again, and listings whose chunks are all whole are live again.
        """
        self.heal_all([key])

    def heal_all(self, keys: Iterable[bytes]) -> None:
        """Note that chunks were stored again, all in one transaction; see `heal`."""
        with self._changing() as db:
            for key in keys:
                if queries.set_damaged(db, key, damaged=False):
                    for name in queries.holders(db, key, ("damaged",)):
                        queries.set_offered(db, name)

    # Room in the store

    def candidates(self) -> list[Candidate]:
        """Return every document on offer as the eviction policies see it, in order of their ids."""
        with self._db.snapshot() as db:
            return upkeep.candidates(db)

    def release(self, keys: Iterable[bytes], delete: Callable[[bytes], object]) -> int:
        """Call `delete` for each chunk that no listing on offer or on its way holds; how many.

        Nobody can begin to publish meanwhile: a publisher was there before, and its chunks are
        kept, or comes afterwards, and finds them gone. `delete` must be quick and must not use the
        catalogue; what it raises is raised on.
        """
        released = 0
        waiting = iter(keys)
        while batch := list(islice(waiting, _RELEASED_AT_ONCE)):
            with self._db.transaction() as db:
                for key in batch:
                    if not queries.is_held(db, key, NEEDED):
                        delete(key)
                        released += 1
        return released

    # Uses and audits

    def note_uses(self, uses: Sequence[Use]) -> None:
        """Count reuses of listings for the eviction policies; mutates the database, once.

        No listing changes by it. Uses of unknown documents are ignored.
        """
        if uses:
            with self._db.transaction() as db:
                upkeep.note_uses(db, uses)

    def usage_of(self, document_id: str) -> Usage:
        """Return what is known of a document's reuses. Raises NotFoundError."""
        with self._db.snapshot() as db:
            usage = upkeep.usage_of(db, document_id)
        if usage is None:
            raise NotFoundError(f"there is no document {document_id}; see `kvmarket document list`")
        return usage

    def record_audit(self, audit: Audit) -> None:
        """Keep an audit's result with its listing; mutates the database. Raises NotFoundError."""
        with self._db.transaction() as db:
            self._read(db, audit.document_id)
            upkeep.record_audit(db, audit)

    def audits_of(self, document_id: str) -> list[Audit]:
        """Return a document's audits, newest first; none for an unknown document."""
        with self._db.snapshot() as db:
            return upkeep.audits_of(db, document_id)
