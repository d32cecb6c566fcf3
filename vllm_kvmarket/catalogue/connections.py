"""The catalogue's connections to its database: SQLite in the home, or PostgreSQL."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from vllm_kvmarket.core.database import Connection, Database


class Owner(Protocol):
    """One process (or one catalogue in it) that publishes or deletes.

    Callers hold a transaction, so that no one looks between a name's announcement and its use.
    """

    name: str

    @property
    def is_certain(self) -> bool:
        """Whether nobody can take this process for dead within the next seconds."""

    def announce(self, db: Connection) -> None:
        """Show others that this process lives, until closed."""

    def is_alive(self, db: Connection, name: str) -> bool:
        """Say whether the owner of that name has announced itself and not ended since."""

    def close(self) -> None:
        """Show others that this process has ended."""


class Connections(Database, Protocol):
    """What the catalogue asks of its database beside transactions."""

    @property
    def owner(self) -> Owner:
        """This process as others see it."""

    @property
    def is_near(self) -> bool:
        """Whether it is on this machine, so that a read of one row takes microseconds."""

    def tokens_of(self, key: bytes) -> bytes | None:
        """Return a chunk's packed tokens, if they are stored; waits for no other reading."""

    def news(self, seen: int | None) -> AbstractContextManager[tuple[int, Connection] | None]:
        """Read the database as of one moment, with a number for what it has now.

        None where that is the number that was `seen` before: then nothing has changed.
        """

    def wait_for_change(self, timeout_s: float, closing: threading.Event) -> bool:
        """Wait until something may have changed, but no longer; False once `closing` is set."""


def open_connections(place: Path | str) -> Connections:
    """Open the database, a file's path or a `postgresql://` URL, and make its tables if needed."""
    if isinstance(place, Path):
        from vllm_kvmarket.catalogue.sqlite_connections import SqliteConnections

        return SqliteConnections(place)
    from vllm_kvmarket.catalogue.postgres_connections import PostgresConnections

    return PostgresConnections(place)
