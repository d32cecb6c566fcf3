"""Proof that balances and holds follow from the transfers, and that receipts agree with them.

The books are read in the order of effect, a page at a time. What they lead to are `CheckedBooks`:
who keeps them can go on from there later, and reads new bookings only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from vllm_kvmarket.ledger.model import (
    GRACE_S,
    OWED,
    PROVIDER,
    ROYALTY,
    SUSPENSE,
    TURN_NANO,
    Account,
    Receipt,
    Transfer,
    digest_of,
    turned,
)
from vllm_kvmarket.ledger.periods import SLACK_S
from vllm_kvmarket.ledger.storage import Everything, NumberedReceipt, Storage

PAGE = 10_000  # transfers or receipts, some megabytes
MOST_LOOK_UPS = 1000  # more receipts than that are missing, not late
# A sale's charge, and the kinds that move its amount.
SALE = "reuse"
CHARGES = ("post", "late")


class Balances(msgspec.Struct, array_like=True):
    """An account's sums; `late_nano` also where the account may go negative."""

    debits_pending: int = 0
    credits_pending: int = 0
    debits_posted: int = 0
    credits_posted: int = 0
    late_nano: int = 0


class Hold(msgspec.Struct, array_like=True):
    """A reservation that is open, or that expired and may be paid late."""

    debit: str
    credit: str
    amount_nano: int
    due_at_s: float


class CheckedBooks(msgspec.Struct):
    """What the first `size` transfers and `receipts` receipts lead to.

    `last_receipt` is the sequence number of the last receipt that was read. `unpaired` are charges
    and royalties without their receipt, `early` receipts without their transfers: the other part
    was not booked yet when this was read.
    """

    size: int = 0
    receipts: int = 0
    last_receipt: int = 0
    balances: dict[str, Balances] = {}
    holds: dict[str, Hold] = {}
    expired: dict[str, Hold] = {}
    unpaired: dict[str, Transfer] = {}
    early: list[Receipt] = []


class LookUp(Protocol):
    """Single bookings, for what is not as expected."""

    def transfer(self, transfer_id: str) -> Transfer | None:
        """The transfer with this id."""

    def receipts_of(self, transfer: Transfer) -> list[Receipt]:
        """The receipts that name a transfer."""


def is_charge(kind: str, code: str) -> bool:
    """Whether a transfer is what a buyer pays for a sale."""
    return (kind in CHARGES and code == SALE) or (kind == "plain" and code == OWED)


def is_beyond_funds(transfer: Transfer) -> bool:
    """Whether a transfer was booked whatever the account had: these make debts."""
    return transfer.kind == "late" or (transfer.kind == "plain" and transfer.code == OWED)


def check_behind(
    storage: Storage,
    start: CheckedBooks | None = None,
    on_page: Callable[[Sequence[Transfer]], object] | None = None,
) -> tuple[list[str], CheckedBooks]:
    """Check the books behind `start`, by default all; return the problems, and how far it got.

    `on_page` is called with each page of the transfers up to there, in the order of the log. Safe
    while others book: what they add meanwhile is checked too, but not counted. With problems, the
    checked part is worth nothing. Raises LedgerError.
    """
    books = BooksCheck(start)
    last = False
    while not last:
        page = storage.transfers_after(books.state.size, PAGE)
        last = len(page) < PAGE
        if on_page is not None:
            on_page(page)
        books.add_transfers(page)
        _add_receipts(storage, books, math.inf if last else page[-1].created_at_s + SLACK_S)
    look_up = _StoredBookings(storage)
    books.pair_the_rest(look_up)
    # The books go on while this looks at them: their state is compared as of one moment.
    checked = msgspec.json.decode(msgspec.json.encode(books.state), type=CheckedBooks)
    rest = storage.everything(checked.size, checked.last_receipt)
    books.add_transfers(rest.transfers)
    books.add_receipts(rest.receipts)
    return books.problems(rest.accounts, rest.dues, look_up), checked


def _add_receipts(storage: Storage, books: BooksCheck, until_s: float) -> None:
    """Read receipts up to a time, or to the last."""
    while True:
        page = storage.receipts_after(books.state.last_receipt, PAGE)
        books.add_receipts(page)  # also none: those that were early may have their transfers now
        if len(page) < PAGE or page[-1].receipt.created_at_s > until_s:
            return


def problems(books: Everything) -> list[str]:
    """Check books that are in memory; return every difference, in words."""
    whole = BooksCheck()
    whole.add_transfers(books.transfers)
    whole.add_receipts(books.receipts)
    return whole.problems(books.accounts, books.dues, _GivenBookings(books))


class _StoredBookings:
    """See LookUp; in the database."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def transfer(self, transfer_id: str) -> Transfer | None:
        return self._storage.transfer(transfer_id)

    def receipts_of(self, transfer: Transfer) -> list[Receipt]:
        at_s = transfer.created_at_s
        found = self._storage.receipts_booked(at_s - SLACK_S, at_s + SLACK_S, None, ())
        return [each for each in found if transfer.id in each.transfer_ids]


class _GivenBookings:
    """See LookUp; in memory."""

    def __init__(self, books: Everything) -> None:
        self._transfers = {each.id: each for each in books.transfers}
        self._receipts = [each.receipt for each in books.receipts]

    def transfer(self, transfer_id: str) -> Transfer | None:
        return self._transfers.get(transfer_id)

    def receipts_of(self, transfer: Transfer) -> list[Receipt]:
        return [each for each in self._receipts if transfer.id in each.transfer_ids]


class BooksCheck:
    """Recomputes the books from bookings in the order of effect; `state` grows with them."""

    def __init__(self, start: CheckedBooks | None = None) -> None:
        self.state = CheckedBooks() if start is None else start
        self._found: list[str] = []
        # The first transfer between each two accounts: their kinds are compared once.
        self._pairs: dict[tuple[str, str], str] = {}

    def add_transfers(self, transfers: Iterable[Transfer]) -> None:
        """Take in the next transfers of the log; mutates."""
        for transfer in transfers:
            self._add_transfer(transfer)

    def add_receipts(self, receipts: Iterable[NumberedReceipt]) -> None:
        """Take in the next receipts; mutates."""
        state = self.state
        left = [each for each in state.early if not self._pair(each)]
        for each in receipts:
            state.last_receipt = each.sequence
            state.receipts += 1
            if not self._pair(each.receipt):
                left.append(each.receipt)
        state.early = left

    def pair_the_rest(self, look_up: LookUp) -> None:
        """Find receipts that were numbered early and committed late, so that nobody read them."""
        for transfer in list(self.state.unpaired.values())[:MOST_LOOK_UPS]:
            for receipt in look_up.receipts_of(transfer):
                self.state.receipts += self._pair(receipt)

    def problems(
        self, accounts: Sequence[Account], dues: dict[str, float], look_up: LookUp
    ) -> list[str]:
        """Compare with the accounts and open holds as they are stored; every problem, in words."""
        self.pair_the_rest(look_up)
        found = self._found + self._wrong_accounts(accounts) + self._wrong_balances(accounts)
        holds = {held: hold.due_at_s for held, hold in self.state.holds.items()}
        found += [
            f"hold {held}: is due at {dues.get(held)}, transfers say {holds.get(held)}"
            for held in sorted(set(holds) | set(dues))
            if holds.get(held) != dues.get(held)
        ]
        return found + self._wrong_receipts(look_up)

    def _add_transfer(self, transfer: Transfer) -> None:
        state = self.state
        state.size += 1
        debit = state.balances.get(transfer.debit)
        if debit is None:
            debit = state.balances[transfer.debit] = Balances()
        credit = state.balances.get(transfer.credit)
        if credit is None:
            credit = state.balances[transfer.credit] = Balances()
        self._pairs.setdefault((transfer.debit, transfer.credit), transfer.id)
        reserved = posted = 0
        if transfer.kind == "pending":
            reserved = transfer.amount_nano
            due_at_s = transfer.created_at_s + transfer.timeout_s
            state.holds[transfer.id] = Hold(
                transfer.debit, transfer.credit, transfer.amount_nano, due_at_s
            )
        else:
            if transfer.pending_id:
                reserved = -self._released(transfer)
            if transfer.kind in ("plain", "post", "late"):
                posted = transfer.amount_nano
        debit.debits_pending += reserved
        credit.credits_pending += reserved
        debit.debits_posted += posted
        credit.credits_posted += posted
        for each in (debit, credit):
            if each.debits_posted >= TURN_NANO:
                each.debits_posted, each.credits_posted = turned(
                    each.debits_posted, each.credits_posted
                )
        if is_beyond_funds(transfer):
            debit.late_nano += posted
        sale = transfer.amount_nano > 0 and is_charge(transfer.kind, transfer.code)
        royalty = transfer.code == ROYALTY and transfer.debit == PROVIDER
        if sale or royalty or transfer.receipt_digest:
            state.unpaired[transfer.id] = transfer

    def _released(self, transfer: Transfer) -> int:
        """What is reserved no longer, behind a transfer that names a reservation."""
        state, held, kind = self.state, transfer.pending_id, transfer.kind
        hold = (state.expired if kind == "late" else state.holds).get(held)
        if (
            hold is None
            or (hold.debit, hold.credit) != (transfer.debit, transfer.credit)
            or transfer.amount_nano > (hold.amount_nano if kind in CHARGES else 0)
        ):
            self._found.append(f"transfer {transfer.id}: cannot resolve {held}")
        if hold is None:
            return 0
        if kind == "renew":
            hold.due_at_s = max(hold.due_at_s, transfer.created_at_s + transfer.timeout_s)
            return 0
        if kind == "late":
            del state.expired[held]
            return 0
        del state.holds[held]
        if kind == "expire":
            state.expired[held] = hold
            if transfer.created_at_s < hold.due_at_s + GRACE_S:
                self._found.append(f"transfer {transfer.id}: hold {held} was not due")
        return hold.amount_nano

    def _pair(self, receipt: Receipt) -> bool:
        """Compare a receipt with its transfers, where all of them wait for it."""
        paid = [self.state.unpaired.get(each) for each in receipt.transfer_ids]
        if None in paid or len(set(receipt.transfer_ids)) < len(paid):
            return False
        transfers = {each.id: each for each in paid if each is not None}
        for each in transfers:
            del self.state.unpaired[each]
        self._compare(receipt, transfers)
        return True

    def _compare(self, receipt: Receipt, transfers: dict[str, Transfer]) -> None:
        found = _wrong_amounts(receipt, transfers)
        self._found += [f"receipt {receipt.id}: {each}" for each in found]

    def _wrong_receipts(self, look_up: LookUp) -> list[str]:
        """Receipts whose transfers did not wait for them, and transfers that lack a receipt."""
        state, of_transfer, before = self.state, dict[str, str](), len(self._found)
        for receipt in state.early:
            found = {each: look_up.transfer(each) for each in receipt.transfer_ids}
            transfers = {each.id: each for each in found.values() if each is not None}
            missing = [each for each in receipt.transfer_ids if each not in transfers]
            if missing:
                self._found.append(f"receipt {receipt.id}: transfer {missing[0]} is missing")
                continue
            self._compare(receipt, transfers)
            for transfer in transfers.values():
                state.unpaired.pop(transfer.id, None)
                first = of_transfer.setdefault(transfer.id, receipt.id)
                first = next((each.id for each in look_up.receipts_of(transfer)), first)
                if first != receipt.id:
                    self._found.append(
                        f"receipt {receipt.id}: is for transfer {transfer.id}, as {first} is"
                    )
        return self._found[before:] + [
            f"transfer {transfer}: its receipt is missing" for transfer in state.unpaired
        ]

    def _wrong_accounts(self, accounts: Sequence[Account]) -> list[str]:
        """Accounts that are not there, or between which nothing may move."""
        currencies = {account.id: account.currency for account in accounts}
        found = []
        for pair, transfer in self._pairs.items():
            missing = sorted(set(pair) - set(currencies))
            found += [f"transfer {transfer}: account {account} is missing" for account in missing]
            if not missing and currencies[pair[0]] != currencies[pair[1]]:
                found.append(f"transfer {transfer}: its accounts have different currencies")
        named = {account for pair in self._pairs for account in pair}
        gone = sorted(set(self.state.balances) - set(currencies) - named)
        return found + [f"account {account}: is missing" for account in gone]

    def _wrong_balances(self, accounts: Sequence[Account]) -> list[str]:
        found, totals = [], dict[str, tuple[int, int]]()
        for account in accounts:
            balances = self.state.balances.get(account.id, Balances())
            for column in Balances.__struct_fields__:
                stored, expected = getattr(account, column), getattr(balances, column)
                if column == "late_nano" and account.may_go_negative:
                    expected = 0
                if stored != expected:
                    found.append(
                        f"account {account.id}: {column} is {stored}, transfers say {expected}"
                    )
            if not account.may_go_negative and account.available_nano + account.late_nano < 0:
                found.append(f"account {account.id}: spent more than it has")
            debits, credits = totals.get(account.currency, (0, 0))
            totals[account.currency] = (
                debits + account.debits_posted,
                credits + account.credits_posted,
            )
        return found + [
            f"debits {debits} and credits {credits} in {currency} differ"
            for currency, (debits, credits) in sorted(totals.items())
            if debits != credits
        ]


def _wrong_amounts(receipt: Receipt, transfers: dict[str, Transfer]) -> Iterable[str]:
    charge = transfers[receipt.transfer_ids[0]] if receipt.transfer_ids else None
    if receipt.charge_nano != (charge.amount_nano if charge else 0):
        yield f"says {receipt.charge_nano}, charged otherwise"
    if charge is None:
        return
    if charge.debit != receipt.account:
        yield f"is {receipt.account}'s, paid by {charge.debit}"
    if charge.receipt_digest != digest_of(receipt):
        yield f"is not the one that transfer {charge.id} was booked with"
    lines = receipt.all_lines()
    if sum(line.charge_nano for line in lines) != receipt.charge_nano:
        yield "its lines do not add up to its charge"
    if sum(line.royalty_nano for line in lines) != receipt.royalty_nano:
        yield "its lines do not add up to its royalty"
    owed = [line for line in lines if line.royalty_nano]
    if len(owed) != len(receipt.transfer_ids) - 1:
        yield f"has {len(receipt.transfer_ids) - 1} royalties, {len(owed)} are due"
    for line, transfer_id in zip(owed, receipt.transfer_ids[1:], strict=False):
        paid = transfers[transfer_id]
        if paid.amount_nano != line.royalty_nano:
            yield f"owes {line.publisher} {line.royalty_nano}, {transfer_id} is {paid.amount_nano}"
        if (paid.kind, paid.debit) != ("plain", PROVIDER) or paid.credit not in (
            line.publisher,
            SUSPENSE,
        ):
            yield f"owes {line.publisher}, {transfer_id} pays {paid.credit}"
