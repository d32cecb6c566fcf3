"""Which publishing processes are alive, where several machines share the database.

Each has a row with the time until which it is believed; the server's clock decides. A thread of its
own renews it, so that neither a long transaction nor a short absence of the server ends it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psycopg

from vllm_kvmarket.core.database import Connection

LEASE_S = 30.0
RENEWED_EVERY_S = 5.0

_RENEW = (
    "INSERT INTO publisher_lease VALUES (%s, unixepoch()) "
    "ON CONFLICT (name) DO UPDATE SET renewed_at_s = excluded.renewed_at_s"
)


class PublisherLease:
    """See connections.Owner."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]]) -> None:
        self._connect = connect
        self._raw: psycopg.Connection[Any] | None = None
        self._closing = threading.Event()
        self._renewer: threading.Thread | None = None
        self._renewed_at_s = float("-inf")
        self.name = uuid.uuid4().hex

    @property
    def is_certain(self) -> bool:
        """See connections.Owner."""
        return time.monotonic() < self._renewed_at_s + LEASE_S / 2

    def announce(self, db: Connection) -> None:
        """See connections.Owner. Forgets processes that have died."""
        started_at_s = time.monotonic()
        db.execute("DELETE FROM publisher_lease WHERE renewed_at_s < unixepoch() - ?", (LEASE_S,))
        db.execute(_RENEW.replace("%s", "?"), (self.name,))
        self._renewed_at_s = started_at_s
        if self._renewer is None:
            self._renewer = threading.Thread(
                target=self._renew_often, name="kvmarket-lease", daemon=True
            )
            self._renewer.start()

    def is_alive(self, db: Connection, name: str) -> bool:
        """See connections.Owner."""
        statement = (
            "SELECT 1 FROM publisher_lease WHERE name = ? AND renewed_at_s >= unixepoch() - ?"
        )
        return bool(db.execute(statement, (name, LEASE_S)).fetchall())

    def close(self) -> None:
        """See connections.Owner."""
        self._closing.set()
        if self._renewer is not None:
            self._renewer.join()

    def _renew_often(self) -> None:
        while not self._closing.wait(RENEWED_EVERY_S):
            self._run(_RENEW)
        self._run("DELETE FROM publisher_lease WHERE name = %s")
        if self._raw is not None:
            self._raw.close()

    def _run(self, statement: str) -> None:
        started_at_s = time.monotonic()
        try:
            if self._raw is None or self._raw.closed:
                self._raw = self._connect()
            self._raw.execute(statement.encode(), (self.name,))
        except psycopg.Error:
            # The server is away: the next time is soon, and the lease longer.
            return
        self._renewed_at_s = started_at_s
