"""The interface between the ledger and its database, and how a group of batches is applied."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import msgspec

from vllm_kvmarket.core.errors import LedgerRefusedError, LedgerUnavailableError
from vllm_kvmarket.ledger.known_funds import KnownFunds
from vllm_kvmarket.ledger.model import (
    ROYALTY,
    SUSPENSE,
    Account,
    Operation,
    Outcome,
    Receipt,
    Result,
    Transfer,
    encode_receipt,
)
from vllm_kvmarket.ledger.rules import Books, apply
from vllm_kvmarket.ledger.working_set import Wanted


class MalformedBatchError(LedgerRefusedError):
    """A database can never store this batch; nothing of its group took effect."""


class RowsHeldError(LedgerUnavailableError):
    """Another writer holds what a batch needs. It had no effect, and is tried again."""

    def __init__(self) -> None:
        super().__init__("the account is in use elsewhere; submit the same again")


class Batch(msgspec.Struct, frozen=True, eq=False):
    """Operations that take effect together, and the future that answers them.

    `at_s` is None for the database's time at the moment of writing. `give_up_at_s` is a moment of
    time.monotonic(); a batch that never gives up is kept in the outbox until it is booked. A lone
    reservation may be undone: it is voided when the caller gave up and it may have taken effect.
    """

    operations: tuple[Operation, ...]
    linked: bool
    receipt: Receipt | None
    future: Future[list[Result]]
    at_s: float | None
    give_up_at_s: float
    undo: bool = False

    @property
    def must_be_booked(self) -> bool:
        """Whether the batch outlives this process."""
        return self.give_up_at_s == math.inf


class KeyedRequest(msgspec.Struct, frozen=True):
    """A client's Idempotency-Key: `purchase_key` is the same for all requests that share it."""

    purchase_key: str
    body_digest: str
    uses: int


class NewReceipt(msgspec.Struct, frozen=True, gc=False):
    """A receipt to store, and its encoding, which its charge commits to."""

    receipt: Receipt
    body: bytes


RECEIPT_COLUMNS = ("id", "request_id", "account", "document_id", "charge_nano", "body")


def receipt_row(new: NewReceipt) -> tuple[str, str, str, str, int, str]:
    """A receipt as a table has it, by RECEIPT_COLUMNS."""
    receipt = new.receipt
    return (
        receipt.id,
        receipt.request_id,
        receipt.account,
        receipt.document_id,
        receipt.charge_nano,
        new.body.decode(),
    )


class NumberedReceipt(msgspec.Struct, frozen=True):
    """A stored receipt, and its sequence number, which has gaps."""

    sequence: int
    receipt: Receipt


class Everything(msgspec.Struct, frozen=True):
    """The whole books, of one moment. Transfers in the order in which they took effect."""

    accounts: list[Account]
    transfers: list[Transfer]
    receipts: list[NumberedReceipt]
    dues: dict[str, float]


class Storage(Protocol):
    """One process's access to the database. Every method raises LedgerError when it cannot.

    `write` is called by one thread, the others by any. `funds` learns from each group.
    """

    funds: KnownFunds

    def write(self, group: Sequence[Batch]) -> Sequence[list[Result] | RowsHeldError]:
        """Apply a group in one transaction, durable on return.

        A batch whose answer is RowsHeldError is not part of it. Raises MalformedBatchError or
        LedgerUnavailableError.
        """

    def open_account(self, account: Account) -> None:
        """Keep a new account; one with its id that is there stays as it is."""

    def account(self, account_id: str) -> Account | None:
        """An account as it stands."""

    def accounts(self) -> list[Account]:
        """Every account, by id."""

    def transfer(self, transfer_id: str) -> Transfer | None:
        """The transfer with this id."""

    def transfers(
        self, account: str | None, limit: int | None, before: str | None = None
    ) -> list[Transfer]:
        """Transfers of one account or of all, newest first, older than the one named `before`."""

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        """Transfers that took effect behind the first `sequence`, in that order."""

    def sequence_of(self, transfer_id: str) -> int | None:
        """A transfer's position in the order of effect, from 1."""

    def receipts(
        self, where: Mapping[str, str], limit: int | None, before: str | None = None
    ) -> list[Receipt]:
        """Receipts whose columns have these values, newest first, older than `before`."""

    def receipts_after(self, sequence: int, limit: int) -> list[NumberedReceipt]:
        """Receipts behind a sequence number, in their order; on PostgreSQL not that of booking."""

    def moves(self, account: str, from_s: float | None, to_s: float | None) -> list[Transfer]:
        """What moved amounts to or from an account in a period, in the order of effect.

        A period has its beginning and not its end; None is without that bound.
        """

    def moved_before(self, account: str, at_s: float) -> int:
        """The sum of all that moved to an account before a moment, less what moved from it."""

    def receipts_booked(
        self,
        from_s: float | None,
        to_s: float | None,
        account: str | None,
        documents: Sequence[str],
    ) -> list[Receipt]:
        """A period's receipts of an account and of documents, or all; in the order of booking."""

    def due_at_s(self, pending_id: str) -> float | None:
        """When an open hold is due."""

    def overdue(self, now_s: float | None, limit: int) -> list[str]:
        """Open holds whose grace is over, the oldest first; None for the database's time."""

    def use_key(
        self, account: str, key: str, body_digest: str, purchase_key: str, keep_s: float
    ) -> KeyedRequest:
        """Count a use of an idempotency key, which is forgotten `keep_s` after its first use.

        A new key gets this digest and purchase key; an older one keeps its own. Durable on return.
        """

    def everything(self, after: int = 0, receipts_after: int = 0) -> Everything:
        """The books of one moment: all accounts and holds, and the transfers and receipts behind.

        Transfers that have no place in the log yet come last.
        """

    def close(self) -> None:
        """Release the database. Nobody may be using it any more."""


def wanted(group: Sequence[Batch]) -> Wanted:
    """Everything that the rules may look up for a group."""
    operations = [operation for batch in group for operation in batch.operations]
    pending_ids = {operation.pending_id for operation in operations if operation.pending_id}
    moves = [operation for operation in operations if not operation.pending_id]
    account_ids = {each.debit for each in moves} | {each.credit for each in moves}
    if any(each.code == ROYALTY for each in moves):
        account_ids.add(SUSPENSE)
    return Wanted(
        transfer_ids=storable({operation.id for operation in operations} | pending_ids),
        pending_ids=storable(pending_ids),
        account_ids=storable(account_ids),
    )


def storable(ids: set[str]) -> list[str]:
    """The ids that a database can have: no text of PostgreSQL contains a NUL."""
    return [id for id in ids if "\0" not in id]


def apply_group(
    books: Books, group: Sequence[Batch], now_s: float
) -> tuple[list[list[Result]], list[NewReceipt]]:
    """Apply every batch by the rules; return the answers, and the receipts to store.

    A receipt is stored when all of its batch is good and any of it is new. The charge, which is
    the receipt's first transfer, commits to it by its digest.
    """
    answers, receipts = [], []
    for batch in group:
        at_s = now_s if batch.at_s is None else batch.at_s
        if batch.receipt is None:
            answers.append(apply(books, batch.operations, at_s, linked=batch.linked))
            continue
        receipt = msgspec.structs.replace(batch.receipt, created_at_s=at_s)
        new, operations = NewReceipt(receipt, encode_receipt(receipt)), batch.operations
        if batch.linked:
            operations = _with_digest(operations, new)
        results = apply(books, operations, at_s, linked=batch.linked)
        answers.append(results)
        outcomes = [result.outcome for result in results]
        if Outcome.OK in outcomes and max(outcomes).good:
            receipts.append(new)
    return answers, receipts


def _with_digest(operations: tuple[Operation, ...], new: NewReceipt) -> tuple[Operation, ...]:
    charge = new.receipt.transfer_ids[0] if new.receipt.transfer_ids else None
    for place, operation in enumerate(operations):
        if operation.id == charge:
            digest = hashlib.sha256(new.body).hexdigest()
            charged = msgspec.structs.replace(operation, receipt_digest=digest)
            return (*operations[:place], charged, *operations[place + 1 :])
    return operations
