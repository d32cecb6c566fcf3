"""Books moved from one database into another, by applying every transfer again at its own time.

The rules decide alike everywhere, so that balances, holds and the log's root come out the same;
the caller checks that with `check_ledger`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from vllm_kvmarket.core.errors import ProofError
from vllm_kvmarket.ledger import (
    PROVIDER,
    Ledger,
    Operation,
    Receipt,
    Result,
    Transfer,
)
from vllm_kvmarket.proofs import leaves

WINDOW = 5_000  # batches under way at once
PATIENCE_S = 60.0


def replay(ledger: Ledger, place: Path | str) -> int:
    """Copy a ledger as of now into a database, a path or URL as Ledger.open takes it.

    How many transfers it has then. Safe while others write to `ledger`. What the database has
    already must be a part of it. Raises ProofError when it is not, and LedgerError.
    """
    size = sum(len(page) for page in leaves.pages(ledger))
    # Behind the transfers, so that none is without its accounts and its receipt.
    accounts = ledger.accounts()
    receipts = {each.transfer_ids[-1]: each for each in ledger.receipts() if each.transfer_ids}
    now_s = [0.0]
    currency = ledger.account(PROVIDER).currency
    with Ledger.open(place, clock=lambda: now_s[0], currency=currency) as copy:
        for account in accounts:
            copy.create_account(
                account.id,
                account.kind,
                may_go_negative=account.may_go_negative,
                currency=account.currency,
            )
        for window in _windows(ledger, size):
            answers: list[tuple[Transfer, Future[list[Result]]]] = []
            for transfer in window:
                now_s[0] = transfer.created_at_s
                answers.append((transfer, _submit(copy, transfer, receipts.get(transfer.id))))
            for transfer, answer in answers:
                (result,) = answer.result()
                if not result.outcome.good:
                    raise ProofError(
                        f"{place}: transfer {transfer.id} does not take effect there "
                        f"({result.outcome.name.lower()} {result.detail}); give an empty database"
                    )
        if copy.transfers_after(size, 1):
            raise ProofError(f"{place}: has other transfers as well; give an empty database")
    return size


def _windows(ledger: Ledger, size: int) -> Iterator[list[Transfer]]:
    left = size
    for page in leaves.pages(ledger):
        wanted = page[:left]
        left -= len(wanted)
        for first in range(0, len(wanted), WINDOW):
            yield wanted[first : first + WINDOW]
        if not left:
            return


def _submit(copy: Ledger, transfer: Transfer, receipt: Receipt | None) -> Future[list[Result]]:
    # An operation that names a reservation takes accounts and cause from it.
    first = not transfer.pending_id
    operation = Operation(
        "post" if transfer.kind == "late" else transfer.kind,
        transfer.id,
        transfer.debit if first else "",
        transfer.credit if first else "",
        transfer.amount_nano,
        transfer.pending_id,
        transfer.timeout_s,
        transfer.code if first else "",
        transfer.user_data if first else "",
        transfer.receipt_digest,
    )
    return copy.submit([operation], receipt=receipt, patience_s=PATIENCE_S)
