"""The ledger in PostgreSQL: for a market that several machines share.

A group takes two calls: `kvmarket.find` takes the turn and looks up what the rules need,
`kvmarket.keep` is the one server-side function that writes what they decided, all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import LedgerError, LedgerUnavailableError
from vllm_kvmarket.ledger import postgres_schema
from vllm_kvmarket.ledger.group_commit import malformed, unavailable
from vllm_kvmarket.ledger.known_funds import KnownFunds
from vllm_kvmarket.ledger.model import GRACE_S, Account, Receipt, Result, Transfer
from vllm_kvmarket.ledger.storage import (
    Batch,
    Everything,
    KeyedRequest,
    NewReceipt,
    apply_group,
    wanted,
)
from vllm_kvmarket.ledger.working_set import Found, GroupBooks

try:
    import psycopg
    import psycopg_pool
    from psycopg import sql
    from psycopg.rows import class_row, scalar_row
except ImportError as missing:
    raise LedgerError(
        f"a ledger on PostgreSQL needs psycopg ({missing}); "
        "install it with `pip install vllm-kvmarket[postgres]`"
    ) from missing

ROOM = "ledger"
READERS = 8
READ_TIMEOUT_S = 5.0
# A server that is gone without a word is noticed within seconds, not after the kernel's hours.
CONNECTION: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "kvmarket-ledger",
}
# Durable whatever the server's default is. A writer that stalls between its two calls (a stopped
# process, a lost network) holds the others up no longer than this: the server rolls it back.
WRITER_SETTINGS = (
    "SET synchronous_commit = on; SET idle_in_transaction_session_timeout = '5s'; "
    "SET lock_timeout = '10s'"
)
# Only one process at a time makes the tables; the number is arbitrary.
SCHEMA_LOCK = 0x6B766D61726B6574
ACCOUNT_COLUMNS = ", ".join(Account.__struct_fields__)
TRANSFER_COLUMNS = ", ".join(
    "coalesce(pending_id, '') AS pending_id" if field == "pending_id" else field
    for field in Transfer.__struct_fields__
)


class Changes(msgspec.Struct, frozen=True):
    """What a group changed, as the function kvmarket.keep expects it."""

    transfers: list[Transfer]
    dues: dict[str, float | None]
    receipts: list[dict[str, Any]]
    documents: list[dict[str, str]]
    now_s: float


class PostgresStorage:
    """See storage.Storage. Any number of processes and machines may share the database."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._place = _without_password(url)
        self._writing: psycopg.Connection[Any] | None = None
        self.funds = KnownFunds()
        with self._reported():
            with self._writer().transaction():
                _make_tables(self._writer())
            self._pool = psycopg_pool.ConnectionPool(
                url,
                kwargs={**CONNECTION, "autocommit": True},
                min_size=0,
                max_size=READERS,
                timeout=READ_TIMEOUT_S,
                # The next reader tries again at once: no growing pauses while the server is away.
                reconnect_timeout=0.0,
                check=psycopg_pool.ConnectionPool.check_connection,
                name="kvmarket-ledger",
                open=True,
            )

    def close(self) -> None:
        self._drop_writer()
        self._pool.close()

    def write(self, group: Sequence[Batch]) -> list[list[Result]]:
        try:
            return self._write(self._writer(), group)
        except Exception as error:
            # Whatever state the connection is in: the next attempt starts with a new one.
            self._drop_writer()
            if _is_away(error):
                raise unavailable(error) from error
            raise malformed(error) from error

    def _write(self, db: psycopg.Connection[Any], group: Sequence[Batch]) -> list[list[Result]]:
        looked_for = msgspec.json.encode(wanted(group)).decode()
        # Two round trips a group: BEGIN goes with the first call, COMMIT with the second.
        with db.pipeline(), db.transaction():
            row = db.execute("SELECT kvmarket.find(%s)::text", (looked_for,)).fetchone()
            assert row is not None
            found = msgspec.json.decode(row[0], type=Found)
            books = GroupBooks(found)
            answers, receipts = apply_group(books, group, found.now_s)
            changes = Changes(
                books.new_transfers,
                books.changed_dues,
                [_receipt_row(each) for each in receipts],
                [
                    {"document_id": line.document_id, "receipt_id": each.receipt.id}
                    for each in receipts
                    for line in each.receipt.lines
                ],
                found.now_s,
            )
            if changes.transfers:
                text = msgspec.json.encode(changes).decode()
                db.execute("SELECT kvmarket.keep(%s)", (text,))
        self.funds.learn(books.accounts)
        return answers

    def _writer(self) -> psycopg.Connection[Any]:
        if self._writing is None:
            self._writing = psycopg.connect(self._url, autocommit=True, **CONNECTION)
            self._writing.execute(WRITER_SETTINGS)
        return self._writing

    def _drop_writer(self) -> None:
        if self._writing is not None:
            self._writing.close()
            self._writing = None

    def open_account(self, account: Account) -> None:
        with self._reading() as db:
            db.execute(
                "INSERT INTO kvmarket.account (id, kind, may_go_negative, currency) "
                "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (account.id, account.kind, account.may_go_negative, account.currency),
            )

    def account(self, account_id: str) -> Account | None:
        with self._reading() as db:
            return _accounts(db, sql.SQL("WHERE id = %s"), (account_id,)).fetchone()

    def accounts(self) -> list[Account]:
        with self._reading() as db:
            return _accounts(db).fetchall()

    def transfer(self, transfer_id: str) -> Transfer | None:
        with self._reading() as db:
            return _transfers(db, sql.SQL("WHERE id = %s"), (transfer_id,)).fetchone()

    def transfers(
        self, account: str | None, limit: int | None, before: str | None = None
    ) -> list[Transfer]:
        newest = sql.SQL("ORDER BY sequence DESC LIMIT %(limit)s")
        older = sql.SQL("TRUE")
        if before is not None:
            older = sql.SQL(
                "sequence < (SELECT sequence FROM kvmarket.transfer WHERE id = %(before)s)"
            )
        values = {"account": account, "before": before, "limit": limit}
        with self._reading() as db:
            if account is None:
                where = sql.SQL("WHERE {} {}").format(older, newest)
                return _transfers(db, where, values).fetchall()
            # Each half goes down its own index; together they would read it all and sort it.
            half = sql.SQL(
                "(SELECT sequence FROM kvmarket.transfer WHERE {} = %(account)s AND {} {})"
            )
            where = sql.SQL("WHERE sequence IN ({} UNION ALL {}) {}").format(
                half.format(sql.Identifier("debit"), older, newest),
                half.format(sql.Identifier("credit"), older, newest),
                newest,
            )
            return _transfers(db, where, values).fetchall()

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        behind = sql.SQL("WHERE sequence > %s ORDER BY sequence LIMIT %s")
        with self._reading() as db:
            return _transfers(db, behind, (sequence, limit)).fetchall()

    def sequence_of(self, transfer_id: str) -> int | None:
        with self._reading() as db, db.cursor(row_factory=scalar_row) as cursor:
            query = "SELECT sequence FROM kvmarket.transfer WHERE id = %s"
            sequence: int | None = cursor.execute(query, (transfer_id,)).fetchone()
            return sequence

    def receipts(
        self, where: Mapping[str, str], limit: int | None, before: str | None = None
    ) -> list[Receipt]:
        with self._reading() as db:
            return _receipts(db, where, limit, before)

    def due_at_s(self, pending_id: str) -> float | None:
        with self._reading() as db, db.cursor(row_factory=scalar_row) as cursor:
            query = "SELECT due_at_s FROM kvmarket.hold WHERE pending_id = %s"
            due_at_s: float | None = cursor.execute(query, (pending_id,)).fetchone()
            return due_at_s

    def overdue(self, now_s: float | None, limit: int) -> list[str]:
        with self._reading() as db, db.cursor(row_factory=scalar_row) as cursor:
            query = (
                "SELECT pending_id FROM kvmarket.hold "
                "WHERE due_at_s <= coalesce(%s, (SELECT kvmarket.now_s())) - %s "
                "ORDER BY due_at_s LIMIT %s"
            )
            return cursor.execute(query, (now_s, GRACE_S, limit)).fetchall()

    def use_key(
        self, account: str, key: str, body_digest: str, purchase_key: str, keep_s: float
    ) -> KeyedRequest:
        with self._reading() as db, db.transaction():
            db.execute(
                "DELETE FROM kvmarket.keyed_request WHERE first_used_at_s <= "
                "(SELECT kvmarket.now_s()) - %s",
                (keep_s,),
            )
            row = db.execute(
                "INSERT INTO kvmarket.keyed_request AS known "
                "VALUES (%s, %s, %s, %s, kvmarket.now_s(), 1) ON CONFLICT (account, key) "
                "DO UPDATE SET uses = known.uses "
                "+ CASE WHEN known.body_digest = excluded.body_digest THEN 1 ELSE 0 END "
                "RETURNING purchase_key, body_digest, uses",
                (account, key, body_digest, purchase_key),
            ).fetchone()
            assert row is not None
            return KeyedRequest(*row)

    def everything(self) -> Everything:
        with self._reading() as db, db.transaction():
            # One snapshot for all that follows.
            db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            dues = db.execute("SELECT pending_id, due_at_s FROM kvmarket.hold").fetchall()
            return Everything(
                _accounts(db).fetchall(),
                _transfers(db, sql.SQL("ORDER BY sequence")).fetchall(),
                _receipts(db, {}, None)[::-1],
                dict(dues),
            )

    @contextmanager
    def _reading(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection of the pool, for reading and for opening accounts."""
        with self._reported(), self._pool.connection() as db:
            yield db

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn the database's errors into ours."""
        try:
            yield
        except (psycopg.Error, psycopg_pool.PoolTimeout) as error:
            reason = " ".join(str(error).split())
            raise LedgerUnavailableError(
                f"the ledger's database {self._place} cannot be used ({reason}); see whether "
                "PostgreSQL runs there and lets this user in"
            ) from error


def _is_away(error: Exception) -> bool:
    """Whether a failure is the database's, rather than due to what a batch contains."""
    refused = (
        psycopg.DataError,
        psycopg.IntegrityError,
        psycopg.NotSupportedError,
        psycopg.errors.ProgramLimitExceeded,
    )
    # What is no error of the database comes from the rules, with what a caller built by hand.
    return isinstance(error, psycopg.Error) and not isinstance(error, refused)


def _make_tables(db: psycopg.Connection[Any]) -> None:
    """Make the tables where there are none, in one transaction; one process at a time."""
    db.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
    # Whoever may not make a schema can use one that is there.
    made = db.execute("SELECT to_regclass('kvmarket.schema_version')").fetchone()
    if made is None or made[0] is None:
        db.execute(postgres_schema.VERSION_TABLE)
    row = db.execute(
        "SELECT version FROM kvmarket.schema_version WHERE room = %s", (ROOM,)
    ).fetchone()
    version = row[0] if row else 0
    newest = len(postgres_schema.MIGRATIONS)
    sqlite.refuse_newer(ROOM, version, newest)
    for migration in postgres_schema.MIGRATIONS[version:]:
        db.execute(sql.SQL(migration))
    if version < newest:
        db.execute(
            "INSERT INTO kvmarket.schema_version VALUES (%s, %s) "
            "ON CONFLICT (room) DO UPDATE SET version = excluded.version",
            (ROOM, newest),
        )


def _accounts(
    db: psycopg.Connection[Any], where: sql.Composable | None = None, values: Sequence[Any] = ()
) -> psycopg.Cursor[Account]:
    query = sql.SQL("SELECT {} FROM kvmarket.account {} ORDER BY id").format(
        sql.SQL(ACCOUNT_COLUMNS), where or sql.SQL("")
    )
    return db.cursor(row_factory=class_row(Account)).execute(query, values)


def _transfers(
    db: psycopg.Connection[Any],
    clauses: sql.Composable,
    values: Sequence[Any] | Mapping[str, Any] = (),
) -> psycopg.Cursor[Transfer]:
    query = sql.SQL("SELECT {} FROM kvmarket.transfer {}").format(
        sql.SQL(TRANSFER_COLUMNS), clauses
    )
    return db.cursor(row_factory=class_row(Transfer)).execute(query, values)


def _receipts(
    db: psycopg.Connection[Any],
    where: Mapping[str, str],
    limit: int | None,
    before: str | None = None,
) -> list[Receipt]:
    conditions, values = list[sql.Composable](), list[object]()
    for column, value in where.items():
        some = sql.SQL("{} = %s").format(sql.Identifier(column))
        values.append(value)
        if column == "document_id":  # also of another line than the last
            some = sql.SQL(
                "({} OR id IN (SELECT receipt_id FROM kvmarket.receipt_line WHERE {}))"
            ).format(some, some)
            values.append(value)
        conditions.append(some)
    if before is not None:
        conditions.append(
            sql.SQL("sequence < (SELECT sequence FROM kvmarket.receipt WHERE id = %s)")
        )
        values.append(before)
    query = sql.SQL(
        "SELECT body FROM kvmarket.receipt WHERE {} ORDER BY sequence DESC LIMIT %s"
    ).format(sql.SQL(" AND ").join([sql.SQL("TRUE"), *conditions]))
    rows = db.execute(query, (*values, limit))
    return [msgspec.json.decode(body, type=Receipt) for (body,) in rows]


def _receipt_row(new: NewReceipt) -> dict[str, Any]:
    receipt = new.receipt
    return {
        "id": receipt.id,
        "request_id": receipt.request_id,
        "account": receipt.account,
        "document_id": receipt.document_id,
        "charge_nano": receipt.charge_nano,
        "body": new.body.decode(),
    }


def _without_password(url: str) -> str:
    """Where the database is, fit for a message."""
    facts = psycopg.conninfo.conninfo_to_dict(url)
    return f"{facts.get('dbname', '')} at {facts.get('host', 'the local socket')}"
