"""One process's view of what is on offer, kept in step with the database and with the clock."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import apsw

from vllm_kvmarket.catalogue import integrity, queries, schema, upkeep
from vllm_kvmarket.catalogue.connections import BusyError, Connections
from vllm_kvmarket.catalogue.database_match import Beyond
from vllm_kvmarket.catalogue.expiry import Expiries
from vllm_kvmarket.catalogue.listing import ON_OFFER, Listing, Match
from vllm_kvmarket.catalogue.prefix_tree import PrefixTree
from vllm_kvmarket.catalogue.publisher_locks import Owner
from vllm_kvmarket.core.errors import CatalogueError, ConfigError, NotFoundError
from vllm_kvmarket.core.model_identity import CHUNK_TOKENS

OWNERS_FOLDER = "publishing"
EXPIRED_REASON = "its time to live is over"

logger = logging.getLogger(__name__)


class View:
    """The prefix tree over what is on offer, as of the last refresh; see Catalogue."""

    def __init__(self, path: Path, chunk_tokens: int, chunks_in_memory: int | None = None) -> None:
        self.last_error: Exception | None = None
        self._tree = PrefixTree(chunk_tokens)
        # Held while the tree is changed: by what was committed, or by the clock. Taken after the
        # reading connection's lock, which also guards the two numbers.
        self._tree_lock = threading.RLock()
        self._expiries = Expiries()
        self._revision = 0
        self._data_version: int | None = None
        # Whether the database may not know yet of a listing that has ended.
        self._overdue = False
        self._chunks_in_memory = chunks_in_memory
        self._beyond: Beyond | None = None
        self._is_beyond = False
        self._pinned_beyond: frozenset[str] = frozenset()
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._owner = Owner(path.parent / OWNERS_FOLDER)
        self._db = Connections(path, schema.ROOM, (schema.SCHEMA,))
        with self._db.transaction() as db:
            chosen = queries.fix_chunk_tokens(db, chunk_tokens)
        if chosen != chunk_tokens:
            self.close()
            raise ConfigError(
                f"chunk_tokens is {chunk_tokens}, but the market in {path.parent} was made with "
                f"{chosen}: set it to {chosen}, or use another home"
            )
        if chunks_in_memory is not None:
            self._beyond = Beyond(self._db, chunk_tokens)
        self.refresh()

    @property
    def chunk_tokens(self) -> int:
        """How many tokens a chunk has."""
        return self._tree.chunk_tokens

    @classmethod
    def open(
        cls, path: Path, chunk_tokens: int = CHUNK_TOKENS, chunks_in_memory: int | None = None
    ) -> Self:
        """Open the catalogue in the market's database, making its tables where there are none.

        At most `chunks_in_memory` chunks go into the prefix tree, None for all; documents that do
        not fit are matched in the database, which gets more tables for it, for good. Raises
        ConfigError when it was made with another chunk size, CatalogueError when the database
        cannot be used.
        """
        return cls(path, chunk_tokens, chunks_in_memory)

    def close(self) -> None:
        """Stop watching and release the database; what this process was publishing is given up."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._beyond is not None:
            self._beyond.close()
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

        Each token belongs to the listing that was the first to offer the prefix up to it. Memory
        only, and as fresh as the last refresh.
        """
        return self._tree.match(namespace, token_ids)

    @property
    def is_beyond_memory(self) -> bool:
        """Whether `match` may miss a document on offer, as the prefix tree had no room for it.

        Stays so until the catalogue is opened again.
        """
        return self._is_beyond

    def match_later(self, namespace: bytes, token_ids: Sequence[int]) -> Future[Match | None]:
        """Start to match in the tree and in the database; never waits.

        The future gives the longer of the two matches, and raises CatalogueError when the database
        cannot be used. Where no document is beyond memory it is done already.
        """
        if self._beyond is None or not self._is_beyond:
            done: Future[Match | None] = Future()
            done.set_result(self.match(namespace, token_ids))
            return done
        return self._beyond.match_later(namespace, token_ids, self.match)

    def match_anywhere(self, namespace: bytes, token_ids: Sequence[int]) -> Match | None:
        """Find what `match_later` does; waits for the database when it must.

        Without the database it is what `match` says.
        """
        found = self.match(namespace, token_ids)
        if not self._is_beyond:
            return found
        try:
            return self.match_later(namespace, token_ids).result()
        except CatalogueError:
            return found

    def is_pinned(self, document_id: str) -> bool:
        """Say whether a document can be matched and is pinned; memory only, as `match`."""
        listing = self._tree.listing(document_id)
        if listing is None:
            return document_id in self._pinned_beyond
        return listing.pinned

    @property
    def chunk_count(self) -> int:
        """How many chunks can be matched in memory."""
        return self._tree.chunk_count

    @property
    def document_count(self) -> int:
        """How many documents can be matched in memory, at least in part."""
        return len(self._tree.entries)

    # Keeping up with the database and the clock

    def refresh(self) -> bool:
        """Take over what was committed since, by this process or another, and drop what has ended;
        whether anything was.

        Mutates the tree. Raises CatalogueError when the database cannot be read; what has ended is
        dropped even then.
        """
        dropped = self._drop_ended(time.time())
        with self._db.reading() as db:
            # Changes with every commit by another connection, and costs no read of the database.
            data_version = int(db.pragma("data_version"))
            if data_version == self._data_version:
                return dropped
            with db:
                changed = self._take_over(db, time.time())
            self._data_version = data_version
            return changed or dropped

    def _take_over(self, db: apsw.Connection, now_s: float) -> bool:
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
            self._tree.put(listing, change.place, change.chunks)
            self._expiries.note(listing.document_id, listing.terms.expires_at_s)
        else:
            self._tree.remove(listing.document_id)
            self._expiries.note(listing.document_id, None)
            self._overdue |= listing.state in ON_OFFER and listing.is_over(now_s)

    def _take_over_what_fits(self, db: apsw.Connection, now_s: float, most: int) -> None:
        """Put the most used documents into the tree; the tokens of the others are not read."""
        pinned = set(self._pinned_beyond)
        for name, token_count, offered, is_pinned, expires_at_s in queries.changed(
            db, self._revision, now_s
        ):
            entry = self._tree.entries.get(name)
            kept = self._tree.chunk_count - (len(entry.path) - 1 if entry else 0)
            fits = kept - (-token_count // self._tree.chunk_tokens) <= most
            pinned.discard(name)
            if fits or not offered:
                self._apply(queries.read_change(db, name, now_s), now_s)
                continue
            self._is_beyond = True
            self._tree.remove(name)
            self._expiries.note(name, expires_at_s)
            if is_pinned:
                pinned.add(name)
        self._pinned_beyond = frozenset(pinned)

    def _drop_ended(self, now_s: float) -> bool:
        """Stop matching what has ended by now, whatever the database says; mutates the tree."""
        with self._tree_lock:
            ended = self._expiries.take_due(now_s)
            for document_id in ended:
                self._tree.remove(document_id)
            self._pinned_beyond = self._pinned_beyond.difference(ended)
        self._overdue |= bool(ended)
        return bool(ended)

    @contextmanager
    def _changing(self, *, wait: bool = True) -> Iterator[apsw.Connection]:
        """Change the database, all or nothing, and then the tree."""
        with self._db.transaction(wait=wait) as db:
            yield db
        # The change is durable: that it could not be read back yet must not look like its failure.
        self._attempt(self.refresh)

    @staticmethod
    def _read(db: apsw.Connection, document_id: str) -> Listing:
        listing = queries.find_listing(db, document_id)
        if listing is None:
            raise NotFoundError(f"there is no document {document_id}; see `kvmarket document list`")
        return listing

    def expire(self, now_s: float | None = None) -> list[str]:
        """Note that listings on offer whose time to live is over have expired; returns which.

        Mutates the database, and does not write to it when there are none. The watcher does this
        unasked.
        """
        return self._expire(time.time() if now_s is None else now_s, wait=True)

    def _expire(self, now_s: float, *, wait: bool) -> list[str]:
        with self._db.snapshot() as db:
            if not upkeep.ended(db, now_s):
                return []
        with self._changing(wait=wait) as db:
            ended = upkeep.ended(db, now_s)
            for document_id in ended:
                queries.set_state(db, document_id, "expired", EXPIRED_REASON)
        return ended

    def watch(self, interval_s: float = 0.25) -> None:
        """Refresh from a thread of its own until closed; see `last_error`."""
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=self._watch, args=(interval_s,), name="kvmarket-catalogue", daemon=True
            )
            self._watcher.start()

    def _watch(self, interval_s: float) -> None:
        while not self._closing.wait(interval_s):
            self._attempt(self._look)

    def _look(self) -> None:
        self.refresh()
        if self._overdue:
            self._write_ended()

    def _write_ended(self) -> None:
        """Tell the database what has ended, or leave it for later; never waits for other writers.

        The tree knows already, and must be kept up to date meanwhile.
        """
        try:
            self._overdue = False
            self._expire(time.time(), wait=False)
        except BusyError:
            self._overdue = True
        except BaseException:
            self._overdue = True
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

    def check_integrity(self) -> list[str]:
        """Compare listings, chunks and tree; returns what is wrong, nothing when all is well."""
        with self._db.snapshot() as db, self._tree_lock:
            now_s = time.time()
            self._drop_ended(now_s)
            self._take_over(db, now_s)
            return integrity.problems(db, self._tree, now_s, whole=self._chunks_in_memory is None)
