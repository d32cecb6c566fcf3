"""The ledger's rules: one pure state machine over accounts and transfers.

Double entry in TigerBeetle's discipline: every transfer moves an integer amount from one account to
another, in one step (plain) or in two (pending, then post or void, or expire when its time is
over); transfers never change; a second operation with the same id does nothing. Storage only looks
up and writes what these functions ask for.
Source: https://docs.tigerbeetle.com/coding/two-phase-transfers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_kvmarket.ledger.model import (
    GRACE_S,
    INT64_MAX,
    MAX_ID_LENGTH,
    MAX_PENDING_ID_LENGTH,
    OWED,
    ROYALTY,
    SUSPENSE,
    TURN_NANO,
    Account,
    Operation,
    Outcome,
    Result,
    Transfer,
    TransferKind,
    turned,
)

OK = Result(Outcome.OK)
EXISTS = Result(Outcome.EXISTS)
ENDS = {
    "post": Outcome.ALREADY_POSTED,
    "void": Outcome.ALREADY_VOIDED,
    "expire": Outcome.EXPIRED,
    "late": Outcome.ALREADY_POSTED,
}
TIMED = ("pending", "renew")


class Books(Protocol):
    """Everything that the rules look up and write."""

    def account(self, account_id: str) -> Account | None:
        """The account as it stands."""

    def transfer(self, transfer_id: str) -> Transfer | None:
        """The transfer with this id."""

    def due_at_s(self, pending_id: str) -> float | None:
        """When a pending transfer is due; None once it is resolved."""

    def resolution(self, pending_id: str) -> Transfer | None:
        """The last post, void, expire or late transfer of a pending one."""

    def put_account(self, account: Account) -> None:
        """Write an account's new balances."""

    def put_transfer(self, transfer: Transfer) -> None:
        """Write a new transfer."""

    def put_due_at_s(self, pending_id: str, due_at_s: float | None) -> None:
        """Write when a pending transfer is due; None when it is resolved."""

    def begin(self) -> None:
        """Begin a batch: what is written from here on stands, or `undo` takes it back."""

    def undo(self) -> None:
        """Take back everything that was written since `begin`."""


def apply(
    books: Books, operations: Sequence[Operation], now_s: float, *, linked: bool = True
) -> list[Result]:
    """Apply a batch in order, each operation on what those before it left; a result for each.

    Linked: when one is refused, none takes effect, and the others are LINKED_FAILED. Not linked:
    each stands alone. Mutates `books` by what took effect. A retry is good: EXISTS, no effect.
    """
    # One operation alone is all or nothing by itself: it looks before it changes.
    if linked and len(operations) > 1:
        return _apply_linked(books, operations, now_s)
    return [_apply_one(books, operation, now_s) for operation in operations]


def _apply_linked(books: Books, operations: Sequence[Operation], now_s: float) -> list[Result]:
    books.begin()
    results: list[Result] = []
    for operation in operations:
        result = _apply_one(books, operation, now_s)
        if not result.outcome.good:
            books.undo()
            others = Result(Outcome.LINKED_FAILED, f"{operation.id} was refused")
            behind = len(operations) - len(results) - 1
            return [others] * len(results) + [result] + [others] * behind
        results.append(result)
    return results


def _apply_one(books: Books, operation: Operation, now_s: float) -> Result:
    if not _fits(operation.amount_nano):
        return Result(Outcome.INVALID_AMOUNT, str(operation.amount_nano))
    existing = books.transfer(operation.id)
    if existing is not None:
        return _compare(existing, operation)
    wrong = _wrong_field(operation)
    if wrong:
        return Result(Outcome.INVALID_FIELD, wrong)
    if operation.pending_id:
        return _resolve(books, operation, now_s)
    return _move(books, operation, now_s)


def _fits(number: int) -> bool:
    # A caller without a type checker may give a float; money is whole nano-units.
    return type(number) is int and 0 <= number <= INT64_MAX


def _wrong_field(operation: Operation) -> str:
    """The first field that an operation of this kind cannot have like this; empty for none."""
    longest = MAX_PENDING_ID_LENGTH if operation.kind == "pending" else MAX_ID_LENGTH
    if not _nameable(operation.id, longest):
        return "id"
    first = operation.kind in ("plain", "pending")
    if not (
        operation.pending_id == "" if first else _nameable(operation.pending_id, MAX_ID_LENGTH)
    ):
        return "pending_id"
    timed = operation.kind in TIMED
    if not _fits(operation.timeout_s) or (operation.timeout_s > 0) is not timed:
        return "timeout_s"
    if operation.amount_nano and operation.kind in ("void", "expire", "renew"):
        return "amount_nano"
    if "\0" in operation.code:
        return "code"
    return "user_data" if "\0" in operation.user_data else ""


def _nameable(id: str, longest: int) -> bool:
    # PostgreSQL's text has no NUL, and its indexes no long keys: the rules are the same everywhere.
    return 0 < len(id) <= longest and "\0" not in id


def _compare(existing: Transfer, operation: Operation) -> Result:
    late = existing.kind == "late" and operation.kind == "post"
    waits = existing.credit == SUSPENSE and operation.code == ROYALTY
    for field in Operation.__struct_fields__:
        if field in ("debit", "credit", "code", "user_data") and operation.pending_id:
            continue  # these come from the pending transfer
        if field == "receipt_digest" or (field == "kind" and late) or (field == "credit" and waits):
            continue  # the ledger's own
        if getattr(existing, field) != getattr(operation, field):
            return Result(Outcome.EXISTS_WITH_DIFFERENT_FIELDS, field)
    return EXISTS


def _move(books: Books, operation: Operation, now_s: float) -> Result:
    """A plain or a pending transfer."""
    if operation.debit == operation.credit:
        return Result(Outcome.SAME_ACCOUNT, operation.debit)
    debit, credit = books.account(operation.debit), books.account(operation.credit)
    if operation.code == ROYALTY and (
        credit is None or (debit is not None and credit.currency != debit.currency)
    ):
        # No sale fails because its publisher cannot be paid.
        credit = books.account(SUSPENSE)
    if debit is None or credit is None:
        return Result(
            Outcome.UNKNOWN_ACCOUNT, operation.debit if debit is None else operation.credit
        )
    if debit.currency != credit.currency:
        return Result(Outcome.DIFFERENT_CURRENCIES, f"{debit.currency}, {credit.currency}")
    amount = operation.amount_nano
    owed = operation.code == OWED and operation.kind == "plain"
    if not (debit.may_go_negative or owed) and amount > debit.available_nano:
        return Result(Outcome.EXCEEDS_CREDITS, debit.id)
    held, moved = (amount, 0) if operation.kind == "pending" else (0, amount)
    late = amount if owed and not debit.may_go_negative else 0
    result = _balance(books, debit, credit, held, moved, late=late)
    if result is OK:
        books.put_transfer(_transfer(operation, operation, now_s, operation.kind, credit.id))
        if operation.kind == "pending":
            books.put_due_at_s(operation.id, now_s + operation.timeout_s)
    return result


def _resolve(books: Books, operation: Operation, now_s: float) -> Result:
    """Any operation that names a pending transfer: a post, void, expire or renewal of it."""
    reserved = books.transfer(operation.pending_id)
    if reserved is None or reserved.kind != "pending":
        return Result(Outcome.PENDING_NOT_FOUND, operation.pending_id)
    due_at_s = books.due_at_s(reserved.id)
    kind, held = operation.kind, -reserved.amount_nano
    if due_at_s is None:
        resolved = books.resolution(reserved.id)
        assert resolved is not None, reserved.id
        if kind != "post" or resolved.kind != "expire":
            return Result(ENDS[resolved.kind], resolved.id)
        # What was sold is paid, however late: the hold is gone, so that this may make a debt.
        kind, held = "late", 0
    elif kind == "expire" and now_s < due_at_s + GRACE_S:
        return Result(Outcome.NOT_DUE, reserved.id)
    if operation.amount_nano > reserved.amount_nano:
        return Result(Outcome.EXCEEDS_PENDING_AMOUNT, str(reserved.amount_nano))
    if kind == "renew":
        assert due_at_s is not None
        books.put_transfer(_transfer(operation, reserved, now_s, kind, reserved.credit))
        books.put_due_at_s(reserved.id, max(due_at_s, now_s + operation.timeout_s))
        return OK
    debit, credit = books.account(reserved.debit), books.account(reserved.credit)
    assert debit is not None and credit is not None
    late = operation.amount_nano if kind == "late" and not debit.may_go_negative else 0
    result = _balance(books, debit, credit, held, operation.amount_nano, late=late)
    if result is OK:
        books.put_transfer(_transfer(operation, reserved, now_s, kind, reserved.credit))
        books.put_due_at_s(reserved.id, None)
    return result


def _balance(
    books: Books, debit: Account, credit: Account, held: int, moved: int, *, late: int = 0
) -> Result:
    """Change both accounts by the same amounts."""
    debits_pending, debits_posted = debit.debits_pending + held, debit.debits_posted + moved
    paid_in, paid_out = debit.credits_posted, credit.debits_posted
    if debits_posted >= TURN_NANO:
        debits_posted, paid_in = turned(debits_posted, paid_in)
    if debits_pending + debits_posted > INT64_MAX:
        return Result(Outcome.OVERFLOW, debit.id)
    credits_pending, credits_posted = credit.credits_pending + held, credit.credits_posted + moved
    if credits_posted >= TURN_NANO:
        paid_out, credits_posted = turned(paid_out, credits_posted)
    if credits_pending + credits_posted > INT64_MAX:
        return Result(Outcome.OVERFLOW, credit.id)
    # Spelled out: this is the innermost step, and msgspec.structs.replace costs thrice as much.
    books.put_account(
        Account(
            debit.id,
            debit.kind,
            debit.may_go_negative,
            debit.currency,
            debits_pending,
            debit.credits_pending,
            debits_posted,
            paid_in,
            debit.late_nano + late,
        )
    )
    books.put_account(
        Account(
            credit.id,
            credit.kind,
            credit.may_go_negative,
            credit.currency,
            credit.debits_pending,
            credits_pending,
            paid_out,
            credits_posted,
            credit.late_nano,
        )
    )
    return OK


def _transfer(
    operation: Operation, named: Operation, now_s: float, kind: TransferKind, credit: str
) -> Transfer:
    """The transfer that an operation becomes; its debit and its cause are those of `named`."""
    return Transfer(
        kind,
        operation.id,
        named.debit,
        credit,
        operation.amount_nano,
        operation.pending_id,
        operation.timeout_s,
        named.code,
        named.user_data,
        operation.receipt_digest,
        now_s,
    )
