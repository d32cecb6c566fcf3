"""The ledger in the market's SQLite file: a writing connection, and a reading one a thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw
import msgspec

from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import LedgerUnavailableError
from vllm_kvmarket.ledger import sqlite_queries as queries
from vllm_kvmarket.ledger import sqlite_schema
from vllm_kvmarket.ledger.clock import Mark, Reading, advance, machine_clock
from vllm_kvmarket.ledger.group_commit import malformed, unavailable
from vllm_kvmarket.ledger.known_funds import KnownFunds
from vllm_kvmarket.ledger.model import (
    GRACE_S,
    MOVES,
    Account,
    Outcome,
    Receipt,
    Result,
    Transfer,
)
from vllm_kvmarket.ledger.periods import HOUR_S, is_in
from vllm_kvmarket.ledger.storage import (
    Batch,
    Everything,
    KeyedRequest,
    NumberedReceipt,
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
            # Of its tables only holds end, which are nobody's secret.
            self._writing.pragma("secure_delete", False)

    def close(self) -> None:
        self._writing.close()
        with self._connections_lock:
            for connection in self._connections:
                connection.close()

    def write(self, group: Sequence[Batch]) -> list[list[Result]]:
        try:
            try:
                return self._write(self._writing, group, all_new=True)
            except apsw.ConstraintError:
                return self._write(self._writing, group, all_new=False)
        except (apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError) as error:
            raise malformed(error) from error
        except apsw.Error as error:
            raise unavailable(error) from error
        except Exception as error:
            # No error of the database, so one of the rules with what a caller built by hand.
            raise malformed(error) from error

    def _write(
        self, db: apsw.Connection, group: Sequence[Batch], *, all_new: bool
    ) -> list[list[Result]]:
        looked_for = wanted(group)
        # Takes the write lock first: no process can change what was looked up before the commit.
        db.execute("BEGIN IMMEDIATE")
        try:
            mark = advance(self._refreshed(db), self._clock())
            if mark.at_s < self._floor_s:
                mark = msgspec.structs.replace(mark, at_s=self._floor_s)
            # Mostly all ids are new, which the index of ids refuses where it is not so. Looked up
            # are they only when something is refused: that may have taken effect before.
            books = GroupBooks(self._find(db, looked_for.without_new() if all_new else looked_for))
            answers, receipts = apply_group(books, group, mark.at_s)
            if all_new and not _all_ok(answers):
                books = GroupBooks(self._find(db, looked_for))
                answers, receipts = apply_group(books, group, mark.at_s)
            if books.new_transfers:
                queries.write(db, books, receipts)
                if _is_old(self._written, mark):
                    queries.write_mark(db, mark)
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

    def _refreshed(self, db: apsw.Connection) -> Mark | None:
        """Forget what others changed; the time of the last group. Under the write lock."""
        # The version changes when another connection commits, of this process or of another.
        version = db.pragma("data_version")
        if version != self._data_version:
            self._data_version = version
            self._memory.forget()
            self._mark = None
        if self._mark is None:
            self._mark = self._written = queries.mark(db)
            # Groups of other processes since then have their transfers' times.
            last = "SELECT created_at_s FROM transfer ORDER BY sequence DESC LIMIT 1"
            self._floor_s = db.execute(last).get or 0.0
        return self._mark

    def _find(self, db: apsw.Connection, looked_for: Wanted) -> Found:
        """Look up what a group names, under the write lock."""
        known, left = self._memory.divide(looked_for)
        found = queries.find(db, left)
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
            return next(iter(queries.accounts(db, [account_id])), None)

    def accounts(self) -> list[Account]:
        with self._reading() as db:
            return queries.accounts(db)

    def transfer(self, transfer_id: str) -> Transfer | None:
        with self._reading() as db:
            return next(iter(queries.transfers(db, [transfer_id])), None)

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
                f"SELECT {queries.READ_TRANSFER} FROM transfer WHERE {where} "  # noqa: S608  # names are ours
                "ORDER BY sequence DESC LIMIT :limit",
                {"account": account, "before": before, "limit": limit},
            )
            return [Transfer(*row) for row in rows]

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        with self._reading() as db:
            return queries.transfers_after(db, sequence, limit)

    def sequence_of(self, transfer_id: str) -> int | None:
        with self._reading() as db:
            query = "SELECT sequence FROM transfer WHERE id = ?"
            row = db.execute(query, (transfer_id,)).fetchone()
            return row[0] if row else None

    def receipts(
        self, where: Mapping[str, str], limit: int | None, before: str | None = None
    ) -> list[Receipt]:
        with self._reading() as db:
            return queries.receipts(db, where, limit, before)

    def moves(self, account: str, from_s: float | None, to_s: float | None) -> list[Transfer]:
        with self._reading() as db:
            first, last = queries.sequences_of(db, "transfer", from_s, to_s)
            halves = " UNION ALL ".join(
                f"SELECT sequence, {queries.READ_TRANSFER} FROM transfer WHERE {side} = :account "  # noqa: S608  # names are ours
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
            first, last = queries.sequences_of(db, "transfer", hour * HOUR_S, at_s)
            moved: int = db.execute(
                queries.MOVED_BEFORE, {**values, "first": first, "last": last}
            ).get
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
                    db.execute(
                        queries.SUM_PERIODS, {"done": done, "up_to": up_to, "hour_s": HOUR_S}
                    )
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
            first, last = queries.sequences_of(db, "receipt", from_s, to_s)
            some = queries.IN_PERIOD if account is None else queries.OF_ACCOUNT_OR_DOCUMENTS
            rows = db.execute(
                f"SELECT body FROM receipt WHERE {some} ORDER BY sequence",  # noqa: S608  # names are ours
                {
                    "first": first,
                    "last": last,
                    "account": account,
                    "documents": queries.json_list(documents),
                },
            )
            found = [queries.read_receipt(body) for (body,) in rows]
        return [each for each in found if is_in(each, from_s, to_s)]

    def due_at_s(self, pending_id: str) -> float | None:
        with self._reading() as db:
            return queries.dues(db, [pending_id]).get(pending_id)

    def overdue(self, now_s: float | None, limit: int) -> list[str]:
        with self._reading() as db:
            if now_s is None:
                now_s = advance(queries.mark(db), self._clock()).at_s
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
                now_s = advance(queries.mark(db), self._clock()).at_s
                old = "DELETE FROM keyed_request WHERE first_used_at_s <= ?"
                db.execute(old, (now_s - keep_s,))
                found: queries.Row = db.execute(
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

    def receipts_after(self, sequence: int, limit: int) -> list[NumberedReceipt]:
        with self._reading() as db:
            return queries.receipts_after(db, sequence, limit)

    def everything(self, after: int = 0, receipts_after: int = 0) -> Everything:
        with self._reading() as db:
            db.execute("BEGIN")  # a read transaction: all of it of the same moment
            try:
                return Everything(
                    queries.accounts(db),
                    queries.transfers_after(db, after, -1),
                    queries.receipts_after(db, receipts_after, -1),
                    queries.dues(db),
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


def _all_ok(answers: list[list[Result]]) -> bool:
    return all(result.outcome is Outcome.OK for answer in answers for result in answer)


def _is_old(written: Mark | None, mark: Mark) -> bool:
    """Whether the clock's row must be written with this group."""
    return (
        written is None
        or written.boot_id != mark.boot_id
        or mark.uptime_s - written.uptime_s >= CLOCK_ROW_S
    )
