"""Which shares of a chunk are stored, in which layouts: what else is there is not the market's.

So an old copy of a chunk can be told from the new one, and what is deleted is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.listing import ON_OFFER
from vllm_kvmarket.core.database import Connection, Value
from vllm_kvmarket.core.stored_share import StoredShare

_SUM = "SELECT coalesce(sum(bytes), 0) FROM chunk_share"
_UNCOUNTED = "SELECT (SELECT coalesce(sum(bytes), 0) FROM chunk_share) - taken_bytes FROM catalogue"


class ChunkShares:
    """Reads and writes the shares of chunks; `refresh` is called after a change."""

    def __init__(self, connections: Connections, refresh: Callable[[], object]) -> None:
        self._db = connections
        self._refresh = refresh

    def note(self, shares: Sequence[StoredShare]) -> None:
        """Record shares that were stored; mutates the database.

        Where one replaces another, every process learns it with the listings that hold the chunk.
        """
        if not shares:
            return
        with self._db.transaction() as db, _counted(db, [share.key for share in shares]):
            for key in dict.fromkeys(share.key for share in shares if _write(db, share)):
                for name in queries.holders(db, key, ON_OFFER):
                    queries.touch(db, name)
        self._refresh()

    def of(self, keys: Iterable[bytes]) -> list[StoredShare]:
        """Return what is recorded of some chunks, in order of keys and ranks."""
        statement = (
            "SELECT key, rank, world_size, layout, bytes, fingerprint FROM chunk_share "
            "WHERE key = ? ORDER BY layout, world_size, rank"
        )
        with self._db.snapshot() as db:
            found = [queries.rows(db, statement, (key,)) for key in keys]
        return [StoredShare(*row) for share in found for row in share]

    def taken_bytes(self, asking: Collection[str] = (), *, fixed: bool = False) -> int:
        """Return the bytes that are taken in the store: what is there, and what is on its way.

        Each share counts until it is deleted, once, however many documents hold its chunk. What is
        on its way counts with what it has asked for, except where it is `asking` now. If `fixed`,
        only chunks of documents that are pinned, on their way or asking; only this reads a row for
        each share.
        """
        asking = list(asking) or [""]
        marks = ", ".join("?" * len(asking))
        shares = "SELECT taken_bytes FROM catalogue"
        values: Sequence[Value] = ()
        if fixed:
            shares = (
                f"{_SUM} WHERE key IN (SELECT key FROM listing JOIN listing_chunk "  # noqa: S608  # only question marks are put in
                "USING (document_id) WHERE state = 'publishing' OR state IN ('live', 'damaged') "
                f"AND (pinned OR document_id IN ({marks})))"
            )
            values = asking
        coming = (
            "SELECT coalesce(sum(stored_bytes), 0) FROM listing WHERE state = 'publishing' "  # noqa: S608  # the same
            f"AND NOT listed AND document_id NOT IN ({marks})"
        )
        with self._db.snapshot() as db:
            counted = queries.rows(db, shares, values) + queries.rows(db, coming, asking)
        return sum(int(count) for (count,) in counted)

    def uncounted_bytes(self) -> int:
        """Return what is taken beyond what is counted, 0 when all is well; reads all shares."""
        with self._db.snapshot() as db:
            ((found,),) = queries.rows(db, _UNCOUNTED)
        return int(found)

    def recount(self) -> None:
        """Count all shares anew; mutates the database. Others may write meanwhile."""
        if uncounted := self.uncounted_bytes():
            with self._db.transaction() as db:
                _count(db, uncounted)


def forget(db: Connection, keys: Sequence[bytes]) -> None:
    """Forget all shares of chunks whose files are gone; mutates the database."""
    with _counted(db, keys):
        db.executemany("DELETE FROM chunk_share WHERE key = ?", [(key,) for key in keys])


@contextmanager
def _counted(db: Connection, keys: Sequence[bytes]) -> Iterator[None]:
    """Count what changes inside of the shares of these chunks; mutates the database."""
    before = _bytes_of(db, keys)
    yield
    _count(db, _bytes_of(db, keys) - before)


def _count(db: Connection, more_bytes: int) -> None:
    db.execute("UPDATE catalogue SET taken_bytes = taken_bytes + ?", (more_bytes,))


def _bytes_of(db: Connection, keys: Sequence[bytes]) -> int:
    statement = f"{_SUM} WHERE key IN ({{}})"
    return sum(int(count) for (count,) in queries.rows_of_keys(db, statement, keys))


def _write(db: Connection, share: StoredShare) -> bool:
    """Insert or replace a share; whether that was a change."""
    values = (
        share.key,
        share.layout,
        share.rank,
        share.world_size,
        share.size_bytes,
        share.fingerprint,
    )
    statement = (
        "INSERT INTO chunk_share VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (key, layout, rank, world_size) DO UPDATE SET "
        "bytes = excluded.bytes, fingerprint = excluded.fingerprint "
        "WHERE chunk_share.fingerprint <> excluded.fingerprint "
        "OR chunk_share.bytes <> excluded.bytes RETURNING 1"
    )
    return bool(queries.rows(db, statement, values))
