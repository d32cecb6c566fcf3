"""The ledger's transfers in the order of effect, in pages.

A ledger that has `transfers_after` and `sequence_of` is asked for exactly what is needed. One that
only lists transfers newest first is read back to the last one known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from vllm_kvmarket.errors import NotFoundError
from vllm_kvmarket.ledger import Ledger, Transfer

PAGE = 10_000
FIRST_LOOK = 1_000


class Paged(Protocol):
    """What a ledger should offer. Sequence numbers begin with 1 and have no gaps."""

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        """The transfers that took effect behind the first `sequence`, at most `limit`."""

    def sequence_of(self, transfer_id: str) -> int:
        """As the how many-th a transfer took effect, from 1. Raises NotFoundError."""


def _paged(ledger: Ledger) -> Paged | None:
    offered: Any = ledger
    return offered if hasattr(ledger, "transfers_after") else None


def pages(ledger: Ledger, after: int = 0, known_id: str = "") -> Iterator[list[Transfer]]:
    """Every transfer behind the first `after`, of which the last has the id `known_id`."""
    paged = _paged(ledger)
    if paged is None:
        behind = _read_back(ledger, after, known_id)
        for first in range(0, len(behind), PAGE):
            yield behind[first : first + PAGE]
        return
    while page := paged.transfers_after(after, PAGE):
        yield page
        after += len(page)


def last_of(ledger: Ledger, size: int, known_id: str) -> Transfer | None:
    """The last of the first `size` transfers, known as `known_id`; None when it is another now."""
    paged = _paged(ledger)
    if paged is None:
        with contextlib.suppress(NotFoundError):
            return ledger.transfer(known_id)
        return None
    found = paged.transfers_after(size - 1, 1)
    return found[0] if found else None


def _read_back(ledger: Ledger, after: int, known_id: str) -> list[Transfer]:
    limit = FIRST_LOOK if after else None
    while True:
        newest = ledger.transfers(limit=limit)
        for number, transfer in enumerate(newest if after else ()):
            if transfer.id == known_id:
                return newest[:number][::-1]
        if limit is None or len(newest) < limit:
            return newest[::-1][after:]
        limit *= 4


def indexes_of(ledger: Ledger, transfer_ids: Iterable[str]) -> dict[str, int]:
    """Which leaves transfers are, from 0. Raises NotFoundError."""
    paged = _paged(ledger)
    if paged is not None:
        return {wanted: paged.sequence_of(wanted) - 1 for wanted in transfer_ids}
    left = set(transfer_ids)
    found: dict[str, int] = {}
    oldest_first = (transfer.id for page in pages(ledger) for transfer in page)
    for index, transfer_id in enumerate(oldest_first if left else ()):
        if transfer_id in left:
            found[transfer_id] = index
            left.remove(transfer_id)
    if left:
        raise NotFoundError(f"there is no transfer {min(left)!r}")
    return found
