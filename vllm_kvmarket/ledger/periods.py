"""Periods of the books: where in a table of bookings a period is, without reading the rest of it.

Bookings are added in the order of time, but for seconds: on PostgreSQL a group is booked up to half
a minute after its time was taken.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_kvmarket.ledger.model import Receipt, Transfer

# Sums are kept of each account and hour, so that a balance brought forward adds up few rows.
HOUR_S = 3600
SLACK_S = 60.0  # more than what is added late
# The first row at or behind a sequence number: its number and time; None behind the last.
ReadRow = Callable[[int], tuple[int, float] | None]


def signed(transfer: Transfer, account_id: str) -> int:
    """What a transfer moved to the account; below 0 for what it moved from it."""
    return transfer.amount_nano if transfer.credit == account_id else -transfer.amount_nano


def is_in(booked: Transfer | Receipt, from_s: float | None, to_s: float | None) -> bool:
    """Whether a booking is in a period, which has its beginning and not its end."""
    at_s = booked.created_at_s
    return (from_s is None or at_s >= from_s) and (to_s is None or at_s < to_s)


def sequences(read: ReadRow, from_s: float | None, to_s: float | None) -> tuple[int, int]:
    """Between which sequence numbers, both included, all rows of a period are.

    Others may be there, too. Reads some dozens of rows.
    """
    last = 1
    while read(last) is not None:
        last *= 2
    first = 0 if from_s is None else _behind(read, last, from_s - SLACK_S)
    return first, last if to_s is None else _behind(read, last, to_s + SLACK_S)


def _behind(read: ReadRow, last: int, at_s: float) -> int:
    """The sequence number before which rows are earlier, and from which on they are later."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        row = read(middle)
        if row is None or row[1] >= at_s:
            high = middle
        else:
            low = row[0] + 1
    return low
