"""The index's file: a SQLite database beside the market's, for all processes of one machine.

What one process commits, the others read at once. What it has is derived: a crash of the machine
may take back the last changes, which are then made again, and a file that cannot be read is
deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import apsw

from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.durable_files import make_private
from vllm_kvmarket.core.errors import CatalogueUnavailableError, ConfigError

# What they have says first_offers.
TABLES = (
    "names", "listings", "begins", "starts", "waiting", "points", "owners", "ends", "facts",
)  # fmt: skip
_DATA, _IN_USE = "index.sqlite", "in-use"
# An index's folder, and one that was lost while a process died.
_FOLDER = re.compile(r"[0-9a-f]{32}(\.lost-\d+)?")
_SCHEMA = "".join(
    f"CREATE TABLE IF NOT EXISTS {table} (key BLOB PRIMARY KEY, value BLOB NOT NULL) "
    "STRICT, WITHOUT ROWID;"
    for table in TABLES
)
_GET = {table: f"SELECT value FROM {table} WHERE key = ?" for table in TABLES}  # noqa: S608  # ours
_PUT = {table: f"INSERT OR REPLACE INTO {table} VALUES (?, ?)" for table in TABLES}  # noqa: S608  # ours
_DELETE = {table: f"DELETE FROM {table} WHERE key = ?" for table in TABLES}  # noqa: S608  # ours
_SCAN = {
    table: f"SELECT key, value FROM {table} WHERE key BETWEEN ? AND ? ORDER BY key LIMIT ?"  # noqa: S608  # ours
    for table in TABLES
}
_BACKWARDS = {
    table: f"SELECT key, value FROM {table} WHERE key > ? AND key <= ? ORDER BY key DESC"  # noqa: S608  # ours
    for table in TABLES
}
# Longer than every key.
_BEHIND = 64
_MOUNTS = Path("/proc/self/mountinfo")
_NETWORKS = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "gpfs", "fuse.glusterfs",
    "fuse.sshfs",
})  # fmt: skip
_UNREADABLE = (apsw.CorruptError, apsw.NotADBError, apsw.SQLError, apsw.FormatError)


class DamagedError(Exception):
    """The file is not what was written."""


class IndexUnavailableError(CatalogueUnavailableError):
    """The file cannot be used now: a full disk, for one."""


class IndexRows:
    """The tables, as of one moment: one transaction. Keys are ordered as bytes."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return a row's value."""
        for (value,) in self._db.execute(_GET[table], (key,)):
            assert isinstance(value, bytes)
            return value
        return None

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Write a row; mutates."""
        self._db.execute(_PUT[table], (key, value))

    def delete(self, table: str, key: bytes) -> None:
        """Remove a row, if there is one; mutates."""
        self._db.execute(_DELETE[table], (key,))

    def scan(self, table: str, prefix: bytes, most: int | None = None) -> list[tuple[bytes, bytes]]:
        """Return the (first `most`) rows whose keys begin with `prefix`, in order."""
        bounds = prefix, prefix.ljust(_BEHIND, b"\xff"), -1 if most is None else most
        return cast("list[tuple[bytes, bytes]]", self._db.execute(_SCAN[table], bounds).fetchall())

    def backwards(self, table: str, above: bytes, up_to: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield the rows with keys above one and up to another, the last one first."""
        return cast(
            "Iterator[tuple[bytes, bytes]]", self._db.execute(_BACKWARDS[table], (above, up_to))
        )


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise DamagedError(str(error)) from error
    except (apsw.Error, OSError) as error:
        raise IndexUnavailableError(
            f"the index in {folder} cannot be used ({error}); see `kvmarket env`"
        ) from error


def _check_is_local(folder: Path) -> None:
    """Raise ConfigError for a folder on a network disk, where machines would spoil one file."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
        inside = [each for each in mounts if folder.resolve().is_relative_to(each[4])]
        kind = max(inside, key=lambda each: len(each[4]))
        kind_name = kind[kind.index("-") + 1]
        if kind_name in _NETWORKS:
            raise ConfigError(
                f"the index cannot be in {folder}, which is on a network disk ({kind_name}); set "
                "index_folder to a folder on this machine's own disk"
            )


def _check_is_ours(folder: Path) -> None:
    """Raise ConfigError where somebody else may have put an index with prices of their own."""
    status = folder.lstat()
    is_ours = status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode)
    if folder.parent.stat().st_mode & 0o022 and not is_ours:
        raise ConfigError(
            f"the index cannot be in {folder}, which another user has made; set index_folder to a "
            "folder that nobody else can write to"
        )


def _use(folder: Path) -> int:
    """Make a folder if needed; nobody removes it as long as the returned descriptor is open."""
    while True:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_is_ours(folder)
        make_private(folder)
        descriptor = os.open(folder / _IN_USE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), (folder / _IN_USE).stat()):
                return descriptor
        # Somebody removed it just now.
        os.close(descriptor)


def _identity_of(folder: Path) -> tuple[int, int] | None:
    """Which file is there, None for none."""
    try:
        status = (folder / _DATA).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class IndexFile:
    """One process's use of an index's file; thread-safe. Made when it is not there, and made again
    when it cannot be read.

    It goes on with what it opened, also when that `is_lost`. Raises ConfigError for a folder on a
    network disk or of another user; DamagedError for a file that must be discarded, and
    IndexUnavailableError for one that cannot be used now.
    """

    def __init__(self, folder: Path) -> None:
        _check_is_local(folder)
        _remove_unused(folder)
        self._folder = folder
        self._idle: list[apsw.Connection] = []
        self._is_closed = False
        self._write_lock = threading.Lock()
        try:
            self._open()
        except DamagedError:
            self._remove()
            self._open()

    def _open(self) -> None:
        with _reported(self._folder):
            self._in_use = _use(self._folder)
            try:
                self._writer = self._connect()
                if not self._writer.execute("SELECT 1 FROM sqlite_schema").fetchall():
                    self._writer.execute(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT")
                self._identity = _identity_of(self._folder)
            except BaseException:
                os.close(self._in_use)
                raise

    def _connect(self) -> apsw.Connection:
        db = sqlite.connect(self._folder / _DATA)
        db.pragma("synchronous", "normal")
        db.pragma("secure_delete", False)
        return db

    def _remove(self) -> None:
        aside = self._folder.with_name(f"{self._folder.name}.lost-{os.getpid()}")
        with contextlib.suppress(OSError):
            self._folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def close(self) -> None:
        """Close what is open; what is being read is closed when it has been read."""
        if self._is_closed:
            return
        self._is_closed = True
        with self._write_lock:
            for db in (self._writer, *self._idle):
                db.close()
            self._idle.clear()
        os.close(self._in_use)

    @property
    def is_lost(self) -> bool:
        """Whether it is not there any more; perhaps another one is."""
        return self._identity != _identity_of(self._folder)

    def discard(self) -> None:
        """Remove the file, if it is there still."""
        if not self.is_lost:
            self._remove()

    @contextmanager
    def reading(self) -> Iterator[IndexRows]:
        """Read the rows as of one moment; waits for nobody."""
        with _reported(self._folder):
            try:
                db = self._idle.pop()
            except IndexError:
                db = self._connect()
            try:
                db.execute("BEGIN")
                yield IndexRows(db)
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if self._is_closed:
                    db.close()
                else:
                    self._idle.append(db)

    @contextmanager
    def writing(self) -> Iterator[IndexRows]:
        """Change the rows, all or nothing; one writer at a time on the machine."""
        with _reported(self._folder), self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield IndexRows(self._writer)
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")


def _remove_unused(folder: Path) -> None:
    """Remove other indexes beside this one that no process has open, and nothing else."""
    for other in folder.parent.glob("*") if folder.parent.is_dir() else ():
        if other.name == folder.name or not _FOLDER.fullmatch(other.name):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(other / _IN_USE, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)
            finally:
                os.close(descriptor)
