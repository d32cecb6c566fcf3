"""The ledger's tables in SQLite, and what is read from and written to them.

Transactions belong to the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import apsw
import msgspec

from vllm_kvmarket.ledger.model import Account, Transfer
from vllm_kvmarket.ledger.receipts import Receipt
from vllm_kvmarket.ledger.working_set import Found, GroupBooks, Wanted

ROOM = "ledger"

MIGRATIONS = (
    """
    CREATE TABLE account (
        id TEXT PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 128),
        kind TEXT NOT NULL CHECK (kind IN ('buyer', 'publisher', 'provider', 'world')),
        may_go_negative INTEGER NOT NULL CHECK (may_go_negative IN (0, 1)),
        debits_pending INTEGER NOT NULL DEFAULT 0 CHECK (debits_pending >= 0),
        credits_pending INTEGER NOT NULL DEFAULT 0 CHECK (credits_pending >= 0),
        debits_posted INTEGER NOT NULL DEFAULT 0 CHECK (debits_posted >= 0),
        credits_posted INTEGER NOT NULL DEFAULT 0 CHECK (credits_posted >= 0),
        CHECK (may_go_negative OR debits_posted + debits_pending <= credits_posted)
    ) STRICT;
    CREATE TABLE transfer (
        sequence INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL CHECK (kind IN ('plain', 'pending', 'post', 'void', 'expire')),
        debit TEXT NOT NULL REFERENCES account (id),
        credit TEXT NOT NULL REFERENCES account (id),
        amount_nano INTEGER NOT NULL CHECK (amount_nano >= 0),
        pending_id TEXT REFERENCES transfer (id),
        timeout_s INTEGER NOT NULL CHECK (timeout_s >= 0),
        code TEXT NOT NULL,
        user_data TEXT NOT NULL,
        created_at_s REAL NOT NULL,
        CHECK (debit <> credit),
        CHECK ((pending_id IS NULL) = (kind IN ('plain', 'pending')))
    ) STRICT;
    CREATE UNIQUE INDEX transfer_resolution ON transfer (pending_id) WHERE pending_id IS NOT NULL;
    CREATE INDEX transfer_debit ON transfer (debit);
    CREATE INDEX transfer_credit ON transfer (credit);
    CREATE TABLE receipt (
        sequence INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL,
        account TEXT NOT NULL REFERENCES account (id),
        document_id TEXT NOT NULL,
        charge_nano INTEGER NOT NULL CHECK (charge_nano >= 0),
        body TEXT NOT NULL
    ) STRICT;
    CREATE INDEX receipt_account ON receipt (account);
    CREATE INDEX receipt_request ON receipt (request_id);
    CREATE INDEX receipt_document ON receipt (document_id);
    CREATE TRIGGER transfer_is_final BEFORE UPDATE ON transfer
        BEGIN SELECT RAISE (ABORT, 'transfers never change'); END;
    CREATE TRIGGER transfer_stays BEFORE DELETE ON transfer
        BEGIN SELECT RAISE (ABORT, 'transfers are never deleted'); END;
    CREATE TRIGGER receipt_is_final BEFORE UPDATE ON receipt
        BEGIN SELECT RAISE (ABORT, 'receipts never change'); END;
    CREATE TRIGGER receipt_stays BEFORE DELETE ON receipt
        BEGIN SELECT RAISE (ABORT, 'receipts are never deleted'); END;
    """,
    # INSERT OR REPLACE deletes without asking the triggers above, so that these ask first.
    """
    CREATE TRIGGER transfer_is_new BEFORE INSERT ON transfer
        WHEN EXISTS (SELECT 1 FROM transfer WHERE id = NEW.id OR sequence = NEW.sequence
            OR pending_id = NEW.pending_id)
        BEGIN SELECT RAISE (ABORT, 'transfers are never replaced'); END;
    CREATE TRIGGER receipt_is_new BEFORE INSERT ON receipt
        WHEN EXISTS (SELECT 1 FROM receipt WHERE id = NEW.id OR sequence = NEW.sequence)
        BEGIN SELECT RAISE (ABORT, 'receipts are never replaced'); END;
    CREATE TRIGGER account_stays BEFORE DELETE ON account
        BEGIN SELECT RAISE (ABORT, 'accounts are never deleted'); END;
    CREATE TRIGGER account_is_itself BEFORE UPDATE OF id, kind, may_go_negative ON account
        BEGIN SELECT RAISE (ABORT, 'accounts keep their id, kind and limit'); END;
    CREATE TRIGGER transfer_resolves_a_hold BEFORE INSERT ON transfer
        WHEN NEW.pending_id IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM transfer WHERE id = NEW.pending_id AND kind = 'pending'
            AND debit = NEW.debit AND credit = NEW.credit
            AND NEW.amount_nano <= iif(NEW.kind = 'post', amount_nano, 0))
        BEGIN SELECT RAISE (ABORT, 'a post, void or expire resolves a pending transfer'); END;
    """,
    # Accounts have a currency; holds are renewed; open holds are found by the time they are due.
    """
    ALTER TABLE account ADD COLUMN currency TEXT NOT NULL DEFAULT 'USD'
        CHECK (length(currency) BETWEEN 3 AND 12);
    DROP TRIGGER account_is_itself;
    CREATE TRIGGER account_is_itself BEFORE UPDATE OF id, kind, may_go_negative, currency ON account
        BEGIN SELECT RAISE (ABORT, 'accounts keep their id, kind, limit and currency'); END;
    PRAGMA defer_foreign_keys = ON;
    CREATE TABLE transfer_3 (
        sequence INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE CHECK (length(id) BETWEEN 1 AND 512),
        kind TEXT NOT NULL CHECK (kind IN ('plain', 'pending', 'renew', 'post', 'void', 'expire')),
        debit TEXT NOT NULL REFERENCES account (id),
        credit TEXT NOT NULL REFERENCES account (id),
        amount_nano INTEGER NOT NULL CHECK (amount_nano >= 0),
        pending_id TEXT REFERENCES transfer_3 (id),
        timeout_s INTEGER NOT NULL CHECK (timeout_s >= 0),
        code TEXT NOT NULL,
        user_data TEXT NOT NULL,
        created_at_s REAL NOT NULL,
        CHECK (debit <> credit),
        CHECK ((pending_id IS NULL) = (kind IN ('plain', 'pending'))),
        CHECK ((timeout_s > 0) = (kind IN ('pending', 'renew')))
    ) STRICT;
    INSERT INTO transfer_3 SELECT sequence, id, kind, debit, credit, amount_nano, pending_id,
        timeout_s, code, user_data, created_at_s FROM transfer ORDER BY sequence;
    DROP TABLE transfer;
    ALTER TABLE transfer_3 RENAME TO transfer;
    CREATE UNIQUE INDEX transfer_resolution ON transfer (pending_id)
        WHERE kind IN ('post', 'void', 'expire');
    CREATE INDEX transfer_debit ON transfer (debit);
    CREATE INDEX transfer_credit ON transfer (credit);
    CREATE TRIGGER transfer_is_final BEFORE UPDATE ON transfer
        BEGIN SELECT RAISE (ABORT, 'transfers never change'); END;
    CREATE TRIGGER transfer_stays BEFORE DELETE ON transfer
        BEGIN SELECT RAISE (ABORT, 'transfers are never deleted'); END;
    CREATE TRIGGER transfer_is_new BEFORE INSERT ON transfer
        WHEN EXISTS (SELECT 1 FROM transfer WHERE id = NEW.id)
            OR EXISTS (SELECT 1 FROM transfer WHERE sequence = NEW.sequence)
        BEGIN SELECT RAISE (ABORT, 'transfers are never replaced'); END;
    CREATE TRIGGER transfer_names_an_open_hold BEFORE INSERT ON transfer
        WHEN NEW.pending_id IS NOT NULL AND (
            EXISTS (SELECT 1 FROM transfer WHERE pending_id = NEW.pending_id
                AND kind IN ('post', 'void', 'expire'))
            OR NOT EXISTS (
                SELECT 1 FROM transfer WHERE id = NEW.pending_id AND kind = 'pending'
                AND debit = NEW.debit AND credit = NEW.credit
                AND NEW.amount_nano <= iif(NEW.kind = 'post', amount_nano, 0)))
        BEGIN SELECT RAISE (ABORT, 'what names a pending transfer fits it, while it is open'); END;
    CREATE TRIGGER transfer_has_one_currency BEFORE INSERT ON transfer
        WHEN (SELECT currency FROM account WHERE id = NEW.debit)
            <> (SELECT currency FROM account WHERE id = NEW.credit)
        BEGIN SELECT RAISE (ABORT, 'both accounts of a transfer have one currency'); END;
    CREATE TABLE hold (
        pending_id TEXT PRIMARY KEY REFERENCES transfer (id),
        due_at_s REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX hold_due ON hold (due_at_s);
    INSERT INTO hold SELECT id, created_at_s + timeout_s FROM transfer AS held
        WHERE kind = 'pending'
        AND NOT EXISTS (SELECT 1 FROM transfer WHERE pending_id = held.id);
    """,
)

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
INSERT_RECEIPT = (
    "INSERT INTO receipt (id, request_id, account, document_id, charge_nano, body) VALUES ",
    "(?, ?, ?, ?, ?, ?)",
    "",
)
# Few sizes, so that the connection's cache of statements holds them all.
ROWS_AT_ONCE = (128, 16, 4, 1)
Row = tuple[Any, ...]


def account_from(row: Row) -> Account:
    """An account from ACCOUNT_COLUMNS."""
    id, kind, may_go_negative, *rest = row
    return Account(id, kind, bool(may_go_negative), *rest)


def read_accounts(db: apsw.Connection, ids: Iterable[str] | None = None) -> list[Account]:
    """Every account, or those with these ids; by id."""
    some = "" if ids is None else "WHERE id IN (SELECT value FROM json_each(?)) "
    rows = db.execute(
        f"SELECT {ACCOUNT_COLUMNS} FROM account {some}ORDER BY id",  # noqa: S608  # names are ours
        () if ids is None else (_json(ids),),
    )
    return [account_from(row) for row in rows]


def read_transfers(
    db: apsw.Connection, account: str | None = None, limit: int | None = None
) -> list[Transfer]:
    """Transfers of one account or of all, newest first."""
    # OR over the two indexes; a condition that also fits "all" would read the whole table.
    where = "" if account is None else "WHERE debit = ?1 OR credit = ?1 "
    rows = db.execute(
        f"SELECT {READ_TRANSFER} FROM transfer {where}ORDER BY sequence DESC LIMIT ?2",  # noqa: S608  # names are ours
        (account, -1 if limit is None else limit),
    )
    return [Transfer(*row) for row in rows]


def read_after(db: apsw.Connection, sequence: int, limit: int) -> list[Transfer]:
    """Transfers behind the first `sequence`, oldest first."""
    rows = db.execute(
        f"SELECT {READ_TRANSFER} FROM transfer WHERE sequence > ? ORDER BY sequence LIMIT ?",  # noqa: S608  # names are ours
        (sequence, limit),
    )
    return [Transfer(*row) for row in rows]


def read_some(
    db: apsw.Connection, ids: Iterable[str], column: str = "id", condition: str = "TRUE"
) -> list[Transfer]:
    """Transfers whose id or pending_id is among some."""
    rows = db.execute(
        f"SELECT {READ_TRANSFER} FROM transfer "  # noqa: S608  # names are ours
        f"WHERE {column} IN (SELECT value FROM json_each(?)) AND {condition}",
        (_json(ids),),
    )
    return [Transfer(*row) for row in rows]


def find(db: apsw.Connection, wanted: Wanted) -> Found:
    """What the rules need to know for a group."""
    transfers = read_some(db, wanted.transfer_ids)
    dues: dict[str, float] = {}
    resolutions: list[Transfer] = []
    accounts = set(wanted.account_ids)
    if wanted.pending_ids:
        dues = read_dues(db, wanted.pending_ids)
        held = [each for each in transfers if each.kind == "pending"]
        accounts.update(each.debit for each in held)
        accounts.update(each.credit for each in held)
        closed = [each.id for each in held if each.id not in dues]
        if closed:
            resolutions = read_some(db, closed, "pending_id", "kind IN ('post', 'void', 'expire')")
    return Found(read_accounts(db, accounts), transfers, dues, resolutions)


def read_dues(db: apsw.Connection, pending_ids: Iterable[str] | None = None) -> dict[str, float]:
    """Until when open holds stand: of all, or of some."""
    some = "" if pending_ids is None else "WHERE pending_id IN (SELECT value FROM json_each(?))"
    rows = db.execute(
        f"SELECT pending_id, due_at_s FROM hold {some}",  # noqa: S608  # names are ours
        () if pending_ids is None else (_json(pending_ids),),
    )
    return dict(list(rows))


def keep(db: apsw.Connection, books: GroupBooks, receipts: Sequence[Receipt]) -> None:
    """Write what a group changed."""
    _insert(db, INSERT_TRANSFER, map(msgspec.structs.astuple, books.new_transfers))
    db.executemany(
        "UPDATE account SET debits_pending = ?5, credits_pending = ?6, debits_posted = ?7, "
        "credits_posted = ?8 WHERE id = ?1",
        [msgspec.structs.astuple(account) for account in books.changed_accounts.values()],
    )
    changed = books.changed_dues.items()
    _insert(db, INSERT_HOLD, [(id, due_at_s) for id, due_at_s in changed if due_at_s is not None])
    db.execute(
        "DELETE FROM hold WHERE pending_id IN (SELECT value FROM json_each(?))",
        (_json(id for id, due_at_s in changed if due_at_s is None),),
    )
    _insert(db, INSERT_RECEIPT, map(_receipt_row, _new(db, receipts)))


def _new(db: apsw.Connection, receipts: Sequence[Receipt]) -> Iterable[Receipt]:
    """Receipts under new ids; one with the id of another stays away, so that the first stands."""
    by_id = {receipt.id: receipt for receipt in reversed(receipts)}
    kept = db.execute(
        "SELECT id FROM receipt WHERE id IN (SELECT value FROM json_each(?))", (_json(by_id),)
    )
    for (id,) in kept:
        del by_id[id]
    return reversed(by_id.values())


def _receipt_row(receipt: Receipt) -> Row:
    body = msgspec.json.encode(receipt).decode()
    return (
        receipt.id,
        receipt.request_id,
        receipt.account,
        receipt.document_id,
        receipt.charge_nano,
        body,
    )


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


def overdue_holds(db: apsw.Connection, now_s: float, limit: int) -> list[str]:
    """Ids of the open holds whose time is over, longest overdue first."""
    rows = db.execute(
        "SELECT pending_id FROM hold WHERE due_at_s <= ? ORDER BY due_at_s LIMIT ?", (now_s, limit)
    )
    return [held for (held,) in rows]


def read_receipts(
    db: apsw.Connection, where: Mapping[str, str], limit: int | None = None
) -> list[Receipt]:
    """Receipts whose columns have these values, newest first."""
    condition = " AND ".join(f"{column} = ?" for column in where) or "TRUE"
    rows = db.execute(
        f"SELECT body FROM receipt WHERE {condition} ORDER BY sequence DESC LIMIT ?",  # noqa: S608  # names are ours
        (*where.values(), -1 if limit is None else limit),
    )
    return [msgspec.json.decode(body, type=Receipt) for (body,) in rows]


def _json(ids: Iterable[str]) -> str:
    return msgspec.json.encode(list(ids)).decode()
