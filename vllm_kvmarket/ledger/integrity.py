"""Proof that the balances follow from the transfers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from vllm_kvmarket.ledger.model import Account, Receipt, Transfer
from vllm_kvmarket.ledger.rules import ENDS
from vllm_kvmarket.ledger.storage import Everything

BALANCES = ("debits_pending", "credits_pending", "debits_posted", "credits_posted")


def problems(books: Everything) -> list[str]:
    """Recompute every balance and hold from the transfers; what differs, in words."""
    transfers = {transfer.id: transfer for transfer in books.transfers}
    found = _compare(books.accounts, _recompute(transfers))
    found += _unfounded(books.accounts, transfers)
    found += _wrong_holds(books.dues, books.transfers)
    return found + _wrong_receipts(books.receipts, transfers)


def _recompute(transfers: dict[str, Transfer]) -> dict[tuple[str, str], int]:
    balances: dict[tuple[str, str], int] = defaultdict(int)
    for transfer in transfers.values():
        reserved = transfer.amount_nano if transfer.kind == "pending" else 0
        posted = transfer.amount_nano if transfer.kind in ("plain", "post") else 0
        if transfer.kind in ENDS and transfer.pending_id in transfers:
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
            and transfer.amount_nano <= (held.amount_nano if transfer.kind == "post" else 0)
        ):
            found.append(f"transfer {transfer.id}: cannot resolve {transfer.pending_id}")
    return found


def _wrong_holds(dues: dict[str, float], transfers: Iterable[Transfer]) -> list[str]:
    """Holds posted, renewed or expired at the wrong time, twice, or kept when they are over."""
    found = []
    expected: dict[str, float] = {}
    for transfer in transfers:
        held, now_s = transfer.pending_id, transfer.created_at_s
        if transfer.kind == "pending":
            expected[transfer.id] = now_s + transfer.timeout_s
        elif held not in expected:
            if held:
                found.append(f"transfer {transfer.id}: hold {held} was not open")
        elif transfer.kind == "renew":
            if now_s >= expected[held]:
                found.append(f"transfer {transfer.id}: hold {held} was due already")
            expected[held] = max(expected[held], now_s + transfer.timeout_s)
        else:
            due_at_s = expected.pop(held)
            if transfer.kind == "post" and now_s >= due_at_s:
                found.append(f"transfer {transfer.id}: hold {held} was due already")
            if transfer.kind == "expire" and now_s < due_at_s:
                found.append(f"transfer {transfer.id}: hold {held} was not due")
    return found + [
        f"hold {held}: is due at {dues.get(held)}, transfers say {expected.get(held)}"
        for held in sorted(set(expected) | set(dues))
        if expected.get(held) != dues.get(held)
    ]


def _wrong_receipts(receipts: list[Receipt], transfers: dict[str, Transfer]) -> list[str]:
    """Receipts that say another charge than was made, and charges with two receipts."""
    found = []
    receipted: dict[str, str] = {}
    for receipt in receipts:
        missing = [transfer for transfer in receipt.transfer_ids if transfer not in transfers]
        if missing:
            found.append(f"receipt {receipt.id}: transfer {missing[0]} is missing")
            continue
        charge = transfers[receipt.transfer_ids[0]] if receipt.transfer_ids else None
        if receipt.charge_nano != (charge.amount_nano if charge else 0):
            found.append(f"receipt {receipt.id}: says {receipt.charge_nano}, charged otherwise")
        if charge is None:
            continue
        first = receipted.setdefault(charge.id, receipt.id)
        if first != receipt.id:
            found.append(f"receipt {receipt.id}: is for transfer {charge.id}, as {first} is")
        if charge.debit != receipt.account:
            found.append(f"receipt {receipt.id}: is {receipt.account}'s, paid by {charge.debit}")
    return found


def _compare(accounts: list[Account], balances: dict[tuple[str, str], int]) -> list[str]:
    found = []
    for account in accounts:
        for column in BALANCES:
            stored, expected = getattr(account, column), balances.get((account.id, column), 0)
            if stored != expected:
                found.append(
                    f"account {account.id}: {column} is {stored}, transfers say {expected}"
                )
        if not account.may_go_negative and account.available_nano < 0:
            found.append(f"account {account.id}: spent more than it has")
    debits = sum(account.debits_posted for account in accounts)
    credits = sum(account.credits_posted for account in accounts)
    if debits != credits:
        found.append(f"debits {debits} and credits {credits} differ")
    return found
