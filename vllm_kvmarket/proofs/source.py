"""The ledger's transfers in the order of effect, in pages. Leaf n has the sequence number n + 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_kvmarket.ledger import Ledger, Transfer

PAGE = 10_000  # some megabytes


def pages(ledger: Ledger, after: int = 0) -> Iterator[list[Transfer]]:
    """Every transfer behind the first `after`; those that take effect meanwhile as well."""
    while page := ledger.transfers_after(after, PAGE):
        yield page
        after += len(page)


def transfer_at(ledger: Ledger, index: int) -> Transfer | None:
    """The transfer that is this leaf; None where the log is not that long."""
    found = ledger.transfers_after(index, 1)
    return found[0] if found else None


def indexes_of(ledger: Ledger, transfer_ids: Iterable[str]) -> dict[str, int]:
    """Which leaves transfers are, from 0. Raises NotFoundError."""
    return {transfer_id: ledger.sequence_of(transfer_id) - 1 for transfer_id in transfer_ids}
