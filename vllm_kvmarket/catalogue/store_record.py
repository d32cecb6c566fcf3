"""Which store the catalogue's chunks are in, as its database records it."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.listing import NEEDED
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.errors import CatalogueRefusedError


class RecordedStore(NamedTuple):
    """An object store's URL and the id that is written in it; None for both: the disk alone."""

    url: str | None
    store_id: str | None


class StoreRecord:
    """Reads and writes the record; `store_id` is the store that this process uses."""

    def __init__(self, connections: Connections) -> None:
        self.store_id: str | None = None
        self._db = connections

    def read(self) -> RecordedStore:
        """Return what is recorded. Raises CatalogueUnavailableError."""
        with self._db.snapshot() as db:
            return _read(db)

    def is_current(self) -> bool:
        """Say whether the recorded store is the one that this process uses."""
        return self.read().store_id == self.store_id

    def write(self, record: RecordedStore, uploaded: Set[bytes] | None = None) -> bool:
        """Record an object store, and that this process uses it; mutates the database.

        With `uploaded`, the keys of all chunks that were uploaded to it: returns False, and records
        nothing, when a document needs another chunk by now. Raises CatalogueRefusedError while a
        document is being published: its chunks would be on the disk alone.
        """
        with self._db.transaction() as db:
            if uploaded is not None:
                if queries.being_published(db):
                    raise CatalogueRefusedError(
                        "a document is being published onto the disk; stop the market's engines "
                        "and run the command again"
                    )
                if queries.all_held(db, NEEDED) - uploaded:
                    return False
            db.execute("UPDATE catalogue SET store_url = ?, store_id = ?", record)
        self.store_id = record.store_id
        return True

    def check(self, db: Connection) -> None:
        """Refuse a new document when the chunks are in another store than this process uses."""
        recorded = _read(db)
        if recorded.store_id != self.store_id:
            raise CatalogueRefusedError(
                f"this market's chunks are in {recorded.url or 'its folder'} now; set "
                "object_store_url to it and restart this process"
            )


def _read(db: Connection) -> RecordedStore:
    return RecordedStore(*queries.rows(db, "SELECT store_url, store_id FROM catalogue")[0])
