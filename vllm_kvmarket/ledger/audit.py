"""Proof that the balances follow from the transfers."""

from __future__ import annotations

from collections import defaultdict

import apsw

from vllm_kvmarket.ledger import tables
from vllm_kvmarket.ledger.rules import Account, Transfer

BALANCES = ("debits_pending", "credits_pending", "debits_posted", "credits_posted")


def problems(db: apsw.Connection) -> list[str]:
    """Recompute every balance from the transfers, in one snapshot; what differs, in words."""
    with db:  # one read transaction: accounts and transfers of the same moment
        accounts = [
            tables.account_from(row)
            for row in db.execute(f"SELECT {tables.ACCOUNT_COLUMNS} FROM account")  # noqa: S608  # names are ours
        ]
        transfers = [
            tables.transfer_from(row)
            for row in db.execute(
                f"SELECT {tables.TRANSFER_COLUMNS} FROM transfer ORDER BY sequence"  # noqa: S608  # names are ours
            )
        ]
        receipts = tables.read_receipts(db, "TRUE", (), None)
    found = _compare(accounts, _recompute(transfers))
    posted = {transfer.id: transfer for transfer in transfers}
    for receipt in receipts:
        missing = [transfer for transfer in receipt.transfer_ids if transfer not in posted]
        if missing:
            found.append(f"receipt {receipt.id}: transfer {missing[0]} is missing")
            continue
        charged = posted[receipt.transfer_ids[0]].amount_nano if receipt.transfer_ids else 0
        if charged != receipt.charge_nano:
            found.append(f"receipt {receipt.id}: says {receipt.charge_nano}, charged otherwise")
    return found


def _recompute(transfers: list[Transfer]) -> dict[tuple[str, str], int]:
    balances: dict[tuple[str, str], int] = defaultdict(int)
    amounts = {transfer.id: transfer.amount_nano for transfer in transfers}
    for transfer in transfers:
        reserved = transfer.amount_nano if transfer.kind == "pending" else 0
        posted = transfer.amount_nano if transfer.kind in ("plain", "post") else 0
        if transfer.pending_id:
            reserved = -amounts[transfer.pending_id]
        balances[transfer.debit, "debits_pending"] += reserved
        balances[transfer.credit, "credits_pending"] += reserved
        balances[transfer.debit, "debits_posted"] += posted
        balances[transfer.credit, "credits_posted"] += posted
    return balances


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
