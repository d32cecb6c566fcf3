"""What documents leave behind when they leave the market: stored chunks, and tokens.

Nothing is deleted inside a transaction. A chunk that nothing needs is first marked as being
deleted; then its files and objects go, and then the mark. Publishing a document with such a chunk
waits until the mark is gone. It takes back the mark of a process that has died; otherwise the next
who deletes continues there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice

from vllm_kvmarket.catalogue import chunk_shares, queries
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.listing import NEEDED
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.errors import (
    CatalogueRefusedError,
    CatalogueUnavailableError,
    NotFoundError,
)

Delete = Callable[[list[bytes]], object]

# Chunks that are marked at once: a publisher may wait for all of them.
_AT_ONCE = 64
# How long a publisher waits until its document's old chunks are gone.
_PATIENCE_S = 60.0
_PAUSE_S = 0.01
# Documents whose tokens are removed in one transaction.
_PURGED_AT_ONCE = 100
_GONE = "state NOT IN ('live', 'damaged', 'publishing')"


class Leftovers:
    """Deletes what no document needs; thread-safe."""

    def __init__(self, connections: Connections) -> None:
        self._db = connections
        self._owner = connections.owner
        self._lock = threading.Lock()

    # Chunks

    def documents(self) -> list[str]:
        """Return documents that left the market since this was asked; mutates the database.

        What only they needed can be released now. What a process leaves that ends before it has
        released it is `unneeded`.
        """
        statement = (
            f"UPDATE listing SET stored = FALSE WHERE stored AND {_GONE} RETURNING document_id"  # noqa: S608  # a text of ours
        )
        with self._db.transaction() as db:
            return [document_id for (document_id,) in queries.rows(db, statement)]

    def keys_of(self, document_ids: Iterable[str]) -> list[bytes]:
        """Return the chunks of some documents, each once."""
        with self._db.snapshot() as db:
            chunks = (queries.chunks_of(db, each) for each in document_ids)
            return list(dict.fromkeys(chunk.key for found in chunks for chunk in found))

    def unneeded(self) -> list[bytes]:
        """Return chunks that are recorded as stored, and that nothing needs; reads all of them."""
        statement = (
            "SELECT DISTINCT key FROM chunk_share WHERE NOT EXISTS (SELECT 1 FROM listing_chunk "  # noqa: S608  # a text of ours
            "JOIN listing USING (document_id) WHERE listing_chunk.key = chunk_share.key "
            f"AND NOT ({_GONE}))"
        )
        with self._db.snapshot() as db:
            return [key for (key,) in queries.rows(db, statement)]

    def interrupted(self) -> list[bytes]:
        """Return chunks that somebody is deleting, or was until it died."""
        with self._db.snapshot() as db:
            return [key for (key,) in queries.rows(db, "SELECT key FROM releasing")]

    def release(self, keys: Iterable[bytes], delete: Delete) -> int:
        """Call `delete` with chunks that no listing on offer or on its way needs; how many.

        No publication of a chunk can begin while it is being deleted: one that began before keeps
        it, and one that begins afterwards finds it gone. Nobody else waits. `delete` gets several
        at once and must not publish; its errors pass through.
        """
        released = 0
        waiting = iter(dict.fromkeys(keys))
        with self._lock:
            while batch := list(islice(waiting, _AT_ONCE)):
                if not (marked := self._mark(batch)):
                    continue
                gone: list[bytes] = []
                try:
                    self._check_certain()
                    delete(marked)
                    gone = marked
                finally:
                    self._unmark(gone)
                released += len(gone)
        return released

    def _mark(self, batch: list[bytes]) -> list[bytes]:
        """Mark what this process may delete: nothing needs it, and nobody else is deleting it.

        A mark has one owner, so that a chunk is not let go while another process deletes it.
        """
        with self._db.transaction() as db:
            self._owner.announce(db)
            taken = queries.needed(db, batch) | self._being_deleted(db, batch)
            free = [key for key in batch if key not in taken]
            marks = [(key, self._owner.name) for key in free]
            db.executemany("INSERT INTO releasing VALUES (?, ?)", marks)
            return free

    def _check_certain(self) -> None:
        """Raise CatalogueUnavailableError where others may take this process's marks for dead."""
        if not self._owner.is_certain:
            raise CatalogueUnavailableError(
                f"{self._db.place} was away too long; what is left is deleted the next time"
            )

    def _unmark(self, gone: list[bytes]) -> None:
        """Forget what was deleted, and the marks.

        A mark that somebody has taken back meanwhile, because this process stood still for so long
        that it looked dead: the chunk may have been stored anew before it was deleted.
        """
        with self._db.transaction() as db:
            statement = "DELETE FROM releasing WHERE owner = ? RETURNING key"
            own = {key for (key,) in queries.rows(db, statement, (self._owner.name,))}
            chunk_shares.forget(db, gone)
            queries.forget_refuted(db, gone)
            for key in gone:
                if key not in own:
                    queries.report_damage(db, key, "it was deleted while it was published")

    @contextmanager
    def undisturbed(
        self,
        keys: Collection[bytes],
        changing: Callable[[], AbstractContextManager[Connection]],
    ) -> Iterator[Connection]:
        """Begin a transaction by `changing` while nobody deletes one of these chunks.

        Raises CatalogueUnavailableError when deleting them takes too long.
        """
        until_s = time.monotonic() + _PATIENCE_S
        while True:
            with changing() as db:
                if not self._being_deleted(db, keys):
                    yield db
                    return
            if time.monotonic() > until_s:
                raise CatalogueUnavailableError(
                    "old chunks of the document are still being deleted; try again"
                )
            time.sleep(_PAUSE_S)

    def _being_deleted(self, db: Connection, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of these chunks that a living process is deleting.

        Takes back marks of dead ones, and what was recorded of these chunks: they may be gone.
        """
        asked, found = set(keys), set()
        for key, owner in queries.rows(db, "SELECT key, owner FROM releasing"):
            if key in asked and self._owner.is_alive(db, owner):
                found.add(key)
            elif key in asked:
                db.execute("DELETE FROM releasing WHERE key = ?", (key,))
                chunk_shares.forget(db, [key])
        return found

    # Tokens

    def purge(self, document_ids: Iterable[str], delete: Delete) -> int:
        """Remove the tokens of documents that left the market, and the chunks that only they need.

        Their listings stay, for receipts and statistics. Returns how many documents had tokens;
        mutates the database. Raises NotFoundError, and CatalogueRefusedError for a document that is
        on offer or on its way; those before it are purged then.
        """
        purged = 0
        waiting = iter(document_ids)
        while batch := list(islice(waiting, _PURGED_AT_ONCE)):
            with self._db.snapshot() as db:
                for document_id in batch:
                    _check_gone(db, document_id)
            self.release(self.keys_of(batch), delete)
            with self._db.transaction() as db:
                for document_id in batch:
                    # Somebody may have published it again.
                    _check_gone(db, document_id)
                    purged += _purge(db, document_id)
        return purged

    def overdue(self, ended_before_s: float) -> list[str]:
        """Return documents with tokens that were delisted, expired or failed before then."""
        statement = (
            "SELECT document_id FROM listing WHERE ended_at_s < ? "
            "AND state IN ('delisted', 'expired', 'failed') AND NOT purged"
        )
        with self._db.snapshot() as db:
            return [name for (name,) in queries.rows(db, statement, (ended_before_s,))]


def _check_gone(db: Connection, document_id: str) -> None:
    found = queries.rows(db, "SELECT state FROM listing WHERE document_id = ?", (document_id,))
    if not found:
        raise NotFoundError(f"there is no document {document_id}; see `kvmarket document list`")
    if found[0][0] in NEEDED:
        raise CatalogueRefusedError(f"{document_id} is {found[0][0]}; delist it first")


def _purge(db: Connection, document_id: str) -> bool:
    keys = [(chunk.key,) for chunk in queries.chunks_of(db, document_id)]
    db.execute("DELETE FROM listing_chunk WHERE document_id = ?", (document_id,))
    db.executemany(
        "DELETE FROM chunk WHERE key = ? "
        "AND NOT EXISTS (SELECT 1 FROM listing_chunk WHERE listing_chunk.key = chunk.key)",
        keys,
    )
    db.execute("UPDATE listing SET purged = TRUE WHERE document_id = ?", (document_id,))
    return bool(keys)
