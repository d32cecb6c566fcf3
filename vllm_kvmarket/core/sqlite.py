"""The market's SQLite database: how it is opened, and how its tables are made.

All rooms keep their tables in one file, each with its own schema version.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw

from vllm_kvmarket.core.database import BusyError, Connection, Room
from vllm_kvmarket.core.durable_files import make_private
from vllm_kvmarket.core.errors import ConfigError

BUSY_TIMEOUT_MS = 10_000
LOG_TIMEOUT_MS = 200


def connect(path: Path) -> apsw.Connection:
    """Open (and create) the market's database, for its owner alone and for several processes.

    WAL lets readers go on beside one writer; synchronous=FULL makes a commit durable before it
    returns. Source: https://www.sqlite.org/wal.html.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite gives its -wal and -shm files the database's mode. An existing database must not be
    # opened here: closing it would drop the locks of this process's other connections.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    for suffix in ("", "-wal", "-shm"):
        make_private(path.with_name(path.name + suffix))
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    connection.pragma("foreign_keys", True)
    # Documents' tokens are deleted by more than one statement: all of them overwrite with zeros.
    connection.pragma("secure_delete", True)
    return connection


def empty_log(path: Path) -> bool:
    """Take what the write-ahead log still has of deleted rows out of it; whether that was done.

    Not while someone else reads or writes for longer than a moment. Raises apsw.Error.
    """
    connection = apsw.Connection(str(path))
    try:
        connection.set_busy_timeout(LOG_TIMEOUT_MS)
        # A connection that has read nothing does not know that there is a log.
        connection.pragma("schema_version")
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except (apsw.BusyError, apsw.LockedError):
        return False
    finally:
        connection.close()
    return True


def steps_from(room: str, version: int, migrations: Sequence[str], oldest: int = 1) -> list[str]:
    """Return what brings tables of this version (0: none) to the newest; see database.Room.

    Raises ConfigError for tables that a newer kvmarket has made, which older code would spoil, and
    for those that are too old.
    """
    known = oldest + len(migrations) - 1
    if 0 < version < oldest or version > known:
        age, known = ("a newer", known) if version > known else ("an older", oldest)
        raise ConfigError(
            f"the {room} tables were made by {age} kvmarket (version {version}, this one knows "
            f"{known}); install that version of vllm-kvmarket, or open another home or database"
        )
    return list(migrations[version - oldest + 1 if version else 0 :])


def migrate(
    connection: apsw.Connection, room: str, migrations: Sequence[str], oldest: int = 1
) -> None:
    """Bring one room's tables to the newest version, in one transaction; mutates the database.

    Raises ConfigError as `steps_from` does, and leaves the tables as they are.
    """
    # BEGIN IMMEDIATE takes the write lock first, so that two processes never migrate at once.
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_version "
            "(room TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT"
        )
        row = connection.execute(
            "SELECT version FROM schema_version WHERE room = ?", (room,)
        ).fetchone()
        version = row[0] if row else 0
        for migration in steps_from(room, version, migrations, oldest):
            connection.execute(migration)
        connection.execute(
            "INSERT INTO schema_version VALUES (?, ?) "
            "ON CONFLICT (room) DO UPDATE SET version = excluded.version",
            (room, oldest + len(migrations) - 1),
        )
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


class SqliteDatabase:
    """See database.Database: one connection writes, one reads."""

    def __init__(self, path: Path, room: Room) -> None:
        self.place = str(path)
        self._path = path
        self._room = room
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        first, *later = room.migrations
        with self._reported():
            self._writer = connect(path)
            migrate(self._writer, room.name, (first + room.sqlite_only, *later), room.oldest)
            self._writer.set_busy_timeout(room.patience_ms)
            self._reader = connect(path)
        self._file = self._file_identity()

    def close(self) -> None:
        """See Database."""
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[Connection]:
        """See Database."""
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
                self._writer.set_busy_timeout(self._room.patience_ms)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """See Database."""
        with self._read_lock, self._reported():
            self._check_file()
            yield self._reader

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """See Database."""
        with self.reading(), self._reader:
            yield self._reader

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn SQLite's errors into the room's."""
        try:
            yield
        except apsw.Error as error:
            raise self._room.unavailable(
                f"the market's database {self._path} cannot be used ({error}); see `kvmarket env`"
            ) from error

    def _file_identity(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise self._room.unavailable(
                f"the market's database {self._path} is gone ({error.strerror}); restore it"
            ) from None
        return status.st_dev, status.st_ino

    def _check_file(self) -> None:
        """Raise the room's error unless the open database is the one that is there.

        SQLite would go on reading and writing a deleted file.
        """
        if self._file_identity() != self._file:
            raise self._room.unavailable(
                f"the market's database {self._path} was replaced; restart this process"
            )
