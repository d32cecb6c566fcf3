"""An append-only log of what administrators changed, over HTTP or by the command line.

It is a table of the market's database, so that a backup has it. The database refuses to change or
remove an entry.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import apsw
import msgspec

from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import UnavailableError

ROOM = "admin_log"
MIGRATIONS = (
    """
    CREATE TABLE admin_log (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        at_s REAL NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        details TEXT NOT NULL
    ) STRICT;
    CREATE TRIGGER admin_log_entries_are_final BEFORE UPDATE ON admin_log
    BEGIN SELECT RAISE(ABORT, 'an entry of the admin log never changes'); END;
    CREATE TRIGGER admin_log_entries_stay BEFORE DELETE ON admin_log
    BEGIN SELECT RAISE(ABORT, 'an entry of the admin log is never removed'); END;
    """,
)


class AdminEntry(msgspec.Struct, frozen=True):
    """One change: the actor is `cli:` and a user of the system, or an API key's id."""

    number: int
    at_s: float
    actor: str
    action: str
    details: dict[str, Any]


class AdminLog:
    """The log of one market's database; several threads and processes may append.

    Every method raises UnavailableError when the database cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as db:
            sqlite.migrate(db, ROOM, MIGRATIONS)

    def record(self, actor: str, action: str, details: Mapping[str, Any]) -> None:
        """Append an entry, durably; `details` are JSON values without secrets. Mutates.

        Call it before the change: without an entry there is no change.
        """
        encoded = msgspec.json.encode(details, order="sorted").decode()
        with self._open() as db:
            db.execute(
                "INSERT INTO admin_log (at_s, actor, action, details) VALUES (?, ?, ?, ?)",
                (time.time(), actor, action, encoded),
            )

    def entries(self, limit: int, before: int | None = None) -> list[AdminEntry]:
        """The newest entries first; with `before`, those with a smaller number."""
        with self._open() as db:
            rows = db.execute(
                "SELECT number, at_s, actor, action, details FROM admin_log "
                "WHERE ?1 IS NULL OR number < ?1 ORDER BY number DESC LIMIT ?2",
                (before, limit),
            ).fetchall()
        return [
            AdminEntry(number, at_s, actor, action, msgspec.json.decode(details))
            for number, at_s, actor, action, details in rows
        ]

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        # An administrator's change is rare: a connection for each keeps this free of locks.
        try:
            with contextlib.closing(sqlite.connect(self._path)) as db:
                yield db
        except apsw.Error as error:
            raise UnavailableError(
                f"the admin log in {self._path} cannot be used ({error}); see `kvmarket env`"
            ) from error
