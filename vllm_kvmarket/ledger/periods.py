"""Periods of the books: where in a table of bookings a period is, without reading the rest of it.

Bookings are added in the order of time, but for seconds: on PostgreSQL a group is booked up to half
a minute after its time was taken.
"""

from __future__ import annotations

import math

from vllm_kvmarket.ledger.model import Receipt, Transfer

# Sums are kept of each account and hour, so that a balance brought forward adds up few rows.
HOUR_S = 3600
SLACK_S = 60.0  # more than what is added late
# For each end of a period, the last row before it, were rows in the order of time. A step goes on
# to a place if the first row from there on is before the end; the next step is half as wide. The
# first is half of all numbers that can be: no row is asked because it is the oldest or the newest.
SEARCH = """
WITH RECURSIVE search (at_s, place, step) AS (
    SELECT CAST(:from_s AS double precision), CAST(0 AS bigint), 4611686018427387904
    UNION ALL SELECT CAST(:to_s AS double precision), 0, 4611686018427387904
    UNION ALL SELECT at_s, place + CASE WHEN (
        SELECT {time_s} FROM {table} WHERE sequence >= place + step ORDER BY sequence LIMIT 1
    ) < at_s THEN step ELSE 0 END, step / 2 FROM search WHERE step > 0
)
SELECT min(place), max(place) FROM search WHERE step = 0
"""


def signed(transfer: Transfer, account_id: str) -> int:
    """What a transfer moved to the account; below 0 for what it moved from it."""
    return transfer.amount_nano if transfer.credit == account_id else -transfer.amount_nano


def is_in(booked: Transfer | Receipt, from_s: float | None, to_s: float | None) -> bool:
    """Whether a booking is in a period, which has its beginning and not its end."""
    at_s = booked.created_at_s
    return (from_s is None or at_s >= from_s) and (to_s is None or at_s < to_s)


def search(
    table: str, time_s: str, from_s: float | None, to_s: float | None
) -> tuple[str, dict[str, float]]:
    """A statement in SQLite's words, and its values: between which sequence numbers, both included,
    all rows of a period are.

    Others may be there, too. Reads some dozens of rows, in the database: it may be on another
    machine.
    """
    return SEARCH.format(table=table, time_s=time_s), {
        "from_s": -math.inf if from_s is None else from_s - SLACK_S,
        "to_s": math.inf if to_s is None else to_s + SLACK_S,
    }
