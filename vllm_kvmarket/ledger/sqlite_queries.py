"""What is read from and written to a ledger in SQLite, each on a connection of the caller's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import apsw
import msgspec

from vllm_kvmarket.ledger.clock import Mark
from vllm_kvmarket.ledger.model import MOVES, Account, Receipt, Transfer
from vllm_kvmarket.ledger.periods import search
from vllm_kvmarket.ledger.storage import (
    RECEIPT_COLUMNS,
    NewReceipt,
    NumberedReceipt,
    receipt_row,
)
from vllm_kvmarket.ledger.working_set import Found, GroupBooks, Wanted

SUM_PERIODS = f"""
INSERT INTO period_sum
    SELECT account, hour, sum(moved_nano) FROM (
        SELECT credit AS account, CAST(created_at_s / :hour_s AS INTEGER) AS hour,
            amount_nano AS moved_nano
        FROM transfer WHERE sequence > :done AND sequence <= :up_to AND kind IN {MOVES}
        UNION ALL SELECT debit, CAST(created_at_s / :hour_s AS INTEGER), -amount_nano
        FROM transfer WHERE sequence > :done AND sequence <= :up_to AND kind IN {MOVES}
    ) WHERE TRUE GROUP BY account, hour
    ON CONFLICT (account, hour) DO UPDATE SET moved_nano = moved_nano + excluded.moved_nano
"""  # noqa: S608  # names are ours
MOVED_BEFORE = f"""
SELECT (SELECT ifnull(sum(moved_nano), 0) FROM period_sum WHERE account = :account AND hour < :hour)
    + ifnull(sum(iif(credit = :account, amount_nano, -amount_nano)), 0)
FROM (
    SELECT * FROM transfer WHERE debit = :account AND sequence BETWEEN :first AND :last
    UNION ALL
    SELECT * FROM transfer WHERE credit = :account AND sequence BETWEEN :first AND :last
) WHERE kind IN {MOVES} AND created_at_s >= :from_s AND created_at_s < :to_s
"""  # noqa: S608  # names are ours
IN_PERIOD = "sequence BETWEEN :first AND :last"
OF_ACCOUNT_OR_DOCUMENTS = f"""sequence IN (
    SELECT sequence FROM receipt WHERE account = :account AND {IN_PERIOD}
    UNION SELECT sequence FROM receipt
        WHERE document_id IN (SELECT value FROM json_each(:documents)) AND {IN_PERIOD}
    UNION SELECT sequence FROM receipt WHERE {IN_PERIOD} AND id IN (SELECT receipt_id
        FROM receipt_line WHERE document_id IN (SELECT value FROM json_each(:documents))))
"""  # noqa: S608  # names are ours
ACCOUNT_COLUMNS = ", ".join(Account.__struct_fields__)
TRANSFER_COLUMNS = ", ".join(Transfer.__struct_fields__)
# Most transfers resolve nothing: "" in a Transfer, NULL in the table.
READ_TRANSFER = TRANSFER_COLUMNS.replace("pending_id", "ifnull(pending_id, '')")
INSERT_TRANSFER = (
    f"INSERT INTO transfer ({TRANSFER_COLUMNS}) VALUES ",  # noqa: S608  # names are ours
    "("
    + ", ".join("nullif(?, '')" if f == "pending_id" else "?" for f in Transfer.__struct_fields__)
    + ")",
    "",
)
INSERT_HOLD = (
    "INSERT INTO hold (pending_id, due_at_s) VALUES ",
    "(?, ?)",
    " ON CONFLICT (pending_id) DO UPDATE SET due_at_s = excluded.due_at_s",
)
INSERT_RECEIPT_LINE = (
    "INSERT INTO receipt_line (document_id, receipt_id) VALUES ",
    "(?, ?)",
    " ON CONFLICT DO NOTHING",
)
INSERT_RECEIPT = (
    f"INSERT INTO receipt ({', '.join(RECEIPT_COLUMNS)}) VALUES ",  # noqa: S608  # names are ours
    "(?, ?, ?, ?, ?, ?)",
    "",
)
IS_AN_END = "kind IN ('post', 'void', 'expire', 'late')"
# Few sizes, so that the connection's cache of statements holds them all.
ROWS_AT_ONCE = (128, 16, 4, 1)
Row = tuple[Any, ...]
read_receipt = msgspec.json.Decoder(Receipt).decode


def sequences_of(
    db: apsw.Connection, table: str, from_s: float | None, to_s: float | None
) -> tuple[int, int]:
    """Between which sequence numbers of a table the bookings of a period are."""
    time_s = {"transfer": "created_at_s", "receipt": "json_extract(body, '$.created_at_s')"}[table]
    row: tuple[int, int] = db.execute(*search(table, time_s, from_s, to_s)).get
    return row


def accounts(db: apsw.Connection, ids: Iterable[str] | None = None) -> list[Account]:
    """Every account, or those with these ids; by id."""
    some = "" if ids is None else "WHERE id IN (SELECT value FROM json_each(?)) "
    rows = db.execute(
        f"SELECT {ACCOUNT_COLUMNS} FROM account {some}ORDER BY id",  # noqa: S608  # names are ours
        () if ids is None else (json_list(ids),),
    )
    return [
        Account(id, kind, bool(may_go_negative), *rest) for id, kind, may_go_negative, *rest in rows
    ]


def transfers(
    db: apsw.Connection, ids: Iterable[str], column: str = "id", condition: str = "TRUE"
) -> list[Transfer]:
    """Transfers whose id or pending_id is among some."""
    rows = db.execute(
        f"SELECT {READ_TRANSFER} FROM transfer "  # noqa: S608  # names are ours
        f"WHERE {column} IN (SELECT value FROM json_each(?)) AND {condition}",
        (json_list(ids),),
    )
    return [Transfer(*row) for row in rows]


def transfers_after(db: apsw.Connection, sequence: int, limit: int) -> list[Transfer]:
    """Transfers behind the first `sequence`, in their order; all of them for -1."""
    rows = db.execute(
        f"SELECT {READ_TRANSFER} FROM transfer WHERE sequence > ? "  # noqa: S608  # names are ours
        "ORDER BY sequence LIMIT ?",
        (sequence, limit),
    )
    return [Transfer(*row) for row in rows]


def receipts_after(db: apsw.Connection, sequence: int, limit: int) -> list[NumberedReceipt]:
    """Receipts behind a sequence number; all of them for -1."""
    rows = db.execute(
        "SELECT sequence, body FROM receipt WHERE sequence > ? ORDER BY sequence LIMIT ?",
        (sequence, limit),
    )
    return [NumberedReceipt(number, read_receipt(body)) for number, body in rows]


def find(db: apsw.Connection, wanted: Wanted) -> Found:
    """Everything that the rules look up for a group."""
    named = transfers(db, wanted.transfer_ids) if wanted.transfer_ids else []
    open_holds: dict[str, float] = {}
    resolutions: list[Transfer] = []
    account_ids = set(wanted.account_ids)
    if wanted.pending_ids:
        open_holds = dues(db, wanted.pending_ids)
        held = [each for each in named if each.kind == "pending"]
        account_ids.update(each.debit for each in held)
        account_ids.update(each.credit for each in held)
        closed = [each.id for each in held if each.id not in open_holds]
        if closed:
            resolutions = transfers(db, closed, "pending_id", IS_AN_END)
    return Found(accounts(db, account_ids) if account_ids else [], named, open_holds, resolutions)


def dues(db: apsw.Connection, pending_ids: Iterable[str] | None = None) -> dict[str, float]:
    """Until when open holds stand: of all, or of some."""
    some = "" if pending_ids is None else "WHERE pending_id IN (SELECT value FROM json_each(?))"
    rows = db.execute(
        f"SELECT pending_id, due_at_s FROM hold {some}",  # noqa: S608  # names are ours
        () if pending_ids is None else (json_list(pending_ids),),
    )
    return dict(list(rows))


def mark(db: apsw.Connection) -> Mark | None:
    """The clock's row."""
    row = db.execute("SELECT at_s, uptime_s, boot_id FROM clock").fetchone()
    return Mark(*row) if row else None


def write_mark(db: apsw.Connection, mark: Mark) -> None:
    """Write the clock's row."""
    db.execute(
        "INSERT INTO clock VALUES (1, ?, ?, ?) ON CONFLICT (only_one) DO UPDATE SET "
        "at_s = excluded.at_s, uptime_s = excluded.uptime_s, boot_id = excluded.boot_id",
        msgspec.structs.astuple(mark),
    )


def write(db: apsw.Connection, books: GroupBooks, receipts: Sequence[NewReceipt]) -> None:
    """Write what a group changed; each statement that has nothing to do would cost, too."""
    _insert(db, INSERT_TRANSFER, map(msgspec.structs.astuple, books.new_transfers))
    db.executemany(
        "UPDATE account SET debits_pending = ?5, credits_pending = ?6, debits_posted = ?7, "
        "credits_posted = ?8, late_nano = ?9 WHERE id = ?1",
        [msgspec.structs.astuple(account) for account in books.changed_accounts.values()],
    )
    changed = books.changed_dues.items()
    _insert(db, INSERT_HOLD, [(id, due_at_s) for id, due_at_s in changed if due_at_s is not None])
    ended = [id for id, due_at_s in changed if due_at_s is None]
    if ended:
        db.execute(
            "DELETE FROM hold WHERE pending_id IN (SELECT value FROM json_each(?))",
            (json_list(ended),),
        )
    if receipts:
        try:
            _write_receipts(db, receipts)
        except apsw.ConstraintError:
            _write_receipts(db, _new(db, receipts))


def _write_receipts(db: apsw.Connection, receipts: Sequence[NewReceipt]) -> None:
    _insert(db, INSERT_RECEIPT, map(receipt_row, receipts))
    _insert(
        db,
        INSERT_RECEIPT_LINE,
        [(line.document_id, each.receipt.id) for each in receipts for line in each.receipt.lines],
    )


def _new(db: apsw.Connection, receipts: Sequence[NewReceipt]) -> list[NewReceipt]:
    """Receipts under new ids: the first receipt with an id stays."""
    by_id = {new.receipt.id: new for new in reversed(receipts)}
    known = db.execute(
        "SELECT id FROM receipt WHERE id IN (SELECT value FROM json_each(?))", (json_list(by_id),)
    )
    for (id,) in known:
        del by_id[id]
    return list(reversed(by_id.values()))


def _insert(db: apsw.Connection, statement: tuple[str, str, str], rows: Iterable[Row]) -> None:
    """Insert rows in their order, many a statement.

    Each step of a statement gives the interpreter's lock away, and taking it back from a busy
    thread takes up to 5 ms: one step a row is what a busy engine would slow down most.
    """
    head, row, tail = statement
    left = list(rows)
    for size in ROWS_AT_ONCE:
        while len(left) >= size:
            db.execute(
                head + ", ".join([row] * size) + tail,
                [value for values in left[:size] for value in values],
            )
            del left[:size]


def receipts(
    db: apsw.Connection,
    where: Mapping[str, str],
    limit: int | None = None,
    before: str | None = None,
) -> list[Receipt]:
    """Receipts whose columns have these values, newest first; a document's: of any line."""
    conditions, values = ["TRUE"], list[object]()
    for column, value in where.items():
        some = f"{column} = ?"
        values.append(value)
        if column == "document_id":
            some = f"({some} OR id IN (SELECT receipt_id FROM receipt_line WHERE {some}))"  # noqa: S608  # names are ours
            values.append(value)
        conditions.append(some)
    if before is not None:
        conditions.append("sequence < (SELECT sequence FROM receipt WHERE id = ?)")
        values.append(before)
    rows = db.execute(
        f"SELECT body FROM receipt WHERE {' AND '.join(conditions)} "  # noqa: S608  # names are ours
        "ORDER BY sequence DESC LIMIT ?",
        (*values, -1 if limit is None else limit),
    )
    return [read_receipt(body) for (body,) in rows]


def json_list(ids: Iterable[str]) -> str:
    """Some ids as one value of a statement."""
    return msgspec.json.encode(list(ids)).decode()
