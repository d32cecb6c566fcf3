"""The ledger: the facade over a storage and the thread that writes it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self, cast, get_args

from vllm_kvmarket.core.errors import (
    LedgerError,
    LedgerRefusedError,
    LedgerUnavailableError,
    NotFoundError,
)
from vllm_kvmarket.ledger import integrity
from vllm_kvmarket.ledger.group_commit import Writer
from vllm_kvmarket.ledger.model import (
    ACCOUNT_ID,
    CURRENCY,
    DEFAULT_CURRENCY,
    Account,
    AccountKind,
    Operation,
    Outcome,
    Receipt,
    Result,
    Transfer,
    expire,
    plain,
    renew,
)
from vllm_kvmarket.ledger.storage import Batch, Storage

PROVIDER = "provider"
WORLD = "world"
POSTGRES = ("postgresql://", "postgres://")
PATIENCE_S = 5.0
EXPIRE_AT_ONCE = 500


class Ledger:
    """One process's access to the ledger; thread-safe. Several processes may share the database.

    Belongs to the process that opened it: a forked child has no writer thread, and must not touch
    its parent's connections. It opens a ledger of its own.
    """

    def __init__(
        self,
        storage: Storage,
        clock: Callable[[], float] = time.time,
        currency: str = DEFAULT_CURRENCY,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._currency = currency
        self._process = os.getpid()
        self._closed = False
        self.create_account(PROVIDER, "provider")
        self.create_account(WORLD, "world", may_go_negative=True)
        self._writer = Writer(storage)

    @classmethod
    def open(
        cls,
        place: Path | str,
        clock: Callable[[], float] = time.time,
        currency: str = DEFAULT_CURRENCY,
    ) -> Self:
        """Open the ledger, with the accounts `provider` and `world`, making it where there is none.

        `place` is a file of SQLite or a URL of PostgreSQL, postgresql://user:password@host/name.
        `currency` is the settlement currency, that of every account that names no other. Raises
        LedgerError when the database cannot be used, or has its accounts in another currency.
        """
        storage = storage_of(place)
        try:
            return cls(storage, clock, currency)
        except BaseException:
            storage.close()
            raise

    def close(self) -> None:
        """Write what is queued, then release the database. Nobody may be reading any more."""
        self._writer.close()
        if not self._closed:
            self._closed = True
            self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Writing

    def submit(
        self,
        operations: Sequence[Operation],
        *,
        linked: bool = True,
        receipt: Receipt | None = None,
        patience_s: float = PATIENCE_S,
    ) -> Future[list[Result]]:
        """Enqueue a batch; durable once its future answers, with a result for each operation.

        Costs microseconds and never waits. Linked, all of the batch takes effect or none; batches
        apply in the order of submission, at the time of submission. The receipt is kept in the same
        transaction, if every operation is good and any of them is new: a retry leaves no second
        receipt.

        While the database is away, the batch is tried again for `patience_s`, `math.inf` for as
        long as the ledger is open. Then the future raises LedgerError; the same batch may be
        submitted again, what took effect before is EXISTS. A batch that no database could keep
        raises LedgerError at once, and has no effect.
        """
        future: Future[list[Result]] = Future()
        # What is enqueued will be written: a running future cannot be cancelled.
        future.set_running_or_notify_cancel()
        batch = Batch(
            tuple(operations),
            linked,
            receipt,
            future,
            self._clock(),
            time.monotonic() + patience_s,
        )
        if refusal := self._foreign() or self._writer.enqueue(batch):
            future.set_exception(refusal)
        return future

    @property
    def queue_depth(self) -> int:
        """How many batches wait to be written; never waits."""
        return self._writer.queue_depth

    def on_commit(self, told: Callable[[float], object]) -> None:
        """Have `told` called with the seconds that each commit took, on the writer's thread."""
        self._writer.on_commit = told

    def transact(self, *operations: Operation) -> None:
        """Submit a linked batch and wait for it. Raises LedgerError when it is refused."""
        for operation, result in zip(operations, self.submit(operations).result(), strict=True):
            if not result.outcome.good and result.outcome is not Outcome.LINKED_FAILED:
                raise LedgerRefusedError(
                    f"transfer {operation.id}: {result.outcome.name.lower().replace('_', ' ')} "
                    f"{result.detail}".rstrip()
                )

    def renew(self, pending_ids: Iterable[str], timeout_s: int) -> Future[list[Result]]:
        """Keep holds for `timeout_s` from now, each for itself; never waits, see submit.

        An engine calls it for what it still serves, well before the holds are due. The result says
        of each whether it stands: OK, or why not (ALREADY_POSTED, EXPIRED, ...).
        """
        # One renewal a hold and nanosecond; another with the same id would do the same.
        now_ns = time.time_ns()
        return self.submit(
            [
                renew(id=f"{held}:renew:{now_ns}", pending_id=held, timeout_s=timeout_s)
                for held in pending_ids
            ],
            linked=False,
        )

    def expire_pending(self) -> int:
        """Release every reservation whose time is over; how many there were.

        Cheap when there are none: one look into an index. Waits for the database, so call it from
        a thread of its own. Raises LedgerError.
        """
        expired = 0
        while True:
            overdue = self._reader().overdue(self._clock(), EXPIRE_AT_ONCE)
            if not overdue:
                return expired
            batch = [expire(id=f"{held}:expire", pending_id=held) for held in overdue]
            results = self.submit(batch, linked=False).result()
            released = sum(result.outcome is Outcome.OK for result in results)
            expired += released
            # Where another process releases the same ones, it is left to go on.
            if len(overdue) < EXPIRE_AT_ONCE or not released:
                return expired

    # Accounts

    def create_account(
        self,
        account_id: str,
        kind: str,
        *,
        may_go_negative: bool = False,
        currency: str | None = None,
    ) -> Account:
        """Open an account; one of the same kind that is there already is returned.

        `currency` is the ledger's unless told. Raises LedgerError for a malformed id or currency,
        an unknown kind, another kind, limit or currency than it has.
        """
        currency = self._currency if currency is None else currency
        if not ACCOUNT_ID.fullmatch(account_id):
            raise LedgerRefusedError(
                f"account id {account_id!r} is not 1 to 128 of the characters A-Z a-z 0-9 . _ : @ -"
            )
        if kind not in get_args(AccountKind):
            raise LedgerRefusedError(
                f"account kind {kind!r} is none of {', '.join(get_args(AccountKind))}"
            )
        if not CURRENCY.fullmatch(currency):
            raise LedgerRefusedError(f"currency {currency!r} is not a code like USD")
        wanted = Account(account_id, cast(AccountKind, kind), may_go_negative, currency)
        self._reader().open_account(wanted)
        account = self.account(account_id)
        if account.kind != kind:
            raise LedgerRefusedError(
                f"account {account_id!r} exists as a {account.kind}, not a {kind}"
            )
        if account.may_go_negative is not may_go_negative:
            may = "may" if account.may_go_negative else "may not"
            raise LedgerRefusedError(f"account {account_id!r} exists and {may} go negative")
        if account.currency != currency:
            raise LedgerRefusedError(f"account {account_id!r} exists in {account.currency}")
        return account

    def deposit(self, account_id: str, amount_nano: int, transfer_id: str) -> Transfer:
        """Bring money in from the outside world, once for a transfer id.

        Raises NotFoundError for an unknown account and LedgerError for a refused amount.
        """
        self.account(account_id)
        if amount_nano <= 0:
            raise LedgerRefusedError(f"a deposit must be above 0, not {amount_nano} nano-units")
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

    # Reading

    def account(self, account_id: str) -> Account:
        """An account as it stands. Raises NotFoundError."""
        found = self._reader().account(account_id)
        if found is None:
            raise NotFoundError(
                f"there is no account {account_id!r}; create it with `kvmarket account create`"
            )
        return found

    def accounts(self) -> list[Account]:
        """Every account, by id."""
        return self._reader().accounts()

    def transfer(self, transfer_id: str) -> Transfer:
        """A transfer. Raises NotFoundError."""
        found = self._reader().transfer(transfer_id)
        if found is None:
            raise NotFoundError(f"there is no transfer {transfer_id!r}")
        return found

    def transfers(self, account: str | None = None, limit: int | None = None) -> list[Transfer]:
        """Transfers of one account or of all, newest first."""
        return self._reader().transfers(account, limit)

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        """Transfers that took effect behind the first `sequence`, in that order, `limit` at most.

        Sequence numbers begin with 1 and have no gaps.
        """
        return self._reader().transfers_after(sequence, limit)

    def sequence_of(self, transfer_id: str) -> int:
        """As the how many-th a transfer took effect, from 1. Raises NotFoundError."""
        found = self._reader().sequence_of(transfer_id)
        if found is None:
            raise NotFoundError(f"there is no transfer {transfer_id!r}")
        return found

    def due_at_s(self, pending_id: str) -> float | None:
        """Until when a reservation stands, in seconds of the epoch; None when it does not."""
        return self._reader().due_at_s(pending_id)

    def receipts(
        self,
        account: str | None = None,
        request_id: str | None = None,
        document_id: str | None = None,
        limit: int | None = None,
    ) -> list[Receipt]:
        """Receipts that have all the given properties, newest first."""
        asked = {"account": account, "request_id": request_id, "document_id": document_id}
        given = {column: value for column, value in asked.items() if value is not None}
        return self._reader().receipts(given, limit)

    def receipt(self, receipt_id: str) -> Receipt:
        """A receipt. Raises NotFoundError."""
        found = self._reader().receipts({"id": receipt_id}, 1)
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
        """What is wrong with the books; empty when debits equal credits, every balance and hold
        follows from the transfers, and every receipt says what was charged.
        """
        return integrity.problems(self._reader().everything())

    def _reader(self) -> Storage:
        if foreign := self._foreign():
            raise foreign
        if self._closed:
            raise LedgerUnavailableError("the ledger is closed")
        return self._storage

    def _foreign(self) -> LedgerError | None:
        """Why this process cannot use the ledger, if it cannot."""
        if os.getpid() == self._process:
            return None
        return LedgerError(
            "the ledger was opened by another process, before a fork; open it in this one"
        )


def storage_of(place: Path | str) -> Storage:
    """The database at a path or URL, with its tables as new as this code; see Ledger.open."""
    if str(place).startswith(POSTGRES):
        from vllm_kvmarket.ledger.postgres import PostgresStorage

        return PostgresStorage(str(place))
    from vllm_kvmarket.ledger.sqlite import SqliteStorage

    return SqliteStorage(Path(place))
