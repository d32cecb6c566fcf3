"""What is read of a ledger in PostgreSQL, each on a connection of the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import psycopg
from psycopg import sql
from psycopg.rows import class_row

from vllm_kvmarket.core.postgres_database import translated
from vllm_kvmarket.ledger.model import MOVES, Account, Receipt, Transfer
from vllm_kvmarket.ledger.periods import HOUR_S, is_in, search
from vllm_kvmarket.ledger.storage import NumberedReceipt

NUMBERED = "JOIN kvmarket.log_leaf USING (sequence) WHERE number > %s ORDER BY number LIMIT %s"
# They depend on what has a number, and not the other way round.
UNNUMBERED = """WHERE sequence > (SELECT complete FROM kvmarket.numbering) AND NOT EXISTS (
    SELECT FROM kvmarket.log_leaf AS leaf WHERE leaf.sequence = transfer.sequence)
    ORDER BY sequence"""
TRANSFER_COLUMNS = ", ".join(
    "coalesce(pending_id, '') AS pending_id" if field == "pending_id" else field
    for field in Transfer.__struct_fields__
)
RECEIPT_TIME = "(body::json->>'created_at_s')::double precision"
decode = msgspec.json.Decoder(Receipt).decode
# A period: its beginning, and its end, which is no part of it; None is without that bound.
Period = tuple[float | None, float | None]
HALF = sql.SQL(
    "(SELECT * FROM kvmarket.transfer WHERE {} = %(account)s "
    "AND sequence BETWEEN %(first)s AND %(last)s)"
)
# Each half goes down its own index; nothing is in both.
WITHIN = sql.SQL("({} UNION ALL {}) AS booked").format(
    HALF.format(sql.Identifier("debit")), HALF.format(sql.Identifier("credit"))
)
IN_PERIOD = "sequence BETWEEN %(first)s AND %(last)s"
OF_ACCOUNT_OR_DOCUMENTS = f"""sequence IN (
    SELECT sequence FROM kvmarket.receipt WHERE account = %(account)s AND {IN_PERIOD}
    UNION SELECT sequence FROM kvmarket.receipt
        WHERE document_id = ANY (%(documents)s) AND {IN_PERIOD}
    UNION SELECT sequence FROM kvmarket.receipt_line JOIN kvmarket.receipt ON id = receipt_id
        WHERE receipt_line.document_id = ANY (%(documents)s) AND {IN_PERIOD})"""  # noqa: S608  # names are ours


def number_leaves(db: psycopg.Connection[Any]) -> int:
    """Number the transfers that have no number yet; how many that were.

    One statement: no client that stops holds the others up.
    """
    row = db.execute("SELECT kvmarket.number_leaves()").fetchone()
    assert row is not None
    return int(row[0])


def sequences_of(
    db: psycopg.Connection[Any], table: str, time_s: str, from_s: float | None, to_s: float | None
) -> tuple[int, int]:
    """Between which sequence numbers of a table the bookings of a period are."""
    statement, values = search(f"kvmarket.{table}", time_s, from_s, to_s)
    row: tuple[int, int] | None = db.execute(translated(statement), values).fetchone()
    assert row is not None
    return row


def accounts(
    db: psycopg.Connection[Any], where: sql.Composable | None = None, values: Sequence[Any] = ()
) -> list[Account]:
    """Accounts as they stand, by id."""
    query = sql.SQL("SELECT to_json(balance)::text FROM kvmarket.balance {} ORDER BY id").format(
        where or sql.SQL("")
    )
    return [msgspec.json.decode(row, type=Account) for (row,) in db.execute(query, values)]


def transfers(
    db: psycopg.Connection[Any],
    clauses: sql.Composable,
    values: Sequence[Any] | Mapping[str, Any] = (),
) -> psycopg.Cursor[Transfer]:
    """A cursor over transfers."""
    query = sql.SQL("SELECT {} FROM kvmarket.transfer {}").format(
        sql.SQL(TRANSFER_COLUMNS), clauses
    )
    return db.cursor(row_factory=class_row(Transfer)).execute(query, values)


def receipts(
    db: psycopg.Connection[Any],
    where: Mapping[str, str],
    limit: int | None,
    before: str | None = None,
) -> list[Receipt]:
    """See storage.Storage."""
    conditions, values = list[sql.Composable](), list[object]()
    for column, value in where.items():
        some = sql.SQL("{} = %s").format(sql.Identifier(column))
        values.append(value)
        if column == "document_id":  # also of another line than the last
            some = sql.SQL(
                "({} OR id IN (SELECT receipt_id FROM kvmarket.receipt_line WHERE {}))"
            ).format(some, some)
            values.append(value)
        conditions.append(some)
    if before is not None:
        conditions.append(
            sql.SQL("sequence < (SELECT sequence FROM kvmarket.receipt WHERE id = %s)")
        )
        values.append(before)
    query = sql.SQL(
        "SELECT body FROM kvmarket.receipt WHERE {} ORDER BY sequence DESC LIMIT %s"
    ).format(sql.SQL(" AND ").join([sql.SQL("TRUE"), *conditions]))
    rows = db.execute(query, (*values, limit))
    return [decode(body) for (body,) in rows]


def receipts_after(
    db: psycopg.Connection[Any], sequence: int, limit: int | None
) -> list[NumberedReceipt]:
    """See storage.Storage."""
    rows = db.execute(
        "SELECT sequence, body FROM kvmarket.receipt WHERE sequence > %s "
        "ORDER BY sequence LIMIT %s",
        (sequence, limit),
    )
    return [NumberedReceipt(number, decode(body)) for number, body in rows]


def moves(db: psycopg.Connection[Any], account: str, period: Period) -> list[Transfer]:
    """See storage.Storage."""
    first, last = sequences_of(db, "transfer", "created_at_s", *period)
    found = transfers(
        db,
        sql.SQL("WHERE sequence IN (SELECT sequence FROM {}) ORDER BY sequence").format(WITHIN),
        {"account": account, "first": first, "last": last},
    )
    return [each for each in found if each.kind in MOVES and is_in(each, *period)]


def moved_before(db: psycopg.Connection[Any], account: str, at_s: float) -> int:
    """See storage.Storage; what has no number in the log is not in the sums of its hour."""
    hour = int(at_s // HOUR_S)
    first, last = sequences_of(db, "transfer", "created_at_s", hour * HOUR_S, at_s)
    query = sql.SQL(
        "SELECT (SELECT coalesce(sum(moved_nano), 0) FROM kvmarket.period_sum "
        "WHERE account = %(account)s AND hour < %(hour)s) + coalesce(sum("
        "CASE WHEN credit = %(account)s THEN amount_nano ELSE -amount_nano END), 0) "
        "FROM {} WHERE kind = ANY (%(moves)s) "
        "AND created_at_s >= %(from_s)s AND created_at_s < %(to_s)s"
    ).format(WITHIN)
    values = {"account": account, "hour": hour, "moves": list(MOVES), "first": first, "last": last}
    values |= {"from_s": hour * HOUR_S, "to_s": at_s}
    row = db.execute(query, values).fetchone()
    assert row is not None
    return int(row[0])


def receipts_booked(
    db: psycopg.Connection[Any], period: Period, account: str | None, documents: Sequence[str]
) -> list[Receipt]:
    """See storage.Storage."""
    first, last = sequences_of(db, "receipt", RECEIPT_TIME, *period)
    query = sql.SQL("SELECT body FROM kvmarket.receipt WHERE {} ORDER BY sequence").format(
        sql.SQL(IN_PERIOD if account is None else OF_ACCOUNT_OR_DOCUMENTS)
    )
    values = {"first": first, "last": last, "account": account, "documents": list(documents)}
    found = [decode(body) for (body,) in db.execute(query, values)]
    return [each for each in found if is_in(each, *period)]
