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
)

ACCOUNT_COLUMNS = ", ".join(Account.__struct_fields__)
TRANSFER_COLUMNS = ", ".join(Transfer.__struct_fields__)
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
    """Books on the database, read inside the caller's transaction and remembered until its end."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self._accounts: dict[str, Account | None] = {}

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
        self._accounts[account.id] = account
        self._db.execute(
            "UPDATE account SET debits_pending = ?, credits_pending = ?, debits_posted = ?, "
            "credits_posted = ? WHERE id = ?",
            (
                account.debits_pending,
                account.credits_pending,
                account.debits_posted,
                account.credits_posted,
                account.id,
            ),
        )

    def put_transfer(self, transfer: Transfer) -> None:
        """See Books."""
        values: list[Any] = [getattr(transfer, field) for field in Transfer.__struct_fields__]
        values[Transfer.__struct_fields__.index("pending_id")] = transfer.pending_id or None
        marks = ", ".join("?" * len(values))
        self._db.execute(
            f"INSERT INTO transfer ({TRANSFER_COLUMNS}) VALUES ({marks})",  # noqa: S608  # names are ours
            values,
        )


def put_receipt(db: apsw.Connection, receipt: Receipt) -> None:
    """Keep a receipt; one with the same id stays as it is."""
    db.execute(
        "INSERT INTO receipt (id, request_id, account, document_id, charge_nano, body) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        (
            receipt.id,
            receipt.request_id,
            receipt.account,
            receipt.document_id,
            receipt.charge_nano,
            msgspec.json.encode(receipt).decode(),
        ),
    )


def read_receipts(
    db: apsw.Connection, where: str, bindings: Sequence[apsw.SQLiteValue], limit: int | None
) -> list[Receipt]:
    """Receipts that satisfy a condition, newest first."""
    rows = db.execute(
        f"SELECT body FROM receipt WHERE {where} ORDER BY sequence DESC LIMIT ?",  # noqa: S608  # conditions are ours
        (*bindings, -1 if limit is None else limit),
    )
    return [msgspec.json.decode(body, type=Receipt) for (body,) in rows]
