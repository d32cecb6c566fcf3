"""The ledger on SQLite: one writer thread, group commit, futures.

A caller only enqueues. The thread takes every batch that waits, applies each by the rules inside
one
transaction, commits once, and then answers all of them: one fsync pays for many batches.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import apsw

from vllm_kvmarket import database
from vllm_kvmarket.errors import LedgerError, NotFoundError
from vllm_kvmarket.ledger import tables
from vllm_kvmarket.ledger.receipts import Receipt
from vllm_kvmarket.ledger.rules import (
    ACCOUNT_ID,
    Account,
    AccountKind,
    Operation,
    Outcome,
    Result,
    Transfer,
    apply,
    expire,
    plain,
)

PROVIDER = "provider"
WORLD = "world"
MAX_GROUP = 1024  # batches a commit: bounds how long the first of them waits


@dataclass(slots=True)
class _Batch:
    operations: Sequence[Operation]
    receipt: Receipt | None
    future: Future[list[Result]]


def _is_one_batch_s(error: Exception) -> bool:
    """Whether a failure is due to what one batch contains, rather than to the database."""
    return isinstance(error, apsw.ConstraintError) or not isinstance(error, apsw.Error)


class Ledger:
    """One process's access to the ledger; thread-safe. Several processes may share the file."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._queue: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._local = threading.local()
        self._connections: list[apsw.Connection] = []
        self._connections_lock = threading.Lock()
        self._closed = False
        # Held for an enqueuing only: behind the end of the queue nothing may follow.
        self._queue_lock = threading.Lock()
        db = self._db()
        database.migrate(db, tables.ROOM, tables.MIGRATIONS)
        self.create_account(PROVIDER, "provider")
        self.create_account(WORLD, "world", may_go_negative=True)
        self._writer = threading.Thread(target=self._write, name="kvmarket-ledger", daemon=True)
        self._writer.start()

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> Self:
        """Open the ledger in the market's database, with the accounts `provider` and `world`."""
        return cls(path, clock)

    def close(self) -> None:
        """Write what is queued, then release the database."""
        with self._queue_lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._writer.join()
        with self._connections_lock:
            for connection in self._connections:
                connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Writing

    def submit(
        self, operations: Sequence[Operation], receipt: Receipt | None = None
    ) -> Future[list[Result]]:
        """Enqueue a linked batch: all of it takes effect, durably, or none.

        Costs microseconds. The future answers after the commit, with a result an operation, or with
        LedgerError when the database could not be written. Batches apply in the order of
        submission.
        The receipt is kept in the same transaction, if the batch takes effect.
        """
        future: Future[list[Result]] = Future()
        # What is enqueued will be written: a running future cannot be cancelled.
        future.set_running_or_notify_cancel()
        with self._queue_lock:
            closed = self._closed
            if not closed:
                self._queue.put(_Batch(operations, receipt, future))
        if closed:
            future.set_exception(LedgerError("the ledger is closed"))
        return future

    def transact(self, *operations: Operation) -> None:
        """Submit a linked batch and wait for it. Raises LedgerError when it is refused."""
        for operation, result in zip(operations, self.submit(operations).result(), strict=True):
            if not result.outcome.good and result.outcome is not Outcome.LINKED_FAILED:
                raise LedgerError(
                    f"transfer {operation.id}: {result.outcome.name.lower().replace('_', ' ')} "
                    f"{result.detail}".rstrip()
                )

    def _write(self) -> None:
        db = self._db()
        open_ended = True
        while open_ended:
            first = self._queue.get()
            group: list[_Batch] = []
            while first is not None:
                group.append(first)
                if len(group) == MAX_GROUP or self._queue.empty():
                    break
                first = self._queue.get()
            open_ended = first is not None
            if group:
                self._commit(db, group)

    def _commit(self, db: apsw.Connection, group: list[_Batch]) -> None:
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                books = tables.StoredBooks(db)
                answers = [self._apply(db, books, batch) for batch in group]
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite may have rolled back already, as on a full disk
                    db.execute("ROLLBACK")
                raise
        except Exception as error:  # noqa: BLE001
            # The thread outlives a full disk, a locked file and a bad batch: callers decide.
            if len(group) > 1 and _is_one_batch_s(error):
                for batch in group:
                    self._commit(db, [batch])
                return
            failure = LedgerError(f"the ledger could not be written: {error}")
            for batch in group:
                batch.future.set_exception(failure)
            return
        for batch, results in zip(group, answers, strict=True):
            batch.future.set_result(results)

    def _apply(self, db: apsw.Connection, books: tables.StoredBooks, batch: _Batch) -> list[Result]:
        results = apply(books, batch.operations, self._clock())
        if batch.receipt is not None and all(result.outcome.good for result in results):
            tables.put_receipt(db, batch.receipt)
        return results

    # Accounts

    def create_account(
        self, account_id: str, kind: str, *, may_go_negative: bool = False
    ) -> Account:
        """Open an account; one of the same kind that is there already is returned.

        Raises LedgerError for a malformed id, an unknown kind, or another kind than it has.
        """
        if not ACCOUNT_ID.fullmatch(account_id):
            raise LedgerError(
                f"account id {account_id!r} is not 1 to 128 of the characters A-Z a-z 0-9 . _ : @ -"
            )
        if kind not in get_args(AccountKind):
            raise LedgerError(
                f"account kind {kind!r} is none of {', '.join(get_args(AccountKind))}"
            )
        self._db().execute(
            "INSERT INTO account (id, kind, may_go_negative) VALUES (?, ?, ?) "
            "ON CONFLICT DO NOTHING",
            (account_id, kind, int(may_go_negative)),
        )
        account = self.account(account_id)
        if account.kind != kind:
            raise LedgerError(f"account {account_id!r} exists as a {account.kind}, not a {kind}")
        return account

    def deposit(self, account_id: str, amount_nano: int, transfer_id: str) -> Transfer:
        """Bring money in from the outside world, once for a transfer id.

        Raises NotFoundError for an unknown account and LedgerError for a refused amount.
        """
        self.account(account_id)
        if amount_nano <= 0:
            raise LedgerError(f"a deposit must be above 0, not {amount_nano} nano-units")
        self.transact(
            plain(
                id=transfer_id,
                debit=WORLD,
                credit=account_id,
                amount_nano=amount_nano,
                code="deposit",
            )
        )
        return self.transfer(transfer_id)

    def expire_pending(self) -> int:
        """Release every reservation whose time is over; how many there were."""
        overdue = self._db().execute(
            "SELECT id FROM transfer AS held WHERE kind = 'pending' "
            "AND created_at_s + timeout_s <= ? "
            "AND NOT EXISTS (SELECT 1 FROM transfer WHERE pending_id = held.id)",
            (self._clock(),),
        )
        futures = [
            self.submit([expire(id=f"{held}:expire", pending_id=held)]) for (held,) in overdue
        ]
        return sum(future.result()[0].outcome is Outcome.OK for future in futures)

    # Reading

    def account(self, account_id: str) -> Account:
        """An account as it stands. Raises NotFoundError."""
        found = tables.StoredBooks(self._db()).account(account_id)
        if found is None:
            raise NotFoundError(
                f"there is no account {account_id!r}; create it with `kvmarket account create`"
            )
        return found

    def accounts(self) -> list[Account]:
        """Every account, by id."""
        rows = self._db().execute(f"SELECT {tables.ACCOUNT_COLUMNS} FROM account ORDER BY id")  # noqa: S608  # names are ours
        return [tables.account_from(row) for row in rows]

    def transfer(self, transfer_id: str) -> Transfer:
        """A transfer. Raises NotFoundError."""
        found = tables.StoredBooks(self._db()).transfer(transfer_id)
        if found is None:
            raise NotFoundError(f"there is no transfer {transfer_id!r}")
        return found

    def transfers(self, account: str | None = None, limit: int | None = None) -> list[Transfer]:
        """Transfers of one account or of all, newest first."""
        rows = self._db().execute(
            f"SELECT {tables.TRANSFER_COLUMNS} FROM transfer "  # noqa: S608  # names are ours
            "WHERE ?1 IS NULL OR debit = ?1 OR credit = ?1 ORDER BY sequence DESC LIMIT ?2",
            (account, -1 if limit is None else limit),
        )
        return [tables.transfer_from(row) for row in rows]

    def receipts(
        self,
        account: str | None = None,
        request_id: str | None = None,
        document_id: str | None = None,
        limit: int | None = None,
    ) -> list[Receipt]:
        """Receipts that have all the given properties, newest first."""
        wanted = {"account": account, "request_id": request_id, "document_id": document_id}
        given = {column: value for column, value in wanted.items() if value is not None}
        where = " AND ".join(f"{column} = ?" for column in given) or "TRUE"
        return tables.read_receipts(self._db(), where, list(given.values()), limit)

    def receipt(self, receipt_id: str) -> Receipt:
        """A receipt. Raises NotFoundError."""
        found = tables.read_receipts(self._db(), "id = ?", (receipt_id,), 1)
        if not found:
            raise NotFoundError(f"there is no receipt {receipt_id!r}")
        return found[0]

    def check_integrity(self) -> list[str]:
        """What is wrong with the books; empty when debits equal credits and all balances follow
        from the transfers.
        """
        from vllm_kvmarket.ledger.audit import problems

        return problems(self._db())

    def _db(self) -> apsw.Connection:
        """This thread's connection."""
        connection: apsw.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = database.connect(self._path)
            with self._connections_lock:
                self._connections.append(connection)
        return connection
