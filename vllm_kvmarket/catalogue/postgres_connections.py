"""The catalogue's connections to PostgreSQL, which several machines share."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.publisher_lease import PublisherLease
from vllm_kvmarket.catalogue.schema import CATALOGUE
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.postgres_database import PostgresDatabase, connect

# How soon a process that waits for changes notices that it is to end.
_CLOSING_SEEN_S = 0.2
# How soon a server that was away is asked again to announce changes, however seldom one looks.
_LISTENS_AGAIN_S = 1.0


class PostgresConnections(PostgresDatabase):
    """See connections.Connections. Changes are announced by NOTIFY."""

    is_near = False

    def __init__(self, url: str) -> None:
        super().__init__(url, CATALOGUE)
        self._listening: psycopg.Connection[Any] | None = None
        self.owner = PublisherLease(partial(connect, url))

    def close(self) -> None:
        """See Connections. The thread that waits for changes has ended."""
        self.owner.close()
        if self._listening is not None:
            self._listening.close()
        super().close()

    def tokens_of(self, key: bytes) -> bytes | None:
        """See Connections."""
        with self.reading() as db:
            return queries.tokens_of(db, key)

    @contextmanager
    def news(self, seen: int | None) -> Iterator[tuple[int, Connection] | None]:
        """See Connections. The number is that of the catalogue's last change."""
        with self.snapshot() as db:
            ((revision,),) = db.execute("SELECT revision FROM catalogue").fetchall()
            yield None if revision == seen else (revision, db)

    def wait_for_change(self, timeout_s: float, closing: threading.Event) -> bool:
        """See Connections. While the server is away it is a short pause."""
        until_s = time.monotonic() + timeout_s
        try:
            if self._listening is None:
                self._listening = connect(self._url)
                self._listening.execute("LISTEN kvmarket_catalogue")
                # What was announced before may have been missed.
                return not closing.is_set()
            while (left_s := until_s - time.monotonic()) > 0 and not closing.is_set():
                wait_s = min(left_s, _CLOSING_SEEN_S)
                readable, _, _ = select.select([self._listening], [], [], wait_s)
                if readable and any(True for _ in self._listening.notifies(timeout=0)):
                    break
        except (psycopg.Error, OSError):
            if self._listening is not None:
                self._listening.close()
                self._listening = None
            closing.wait(max(0.0, min(until_s - time.monotonic(), _LISTENS_AGAIN_S)))
        return not closing.is_set()
