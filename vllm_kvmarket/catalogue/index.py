"""What is on offer, in this process's memory: kept in step with the database and the clock."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from vllm_kvmarket.catalogue import integrity, queries
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.database_match import DatabaseMatches
from vllm_kvmarket.catalogue.listing import ON_OFFER, Match
from vllm_kvmarket.catalogue.prefix_tree import PrefixTree
from vllm_kvmarket.catalogue.sqlite_connections import SqliteConnections
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.errors import CatalogueError, ConfigError
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import keeps_states

# Larger than every place in the order of first offers.
_BEHIND_ALL = 2**48

Sellable = Callable[[ListingTerms], bool]


class Expiries:
    """The ends of listings that can be matched. Not synchronised."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        # Has ends that do not hold any more, too; `_ends` decides.
        self._line: list[tuple[float, str]] = []

    def note(self, document_id: str, expires_at_s: float | None) -> None:
        """Note when a listing ends, None for never; mutates."""
        if expires_at_s is None:
            self._ends.pop(document_id, None)
        elif self._ends.get(document_id) != expires_at_s:
            self._ends[document_id] = expires_at_s
            heapq.heappush(self._line, (expires_at_s, document_id))

    def take_due(self, now_s: float) -> list[str]:
        """Return the listings that have ended by now, each once; mutates."""
        due = []
        while self._line and self._line[0][0] <= now_s:
            end, document_id = heapq.heappop(self._line)
            if self._ends.get(document_id) == end:
                del self._ends[document_id]
                due.append(document_id)
        return due


class Index:
    """The prefix tree over what is on offer, as of the last refresh; thread-safe.

    At most `chunks_in_memory` chunks go into the tree, None for all. `overdue` means that a listing
    has ended and the database may not know yet. A listing whose terms are not `is_sellable` comes
    last in the order of first offers: it must not stand before one that can be sold.
    """

    def __init__(
        self,
        db: Connections,
        chunk_tokens: int,
        chunks_in_memory: int | None,
        is_sellable: Sellable,
    ) -> None:
        self.tree = PrefixTree(chunk_tokens)
        self._is_sellable = is_sellable
        self.overdue = False
        self._db = db
        # Held while the tree is changed: by what was committed, or by the clock. Taken after the
        # reading connection's lock, which also guards the two numbers.
        self._tree_lock = threading.RLock()
        self._expiries = Expiries()
        self._revision = 0
        self._seen: int | None = None
        self._chunks_in_memory = chunks_in_memory
        self._pinned_beyond: frozenset[str] = frozenset()
        # Whether a document on offer did not fit; stays true until the catalogue is opened again.
        self.is_beyond_memory = False
        self._beyond: DatabaseMatches | None = None
        if chunks_in_memory is not None:
            if not isinstance(db, SqliteConnections):
                raise ConfigError("catalogue_chunks_in_memory: all are in memory with PostgreSQL")
            self._beyond = DatabaseMatches(db, chunk_tokens)

    def close(self) -> None:
        """End the threads that match in the database."""
        if self._beyond is not None:
            self._beyond.close()

    def match_later(self, namespace: bytes, token_ids: Sequence[int]) -> Future[Match | None]:
        """Start to match in the tree and in the database; never waits.

        Where the model keeps a state, in the tree only.
        """
        if self._beyond is None or not self.is_beyond_memory or keeps_states(namespace):
            done: Future[Match | None] = Future()
            done.set_result(self.tree.match(namespace, token_ids))
            return done
        return self._beyond.match_later(namespace, token_ids, self.tree.match)

    def match_anywhere(self, namespace: bytes, token_ids: Sequence[int]) -> Match | None:
        """Find what `match_later` does, or what memory has when the database cannot be used."""
        found = self.tree.match(namespace, token_ids)
        if not self.is_beyond_memory:
            return found
        try:
            return self.match_later(namespace, token_ids).result()
        except CatalogueError:
            return found

    def is_pinned(self, document_id: str) -> bool:
        """Say whether a document can be matched and is pinned; memory only."""
        listing = self.tree.listing(document_id)
        if listing is None:
            return document_id in self._pinned_beyond
        return listing.pinned

    def refresh(self) -> bool:
        """Bring the tree up to date; whether anything has changed. See Catalogue.refresh."""
        dropped = self._drop_ended(time.time())
        with self._db.news(self._seen) as news:
            if news is None:
                return dropped
            seen, db = news
            changed = self._take_over(db, time.time())
            self._seen = seen
            return changed or dropped

    def _take_over(self, db: Connection, now_s: float) -> bool:
        newest = queries.revision(db)
        if newest == self._revision:
            return False
        if self._chunks_in_memory is None:
            changes = queries.read_changes(db, self._revision, now_s)
            # In the order of their tokens, thousands of new chunks go to the end of their lists.
            changes.sort(key=lambda change: (change.listing.namespace, change.chunks))
            with self._tree_lock:
                for change in changes:
                    self._apply(change, now_s)
        else:
            with self._tree_lock:
                self._take_over_what_fits(db, now_s, self._chunks_in_memory)
        self._revision = newest
        return True

    def _apply(self, change: queries.Change, now_s: float) -> None:
        listing = change.listing
        if change.chunks and change.place is not None:
            last = 0 if self._is_sellable(listing.terms) else _BEHIND_ALL
            self.tree.put(listing, last + change.place, change.chunks, change.known)
            self._expiries.note(listing.document_id, listing.terms.expires_at_s)
        else:
            self.tree.remove(listing.document_id)
            self._expiries.note(listing.document_id, None)
            self.overdue |= listing.state in ON_OFFER and listing.is_over(now_s)

    def _take_over_what_fits(self, db: Connection, now_s: float, most: int) -> None:
        """Put the most used documents into the tree; the tokens of the others are not read."""
        pinned = set(self._pinned_beyond)
        for name, token_count, offered, is_pinned, expires_at_s in queries.changed(
            db, self._revision, now_s
        ):
            entry = self.tree.entries.get(name)
            kept = self.tree.chunk_count - (len(entry.path) - 1 if entry else 0)
            fits = kept - (-token_count // self.tree.chunk_tokens) <= most
            pinned.discard(name)
            if fits or not offered:
                self._apply(queries.read_change(db, name, now_s), now_s)
                continue
            self.is_beyond_memory = True
            self.tree.remove(name)
            self._expiries.note(name, expires_at_s)
            if is_pinned:
                pinned.add(name)
        self._pinned_beyond = frozenset(pinned)

    def _drop_ended(self, now_s: float) -> bool:
        """Stop matching what has ended by now, whatever the database says; mutates the tree."""
        with self._tree_lock:
            ended = self._expiries.take_due(now_s)
            for document_id in ended:
                self.tree.remove(document_id)
            self._pinned_beyond = self._pinned_beyond.difference(ended)
        self.overdue |= bool(ended)
        return bool(ended)

    def check_integrity(self) -> list[str]:
        """Compare listings, chunks and tree; returns what is wrong, nothing when all is well."""
        with self._db.snapshot() as db, self._tree_lock:
            now_s = time.time()
            self._drop_ended(now_s)
            self._take_over(db, now_s)
            return integrity.problems(db, self.tree, now_s, whole=self._chunks_in_memory is None)
