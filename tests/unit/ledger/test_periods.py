"""Where a period lies among bookings: all of its rows are found, few others, at the same cost."""

from __future__ import annotations

import apsw
import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ledger_books import receipt
from vllm_kvmarket.ledger import Ledger
from vllm_kvmarket.ledger.model import encode_receipt
from vllm_kvmarket.ledger.periods import SLACK_S
from vllm_kvmarket.ledger.sqlite_queries import sequences_of
from vllm_kvmarket.ledger.statements import statement
from vllm_kvmarket.ledger.storage import NewReceipt, receipt_row

TIMES = st.integers(0, 2_000)
LATE = st.floats(0, SLACK_S, exclude_max=True)
SALES = """INSERT INTO transfer (id, kind, debit, credit, amount_nano, pending_id, timeout_s,
    code, user_data, receipt_digest, created_at_s)
    VALUES (?, 'plain', 'alice', 'provider', 1, NULL, 0, 'reuse', 'kvd_x', '', ?)"""


def table(rows):
    """A table of transfers: their numbers and times."""
    db = apsw.Connection(":memory:")
    db.execute("CREATE TABLE transfer (sequence INTEGER PRIMARY KEY, created_at_s REAL NOT NULL)")
    db.executemany("INSERT INTO transfer VALUES (?, ?)", rows)
    return db


@given(
    st.lists(st.tuples(TIMES, st.integers(1, 1000), LATE), max_size=60),
    st.none() | TIMES,
    st.none() | st.integers(0, 500),
)
def test_all_rows_of_a_period_are_found_and_few_others(steps, from_s, length_s):
    """Numbers have gaps, and times go back by less than the slack, also those of the first rows."""
    to_s = None if length_s is None else (from_s or 0) + length_s
    rows, number = [], 0
    for at_s, gap, late_s in sorted(steps):
        number += gap
        rows.append((number, at_s - late_s))
    first, last = sequences_of(table(rows), "transfer", from_s, to_s)
    for sequence, at_s in rows:
        if (from_s is None or at_s >= from_s) and (to_s is None or at_s < to_s):
            assert first <= sequence <= last
        if first < sequence <= last:
            assert from_s is None or at_s >= from_s - 2 * SLACK_S
            assert to_s is None or at_s < to_s + 2 * SLACK_S


def test_first_rows_that_are_later_than_all_behind_hide_none():
    """The oldest row says nothing of where a period is."""
    db = table((n, n + (1_000_000.0 if n <= 100 else 0.0)) for n in range(1, 10_001))
    for second in range(200, 9_900, 37):
        first, last = sequences_of(db, "transfer", second, second + 1)
        assert second - 61 <= first < second < last <= second + 61


def steps_of_a_statement(path, sales):
    """What SQLite does for the second of the last sale, where a buyer bought once a minute."""
    steps = []

    def trace(db):
        db.trace_v2(
            apsw.SQLITE_TRACE_PROFILE,
            lambda event: steps.append(event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]),
        )

    with Ledger.open(path) as ledger:
        ledger.create_account("alice", "buyer")
    db = apsw.Connection(str(path))
    with db:
        db.executemany(SALES, [(f"p{number}", number * 60.0) for number in range(sales)])
        for number in range(sales):
            sold = receipt(f"kvr_{number}", 1, f"p{number}")
            sold = msgspec.structs.replace(sold, created_at_s=number * 60.0)
            row = receipt_row(NewReceipt(sold, encode_receipt(sold)))
            db.execute("INSERT INTO receipt VALUES (NULL, ?, ?, ?, ?, ?, ?)", row)
    db.close()
    apsw.connection_hooks.append(trace)
    try:
        with Ledger.open(path) as ledger:
            at_s = (sales - 1) * 60.0
            statement(ledger, "alice", at_s, at_s + 1)  # sums of hours, once
            steps.clear()
            (line,) = statement(ledger, "alice", at_s, at_s + 1).lines
            assert line.receipt_id == f"kvr_{sales - 1}"
            return sum(steps)
    finally:
        apsw.connection_hooks.remove(trace)


def test_a_second_costs_the_same_behind_a_longer_past(tmp_path):
    """Sixteen times as many purchases of the same buyer, of which it reads no more."""
    few, many = (steps_of_a_statement(tmp_path / f"{n}.sqlite", n) for n in (300, 4800))
    assert 0 < few < many < 1.3 * few
