"""The market's SQLite database: how it is opened, and how its tables are made.

The catalogue and the ledger keep their tables in one file, each with its own schema version.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import apsw

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


def refuse_newer(room: str, version: int, known: int) -> None:
    """Raise ConfigError for tables that a newer kvmarket has made: older code would spoil them."""
    if version > known:
        raise ConfigError(
            f"the {room} tables were made by a newer kvmarket (version {version}, this one knows "
            f"{known}); install that version of vllm-kvmarket, or open another home or database"
        )


def migrate(connection: apsw.Connection, room: str, migrations: Sequence[str]) -> None:
    """Bring one room's tables to the newest version, in one transaction; mutates the database.

    `migrations[n]` is the SQL that leads from version n to n + 1. Entries are only ever appended.
    Raises ConfigError for tables of a newer version, and leaves them as they are.
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
        refuse_newer(room, version, len(migrations))
        for migration in migrations[version:]:
            connection.execute(migration)
        connection.execute(
            "INSERT INTO schema_version VALUES (?, ?) "
            "ON CONFLICT (room) DO UPDATE SET version = excluded.version",
            (room, len(migrations)),
        )
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
