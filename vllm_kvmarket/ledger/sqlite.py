"""The ledger in the market's SQLite file: a writing connection, and a reading one a thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import msgspec

from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import LedgerUnavailableError
from vllm_kvmarket.ledger import sqlite_schema
from vllm_kvmarket.ledger.clock import Mark, Reading, advance, machine_clock
from vllm_kvmarket.ledger.group_commit import malformed, unavailable
from vllm_kvmarket.ledger.known_funds import KnownFunds
from vllm_kvmarket.ledger.model import (
    GRACE_S,
    MOVES,
    Account,
    Receipt,
    Result,
    Transfer,
)
from vllm_kvmarket.ledger.periods import HOUR_S, is_in, sequences
from vllm_kvmarket.ledger.storage import (
    Batch,
    Everything,
    KeyedRequest,
    NewReceipt,
    apply_group,
    wanted,
)
from vllm_kvmarket.ledger.working_set import Found, GroupBooks, Memory, Wanted

WRITER_CACHE_KIB = 65_536  # a group touches pages all over the indexes of random ids
CHECKPOINT_PAGES = 4000  # a page that many groups change is copied to the file once
# The clock's row is a page more to sync: the last transfer's time stands for it meanwhile.
CLOCK_ROW_S = 0.5
ROOM = "ledger"
SUM_AT_ONCE = 20_000  # transfers a transaction, so that no writer waits for long
SUM_PERIODS = f"""
INSERT INTO period_sum
    SELECT account, hour, sum(moved_nano) FROM (
        SELECT credit AS account, CAST(created_at_s / :hour_s AS INTEGER) AS hour,
            amount_nano AS moved_nano
        FROM transfer WHERE sequence > :done AND sequence <= :up_to AND kind IN {MOVES}
        UNION ALL SELECT debit, CAST(created_at_s / :hour_s AS INTEGER), -amount_nano
        FROM transfer WHERE sequence > :done AND sequence <= :up_to AND kind IN {MOVES}
    ) WHERE TRUE GROUP BY account, hour
    ON CONFLICT (account, hour) DO UPDATE SET moved_nano = moved_nano + excluded.moved_nano
"""  # noqa: S608  # names are ours
MOVED_BEFORE = f"""
SELECT (SELECT ifnull(sum(moved_nano), 0) FROM period_sum WHERE account = :account AND hour < :hour)
    + ifnull(sum(iif(credit = :account, amount_nano, -amount_nano)), 0)
FROM transfer WHERE sequence IN (
    SELECT sequence FROM transfer WHERE debit = :account AND sequence BETWEEN :first AND :last
    UNION ALL
    SELECT sequence FROM transfer WHERE credit = :account AND sequence BETWEEN :first AND :last
) AND kind IN {MOVES} AND created_at_s >= :from_s AND created_at_s < :to_s
"""  # noqa: S608  # names are ours
ACCOUNT_COLUMNS = ", ".join(Account.__struct_fields__)
TRANSFER_COLUMNS = ", ".join(Transfer.__struct_fields__)
# Most transfers resolve nothing: "" in a Transfer, NULL in the table.
READ_TRANSFER = TRANSFER_COLUMNS.replace("pending_id", "ifnull(pending_id, '')")
INSERT_TRANSFER = (
    f"INSERT INTO transfer ({TRANSFER_COLUMNS}) VALUES ",  # noqa: S608  # names are ours
    "("
    + ", ".join("nullif(?, '')" if f == "pending_id" else "?" for f in Transfer.__struct_fields__)
    + ")",
    "",
)
INSERT_HOLD = (
    "INSERT INTO hold (pending_id, due_at_s) VALUES ",
    "(?, ?)",
    " ON CONFLICT (pending_id) DO UPDATE SET due_at_s = excluded.due_at_s",
)
INSERT_RECEIPT_LINE = (
    "INSERT INTO receipt_line (document_id, receipt_id) VALUES ",
    "(?, ?)",
    " ON CONFLICT DO NOTHING",
)
INSERT_RECEIPT = (
    "INSERT INTO receipt (id, request_id, account, document_id, charge_nano, body) VALUES ",
    "(?, ?, ?, ?, ?, ?)",
    "",
)
IS_AN_END = "kind IN ('post', 'void', 'expire', 'late')"
# Few sizes, so that the connection's cache of statements holds them all.
ROWS_AT_ONCE = (128, 16, 4, 1)
Row = tuple[Any, ...]


class SqliteStorage:
    """See storage.Storage. Several processes may share the file."""

    def __init__(self, path: Path, clock: Callable[[], Reading] = machine_clock) -> None:
        self._path = path
        self._local = threading.local()
        # A thread that ends takes its connection with it; close() takes those of the others.
        self._connections: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()
        self._connections_lock = threading.Lock()
        self._clock = clock
        # The time of the last group, while no other connection wrote; and the clock's row.
        self._mark: Mark | None = None
        self._written: Mark | None = None
        self._floor_s = 0.0  # the ledger's time never goes back below this
        self._memory = Memory()
        self.funds = KnownFunds()
        self._data_version: object = None
        with self._reported():
            self._writing = sqlite.connect(path)
            self._writing.pragma("cache_size", -WRITER_CACHE_KIB)
            self._writing.pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
            sqlite.migrate(self._writing, ROOM, sqlite_schema.MIGRATIONS)
            # The triggers look up what a row refers to, once; nothing of it is ever deleted.
            self._writing.pragma("foreign_keys", False)

    def close(self) -> None:
        self._writing.close()
        with self._connections_lock:
            for connection in self._connections:
                connection.close()

    def write(self, group: Sequence[Batch]) -> list[list[Result]]:
        try:
            return self._write(self._writing, group)
        except (apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError) as error:
            raise malformed(error) from error
        except apsw.Error as error:
            raise unavailable(error) from error
        except Exception as error:
            # No error of the database, so one of the rules with what a caller built by hand.
            raise malformed(error) from error

    def _write(self, db: apsw.Connection, group: Sequence[Batch]) -> list[list[Result]]:
        looked_for = wanted(group)
        # Takes the write lock first: no process can change what was looked up before the commit.
        db.execute("BEGIN IMMEDIATE")
        try:
            books = GroupBooks(self._find(db, looked_for))
            mark = advance(self._mark, self._clock())
            if mark.at_s < self._floor_s:
                mark = msgspec.structs.replace(mark, at_s=self._floor_s)
            answers, receipts = apply_group(books, group, mark.at_s)
            if books.new_transfers:
                _write(db, books, receipts)
                if _is_old(self._written, mark):
                    _write_mark(db, mark)
                    self._written = mark
            db.execute("COMMIT")
            self._memory.learn(books)
            self.funds.learn(books.accounts)
            self._mark = mark
        except BaseException:
            if db.in_transaction:  # SQLite may have rolled back already, as on a full disk
                db.execute("ROLLBACK")
            self._memory.forget()
            self._mark = None
            raise
        return answers

    def _find(self, db: apsw.Connection, looked_for: Wanted) -> Found:
        """Look up what a group names, under the write lock."""
        # The version changes when another connection commits, of this process or of another.
        version = db.pragma("data_version")
        if version != self._data_version:
            self._data_version = version
            self._memory.forget()
            self._mark = None
        if self._mark is None:
            self._mark = self._written = _mark(db)
            # Groups of other processes since then have their transfers' times.
            last = "SELECT created_at_s FROM transfer ORDER BY sequence DESC LIMIT 1"
            self._floor_s = db.execute(last).get or 0.0
        known, left = self._memory.divide(looked_for)
        found = _find(db, left)
        return Found(
            known.accounts + found.accounts,
            known.transfers + found.transfers,
            known.dues | found.dues,
            found.resolutions,
        )

    def open_account(self, account: Account) -> None:
        with self._reading() as db:
            db.execute(
                "INSERT INTO account (id, kind, may_go_negative, currency) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                (account.id, account.kind, int(account.may_go_negative), account.currency),
            )

    def account(self, account_id: str) -> Account | None:
        with self._reading() as db:
            return next(iter(_accounts(db, [account_id])), None)

    def accounts(self) -> list[Account]:
        with self._reading() as db:
            return _accounts(db)

    def transfer(self, transfer_id: str) -> Transfer | None:
        with self._reading() as db:
            return next(iter(_transfers(db, [transfer_id])), None)

    def transfers(
        self, account: str | None, limit: int | None, before: str | None = None
    ) -> list[Transfer]:
        with self._reading() as db:
            where = "TRUE"
            if before is not None:
                where = "sequence < (SELECT sequence FROM transfer WHERE id = :before)"
            if account is not None:
                # Each half goes down its own index; together they would be read whole and sorted.
                halves = " UNION ALL ".join(
                    f"SELECT * FROM (SELECT sequence FROM transfer WHERE {side} = :account "  # noqa: S608  # names are ours
                    f"AND {where} ORDER BY sequence DESC LIMIT :limit)"
                    for side in ("debit", "credit")
                )
                where = f"sequence IN ({halves})"
            limit = -1 if limit is None else limit
            rows = db.execute(
                f"SELECT {READ_TRANSFER} FROM transfer WHERE {where} "  # noqa: S608  # names are ours
                "ORDER BY sequence DESC LIMIT :limit",
                {"account": account, "before": before, "limit": limit},
            )
            return [Transfer(*row) for row in rows]

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {READ_TRANSFER} FROM transfer WHERE sequence > ? "  # noqa: S608  # names are ours
                "ORDER BY sequence LIMIT ?",
                (sequence, limit),
            )
            return [Transfer(*row) for row in rows]

    def sequence_of(self, transfer_id: str) -> int | None:
        with self._reading() as db:
            query = "SELECT sequence FROM transfer WHERE id = ?"
            row = db.execute(query, (transfer_id,)).fetchone()
            return row[0] if row else None

    def receipts(
        self, where: Mapping[str, str], limit: int | None, before: str | None = None
    ) -> list[Receipt]:
        with self._reading() as db:
            return _receipts(db, where, limit, before)

    def moves(self, account: str, from_s: float | None, to_s: float | None) -> list[Transfer]:
        with self._reading() as db:
            first, last = _sequences(db, "transfer", from_s, to_s)
            halves = " UNION ALL ".join(
                f"SELECT sequence, {READ_TRANSFER} FROM transfer WHERE {side} = :account "  # noqa: S608  # names are ours
                "AND sequence BETWEEN :first AND :last"
                for side in ("debit", "credit")
            )
            rows = db.execute(
                f"SELECT * FROM ({halves}) ORDER BY sequence",  # noqa: S608  # names are ours
                {"account": account, "first": first, "last": last},
            )
            found = [Transfer(*row) for _, *row in rows]
        return [each for each in found if each.kind in MOVES and is_in(each, from_s, to_s)]

    def moved_before(self, account: str, at_s: float) -> int:
        while self._sum_periods():
            pass
        hour = int(at_s // HOUR_S)
        values = {"account": account, "hour": hour, "from_s": hour * HOUR_S, "to_s": at_s}
        with self._reading() as db:
            first, last = _sequences(db, "transfer", hour * HOUR_S, at_s)
            moved: int = db.execute(MOVED_BEFORE, {**values, "first": first, "last": last}).get
            return moved

    def _sum_periods(self) -> bool:
        """Take the next transfers into the sums of their hours; whether there may be more."""
        with self._reading() as db:
            newest: int = db.execute("SELECT ifnull(max(sequence), 0) FROM transfer").get
            if db.execute("SELECT done FROM period_done").get == newest:
                return False
            db.execute("BEGIN IMMEDIATE")
            try:
                done: int = db.execute("SELECT done FROM period_done").get
                up_to = min(newest, done + SUM_AT_ONCE)
                if up_to > done:
                    db.execute(SUM_PERIODS, {"done": done, "up_to": up_to, "hour_s": HOUR_S})
                    db.execute("UPDATE period_done SET done = ?", (up_to,))
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return up_to < newest

    def receipts_booked(
        self,
        from_s: float | None,
        to_s: float | None,
        account: str | None,
        documents: Sequence[str],
    ) -> list[Receipt]:
        with self._reading() as db:
            first, last = _sequences(db, "receipt", from_s, to_s)
            some = "TRUE"
            if account is not None:
                some = (
                    "sequence IN (SELECT sequence FROM receipt WHERE account = :account "
                    "UNION SELECT sequence FROM receipt WHERE document_id IN "
                    "(SELECT value FROM json_each(:documents)) "
                    "UNION SELECT sequence FROM receipt WHERE id IN (SELECT receipt_id "
                    "FROM receipt_line WHERE document_id IN "
                    "(SELECT value FROM json_each(:documents))))"
                )
            rows = db.execute(
                f"SELECT body FROM receipt WHERE sequence BETWEEN :first AND :last AND {some} "  # noqa: S608  # names are ours
                "ORDER BY sequence",
                {"first": first, "last": last, "account": account, "documents": _json(documents)},
            )
            found = [msgspec.json.decode(body, type=Receipt) for (body,) in rows]
        return [each for each in found if is_in(each, from_s, to_s)]

    def due_at_s(self, pending_id: str) -> float | None:
        with self._reading() as db:
            return _dues(db, [pending_id]).get(pending_id)

    def overdue(self, now_s: float | None, limit: int) -> list[str]:
        with self._reading() as db:
            if now_s is None:
                now_s = advance(_mark(db), self._clock()).at_s
            rows = db.execute(
                "SELECT pending_id FROM hold WHERE due_at_s <= ? ORDER BY due_at_s LIMIT ?",
                (now_s - GRACE_S, limit),
            )
            return [held for (held,) in rows]

    def use_key(
        self, account: str, key: str, body_digest: str, purchase_key: str, keep_s: float
    ) -> KeyedRequest:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                now_s = advance(_mark(db), self._clock()).at_s
                old = "DELETE FROM keyed_request WHERE first_used_at_s <= ?"
                db.execute(old, (now_s - keep_s,))
                found: Row = db.execute(
                    "INSERT INTO keyed_request VALUES (?, ?, ?, ?, ?, 1) "
                    "ON CONFLICT (account, key) DO UPDATE "
                    "SET uses = uses + (body_digest = excluded.body_digest) "
                    "RETURNING purchase_key, body_digest, uses",
                    (account, key, body_digest, purchase_key, now_s),
                ).fetchall()[0]
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return KeyedRequest(*found)

    def everything(self) -> Everything:
        with self._reading() as db:
            db.execute("BEGIN")  # a read transaction: all of it of the same moment
            try:
                return Everything(
                    _accounts(db),
                    _transfers(db),
                    _receipts(db, {})[::-1],
                    _dues(db),
                )
            finally:
                db.execute("ROLLBACK")

    @contextmanager
    def _reading(self) -> Iterator[apsw.Connection]:
        """This thread's connection, for reading and for opening accounts."""
        with self._reported():
            connection: apsw.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = sqlite.connect(self._path)
                with self._connections_lock:
                    self._connections.add(connection)
            yield connection

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn the database's errors into ours."""
        try:
            yield
        except apsw.Error as error:
            raise LedgerUnavailableError(
                f"the market's database {self._path} cannot be used ({error}); see `kvmarket env`"
            ) from error


def _sequences(
    db: apsw.Connection, table: str, from_s: float | None, to_s: float | None
) -> tuple[int, int]:
    time_s = {"transfer": "created_at_s", "receipt": "json_extract(body, '$.created_at_s')"}[table]
    query = f"SELECT sequence, {time_s} FROM {table} WHERE sequence >= ? ORDER BY sequence LIMIT 1"  # noqa: S608  # names are ours

    def read(sequence: int) -> tuple[int, float] | None:
        row: tuple[int, float] | None = db.execute(query, (sequence,)).fetchone()
        return row

    return sequences(read, from_s, to_s)


def _accounts(db: apsw.Connection, ids: Iterable[str] | None = None) -> list[Account]:
    """Every account, or those with these ids; by id."""
    some = "" if ids is None else "WHERE id IN (SELECT value FROM json_each(?)) "
    rows = db.execute(
        f"SELECT {ACCOUNT_COLUMNS} FROM account {some}ORDER BY id",  # noqa: S608  # names are ours
        () if ids is None else (_json(ids),),
    )
    return [
        Account(id, kind, bool(may_go_negative), *rest) for id, kind, may_go_negative, *rest in rows
    ]


def _transfers(
    db: apsw.Connection,
    ids: Iterable[str] | None = None,
    column: str = "id",
    condition: str = "TRUE",
) -> list[Transfer]:
    """Transfers whose id or pending_id is among some; all of them in their order otherwise."""
    some = "" if ids is None else f"WHERE {column} IN (SELECT value FROM json_each(?)) "  # noqa: S608  # names are ours
    order = "ORDER BY sequence" if ids is None else f"AND {condition}"
    rows = db.execute(
        f"SELECT {READ_TRANSFER} FROM transfer {some}{order}",  # noqa: S608  # names are ours
        () if ids is None else (_json(ids),),
    )
    return [Transfer(*row) for row in rows]


def _find(db: apsw.Connection, wanted: Wanted) -> Found:
    """Everything that the rules look up for a group."""
    transfers = _transfers(db, wanted.transfer_ids) if wanted.transfer_ids else []
    dues: dict[str, float] = {}
    resolutions: list[Transfer] = []
    accounts = set(wanted.account_ids)
    if wanted.pending_ids:
        dues = _dues(db, wanted.pending_ids)
        held = [each for each in transfers if each.kind == "pending"]
        accounts.update(each.debit for each in held)
        accounts.update(each.credit for each in held)
        closed = [each.id for each in held if each.id not in dues]
        if closed:
            resolutions = _transfers(db, closed, "pending_id", IS_AN_END)
    return Found(_accounts(db, accounts) if accounts else [], transfers, dues, resolutions)


def _dues(db: apsw.Connection, pending_ids: Iterable[str] | None = None) -> dict[str, float]:
    """Until when open holds stand: of all, or of some."""
    some = "" if pending_ids is None else "WHERE pending_id IN (SELECT value FROM json_each(?))"
    rows = db.execute(
        f"SELECT pending_id, due_at_s FROM hold {some}",  # noqa: S608  # names are ours
        () if pending_ids is None else (_json(pending_ids),),
    )
    return dict(list(rows))


def _mark(db: apsw.Connection) -> Mark | None:
    row = db.execute("SELECT at_s, uptime_s, boot_id FROM clock").fetchone()
    return Mark(*row) if row else None


def _is_old(written: Mark | None, mark: Mark) -> bool:
    """Whether the clock's row must be written with this group."""
    return (
        written is None
        or written.boot_id != mark.boot_id
        or mark.uptime_s - written.uptime_s >= CLOCK_ROW_S
    )


def _write_mark(db: apsw.Connection, mark: Mark) -> None:
    db.execute(
        "INSERT INTO clock VALUES (1, ?, ?, ?) ON CONFLICT (only_one) DO UPDATE SET "
        "at_s = excluded.at_s, uptime_s = excluded.uptime_s, boot_id = excluded.boot_id",
        msgspec.structs.astuple(mark),
    )


def _write(db: apsw.Connection, books: GroupBooks, receipts: Sequence[NewReceipt]) -> None:
    """Write what a group changed; each statement that has nothing to do would cost, too."""
    _insert(db, INSERT_TRANSFER, map(msgspec.structs.astuple, books.new_transfers))
    db.executemany(
        "UPDATE account SET debits_pending = ?5, credits_pending = ?6, debits_posted = ?7, "
        "credits_posted = ?8, late_nano = ?9 WHERE id = ?1",
        [msgspec.structs.astuple(account) for account in books.changed_accounts.values()],
    )
    changed = books.changed_dues.items()
    _insert(db, INSERT_HOLD, [(id, due_at_s) for id, due_at_s in changed if due_at_s is not None])
    ended = [id for id, due_at_s in changed if due_at_s is None]
    if ended:
        db.execute(
            "DELETE FROM hold WHERE pending_id IN (SELECT value FROM json_each(?))", (_json(ended),)
        )
    if receipts:
        try:
            _write_receipts(db, receipts)
        except apsw.ConstraintError:
            _write_receipts(db, _new(db, receipts))


def _write_receipts(db: apsw.Connection, receipts: Sequence[NewReceipt]) -> None:
    _insert(db, INSERT_RECEIPT, map(_receipt_row, receipts))
    _insert(
        db,
        INSERT_RECEIPT_LINE,
        [(line.document_id, each.receipt.id) for each in receipts for line in each.receipt.lines],
    )


def _new(db: apsw.Connection, receipts: Sequence[NewReceipt]) -> list[NewReceipt]:
    """Receipts under new ids: the first receipt with an id stays."""
    by_id = {new.receipt.id: new for new in reversed(receipts)}
    known = db.execute(
        "SELECT id FROM receipt WHERE id IN (SELECT value FROM json_each(?))", (_json(by_id),)
    )
    for (id,) in known:
        del by_id[id]
    return list(reversed(by_id.values()))


def _receipt_row(new: NewReceipt) -> Row:
    receipt = new.receipt
    return (
        receipt.id,
        receipt.request_id,
        receipt.account,
        receipt.document_id,
        receipt.charge_nano,
        new.body.decode(),
    )


def _insert(db: apsw.Connection, statement: tuple[str, str, str], rows: Iterable[Row]) -> None:
    """Insert rows in their order, many a statement.

    Each step of a statement gives the interpreter's lock away, and taking it back from a busy
    thread takes up to 5 ms: one step a row is what a busy engine would slow down most.
    """
    head, row, tail = statement
    left = list(rows)
    for size in ROWS_AT_ONCE:
        while len(left) >= size:
            db.execute(
                head + ", ".join([row] * size) + tail,
                [value for values in left[:size] for value in values],
            )
            del left[:size]


def _receipts(
    db: apsw.Connection,
    where: Mapping[str, str],
    limit: int | None = None,
    before: str | None = None,
) -> list[Receipt]:
    """Receipts whose columns have these values, newest first; a document's: of any line."""
    conditions, values = ["TRUE"], list[object]()
    for column, value in where.items():
        some = f"{column} = ?"
        values.append(value)
        if column == "document_id":
            some = f"({some} OR id IN (SELECT receipt_id FROM receipt_line WHERE {some}))"  # noqa: S608  # names are ours
            values.append(value)
        conditions.append(some)
    if before is not None:
        conditions.append("sequence < (SELECT sequence FROM receipt WHERE id = ?)")
        values.append(before)
    rows = db.execute(
        f"SELECT body FROM receipt WHERE {' AND '.join(conditions)} "  # noqa: S608  # names are ours
        "ORDER BY sequence DESC LIMIT ?",
        (*values, -1 if limit is None else limit),
    )
    return [msgspec.json.decode(body, type=Receipt) for (body,) in rows]


def _json(ids: Iterable[str]) -> str:
    return msgspec.json.encode(list(ids)).decode()
