"""PostgreSQL for the rooms: our SQL in its words, how it is reached, how tables are made there.

All tables are in the schema `kvmarket`.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from vllm_kvmarket.core.database import Bindings, BusyError, Connection, Room, Rows
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.sqlite import steps_from

try:
    import psycopg
    from psycopg import sql
except ImportError as missing:
    raise ConfigError(
        f"a market on PostgreSQL needs psycopg ({missing}); "
        "install it with `pip install vllm-kvmarket[postgres]`"
    ) from missing

# A server that is gone without a word is noticed within seconds, not after the kernel's hours.
OPTIONS: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "kvmarket",
    # Of several hosts, the one that takes writes: after a failover, the standby that was promoted.
    "target_session_attrs": "read-write",
    # Puts values into statements on this side. Where the server binds them, it has to guess the
    # type of each, and does not for `? IS NULL`.
    "cursor_factory": psycopg.ClientCursor,
}
# Durable whatever the server's default is. A client that stalls inside a transaction (a stopped
# process, a lost network) holds the others up no longer than this: the server rolls it back.
SETTINGS = (
    "SET search_path = kvmarket; SET synchronous_commit = on; "
    "SET idle_in_transaction_session_timeout = '10s'"
)
# An account's id may be "updated" so that its row can be locked; a trigger keeps the id. Balances,
# places in the log and sums change by the ledger's own functions only.
_GRANTS = """
REVOKE ALL ON ALL TABLES IN SCHEMA kvmarket FROM {role};
GRANT USAGE ON SCHEMA kvmarket TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA kvmarket TO {role};
REVOKE INSERT, UPDATE, DELETE ON kvmarket.schema_version, kvmarket.account, kvmarket.transfer,
    kvmarket.balance_part, kvmarket.log_leaf, kvmarket.numbering, kvmarket.period_sum FROM {role};
GRANT INSERT (id, kind, may_go_negative, currency), UPDATE (id) ON kvmarket.account TO {role};
GRANT INSERT (id, kind, debit, credit, amount_nano, pending_id, timeout_s, code, user_data,
    receipt_digest, created_at_s) ON kvmarket.transfer TO {role};
REVOKE UPDATE, DELETE ON kvmarket.receipt, kvmarket.receipt_line, kvmarket.admin_log,
    kvmarket.first_offer, kvmarket.audit, kvmarket.revoked_key FROM {role};
REVOKE INSERT, DELETE ON kvmarket.clock FROM {role};
REVOKE DELETE ON kvmarket.catalogue, kvmarket.listing, kvmarket.api_key,
    kvmarket.api_key_revision, kvmarket.signing_key FROM {role}
"""
_BEGIN_READING = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
# Only one process at a time makes tables; the number is arbitrary.
SCHEMA_LOCK = 0x6B766D61726B6574

_PARAMETERS = re.compile(r"%|\?|(?<![:\w]):([a-z_]\w*)| INDEXED BY \w+")
_TABLE_WORDS = (
    (r" STRICT(, WITHOUT ROWID)?;", ";"),
    (r"INTEGER NOT NULL DEFAULT 0 CHECK \(\w+ IN \(0, 1\)\)", "boolean NOT NULL DEFAULT false"),
    (r"INTEGER NOT NULL DEFAULT 1 CHECK \(\w+ IN \(0, 1\)\)", "boolean NOT NULL DEFAULT true"),
    (r"INTEGER PRIMARY KEY( AUTOINCREMENT)?,", "bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"),
    (r"\bINTEGER\b", "bigint"),
    (r"\bREAL\b", "double precision"),
    (r"\bBLOB\b", "bytea"),
    (r"\bTEXT\b", 'text COLLATE "C"'),
)
# Functions of SQLite that PostgreSQL names otherwise.
_WORDS = """
CREATE SCHEMA IF NOT EXISTS kvmarket;
CREATE TABLE IF NOT EXISTS kvmarket.schema_version (
    room text PRIMARY KEY,
    version integer NOT NULL
);
CREATE OR REPLACE FUNCTION kvmarket.hex(bytea) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT AS $$ SELECT encode($1, 'hex') $$;
CREATE OR REPLACE FUNCTION kvmarket.instr(text, text) RETURNS boolean
    LANGUAGE sql IMMUTABLE STRICT AS $$ SELECT strpos($1, $2) > 0 $$;
CREATE OR REPLACE FUNCTION kvmarket.unixepoch() RETURNS double precision
    LANGUAGE sql VOLATILE AS $$ SELECT extract(epoch FROM clock_timestamp())::double precision $$;
"""


@lru_cache(maxsize=512)
def translated(statement: str) -> bytes:
    """Return a statement in psycopg's words: its parameters, and no names of indexes to use."""

    def replace(found: re.Match[str]) -> str:
        if found[0] == "%":
            return "%%"
        if found[0] == "?":
            return "%s"
        return f"%({found[1]})s" if found[1] else ""

    return _PARAMETERS.sub(replace, statement).encode()


def translated_tables(statements: str) -> bytes:
    """Return statements that make SQLite's tables as ones that make PostgreSQL's."""
    for pattern, words in _TABLE_WORDS:
        statements = re.sub(pattern, words, statements)
    return statements.encode()


class PostgresConnection:
    """A database.Connection on PostgreSQL; `raw` is psycopg's."""

    def __init__(self, raw: psycopg.Connection[Any]) -> None:
        self.raw = raw

    def execute(self, statement: str, bindings: Bindings = (), /) -> Rows:
        """See database.Connection."""
        return self.raw.execute(translated(statement), bindings)

    def executemany(self, statement: str, bindings: Iterable[Bindings], /) -> None:
        """See database.Connection."""
        with self.raw.cursor() as cursor:
            cursor.executemany(translated(statement), bindings)


def connect(url: str, options: Mapping[str, Any] = OPTIONS) -> psycopg.Connection[Any]:
    """Open a connection without a transaction."""
    raw = psycopg.connect(url, autocommit=True, **options)
    raw.execute(SETTINGS)
    return raw


def without_password(url: str) -> str:
    """Where the database is, fit for a message."""
    facts = psycopg.conninfo.conninfo_to_dict(url)
    return f"{facts.get('dbname', '')} at {facts.get('host', 'the local socket')}"


def unusable(place: str, error: psycopg.Error) -> str:
    """What a room tells of PostgreSQL's error."""
    reason = " ".join(str(error).split())
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        hint = "run `kvmarket database init` as the database's owner"
    else:
        hint = "see whether PostgreSQL runs there and lets this user in"
    return f"the market's database {place} cannot be used ({reason}); {hint}"


def migrate(raw: psycopg.Connection[Any], room: Room) -> None:
    """Bring one room's tables to the newest version, in one transaction; see sqlite.migrate.

    Who may not make tables can use those that are there.
    """
    with raw.transaction():
        raw.execute("SET LOCAL lock_timeout = '60s'")  # many may open at once
        raw.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
        version = _version(raw, room.name)
        steps = steps_from(room.name, version, room.migrations, room.oldest)
        if not steps:
            return
        raw.execute(_WORDS)
        for number, migration in enumerate(steps):
            raw.execute(translated_tables(migration))
            if version == number == 0 and room.postgres_only:
                raw.execute(room.postgres_only.encode())
        raw.execute(
            "INSERT INTO schema_version VALUES (%s, %s) "
            "ON CONFLICT (room) DO UPDATE SET version = excluded.version",
            (room.name, room.oldest + len(room.migrations) - 1),
        )


def _version(raw: psycopg.Connection[Any], room: str) -> int:
    made = raw.execute("SELECT to_regclass('kvmarket.schema_version')").fetchone()
    if made is None or made[0] is None:
        return 0
    row = raw.execute("SELECT version FROM schema_version WHERE room = %s", (room,)).fetchone()
    return int(row[0]) if row else 0


def allow(url: str, role: str) -> None:
    """Let a role read and write the tables that are there; it can make, change or remove none.

    What never changes it can only add to. Raises ConfigError where that cannot be granted.
    """
    try:
        with psycopg.connect(url, autocommit=True, **OPTIONS) as raw, raw.transaction():
            for statement in _GRANTS.split(";\n"):
                raw.execute(sql.SQL(statement).format(role=sql.Identifier(role)))
    except psycopg.Error as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot let {role!r} use {without_password(url)} ({reason}); make the role, and give "
            "the URL of the database's owner"
        ) from error


class _Slot:
    """One connection, opened when it is needed and again after it broke; the lock guards it.

    It is a database.Connection outside transactions: each statement is of its own.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._raw: psycopg.Connection[Any] | None = None
        self.lock = threading.Lock()

    def get(self) -> psycopg.Connection[Any]:
        """Return the connection; opens one where there is none."""
        if self._raw is None or self._raw.closed:
            self._raw = connect(self._url)
        return self._raw

    def execute(self, statement: str, bindings: Bindings = (), /) -> psycopg.Cursor[Any]:
        """Run what reads or begins a transaction, on a new connection if the old one has broken."""
        raw, text = self.get(), translated(statement)
        try:
            return raw.execute(text, bindings)
        except psycopg.OperationalError:
            if not raw.closed:
                raise
            # Nothing was changed yet: the server may have been restarted since the last time.
            return self.get().execute(text, bindings)

    def executemany(self, statement: str, bindings: Iterable[Bindings], /) -> None:
        """Read once for each of many bindings."""
        for each in bindings:
            self.execute(statement, each)

    def begin(self, statement: str) -> psycopg.Connection[Any]:
        """Run what begins a transaction; its connection."""
        self.execute(statement)
        return self.get()

    @contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Roll back what was begun inside, if it ends with an error and the server is there."""
        try:
            yield
        except BaseException:
            if self._raw is not None:
                try:
                    self._raw.execute("ROLLBACK")
                except psycopg.Error:
                    self.close()
            raise

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._raw is not None:
            self._raw.close()
            self._raw = None


class PostgresDatabase:
    """See database.Database. Writers of a room take turns by an advisory lock.

    A connection that broke is opened again for the next transaction and for whatever is read, so
    that a server that comes back is used at once. When it breaks at a transaction's end, that may
    have been committed.
    """

    def __init__(self, url: str, room: Room) -> None:
        self.place = without_password(url)
        self._url = url
        self._room = room
        self._writer, self._reader = _Slot(url), _Slot(url)
        lock = f"SELECT pg_advisory_xact_lock({zlib.crc32(room.name.encode())})"
        begin = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout ="
        self._begin = f"{begin} {room.patience_ms}; {lock}"
        self._begin_if_free = f"{begin} 1; {lock}"
        try:
            with self._reported():
                migrate(self._writer.get(), room)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See Database."""
        for slot in (self._writer, self._reader):
            with slot.lock:
                slot.close()

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[Connection]:
        """See Database."""
        if not self._writer.lock.acquire(blocking=wait):
            raise BusyError("this process is writing to the market's database; try again")
        try:
            with self._reported(), self._writer.rolled_back():
                try:
                    raw = self._writer.begin(self._begin if wait else self._begin_if_free)
                except psycopg.errors.LockNotAvailable as error:
                    if wait:
                        raise
                    raise BusyError(f"{self.place} is being written to") from error
                yield PostgresConnection(raw)
                raw.execute("COMMIT")
        finally:
            self._writer.lock.release()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """See Database."""
        with self._reader.lock, self._reported():
            yield self._reader

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """See Database."""
        with self._reader.lock, self._reported(), self._reader.rolled_back():
            raw = self._reader.begin(_BEGIN_READING)
            yield PostgresConnection(raw)
            raw.execute("COMMIT")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn PostgreSQL's errors into the room's."""
        try:
            yield
        except psycopg.Error as error:
            raise self._room.unavailable(unusable(self.place, error)) from error
