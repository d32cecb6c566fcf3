"""The catalogue's connections to SQLite, in the market's home."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw

from vllm_kvmarket.catalogue.publisher_locks import LockedFile
from vllm_kvmarket.catalogue.schema import BEYOND_ROOM, BEYOND_SCHEMA, CATALOGUE
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.database import Connection

OWNERS_FOLDER = "publishing"
# A request waits for what such a connection reads.
READER_TIMEOUT_MS = 1_000


class SqliteConnections(sqlite.SqliteDatabase):
    """See connections.Connections."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, CATALOGUE)
        self.owner = LockedFile(path.parent / OWNERS_FOLDER)

    def close(self) -> None:
        """See Connections."""
        super().close()
        self.owner.close()

    def add_match_tables(self) -> None:
        """Make the tables for matches in the database; mutates the database."""
        with self._write_lock, self._reported():
            sqlite.migrate(self._writer, BEYOND_ROOM, (BEYOND_SCHEMA,))

    def open_reader(self) -> apsw.Connection:
        """Open one more connection, which cannot write; the caller closes it."""
        with self._reported():
            self._check_file()
            opened = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY)
            opened.set_busy_timeout(READER_TIMEOUT_MS)
            return opened

    @contextmanager
    def snapshot_of(self, reader: apsw.Connection) -> Iterator[apsw.Connection]:
        """Read through a connection of `open_reader` as of one moment, without waiting."""
        with self._reported():
            self._check_file()
            with reader:
                yield reader

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
