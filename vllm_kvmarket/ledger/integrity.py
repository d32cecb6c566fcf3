"""Proof that the balances follow from the transfers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from vllm_kvmarket.ledger.model import (
    GRACE_S,
    OWED,
    PROVIDER,
    ROYALTY,
    SUSPENSE,
    Account,
    Receipt,
    Transfer,
    digest_of,
)
from vllm_kvmarket.ledger.rules import ENDS
from vllm_kvmarket.ledger.storage import Everything

BALANCES = ("debits_pending", "credits_pending", "debits_posted", "credits_posted", "late_nano")
# A sale's charge, and the kinds that move its amount.
SALE = "reuse"
CHARGES = ("post", "late")


def is_charge(kind: str, code: str) -> bool:
    """Whether a transfer is what a buyer pays for a sale."""
    return (kind in CHARGES and code == SALE) or (kind == "plain" and code == OWED)


def is_beyond_funds(transfer: Transfer) -> bool:
    """Whether a transfer was booked whatever the account had: these make debts."""
    return transfer.kind == "late" or (transfer.kind == "plain" and transfer.code == OWED)


def problems(books: Everything) -> list[str]:
    """Recompute every balance and hold from the transfers; return the differences, in words."""
    transfers = {transfer.id: transfer for transfer in books.transfers}
    limited = {account.id for account in books.accounts if not account.may_go_negative}
    found = _compare(books.accounts, _recompute(transfers, limited))
    found += _unfounded(books.accounts, transfers)
    found += _wrong_holds(books.dues, books.transfers)
    return found + _wrong_receipts(books.receipts, transfers)


def _recompute(transfers: dict[str, Transfer], limited: set[str]) -> dict[tuple[str, str], int]:
    balances: dict[tuple[str, str], int] = defaultdict(int)
    for transfer in transfers.values():
        reserved = transfer.amount_nano if transfer.kind == "pending" else 0
        posted = transfer.amount_nano if transfer.kind in ("plain", "post", "late") else 0
        if is_beyond_funds(transfer) and transfer.debit in limited:
            balances[transfer.debit, "late_nano"] += posted
        if transfer.kind in ENDS and transfer.kind != "late" and transfer.pending_id in transfers:
            reserved = -transfers[transfer.pending_id].amount_nano
        balances[transfer.debit, "debits_pending"] += reserved
        balances[transfer.credit, "credits_pending"] += reserved
        balances[transfer.debit, "debits_posted"] += posted
        balances[transfer.credit, "credits_posted"] += posted
    return balances


def _unfounded(accounts: list[Account], transfers: dict[str, Transfer]) -> list[str]:
    """Transfers between accounts that are not there or not alike, or that name no reservation."""
    currencies = {account.id: account.currency for account in accounts}
    found = []
    for transfer in transfers.values():
        missing = sorted({transfer.debit, transfer.credit} - set(currencies))
        found += [f"transfer {transfer.id}: account {account} is missing" for account in missing]
        if not missing and currencies[transfer.debit] != currencies[transfer.credit]:
            found.append(f"transfer {transfer.id}: its accounts have different currencies")
        held = transfers.get(transfer.pending_id)
        if transfer.pending_id and not (
            held is not None
            and held.kind == "pending"
            and (held.debit, held.credit) == (transfer.debit, transfer.credit)
            and transfer.amount_nano <= (held.amount_nano if transfer.kind in CHARGES else 0)
        ):
            found.append(f"transfer {transfer.id}: cannot resolve {transfer.pending_id}")
    return found


def _wrong_holds(dues: dict[str, float], transfers: Iterable[Transfer]) -> list[str]:
    """Holds that ended twice or too early, and holds that are open when they are over."""
    found = []
    expected: dict[str, float] = {}
    expired: set[str] = set()
    for transfer in transfers:
        held, now_s = transfer.pending_id, transfer.created_at_s
        if transfer.kind == "pending":
            expected[transfer.id] = now_s + transfer.timeout_s
        elif transfer.kind == "late":
            if held not in expired:
                found.append(f"transfer {transfer.id}: hold {held} had not expired")
            expired.discard(held)
        elif held not in expected:
            if held:
                found.append(f"transfer {transfer.id}: hold {held} was not open")
        elif transfer.kind == "renew":
            expected[held] = max(expected[held], now_s + transfer.timeout_s)
        else:
            due_at_s = expected.pop(held)
            if transfer.kind == "expire":
                expired.add(held)
                if now_s < due_at_s + GRACE_S:
                    found.append(f"transfer {transfer.id}: hold {held} was not due")
    return found + [
        f"hold {held}: is due at {dues.get(held)}, transfers say {expected.get(held)}"
        for held in sorted(set(expected) | set(dues))
        if expected.get(held) != dues.get(held)
    ]


def _wrong_receipts(receipts: list[Receipt], transfers: dict[str, Transfer]) -> list[str]:
    """Receipts that differ from their charge or royalties, and transfers that lack a receipt."""
    found = []
    of_transfer: dict[str, str] = {}
    for receipt in receipts:
        missing = [transfer for transfer in receipt.transfer_ids if transfer not in transfers]
        if missing:
            found.append(f"receipt {receipt.id}: transfer {missing[0]} is missing")
            continue
        found += [f"receipt {receipt.id}: {each}" for each in _wrong_amounts(receipt, transfers)]
        for transfer_id in receipt.transfer_ids:
            first = of_transfer.setdefault(transfer_id, receipt.id)
            if first != receipt.id:
                found.append(f"receipt {receipt.id}: is for transfer {transfer_id}, as {first} is")
    for transfer in transfers.values():
        sale = is_charge(transfer.kind, transfer.code) and transfer.amount_nano > 0
        royalty = transfer.code == ROYALTY and transfer.debit == PROVIDER
        if (sale or royalty or transfer.receipt_digest) and transfer.id not in of_transfer:
            found.append(f"transfer {transfer.id}: its receipt is missing")
    return found


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


def _compare(accounts: list[Account], balances: dict[tuple[str, str], int]) -> list[str]:
    found = []
    for account in accounts:
        for column in BALANCES:
            stored, expected = getattr(account, column), balances.get((account.id, column), 0)
            if stored != expected:
                found.append(
                    f"account {account.id}: {column} is {stored}, transfers say {expected}"
                )
        if not account.may_go_negative and account.available_nano + account.late_nano < 0:
            found.append(f"account {account.id}: spent more than it has")
    for currency in sorted({account.currency for account in accounts}):
        some = [account for account in accounts if account.currency == currency]
        debits = sum(account.debits_posted for account in some)
        credits = sum(account.credits_posted for account in some)
        if debits != credits:
            found.append(f"debits {debits} and credits {credits} in {currency} differ")
    return found
