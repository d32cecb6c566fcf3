"""Proof that the balances follow from the transfers."""

from __future__ import annotations

from collections import defaultdict

import apsw

from vllm_kvmarket.ledger import tables
from vllm_kvmarket.ledger.receipts import Receipt
from vllm_kvmarket.ledger.rules import Account, Transfer

BALANCES = ("debits_pending", "credits_pending", "debits_posted", "credits_posted")


def problems(db: apsw.Connection) -> list[str]:
    """Recompute every balance from the transfers, in one snapshot; what differs, in words."""
    with db:  # one read transaction: accounts, transfers and receipts of the same moment
        accounts = tables.read_accounts(db)
        transfers = {transfer.id: transfer for transfer in reversed(tables.read_transfers(db))}
        receipts = tables.read_receipts(db, "TRUE", (), None)
    found = _compare(accounts, _recompute(transfers))
    found += _unfounded(accounts, transfers)
    return found + _wrong_receipts(receipts, transfers)


def _recompute(transfers: dict[str, Transfer]) -> dict[tuple[str, str], int]:
    balances: dict[tuple[str, str], int] = defaultdict(int)
    for transfer in transfers.values():
        reserved = transfer.amount_nano if transfer.kind == "pending" else 0
        posted = transfer.amount_nano if transfer.kind in ("plain", "post") else 0
        if transfer.pending_id in transfers:
            reserved = -transfers[transfer.pending_id].amount_nano
        balances[transfer.debit, "debits_pending"] += reserved
        balances[transfer.credit, "credits_pending"] += reserved
        balances[transfer.debit, "debits_posted"] += posted
        balances[transfer.credit, "credits_posted"] += posted
    return balances


def _unfounded(accounts: list[Account], transfers: dict[str, Transfer]) -> list[str]:
    """Transfers between accounts that are not there, or that resolve what is no reservation."""
    known = {account.id for account in accounts}
    found = []
    for transfer in transfers.values():
        missing = sorted({transfer.debit, transfer.credit} - known)
        found += [f"transfer {transfer.id}: account {account} is missing" for account in missing]
        held = transfers.get(transfer.pending_id)
        if transfer.pending_id and not (
            held is not None
            and held.kind == "pending"
            and (held.debit, held.credit) == (transfer.debit, transfer.credit)
            and transfer.amount_nano <= held.amount_nano
        ):
            found.append(f"transfer {transfer.id}: cannot resolve {transfer.pending_id}")
    return found


def _wrong_receipts(receipts: list[Receipt], transfers: dict[str, Transfer]) -> list[str]:
    """Receipts that say another charge than was made, and charges with two receipts."""
    found = []
    receipted: dict[str, str] = {}
    for receipt in reversed(receipts):
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
