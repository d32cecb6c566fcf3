"""The ledger: the facade over a storage and the thread that writes it."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Self, cast, get_args

from vllm_kvmarket.core.errors import (
    KeyConflictError,
    KeyUsedUpError,
    LedgerError,
    LedgerRefusedError,
    LedgerUnavailableError,
    NotFoundError,
)
from vllm_kvmarket.ledger import integrity
from vllm_kvmarket.ledger.group_commit import Writer
from vllm_kvmarket.ledger.integrity import CheckedBooks
from vllm_kvmarket.ledger.model import (
    ACCOUNT_ID,
    CURRENCY,
    DEFAULT_CURRENCY,
    PROVIDER,
    ROYALTY,
    SUSPENSE,
    WORLD,
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
from vllm_kvmarket.ledger.outbox import Outbox, batch_of
from vllm_kvmarket.ledger.storage import Batch, Storage

POSTGRES = ("postgresql://", "postgres://")
PATIENCE_S = 5.0
RESERVATION_PATIENCE_S = 1.0
EXPIRE_AT_ONCE = 500
KEY_LIFE_S = 24 * 3600.0
MOST_USES_OF_A_KEY = 4  # the answer, and three retries


class _Answer(Future[list[Result]]):
    """A batch in the queue will be written: it cannot be cancelled."""

    def cancel(self) -> bool:
        return False


class Ledger:
    """One process's access to the ledger; thread-safe. Several processes may share the database.

    Belongs to the process that opened it: a forked child has no writer thread, and must not touch
    its parent's connections; it opens another ledger.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        clock: Callable[[], float] | None = None,
        currency: str = DEFAULT_CURRENCY,
        outbox: Path | None = None,
        reservation_patience_s: float = RESERVATION_PATIENCE_S,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._currency = currency
        self._reservation_patience_s = reservation_patience_s
        self._process = os.getpid()
        self._closed = False
        self.create_account(PROVIDER, "provider")
        self.create_account(WORLD, "world", may_go_negative=True)
        self.create_account(SUSPENSE, "suspense")
        self._outbox = None if outbox is None else Outbox(outbox)
        self._writer = Writer(storage, outbox=self._outbox)
        self.book_outbox()

    @classmethod
    def open(
        cls,
        place: Path | str,
        *,
        clock: Callable[[], float] | None = None,
        currency: str = DEFAULT_CURRENCY,
        outbox: Path | None = None,
        reservation_patience_s: float = RESERVATION_PATIENCE_S,
    ) -> Self:
        """Open the ledger with its own accounts, and make it where there is none.

        `place` is a file of SQLite or a URL of PostgreSQL, postgresql://user:password@host/name.
        `currency` is the settlement currency, that of every account that names no other. `outbox`
        is the home's folder for batches that must outlive this process. Times are the database's,
        unless `clock` gives them. Raises LedgerError when the database cannot be used, or has its
        accounts in another currency.
        """
        storage = storage_of(place)
        try:
            return cls(
                storage,
                clock=clock,
                currency=currency,
                outbox=outbox,
                reservation_patience_s=reservation_patience_s,
            )
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
        patience_s: float | None = None,
        shared: bool = False,
    ) -> Future[list[Result]]:
        """Enqueue a batch; durable once its future answers, with a result for each operation.

        Costs microseconds and does not wait for the database. Linked, all of the batch takes effect
        or none; batches apply in the order of submission. The receipt is stored in the same
        transaction, if every operation is good and any of them is new: a retry leaves no second
        receipt.

        While the database is away, the batch is tried again for `patience_s`. Then the future
        raises LedgerUnavailableError; the same batch may be submitted again: what took effect
        before is EXISTS. A lone reservation has less patience, and when its outcome is unknown, the
        ledger releases it, unless it is `shared`: another request may have the same hold. With
        `math.inf` the batch must be booked: it is in the home's outbox when this returns,
        and another process of the home books it when this one dies. A batch that no database could
        store raises LedgerError at once, and has no effect.
        """
        future = _Answer()
        batch_operations, undo = tuple(operations), False
        first = batch_operations[0] if len(batch_operations) == 1 else None
        if type(first) is Operation and first.kind == "pending":
            undo = not shared
            patience_s = self._reservation_patience_s if patience_s is None else patience_s
        batch = Batch(
            batch_operations,
            linked,
            receipt,
            future,
            None if self._clock is None else self._clock(),
            time.monotonic() + (PATIENCE_S if patience_s is None else patience_s),
            undo,
        )
        if refusal := self._foreign() or self._writer.enqueue(batch):
            future.set_exception(refusal)
        return future

    def book_outbox(self) -> int:
        """Submit what processes of this home sold and could not book before they ended.

        Returns how many batches that were. Does not wait for the database.
        """
        if self._outbox is None:
            return 0
        found = 0
        for entries in self._outbox.abandoned():
            for entry in entries:
                if self._writer.enqueue(batch_of(entry), sync=False):
                    return found  # closed: the next process does it
                found += 1
        return found

    def submit_ahead(self, hold: Operation) -> Future[list[Result]] | None:
        """Submit a lone reservation whose caller goes on before the answer; see known_funds.

        None, and nothing is submitted, where the account's funds do not amply cover it. Whatever
        the answer will be, what was sold must be booked: with an OWED transfer where there is no
        hold.
        """
        funds, amount_nano = self._storage.funds, hold.amount_nano
        if amount_nano <= 0 or not funds.take(hold.debit, amount_nano, self._currency):
            return None
        answer = self.submit([hold])
        answer.add_done_callback(partial(funds.end, hold.debit, amount_nano))
        return answer

    def known_available_nano(self, account_id: str) -> int | None:
        """What an account could spend at last; see known_funds. Never waits."""
        return self._storage.funds.available_nano(account_id)

    @property
    def queue_depth(self) -> int:
        """How many batches wait to be written; never waits."""
        return self._writer.queue_depth

    def on_commit(self, observe: Callable[[float], object]) -> None:
        """Have `observe` called with the seconds of each commit, on the writer's thread."""
        self._writer.on_commit = observe

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

        An engine calls it for its running requests, well before the holds are due. The result of
        each hold that does not stand says why (ALREADY_POSTED, EXPIRED, ...).
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
        """Release every reservation that is due and whose grace is over; return their number.

        Books the outboxes of processes that ended, too. Cheap when there is nothing to do: one look
        into an index, and into a folder. Waits for the database, so call it from a thread that
        serves nobody. Raises LedgerError.
        """
        self.book_outbox()
        expired = 0
        while True:
            now_s = None if self._clock is None else self._clock()
            overdue = self._reader().overdue(now_s, EXPIRE_AT_ONCE)
            if not overdue:
                return expired
            batch = [expire(id=f"{held}:expire", pending_id=held) for held in overdue]
            results = self.submit(batch, linked=False).result()
            released = sum(result.outcome is Outcome.OK for result in results)
            expired += released
            # Where another process releases the same ones, it is left to go on.
            if len(overdue) < EXPIRE_AT_ONCE or not released:
                return expired

    def use_key(self, account: str, key: str, body: bytes) -> str:
        """Count a use of a client's Idempotency-Key; return the key of its one purchase.

        The purchase key is the same for every request with this account and key during 24 hours, on
        all engines. Waits for the database. Raises KeyConflictError for another `body` under the
        same key, KeyUsedUpError when the key has covered 4 answers, LedgerUnavailableError.
        """
        digest = hashlib.sha256(body).hexdigest()
        named = f"{len(account)}:{account}:{key}:{secrets.token_hex(16)}"
        new = hashlib.sha256(named.encode()).hexdigest()
        found = self._reader().use_key(account, key, digest, new, KEY_LIFE_S)
        if found.body_digest != digest:
            raise KeyConflictError(
                "this Idempotency-Key was used with another body; use a new key for a new request"
            )
        if found.uses > MOST_USES_OF_A_KEY:
            raise KeyUsedUpError(
                f"this Idempotency-Key has covered {MOST_USES_OF_A_KEY} answers; use a new key"
            )
        return found.purchase_key

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

        `currency` is the ledger's by default. Raises LedgerError for a malformed id or currency,
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
        if kind == "publisher" and self.account(SUSPENSE).balance_nano:
            self.pay_suspended(account_id)
            return self.account(account_id)
        return account

    def pay_suspended(self, account_id: str) -> int:
        """Pay a publisher the royalties that waited in suspense for its account; their sum.

        A repetition pays nothing twice. Raises NotFoundError and LedgerError.
        """
        account, paid_nano = self.account(account_id), 0
        payees: dict[str, dict[str, str]] = {}
        for waiting in self.transfers(SUSPENSE):
            if waiting.credit != SUSPENSE:
                continue
            document_id = waiting.user_data
            if document_id not in payees:
                sold = self.receipts(document_id=document_id)
                payees[document_id] = {k: v for each in sold for k, v in each.payees().items()}
            if payees[document_id].get(waiting.id) != account.id:
                continue
            operation = plain(
                id=f"{waiting.id}:paid",
                debit=SUSPENSE,
                credit=account.id,
                amount_nano=waiting.amount_nano,
                code=ROYALTY,
                user_data=document_id,
            )
            (result,) = self.submit([operation]).result()
            paid_nano += waiting.amount_nano if result.outcome is Outcome.OK else 0
        return paid_nano

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

    def transfers(
        self, account: str | None = None, limit: int | None = None, before: str | None = None
    ) -> list[Transfer]:
        """Transfers of one account or of all, newest first, older than the one named `before`."""
        return self._reader().transfers(account, limit, before)

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        """Transfers that took effect behind the first `sequence`, in that order, `limit` at most.

        Sequence numbers begin with 1 and have no gaps.
        """
        return self._reader().transfers_after(sequence, limit)

    def sequence_of(self, transfer_id: str) -> int:
        """A transfer's position in the order of effect, from 1. Raises NotFoundError."""
        found = self._reader().sequence_of(transfer_id)
        if found is None:
            raise NotFoundError(f"there is no transfer {transfer_id!r}")
        return found

    def due_at_s(self, pending_id: str) -> float | None:
        """When a reservation is due, in seconds of the epoch; None when it has ended."""
        return self._reader().due_at_s(pending_id)

    def receipts(
        self,
        account: str | None = None,
        request_id: str | None = None,
        document_id: str | None = None,
        limit: int | None = None,
        before: str | None = None,
    ) -> list[Receipt]:
        """Receipts with all the given properties, newest first, older than the one `before`."""
        asked = {"account": account, "request_id": request_id, "document_id": document_id}
        given = {column: value for column, value in asked.items() if value is not None}
        return self._reader().receipts(given, limit, before)

    def moves(
        self, account: str, from_s: float | None = None, to_s: float | None = None
    ) -> list[Transfer]:
        """What moved amounts to or from an account from `from_s` up to, and without, `to_s`.

        In the order of effect. Reads the period, not the account's whole history.
        """
        return self._reader().moves(account, from_s, to_s)

    def moved_before(self, account: str, at_s: float) -> int:
        """The balance of an account before a moment."""
        return self._reader().moved_before(account, at_s)

    def receipts_booked(
        self,
        from_s: float | None,
        to_s: float | None,
        account: str | None = None,
        documents: Sequence[str] = (),
    ) -> list[Receipt]:
        """A period's receipts of an account and of documents, or all; in the order of booking."""
        return self._reader().receipts_booked(from_s, to_s, account, documents)

    def receipt(self, receipt_id: str) -> Receipt:
        """A receipt. Raises NotFoundError."""
        found = self._reader().receipts({"id": receipt_id}, 1)
        if not found:
            raise NotFoundError(f"there is no receipt {receipt_id!r}")
        return found[0]

    def totals(self) -> dict[str, tuple[int, int]]:
        """The posted debits and credits of all accounts, by currency; equal in sound books."""
        totals: dict[str, tuple[int, int]] = {}
        for account in self.accounts():
            debits, credits = totals.get(account.currency, (0, 0))
            totals[account.currency] = (
                debits + account.debits_posted,
                credits + account.credits_posted,
            )
        return totals

    def check_integrity(self) -> list[str]:
        """Every problem of the books, in words; none when debits equal credits, every balance and
        hold follows from the transfers, and receipts, charges and royalties agree.
        """
        return self.check_behind()[0]

    def check_behind(
        self,
        start: CheckedBooks | None = None,
        on_page: Callable[[Sequence[Transfer]], object] | None = None,
    ) -> tuple[list[str], CheckedBooks]:
        """Check the books behind `start`; see integrity.check_behind."""
        return integrity.check_behind(self._reader(), start, on_page)

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
