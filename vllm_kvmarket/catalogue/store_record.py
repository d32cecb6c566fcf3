"""Which store the catalogue's chunks are in, as its database records it."""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.listing import NEEDED
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.errors import CatalogueRefusedError


class StoreRecord:
    """Reads and writes the record; `url` is the object store that this process uses, None for the
    disk alone.
    """

    def __init__(self, connections: Connections) -> None:
        self.url: str | None = None
        self._db = connections

    def read(self) -> str | None:
        """Return the URL that is recorded. Raises CatalogueUnavailableError."""
        with self._db.snapshot() as db:
            return _column(db, "store_url")

    def market_id(self) -> str:
        """Return what this market writes into its object store."""
        with self._db.snapshot() as db:
            return str(_column(db, "store_id"))

    def is_current(self) -> bool:
        """Say whether this process knows where the chunks are: in an object store, or not."""
        return (self.read() is None) == (self.url is None)

    def write(self, url: str | None, uploaded: Set[bytes] | None = None) -> bool:
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
            db.execute("UPDATE catalogue SET store_url = ?", (url,))
        self.url = url
        return True

    def check(self, db: Connection) -> None:
        """Refuse a new document when an object store was added since this process began."""
        recorded = _column(db, "store_url")
        if (recorded is None) != (self.url is None):
            raise CatalogueRefusedError(
                f"this market's chunks are in {recorded or 'its folder'} now; set "
                "object_store_url to it and restart this process"
            )


def _column(db: Connection, name: Literal["store_url", "store_id"]) -> str | None:
    found: str | None = queries.rows(db, f"SELECT {name} FROM catalogue")[0][0]  # noqa: S608  # names are ours
    return found
