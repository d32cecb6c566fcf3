"""What the ledger asks of a database: keep what the rules decided, and find it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import msgspec

from vllm_kvmarket.core.errors import LedgerRefusedError
from vllm_kvmarket.ledger.model import Account, Operation, Outcome, Receipt, Result, Transfer
from vllm_kvmarket.ledger.rules import Books, apply
from vllm_kvmarket.ledger.working_set import Wanted


class MalformedBatchError(LedgerRefusedError):
    """What a batch contains cannot be kept, now or ever; nothing of its group took effect."""


class Batch(msgspec.Struct, frozen=True):
    """What takes effect together, at which time, and the future that is told.

    `give_up_at_s` is a moment of time.monotonic().
    """

    operations: tuple[Operation, ...]
    linked: bool
    receipt: Receipt | None
    future: Future[list[Result]]
    at_s: float
    give_up_at_s: float


class Everything(msgspec.Struct, frozen=True):
    """The whole books, of one moment. Transfers in the order in which they took effect."""

    accounts: list[Account]
    transfers: list[Transfer]
    receipts: list[Receipt]
    dues: dict[str, float]


class Storage(Protocol):
    """One process's access to the database. Every method raises LedgerError when it cannot.

    `write` is called by one thread, the others by any.
    """

    def write(self, group: Sequence[Batch]) -> list[list[Result]]:
        """Apply a group in one transaction, durable on return.

        Raises MalformedBatchError or LedgerUnavailableError.
        """

    def open_account(self, account: Account) -> None:
        """Keep a new account; one with its id that is there stays as it is."""

    def account(self, account_id: str) -> Account | None:
        """An account as it stands."""

    def accounts(self) -> list[Account]:
        """Every account, by id."""

    def transfer(self, transfer_id: str) -> Transfer | None:
        """The transfer with this id."""

    def transfers(self, account: str | None, limit: int | None) -> list[Transfer]:
        """Transfers of one account or of all, newest first."""

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        """Transfers that took effect behind the first `sequence`, in that order."""

    def sequence_of(self, transfer_id: str) -> int | None:
        """As the how many-th a transfer took effect, from 1."""

    def receipts(self, where: Mapping[str, str], limit: int | None) -> list[Receipt]:
        """Receipts whose columns have these values, newest first."""

    def due_at_s(self, pending_id: str) -> float | None:
        """Until when an open hold stands."""

    def overdue(self, now_s: float, limit: int) -> list[str]:
        """Open holds that are due, those that have been so for longest first; by an index."""

    def everything(self) -> Everything:
        """The whole books, of one moment."""

    def close(self) -> None:
        """Release the database. Nobody may be using it any more."""


def wanted(group: Sequence[Batch]) -> Wanted:
    """What the rules may look up for a group."""
    operations = [operation for batch in group for operation in batch.operations]
    pending_ids = {operation.pending_id for operation in operations if operation.pending_id}
    moves = [operation for operation in operations if not operation.pending_id]
    return Wanted(
        transfer_ids=_storable({operation.id for operation in operations} | pending_ids),
        pending_ids=_storable(pending_ids),
        account_ids=_storable({each.debit for each in moves} | {each.credit for each in moves}),
    )


def _storable(ids: set[str]) -> list[str]:
    """Without those that are nowhere, because no text of PostgreSQL has a NUL in it."""
    return [id for id in ids if "\0" not in id]


def apply_group(books: Books, group: Sequence[Batch]) -> tuple[list[list[Result]], list[Receipt]]:
    """Apply every batch by the rules; the answers, and the receipts that are to be kept.

    A receipt is kept when all of its batch is good and any of it is new.
    """
    answers, receipts = [], []
    for batch in group:
        results = apply(books, batch.operations, batch.at_s, linked=batch.linked)
        answers.append(results)
        if batch.receipt is not None:
            outcomes = [result.outcome for result in results]
            if Outcome.OK in outcomes and max(outcomes).good:
                receipts.append(batch.receipt)
    return answers, receipts
