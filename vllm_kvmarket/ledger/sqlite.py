"""The ledger on SQLite: the facade over the writer thread and a reading connection a thread."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import apsw

from vllm_kvmarket import database
from vllm_kvmarket.errors import LedgerError, NotFoundError
from vllm_kvmarket.ledger import audit, tables
from vllm_kvmarket.ledger.receipts import Receipt
from vllm_kvmarket.ledger.rules import (
    ACCOUNT_ID,
    Account,
    AccountKind,
    Operation,
    Outcome,
    Result,
    Transfer,
    expire,
    plain,
)
from vllm_kvmarket.ledger.writer import Batch, Writer

PROVIDER = "provider"
WORLD = "world"


class Ledger:
    """One process's access to the ledger; thread-safe. Several processes may share the file.

    Belongs to the process that opened it: a forked child has no writer thread, and must not touch
    its parent's connections. It opens a ledger of its own.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._process = os.getpid()
        self._local = threading.local()
        # A thread that ends takes its connection with it; close() takes those of the others.
        self._connections: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()
        self._connections_lock = threading.Lock()
        self._closed = False
        with self._reported():
            writing = database.connect(path)
            database.migrate(writing, tables.ROOM, tables.MIGRATIONS)
        self.create_account(PROVIDER, "provider")
        self.create_account(WORLD, "world", may_go_negative=True)
        self._writer = Writer(writing, clock)

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> Self:
        """Open the ledger in the market's database, with the accounts `provider` and `world`."""
        return cls(path, clock)

    def close(self) -> None:
        """Write what is queued, then release the database. Nobody may be reading any more."""
        self._writer.close()
        with self._connections_lock:
            self._closed = True
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
        self,
        operations: Sequence[Operation],
        *,
        linked: bool = True,
        receipt: Receipt | None = None,
    ) -> Future[list[Result]]:
        """Enqueue a batch; durable once its future answers, with a result for each operation.

        Costs microseconds and never waits. Linked, all of the batch takes effect or none; batches
        apply in the order of submission. The receipt is kept in the same transaction, if every
        operation is good and any of them is new: a retry leaves no second receipt. The future
        raises LedgerError when the ledger could not be written; then nothing took effect, and the
        same batch may be submitted again.
        """
        future: Future[list[Result]] = Future()
        # What is enqueued will be written: a running future cannot be cancelled.
        future.set_running_or_notify_cancel()
        refusal = self._foreign()
        if not refusal and not self._writer.enqueue(
            Batch(tuple(operations), linked, receipt, future)
        ):
            refusal = "the ledger is closed"
        if refusal:
            future.set_exception(LedgerError(refusal))
        return future

    def transact(self, *operations: Operation) -> None:
        """Submit a linked batch and wait for it. Raises LedgerError when it is refused."""
        for operation, result in zip(operations, self.submit(operations).result(), strict=True):
            if not result.outcome.good and result.outcome is not Outcome.LINKED_FAILED:
                raise LedgerError(
                    f"transfer {operation.id}: {result.outcome.name.lower().replace('_', ' ')} "
                    f"{result.detail}".rstrip()
                )

    # Accounts

    def create_account(
        self, account_id: str, kind: str, *, may_go_negative: bool = False
    ) -> Account:
        """Open an account; one of the same kind that is there already is returned.

        Raises LedgerError for a malformed id, an unknown kind, another kind or limit than it has.
        """
        if not ACCOUNT_ID.fullmatch(account_id):
            raise LedgerError(
                f"account id {account_id!r} is not 1 to 128 of the characters A-Z a-z 0-9 . _ : @ -"
            )
        if kind not in get_args(AccountKind):
            raise LedgerError(
                f"account kind {kind!r} is none of {', '.join(get_args(AccountKind))}"
            )
        with self._reading() as db:
            db.execute(
                "INSERT INTO account (id, kind, may_go_negative) VALUES (?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                (account_id, kind, int(may_go_negative)),
            )
        account = self.account(account_id)
        if account.kind != kind:
            raise LedgerError(f"account {account_id!r} exists as a {account.kind}, not a {kind}")
        if account.may_go_negative is not may_go_negative:
            may = "may" if account.may_go_negative else "may not"
            raise LedgerError(f"account {account_id!r} exists and {may} go negative")
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
        with self._reading() as db:
            overdue = tables.overdue_holds(db, self._clock())
        futures = [self.submit([expire(id=f"{held}:expire", pending_id=held)]) for held in overdue]
        return sum(future.result()[0].outcome is Outcome.OK for future in futures)

    # Reading

    def account(self, account_id: str) -> Account:
        """An account as it stands. Raises NotFoundError."""
        with self._reading() as db:
            found = tables.StoredBooks(db).account(account_id)
        if found is None:
            raise NotFoundError(
                f"there is no account {account_id!r}; create it with `kvmarket account create`"
            )
        return found

    def accounts(self) -> list[Account]:
        """Every account, by id."""
        with self._reading() as db:
            return tables.read_accounts(db)

    def transfer(self, transfer_id: str) -> Transfer:
        """A transfer. Raises NotFoundError."""
        with self._reading() as db:
            found = tables.StoredBooks(db).transfer(transfer_id)
        if found is None:
            raise NotFoundError(f"there is no transfer {transfer_id!r}")
        return found

    def transfers(self, account: str | None = None, limit: int | None = None) -> list[Transfer]:
        """Transfers of one account or of all, newest first."""
        with self._reading() as db:
            return tables.read_transfers(db, account, limit)

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
        with self._reading() as db:
            return tables.read_receipts(db, where, list(given.values()), limit)

    def receipt(self, receipt_id: str) -> Receipt:
        """A receipt. Raises NotFoundError."""
        with self._reading() as db:
            found = tables.read_receipts(db, "id = ?", (receipt_id,), 1)
        if not found:
            raise NotFoundError(f"there is no receipt {receipt_id!r}")
        return found[0]

    def totals(self) -> tuple[int, int]:
        """What all accounts together were debited and credited, posted; equal in sound books."""
        accounts = self.accounts()
        return (
            sum(account.debits_posted for account in accounts),
            sum(account.credits_posted for account in accounts),
        )

    def check_integrity(self) -> list[str]:
        """What is wrong with the books; empty when debits equal credits, every balance follows from
        the transfers, and every receipt says what was charged.
        """
        with self._reading() as db:
            return audit.problems(db)

    @contextmanager
    def _reading(self) -> Iterator[apsw.Connection]:
        """This thread's connection, for reading and for opening accounts."""
        refusal = self._foreign() or ("the ledger is closed" if self._closed else "")
        if refusal:
            raise LedgerError(refusal)
        with self._reported():
            connection: apsw.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = database.connect(self._path)
                with self._connections_lock:
                    self._connections.add(connection)
            yield connection

    def _foreign(self) -> str:
        """Why this process cannot use the ledger; empty when it can."""
        if os.getpid() == self._process:
            return ""
        return "the ledger was opened by another process, before a fork; open it in this one"

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn the database's errors into ours."""
        try:
            yield
        except apsw.Error as error:
            raise LedgerError(
                f"the market's database {self._path} cannot be used ({error}); see `kvmarket env`"
            ) from error
