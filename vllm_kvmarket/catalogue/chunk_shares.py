"""Which shares of a chunk are stored, so that an old copy of it can be told from the new one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.listing import ON_OFFER
from vllm_kvmarket.core.database import Connection, Value
from vllm_kvmarket.core.stored_share import StoredShare


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
        with self._db.transaction() as db:
            for key in dict.fromkeys(share.key for share in shares if _write(db, share)):
                for name in queries.holders(db, key, ON_OFFER):
                    queries.touch(db, name)
        self._refresh()

    def of(self, keys: Iterable[bytes]) -> list[StoredShare]:
        """Return what is recorded of some chunks, in order of keys and ranks."""
        statement = (
            "SELECT key, rank, world_size, layout, bytes, fingerprint FROM chunk_share "
            "WHERE key = ? ORDER BY world_size, rank"
        )
        with self._db.snapshot() as db:
            found = [queries.rows(db, statement, (key,)) for key in keys]
        return [StoredShare(*row) for share in found for row in share]

    def needed_bytes(self, asking: Collection[str] = (), *, fixed: bool = False) -> int:
        """Return the bytes in the store that this home's documents on offer or on their way need.

        Each share counts once, however many documents hold its chunk. What is on its way counts
        with what it has asked for, except where it is `asking` now. Documents whose shares were
        never recorded count with what they wrote. If `fixed`, only those that are pinned, on their
        way or asking. Reads a row for each of their chunks.
        """
        asking = list(asking) or [""]
        marks = ", ".join("?" * len(asking))
        needed = (
            "NOT adopted AND (state = 'publishing' OR state IN ('live', 'damaged') "
            f"AND (pinned OR NOT ? OR document_id IN ({marks})))"
        )
        shares = (
            "SELECT coalesce(sum(bytes), 0) FROM chunk_share WHERE key IN "  # noqa: S608  # the same
            f"(SELECT key FROM listing JOIN listing_chunk USING (document_id) WHERE {needed})"
        )
        others = (
            f"SELECT coalesce(sum(stored_bytes), 0) FROM listing WHERE {needed} "  # noqa: S608  # the same
            f"AND NOT (state = 'publishing' AND document_id IN ({marks})) "
            "AND (state = 'publishing' AND NOT listed OR NOT EXISTS (SELECT 1 FROM listing_chunk "
            "JOIN chunk_share USING (key) WHERE listing_chunk.document_id = listing.document_id))"
        )
        values: tuple[Value, ...] = (fixed, *asking)
        with self._db.snapshot() as db:
            counted = queries.rows(db, shares, values)
            counted += queries.rows(db, others, (*values, *asking))
        return sum(int(count) for (count,) in counted)


def forget(db: Connection, keys: Iterable[bytes]) -> None:
    """Forget all shares of chunks whose files are gone; mutates the database."""
    db.executemany("DELETE FROM chunk_share WHERE key = ?", [(key,) for key in keys])


def _write(db: Connection, share: StoredShare) -> bool:
    """Insert or replace a share; whether that was a change."""
    values = (
        share.key,
        share.rank,
        share.world_size,
        share.layout,
        share.size_bytes,
        share.fingerprint,
    )
    statement = (
        "INSERT INTO chunk_share VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (key, rank, world_size) DO UPDATE SET layout = excluded.layout, "
        "bytes = excluded.bytes, fingerprint = excluded.fingerprint "
        "WHERE chunk_share.fingerprint <> excluded.fingerprint "
        "OR chunk_share.bytes <> excluded.bytes RETURNING 1"
    )
    return bool(queries.rows(db, statement, values))
