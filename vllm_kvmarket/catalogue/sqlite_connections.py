"""The catalogue's connections to SQLite, in the market's home."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.publisher_locks import LockedFile
from vllm_kvmarket.catalogue.schema import CATALOGUE
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.database import Connection

OWNERS_FOLDER = "publishing"
# A request waits for what the connection for tokens reads.
READER_TIMEOUT_MS = 100


class SqliteConnections(sqlite.SqliteDatabase):
    """See connections.Connections."""

    is_near = True

    def __init__(self, path: Path) -> None:
        super().__init__(path, CATALOGUE)
        self.owner = LockedFile(path.parent / OWNERS_FOLDER)
        with self._reported():
            self._tokens_reader = sqlite.connect(path)
            self._tokens_reader.set_busy_timeout(READER_TIMEOUT_MS)
        self._tokens_lock = threading.Lock()

    def close(self) -> None:
        """See Connections."""
        with self._tokens_lock:
            self._tokens_reader.close()
        super().close()
        self.owner.close()

    def tokens_of(self, key: bytes) -> bytes | None:
        """See Connections."""
        with self._tokens_lock, self._reported():
            self._check_file()
            return queries.tokens_of(self._tokens_reader, key)

    @contextmanager
    def news(self, seen: int | None) -> Iterator[tuple[int, Connection] | None]:
        """See Connections. The number costs no read of the database."""
        with self.reading():
            # Changes with every commit by another connection.
            number = int(self._reader.pragma("data_version"))
            if number == seen:
                yield None
            else:
                with self._reader:
                    yield number, self._reader

    def wait_for_change(self, timeout_s: float, closing: threading.Event) -> bool:
        """See Connections."""
        return not closing.wait(timeout_s)
