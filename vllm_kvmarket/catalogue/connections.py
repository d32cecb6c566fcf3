"""The catalogue's two connections to the market's database: one writes, one reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw

from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import CatalogueUnavailableError

# A request waits for what such a connection reads.
READER_TIMEOUT_MS = 1_000


class BusyError(CatalogueUnavailableError):
    """Someone else is writing, and waiting was not wanted."""


class Connections:
    """Thread-safe; whoever reads never waits for whoever waits to write.

    Every method raises CatalogueUnavailableError when the database cannot be used.
    """

    def __init__(self, path: Path, room: str, migrations: Sequence[str]) -> None:
        self._path = path
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        with self._reported():
            self._writer = sqlite.connect(path)
            sqlite.migrate(self._writer, room, migrations)
            self._reader = sqlite.connect(path)
        self._file = self._file_identity()

    def migrate(self, room: str, migrations: Sequence[str]) -> None:
        """Bring the tables of one more room to the newest version; mutates the database."""
        with self._write_lock, self._reported():
            sqlite.migrate(self._writer, room, migrations)

    def open_reader(self) -> apsw.Connection:
        """Open one more connection, which cannot write; whoever asked for it closes it."""
        with self._reported():
            self._check_file()
            opened = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY)
            opened.set_busy_timeout(READER_TIMEOUT_MS)
            return opened

    @contextmanager
    def snapshot_of(self, reader: apsw.Connection) -> Iterator[apsw.Connection]:
        """Read through a connection of `open_reader` as of one moment; waits for no one else."""
        with self._reported():
            self._check_file()
            with reader:
                yield reader

    def close(self) -> None:
        """Release the database, once what is under way is done."""
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[apsw.Connection]:
        """Change the database, durably and all or nothing.

        Raises BusyError where someone else is writing and `wait` is false.
        """
        with self._writing(wait), self._reported():
            self._check_file()
            self._begin(wait)
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back already after some errors, a full disk for one.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def _writing(self, wait: bool) -> Iterator[None]:
        if not self._write_lock.acquire(blocking=wait):
            raise BusyError("this process is writing to the market's database; try again")
        try:
            yield
        finally:
            self._write_lock.release()

    def _begin(self, wait: bool) -> None:
        if not wait:
            self._writer.set_busy_timeout(0)
        try:
            self._writer.execute("BEGIN IMMEDIATE")
        except apsw.BusyError as error:
            if wait:
                raise
            raise BusyError(f"the market's database {self._path} is being written to") from error
        finally:
            if not wait:
                self._writer.set_busy_timeout(sqlite.BUSY_TIMEOUT_MS)

    @contextmanager
    def reading(self) -> Iterator[apsw.Connection]:
        """Read the database statement by statement, each as of its own moment."""
        with self._read_lock, self._reported():
            self._check_file()
            yield self._reader

    @contextmanager
    def snapshot(self) -> Iterator[apsw.Connection]:
        """Read the database as of one moment, whatever others write meanwhile."""
        with self.reading() as db, db:
            yield db

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn the database's errors into ours."""
        try:
            yield
        except apsw.Error as error:
            raise CatalogueUnavailableError(
                f"the market's database {self._path} cannot be used ({error}); see `kvmarket env`"
            ) from error

    def _file_identity(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise CatalogueUnavailableError(
                f"the market's database {self._path} is gone ({error.strerror}); restore it"
            ) from None
        return status.st_dev, status.st_ino

    def _check_file(self) -> None:
        """Raise CatalogueUnavailableError unless the open database is the one that is there.

        SQLite would go on reading and writing a deleted file.
        """
        if self._file_identity() != self._file:
            raise CatalogueUnavailableError(
                f"the market's database {self._path} was replaced; restart this process"
            )
