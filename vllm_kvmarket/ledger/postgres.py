"""The ledger in PostgreSQL: for a market that several machines share.

A group takes two calls: `kvmarket.look_up` finds what the rules need and locks, in a fixed order,
what nobody else may change meanwhile: the accounts that the group spends from, and the holds that
it names. `kvmarket.book` writes what the rules decided, all or nothing. Credits and releases only
add to what an account has, so that they need no lock; each writer adds them up in rows of its own.
So groups of different buyers never wait for each other. The provider pays royalties out of charges
of the same group: it is only locked where these do not cover them. When another writer keeps a lock
for long, what needs it is put off, and the rest of the group goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from vllm_kvmarket.core.database import Room
from vllm_kvmarket.core.errors import LedgerError, LedgerUnavailableError
from vllm_kvmarket.ledger import postgres_schema
from vllm_kvmarket.ledger.group_commit import malformed, unavailable
from vllm_kvmarket.ledger.known_funds import KnownFunds
from vllm_kvmarket.ledger.model import (
    GRACE_S,
    OWED,
    PROVIDER,
    ROYALTY,
    Account,
    Outcome,
    Receipt,
    Result,
    Transfer,
)
from vllm_kvmarket.ledger.storage import (
    RECEIPT_COLUMNS,
    Batch,
    Everything,
    KeyedRequest,
    NumberedReceipt,
    RowsHeldError,
    apply_group,
    receipt_row,
    storable,
    wanted,
)
from vllm_kvmarket.ledger.working_set import Found, GroupBooks, Wanted

try:
    import psycopg
    import psycopg_pool
    from psycopg import sql
    from psycopg.rows import scalar_row

    from vllm_kvmarket.core import postgres_database as database
    from vllm_kvmarket.ledger import postgres_queries as queries
except ImportError as missing:
    raise LedgerError(
        f"a ledger on PostgreSQL needs psycopg ({missing}); "
        "install it with `pip install vllm-kvmarket[postgres]`"
    ) from missing

ROOM = Room("ledger", postgres_schema.MIGRATIONS, LedgerUnavailableError)
READERS = 8
READ_TIMEOUT_S = 5.0
OPTIONS = database.OPTIONS | {
    "application_name": "kvmarket-ledger",
    "cursor_factory": psycopg.Cursor,
}
# Behind a lock each statement must see what was committed. A writer that stalls between its two
# calls (a stopped process, a lost network) keeps its locks no longer than this: the server rolls it
# back. The last statement gives the writer balance rows that nobody else uses, or shared ones.
WRITERS = 64
WRITER_SETTINGS = f"""
SET default_transaction_isolation = 'read committed';
SET idle_in_transaction_session_timeout = '2s';
SET lock_timeout = '300ms';
SELECT set_config('kvmarket.writer', coalesce((
    SELECT number FROM generate_series(1, {WRITERS}) AS number
    WHERE pg_try_advisory_lock({0x6B766D}, number) LIMIT 1), 0)::text, false)
"""  # noqa: S608  # numbers are ours
# Another writer was faster with the same id, or the server chose this one to end a deadlock.
RACES = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)
MOST_RACES = 5


class Request(Wanted, frozen=True):
    """What kvmarket.look_up expects: what a group names, and the accounts to lock.

    `skip_held` is for not waiting for other writers' locks.
    """

    spender_ids: list[str]
    skip_held: bool


class Looked(Found, frozen=True):
    """What it returns; with the accounts and holds that another writer has locked."""

    held_accounts: list[str] = msgspec.field(default_factory=list)
    held_holds: list[str] = msgspec.field(default_factory=list)


class Changes(msgspec.Struct, frozen=True):
    """What a group changed, as kvmarket.book expects it."""

    transfers: list[Transfer]
    dues: dict[str, float | None]
    receipts: list[dict[str, Any]]
    documents: list[dict[str, str]]
    now_s: float


class PostgresStorage:
    """See storage.Storage. Any number of processes and machines may share the database."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._place = database.without_password(url)
        self._writing: psycopg.Connection[Any] | None = None
        # Another writer keeps a lock for long: it is not waited for.
        self._skip_held = False
        self.funds = KnownFunds()
        with self._reported():
            with database.connect(url, OPTIONS) as made:
                database.migrate(made, ROOM)
            self._pool = psycopg_pool.ConnectionPool(
                url,
                kwargs={**OPTIONS, "autocommit": True},
                configure=_configure,
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

    def write(self, group: Sequence[Batch]) -> list[list[Result] | RowsHeldError]:
        races = 0
        while True:
            try:
                return self._write(self._writer(), group)
            except Exception as error:
                # Whatever state the connection is in: the next attempt starts with a new one.
                self._drop_writer()
                if isinstance(error, RACES) and races < MOST_RACES:
                    races += 1
                    continue
                if isinstance(error, psycopg.errors.LockNotAvailable) and not self._skip_held:
                    self._skip_held = True
                    continue
                if _is_away(error):
                    raise unavailable(error) from error
                raise malformed(error) from error

    def _write(
        self, db: psycopg.Connection[Any], group: Sequence[Batch]
    ) -> list[list[Result] | RowsHeldError]:
        spenders = _spenders(group)
        try:
            return self._apply(db, group, spenders)
        except _ProviderShortError:
            return self._apply(db, group, spenders | {PROVIDER})

    def _apply(
        self, db: psycopg.Connection[Any], group: Sequence[Batch], spenders: set[str]
    ) -> list[list[Result] | RowsHeldError]:
        names = wanted(group)
        request = Request(
            transfer_ids=names.transfer_ids,
            pending_ids=names.pending_ids,
            account_ids=names.account_ids,
            spender_ids=storable(spenders),
            skip_held=self._skip_held,
        )
        text = msgspec.json.encode(request).decode()
        # Two round trips a group: BEGIN goes with the first call, COMMIT with the second.
        with db.pipeline(), db.transaction():
            row = db.execute("SELECT kvmarket.look_up(%s)::text", (text,)).fetchone()
            assert row is not None
            found = msgspec.json.decode(row[0], type=Looked)
            if PROVIDER not in spenders:
                found = _without_provider_funds(found)
            books = GroupBooks(found)
            put_off = _put_off(group, found)
            ready = [batch for batch in group if batch not in put_off] if put_off else group
            answers, receipts = apply_group(books, ready, found.now_s)
            if PROVIDER not in spenders and any(map(_is_provider_short, answers)):
                raise _ProviderShortError
            changes = Changes(
                books.new_transfers,
                books.changed_dues,
                [dict(zip(RECEIPT_COLUMNS, receipt_row(each), strict=True)) for each in receipts],
                [
                    {"document_id": line.document_id, "receipt_id": each.receipt.id}
                    for each in receipts
                    for line in each.receipt.lines
                ],
                found.now_s,
            )
            if changes.transfers:
                text = msgspec.json.encode(changes).decode()
                db.execute("SELECT kvmarket.book(%s)", (text,))
        self.funds.learn(books.accounts)
        self._skip_held = bool(put_off)
        done = iter(answers)
        return [RowsHeldError() if batch in put_off else next(done) for batch in group]

    def _writer(self) -> psycopg.Connection[Any]:
        if self._writing is None:
            self._writing = database.connect(self._url, OPTIONS)
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
            return next(iter(queries.accounts(db, sql.SQL("WHERE id = %s"), (account_id,))), None)

    def accounts(self) -> list[Account]:
        with self._reading() as db:
            return queries.accounts(db)

    def transfer(self, transfer_id: str) -> Transfer | None:
        with self._reading() as db:
            return queries.transfers(db, sql.SQL("WHERE id = %s"), (transfer_id,)).fetchone()

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
                return queries.transfers(db, where, values).fetchall()
            # Each half goes down its own index; together they would read it all and sort it.
            half = sql.SQL(
                "(SELECT sequence FROM kvmarket.transfer WHERE {} = %(account)s AND {} {})"
            )
            where = sql.SQL("WHERE sequence IN ({} UNION ALL {}) {}").format(
                half.format(sql.Identifier("debit"), older, newest),
                half.format(sql.Identifier("credit"), older, newest),
                newest,
            )
            return queries.transfers(db, where, values).fetchall()

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        behind = sql.SQL(queries.NUMBERED)
        with self._reading() as db:
            found = queries.transfers(db, behind, (sequence, limit)).fetchall()
            if len(found) < limit and queries.number_leaves(db):
                found = queries.transfers(db, behind, (sequence, limit)).fetchall()
            return found

    def sequence_of(self, transfer_id: str) -> int | None:
        query = (
            "SELECT number FROM kvmarket.log_leaf JOIN kvmarket.transfer USING (sequence) "
            "WHERE id = %s"
        )
        with self._reading() as db, db.cursor(row_factory=scalar_row) as cursor:
            number: int | None = cursor.execute(query, (transfer_id,)).fetchone()
            if number is None and queries.number_leaves(db):
                number = cursor.execute(query, (transfer_id,)).fetchone()
            return number

    def receipts(
        self, where: Mapping[str, str], limit: int | None, before: str | None = None
    ) -> list[Receipt]:
        with self._reading() as db:
            return queries.receipts(db, where, limit, before)

    def moves(self, account: str, from_s: float | None, to_s: float | None) -> list[Transfer]:
        with self._reading() as db:
            return queries.moves(db, account, (from_s, to_s))

    def moved_before(self, account: str, at_s: float) -> int:
        with self._reading() as db:
            queries.number_leaves(db)
            return queries.moved_before(db, account, at_s)

    def receipts_booked(
        self,
        from_s: float | None,
        to_s: float | None,
        account: str | None,
        documents: Sequence[str],
    ) -> list[Receipt]:
        with self._reading() as db:
            return queries.receipts_booked(db, (from_s, to_s), account, documents)

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

    def receipts_after(self, sequence: int, limit: int) -> list[NumberedReceipt]:
        with self._reading() as db:
            return queries.receipts_after(db, sequence, limit)

    def everything(self, after: int = 0, receipts_after: int = 0) -> Everything:
        with self._reading() as db, db.transaction():
            # One snapshot for all that follows.
            db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            dues = db.execute("SELECT pending_id, due_at_s FROM kvmarket.hold").fetchall()
            return Everything(
                queries.accounts(db),
                [
                    *queries.transfers(db, sql.SQL(queries.NUMBERED), (after, None)),
                    *queries.transfers(db, sql.SQL(queries.UNNUMBERED)),
                ],
                queries.receipts_after(db, receipts_after, None),
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
        except psycopg.Error as error:
            raise LedgerUnavailableError(database.unusable(self._place, error)) from error


def _configure(db: psycopg.Connection[Any]) -> None:
    db.execute(database.SETTINGS)


class _ProviderShortError(Exception):
    """The charges of a group do not cover what it takes from the provider."""


def _spenders(group: Sequence[Batch]) -> set[str]:
    """The accounts whose funds decide; royalties come out of charges of their own group."""
    return {
        each.debit
        for batch in group
        for each in batch.operations
        if each.kind in ("plain", "pending")
        and not (each.kind == "plain" and each.code == OWED)
        and not (each.code == ROYALTY and each.debit == PROVIDER)
    }


def _put_off(group: Sequence[Batch], found: Looked) -> set[Batch]:
    """The batches that need what another writer has locked, and those that follow from them."""
    accounts, ids, put_off = set(found.held_accounts), set(found.held_holds), set[Batch]()
    if accounts or ids:
        for batch in group:
            if _spenders([batch]) & accounts or any(
                each.id in ids or each.pending_id in ids for each in batch.operations
            ):
                put_off.add(batch)
                ids.update(each.id for each in batch.operations)
    return put_off


def _without_provider_funds(found: Looked) -> Looked:
    """What is found, but of the provider's funds none: others may be spending them."""
    accounts = [
        msgspec.structs.replace(each, credits_posted=each.debits_posted + each.debits_pending)
        if each.id == PROVIDER
        else each
        for each in found.accounts
    ]
    return msgspec.structs.replace(found, accounts=accounts)


def _is_provider_short(results: Sequence[Result]) -> bool:
    return any(
        each.outcome is Outcome.EXCEEDS_CREDITS and each.detail == PROVIDER for each in results
    )


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
