"""Which shares of a chunk are stored, so that an old copy of it can be told from the new one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import apsw

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.listing import ON_OFFER
from vllm_kvmarket.catalogue.schema import Connections
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


def forget(db: apsw.Connection, keys: Iterable[bytes]) -> None:
    """Forget all shares of chunks whose files are gone; mutates the database."""
    db.executemany("DELETE FROM chunk_share WHERE key = ?", [(key,) for key in keys])


def _write(db: apsw.Connection, share: StoredShare) -> bool:
    """Insert or replace a share; whether that was a change."""
    values = (
        share.key,
        share.rank,
        share.world_size,
        share.layout,
        share.size_bytes,
        share.fingerprint,
    )
    db.execute(
        "INSERT INTO chunk_share VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (key, rank, world_size) DO UPDATE SET layout = excluded.layout, "
        "bytes = excluded.bytes, fingerprint = excluded.fingerprint "
        "WHERE fingerprint <> excluded.fingerprint OR bytes <> excluded.bytes",
        values,
    )
    return db.changes() > 0
