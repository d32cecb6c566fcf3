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

import msgspec

from vllm_kvmarket.core.database import Connection, Room, open_database
from vllm_kvmarket.core.errors import UnavailableError

_TABLE = """
CREATE TABLE admin_log (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at_s REAL NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    details TEXT NOT NULL
) STRICT;
"""
_SQLITE_GUARDS = """
CREATE TRIGGER admin_log_entries_are_final BEFORE UPDATE ON admin_log
BEGIN SELECT RAISE(ABORT, 'an entry of the admin log never changes'); END;
CREATE TRIGGER admin_log_entries_stay BEFORE DELETE ON admin_log
BEGIN SELECT RAISE(ABORT, 'an entry of the admin log is never removed'); END;
"""
_POSTGRES_GUARDS = """
CREATE FUNCTION kvmarket.keep_admin_log() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE integrity_constraint_violation
        USING MESSAGE = 'an entry of the admin log is never changed or removed';
END $$;
CREATE TRIGGER admin_log_entries_are_final BEFORE UPDATE OR DELETE OR TRUNCATE ON admin_log
    FOR EACH STATEMENT EXECUTE FUNCTION kvmarket.keep_admin_log();
"""


def _unavailable(text: str) -> UnavailableError:
    return UnavailableError(f"the admin log is not there: {text}")


ADMIN_LOG = Room(
    "admin_log",
    (_TABLE,),
    _unavailable,
    sqlite_only=_SQLITE_GUARDS,
    postgres_only=_POSTGRES_GUARDS,
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

    def __init__(self, place: Path | str) -> None:
        self._place = place
        open_database(place, ADMIN_LOG).close()

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
                "WHERE :before IS NULL OR number < :before ORDER BY number DESC LIMIT :limit",
                {"before": before, "limit": limit},
            ).fetchall()
        return [
            AdminEntry(number, at_s, actor, action, msgspec.json.decode(details))
            for number, at_s, actor, action, details in rows
        ]

    @contextlib.contextmanager
    def _open(self) -> Iterator[Connection]:
        # An administrator's change is rare: a connection for each keeps this free of locks.
        with (
            contextlib.closing(open_database(self._place, ADMIN_LOG)) as database,
            database.transaction() as db,
        ):
            yield db
