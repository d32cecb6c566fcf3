"""The ledger's rules: one pure state machine over accounts and transfers.

Double entry in TigerBeetle's discipline: every transfer moves an integer amount from one account to
another, in one step (plain) or in two (pending, then post or void, or expire when its time is
over); transfers never change; an id says what it did, so that a retry does nothing. Storage only
looks up and keeps what these functions ask for.
Source: https://docs.tigerbeetle.com/coding/two-phase-transfers
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

INT64_MAX = 2**63 - 1
ACCOUNT_ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")

AccountKind = Literal["buyer", "publisher", "provider", "world"]
TransferKind = Literal["plain", "pending", "post", "void", "expire"]


class Outcome(enum.IntEnum):
    """What became of an operation; everything from INVALID_AMOUNT on had no effect.

    In the order in which the rules look: of several reasons to refuse, the lowest is told.
    """

    OK = 0
    EXISTS = 1
    INVALID_AMOUNT = 2
    EXISTS_WITH_DIFFERENT_FIELDS = 3
    INVALID_FIELD = 4
    SAME_ACCOUNT = 5
    UNKNOWN_ACCOUNT = 6
    PENDING_NOT_FOUND = 7
    ALREADY_POSTED = 8
    ALREADY_VOIDED = 9
    EXPIRED = 10
    NOT_DUE = 11
    EXCEEDS_PENDING_AMOUNT = 12
    EXCEEDS_CREDITS = 13
    OVERFLOW = 14
    LINKED_FAILED = 15

    @property
    def good(self) -> bool:
        """Whether the operation holds: now done, or done before."""
        return self <= Outcome.EXISTS


class Result(msgspec.Struct, frozen=True):
    """An outcome, and for people: which field, account or transfer it is about."""

    outcome: Outcome
    detail: str = ""


class Account(msgspec.Struct, frozen=True):
    """An account and its four balances, in nano-units."""

    id: str
    kind: AccountKind
    may_go_negative: bool = False
    debits_pending: int = 0
    credits_pending: int = 0
    debits_posted: int = 0
    credits_posted: int = 0

    @property
    def balance_nano(self) -> int:
        """What the account has, reservations not counted."""
        return self.credits_posted - self.debits_posted

    @property
    def available_nano(self) -> int:
        """What the account can still spend."""
        return self.balance_nano - self.debits_pending


class Operation(msgspec.Struct, frozen=True):
    """What a caller asks for; build it with `plain`, `pending`, `post`, `void` or `expire`."""

    kind: TransferKind
    id: str
    debit: str = ""
    credit: str = ""
    amount_nano: int = 0
    pending_id: str = ""
    timeout_s: int = 0
    code: str = ""
    user_data: str = ""


class Transfer(Operation, frozen=True):
    """An operation that took effect, for good."""

    created_at_s: float = 0.0


def plain(
    *, id: str, debit: str, credit: str, amount_nano: int, code: str, user_data: str = ""
) -> Operation:
    """Move an amount at once."""
    return Operation("plain", id, debit, credit, amount_nano, code=code, user_data=user_data)


def pending(
    *,
    id: str,
    debit: str,
    credit: str,
    amount_nano: int,
    timeout_s: int,
    code: str,
    user_data: str = "",
) -> Operation:
    """Reserve an amount until it is posted or voided, at most for `timeout_s` (1 or more).

    Every hold ends: who dies while it holds a buyer's funds does not lock them for good.
    """
    return Operation(
        "pending",
        id,
        debit,
        credit,
        amount_nano,
        timeout_s=timeout_s,
        code=code,
        user_data=user_data,
    )


def post(*, id: str, pending_id: str, amount_nano: int) -> Operation:
    """Move a reserved amount, whole or in part; the rest is released.

    Posting 0 is a settlement that costs nothing, not a void: it is kept as a post, so that a free
    reuse has a transfer for its receipt, and a later post or void is told ALREADY_POSTED.
    """
    return Operation("post", id, amount_nano=amount_nano, pending_id=pending_id)


def void(*, id: str, pending_id: str) -> Operation:
    """Release a reserved amount."""
    return Operation("void", id, pending_id=pending_id)


def expire(*, id: str, pending_id: str) -> Operation:
    """Release a reserved amount whose time is over."""
    return Operation("expire", id, pending_id=pending_id)


class Books(Protocol):
    """What the rules need to look up and to keep."""

    def account(self, account_id: str) -> Account | None:
        """The account as it stands."""

    def transfer(self, transfer_id: str) -> Transfer | None:
        """The transfer with this id."""

    def resolution(self, pending_id: str) -> Transfer | None:
        """The post, void or expire of a pending transfer."""

    def put_account(self, account: Account) -> None:
        """Keep an account's new balances."""

    def put_transfer(self, transfer: Transfer) -> None:
        """Keep a new transfer."""


class Draft:
    """Books on top of other books: changes stay here until they are `keep`t."""

    def __init__(self, below: Books) -> None:
        self._below = below
        self._accounts: dict[str, Account] = {}
        self._transfers: dict[str, Transfer] = {}
        self._resolutions: dict[str, Transfer] = {}

    def account(self, account_id: str) -> Account | None:
        """See Books."""
        return self._accounts.get(account_id) or self._below.account(account_id)

    def transfer(self, transfer_id: str) -> Transfer | None:
        """See Books."""
        return self._transfers.get(transfer_id) or self._below.transfer(transfer_id)

    def resolution(self, pending_id: str) -> Transfer | None:
        """See Books."""
        return self._resolutions.get(pending_id) or self._below.resolution(pending_id)

    def put_account(self, account: Account) -> None:
        """See Books."""
        self._accounts[account.id] = account

    def put_transfer(self, transfer: Transfer) -> None:
        """See Books."""
        self._transfers[transfer.id] = transfer
        if transfer.pending_id:
            self._resolutions[transfer.pending_id] = transfer

    def keep(self) -> None:
        """Hand every change down; mutates the books below."""
        for account in self._accounts.values():
            self._below.put_account(account)
        for transfer in self._transfers.values():
            self._below.put_transfer(transfer)


def apply(
    books: Books, operations: Sequence[Operation], now_s: float, *, linked: bool = True
) -> list[Result]:
    """Apply a batch in order, each operation on what those before it left; a result for each.

    Linked: when one is refused, none takes effect, and the others are LINKED_FAILED. Not linked:
    each stands alone. Mutates `books` by what took effect. A retry is good: EXISTS, no effect.
    """
    if linked:
        return _apply_linked(books, operations, now_s)
    return [_apply_one(books, operation, now_s) for operation in operations]


def _apply_linked(books: Books, operations: Sequence[Operation], now_s: float) -> list[Result]:
    draft = Draft(books)
    results: list[Result] = []
    for operation in operations:
        result = _apply_one(draft, operation, now_s)
        if not result.outcome.good:
            others = Result(Outcome.LINKED_FAILED, f"{operation.id} was refused")
            behind = len(operations) - len(results) - 1
            return [others] * len(results) + [result] + [others] * behind
        results.append(result)
    draft.keep()
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
    if operation.kind in ("plain", "pending"):
        return _move(books, operation, now_s)
    return _resolve(books, operation, now_s)


def _fits(number: int) -> bool:
    # A caller without a type checker may bring a float; money is whole nano-units.
    return type(number) is int and 0 <= number <= INT64_MAX


def _wrong_field(operation: Operation) -> str:
    """The first field that an operation of this kind cannot have like this; empty for none."""
    if not operation.id:
        return "id"
    if bool(operation.pending_id) is (operation.kind in ("plain", "pending")):
        return "pending_id"
    if not _fits(operation.timeout_s) or (operation.timeout_s > 0) is (operation.kind != "pending"):
        return "timeout_s"
    if operation.amount_nano and operation.kind in ("void", "expire"):
        return "amount_nano"
    return ""


def _compare(existing: Transfer, operation: Operation) -> Result:
    for field in Operation.__struct_fields__:
        if field in ("debit", "credit", "code", "user_data") and operation.pending_id:
            continue  # a resolution has these from its pending transfer
        if getattr(existing, field) != getattr(operation, field):
            return Result(Outcome.EXISTS_WITH_DIFFERENT_FIELDS, field)
    return Result(Outcome.EXISTS)


def _move(books: Books, operation: Operation, now_s: float) -> Result:
    if operation.debit == operation.credit:
        return Result(Outcome.SAME_ACCOUNT, operation.debit)
    debit, credit = books.account(operation.debit), books.account(operation.credit)
    if debit is None or credit is None:
        return Result(
            Outcome.UNKNOWN_ACCOUNT, operation.debit if debit is None else operation.credit
        )
    amount = operation.amount_nano
    if not debit.may_go_negative and amount > debit.available_nano:
        return Result(Outcome.EXCEEDS_CREDITS, debit.id)
    column = "pending" if operation.kind == "pending" else "posted"
    return _book(books, operation, now_s, debit, credit, **{f"{column}_nano": amount})


def _resolve(books: Books, operation: Operation, now_s: float) -> Result:
    reserved = books.transfer(operation.pending_id)
    if reserved is None or reserved.kind != "pending":
        return Result(Outcome.PENDING_NOT_FOUND, operation.pending_id)
    resolved = books.resolution(reserved.id)
    if resolved is not None:
        outcome = {"post": Outcome.ALREADY_POSTED, "void": Outcome.ALREADY_VOIDED}
        return Result(outcome.get(resolved.kind, Outcome.EXPIRED), resolved.id)
    due = now_s >= reserved.created_at_s + reserved.timeout_s
    if operation.kind == "post" and due:
        return Result(Outcome.EXPIRED, reserved.id)
    if operation.kind == "expire" and not due:
        return Result(Outcome.NOT_DUE, reserved.id)
    if operation.amount_nano > reserved.amount_nano:
        return Result(Outcome.EXCEEDS_PENDING_AMOUNT, str(reserved.amount_nano))
    debit, credit = books.account(reserved.debit), books.account(reserved.credit)
    assert debit is not None and credit is not None
    filled = msgspec.structs.replace(
        operation,
        debit=reserved.debit,
        credit=reserved.credit,
        code=reserved.code,
        user_data=reserved.user_data,
    )
    return _book(
        books,
        filled,
        now_s,
        debit,
        credit,
        pending_nano=-reserved.amount_nano,
        posted_nano=operation.amount_nano,
    )


def _book(
    books: Books,
    operation: Operation,
    now_s: float,
    debit: Account,
    credit: Account,
    *,
    pending_nano: int = 0,
    posted_nano: int = 0,
) -> Result:
    """Change both accounts by the same amounts, and keep the transfer."""
    debit = msgspec.structs.replace(
        debit,
        debits_pending=debit.debits_pending + pending_nano,
        debits_posted=debit.debits_posted + posted_nano,
    )
    credit = msgspec.structs.replace(
        credit,
        credits_pending=credit.credits_pending + pending_nano,
        credits_posted=credit.credits_posted + posted_nano,
    )
    if debit.debits_pending + debit.debits_posted > INT64_MAX:
        return Result(Outcome.OVERFLOW, debit.id)
    if credit.credits_pending + credit.credits_posted > INT64_MAX:
        return Result(Outcome.OVERFLOW, credit.id)
    books.put_account(debit)
    books.put_account(credit)
    books.put_transfer(Transfer(**msgspec.structs.asdict(operation), created_at_s=now_s))
    return Result(Outcome.OK)
