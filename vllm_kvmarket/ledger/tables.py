"""The ledger's tables, and books that read and write them. Transactions belong to the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from vllm_kvmarket.ledger.receipts import Receipt
from vllm_kvmarket.ledger.rules import Account, Transfer

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
)

ACCOUNT_COLUMNS = ", ".join(Account.__struct_fields__)
TRANSFER_COLUMNS = ", ".join(Transfer.__struct_fields__)
# Most transfers resolve nothing: "" in a Transfer, NULL in the table.
INSERT_TRANSFER = (
    f"INSERT INTO transfer ({TRANSFER_COLUMNS}) VALUES ("  # noqa: S608  # names are ours
    + ", ".join("nullif(?, '')" if f == "pending_id" else "?" for f in Transfer.__struct_fields__)
    + ")"
)
Row = tuple[Any, ...]


def account_from(row: Row) -> Account:
    """An account from ACCOUNT_COLUMNS."""
    return msgspec.convert(
        dict(zip(Account.__struct_fields__, row, strict=True)), Account, strict=False
    )


def transfer_from(row: Row) -> Transfer:
    """A transfer from TRANSFER_COLUMNS."""
    fields = dict(zip(Transfer.__struct_fields__, row, strict=True))
    fields["pending_id"] = fields["pending_id"] or ""
    return msgspec.convert(fields, Transfer)


class StoredBooks:
    """Books on the database, for one transaction of the caller's.

    Balances are remembered, and written by `flush`: a group of batches changes few accounts often.
    """

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self._accounts: dict[str, Account | None] = {}
        self._changed: dict[str, Account] = {}

    def account(self, account_id: str) -> Account | None:
        """See Books."""
        if account_id not in self._accounts:
            row = self._db.execute(
                f"SELECT {ACCOUNT_COLUMNS} FROM account WHERE id = ?",  # noqa: S608  # names are ours
                (account_id,),
            ).fetchone()
            self._accounts[account_id] = account_from(row) if row else None
        return self._accounts[account_id]

    def transfer(self, transfer_id: str) -> Transfer | None:
        """See Books."""
        return self._transfer("id = ?", transfer_id)

    def resolution(self, pending_id: str) -> Transfer | None:
        """See Books."""
        return self._transfer("pending_id = ?", pending_id)

    def _transfer(self, where: str, value: str) -> Transfer | None:
        row = self._db.execute(
            f"SELECT {TRANSFER_COLUMNS} FROM transfer WHERE {where}",  # noqa: S608  # names are ours
            (value,),
        ).fetchone()
        return transfer_from(row) if row else None

    def put_account(self, account: Account) -> None:
        """See Books."""
        self._accounts[account.id] = self._changed[account.id] = account

    def flush(self) -> None:
        """Write the balances that changed; the last thing in a transaction."""
        self._db.executemany(
            "UPDATE account SET debits_pending = ?, credits_pending = ?, debits_posted = ?, "
            "credits_posted = ? WHERE id = ?",
            [
                (
                    account.debits_pending,
                    account.credits_pending,
                    account.debits_posted,
                    account.credits_posted,
                    account.id,
                )
                for account in self._changed.values()
            ],
        )
        self._changed.clear()

    def put_transfer(self, transfer: Transfer) -> None:
        """See Books."""
        self._db.execute(INSERT_TRANSFER, msgspec.structs.astuple(transfer))


def put_receipt(db: apsw.Connection, receipt: Receipt) -> None:
    """Keep a receipt; one with the same id stays as it is."""
    db.execute(
        "INSERT INTO receipt (id, request_id, account, document_id, charge_nano, body) "
        "SELECT ?1, ?2, ?3, ?4, ?5, ?6 WHERE NOT EXISTS (SELECT 1 FROM receipt WHERE id = ?1)",
        (
            receipt.id,
            receipt.request_id,
            receipt.account,
            receipt.document_id,
            receipt.charge_nano,
            msgspec.json.encode(receipt).decode(),
        ),
    )


def read_accounts(db: apsw.Connection) -> list[Account]:
    """Every account, by id."""
    rows = db.execute(f"SELECT {ACCOUNT_COLUMNS} FROM account ORDER BY id")  # noqa: S608  # names are ours
    return [account_from(row) for row in rows]


def read_transfers(
    db: apsw.Connection, account: str | None = None, limit: int | None = None
) -> list[Transfer]:
    """Transfers of one account or of all, newest first."""
    # OR over the two indexes; a condition that also fits "all" would read the whole table.
    where = "" if account is None else "WHERE debit = ?1 OR credit = ?1 "
    rows = db.execute(
        f"SELECT {TRANSFER_COLUMNS} FROM transfer {where}ORDER BY sequence DESC LIMIT ?2",  # noqa: S608  # names are ours
        (account, -1 if limit is None else limit),
    )
    return [transfer_from(row) for row in rows]


def overdue_holds(db: apsw.Connection, now_s: float) -> list[str]:
    """Ids of the pending transfers that nothing has resolved within their time, oldest first."""
    rows = db.execute(
        "SELECT id FROM transfer AS held WHERE kind = 'pending' AND created_at_s + timeout_s <= ? "
        "AND NOT EXISTS (SELECT 1 FROM transfer WHERE pending_id = held.id) ORDER BY sequence",
        (now_s,),
    )
    return [held for (held,) in rows]


def read_receipts(
    db: apsw.Connection, where: str, bindings: Sequence[apsw.SQLiteValue], limit: int | None
) -> list[Receipt]:
    """Receipts that satisfy a condition, newest first."""
    rows = db.execute(
        f"SELECT body FROM receipt WHERE {where} ORDER BY sequence DESC LIMIT ?",  # noqa: S608  # conditions are ours
        (*bindings, -1 if limit is None else limit),
    )
    return [msgspec.json.decode(body, type=Receipt) for (body,) in rows]
