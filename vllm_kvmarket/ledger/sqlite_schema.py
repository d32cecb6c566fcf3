"""The ledger's tables in SQLite. The same rules stand in postgres_schema.py for PostgreSQL."""

from __future__ import annotations

TABLES = """
CREATE TABLE account (
    id TEXT PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 128),
    kind TEXT NOT NULL CHECK (kind IN ('buyer', 'publisher', 'provider', 'world', 'suspense')),
    may_go_negative INTEGER NOT NULL CHECK (may_go_negative IN (0, 1)),
    currency TEXT NOT NULL CHECK (length(currency) BETWEEN 3 AND 12),
    debits_pending INTEGER NOT NULL DEFAULT 0 CHECK (debits_pending >= 0),
    credits_pending INTEGER NOT NULL DEFAULT 0 CHECK (credits_pending >= 0),
    debits_posted INTEGER NOT NULL DEFAULT 0 CHECK (debits_posted >= 0),
    credits_posted INTEGER NOT NULL DEFAULT 0 CHECK (credits_posted >= 0),
    late_nano INTEGER NOT NULL DEFAULT 0 CHECK (late_nano >= 0),
    CHECK (may_go_negative
        OR debits_posted - late_nano + debits_pending <= credits_posted)
) STRICT;
CREATE TABLE transfer (
    sequence INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE CHECK (length(id) BETWEEN 1 AND 512),
    kind TEXT NOT NULL
        CHECK (kind IN ('plain', 'pending', 'renew', 'post', 'void', 'expire', 'late')),
    debit TEXT NOT NULL REFERENCES account (id),
    credit TEXT NOT NULL REFERENCES account (id),
    amount_nano INTEGER NOT NULL CHECK (amount_nano >= 0),
    pending_id TEXT REFERENCES transfer (id),
    timeout_s INTEGER NOT NULL CHECK (timeout_s >= 0),
    code TEXT NOT NULL,
    user_data TEXT NOT NULL,
    receipt_digest TEXT NOT NULL,
    created_at_s REAL NOT NULL,
    CHECK (debit <> credit),
    CHECK ((pending_id IS NULL) = (kind IN ('plain', 'pending'))),
    CHECK ((timeout_s > 0) = (kind IN ('pending', 'renew')))
) STRICT;
CREATE UNIQUE INDEX transfer_resolution ON transfer (pending_id)
    WHERE kind IN ('post', 'void', 'expire');
CREATE UNIQUE INDEX transfer_late ON transfer (pending_id) WHERE kind = 'late';
CREATE INDEX transfer_debit ON transfer (debit);
CREATE INDEX transfer_credit ON transfer (credit);
CREATE TABLE hold (
    pending_id TEXT PRIMARY KEY REFERENCES transfer (id),
    due_at_s REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX hold_due ON hold (due_at_s);
CREATE TABLE receipt (
    sequence INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    request_id TEXT NOT NULL,
    account TEXT NOT NULL REFERENCES account (id),
    document_id TEXT NOT NULL,
    charge_nano INTEGER NOT NULL CHECK (charge_nano >= 0),
    body TEXT NOT NULL
) STRICT;
CREATE TABLE receipt_line (
    document_id TEXT NOT NULL,
    receipt_id TEXT NOT NULL REFERENCES receipt (id),
    PRIMARY KEY (document_id, receipt_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE clock (
    only_one INTEGER PRIMARY KEY CHECK (only_one = 1),
    at_s REAL NOT NULL,
    uptime_s REAL NOT NULL,
    boot_id TEXT NOT NULL
) STRICT;
CREATE TABLE keyed_request (
    account TEXT NOT NULL,
    key TEXT NOT NULL,
    body_digest TEXT NOT NULL,
    purchase_key TEXT NOT NULL,
    first_used_at_s REAL NOT NULL,
    uses INTEGER NOT NULL,
    PRIMARY KEY (account, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX keyed_request_age ON keyed_request (first_used_at_s);
CREATE INDEX receipt_account ON receipt (account);
CREATE INDEX receipt_request ON receipt (request_id);
CREATE INDEX receipt_document ON receipt (document_id);
-- INSERT OR REPLACE deletes without asking the other triggers: those BEFORE INSERT ask first.
CREATE TRIGGER transfer_is_final BEFORE UPDATE ON transfer
    BEGIN SELECT RAISE (ABORT, 'transfers never change'); END;
CREATE TRIGGER transfer_stays BEFORE DELETE ON transfer
    BEGIN SELECT RAISE (ABORT, 'transfers are never deleted'); END;
CREATE TRIGGER receipt_is_new BEFORE INSERT ON receipt
    WHEN EXISTS (SELECT 1 FROM receipt WHERE id = NEW.id OR sequence = NEW.sequence)
    BEGIN SELECT RAISE (ABORT, 'receipts are never replaced'); END;
CREATE TRIGGER receipt_is_final BEFORE UPDATE ON receipt
    BEGIN SELECT RAISE (ABORT, 'receipts never change'); END;
CREATE TRIGGER receipt_stays BEFORE DELETE ON receipt
    BEGIN SELECT RAISE (ABORT, 'receipts are never deleted'); END;
CREATE TRIGGER account_stays BEFORE DELETE ON account
    BEGIN SELECT RAISE (ABORT, 'accounts are never deleted'); END;
CREATE TRIGGER account_is_itself BEFORE UPDATE OF id, kind, may_go_negative, currency ON account
    BEGIN SELECT RAISE (ABORT, 'accounts keep their id, kind, limit and currency'); END;
"""

# A trigger looks up all that a row refers to, so that the writer needs no foreign keys beside it.
# One trigger for all that an insert must fulfil: each is a program to start, a row.
WHOLE_CHECKS = """
DROP TRIGGER IF EXISTS transfer_fits;
CREATE TRIGGER transfer_fits BEFORE INSERT ON transfer BEGIN
    SELECT CASE
        WHEN EXISTS (SELECT 1 FROM transfer WHERE id = NEW.id)
            OR EXISTS (SELECT 1 FROM transfer WHERE sequence = NEW.sequence)
            THEN RAISE (ABORT, 'transfers are never replaced')
        WHEN (SELECT currency FROM account WHERE id = NEW.debit)
            = (SELECT currency FROM account WHERE id = NEW.credit) IS NOT TRUE
            THEN RAISE (ABORT, 'both accounts of a transfer are there, and have one currency')
        WHEN NEW.pending_id IS NOT NULL AND (
            coalesce((SELECT kind FROM transfer WHERE pending_id = NEW.pending_id
                AND kind IN ('post', 'void', 'expire')), 'open')
                <> iif(NEW.kind = 'late', 'expire', 'open')
            OR NOT EXISTS (
                SELECT 1 FROM transfer WHERE id = NEW.pending_id AND kind = 'pending'
                AND debit = NEW.debit AND credit = NEW.credit
                AND NEW.amount_nano <= iif(NEW.kind IN ('post', 'late'), amount_nano, 0)))
            THEN RAISE (ABORT, 'what names a pending transfer fits it, while it is open')
    END;
END;
CREATE TRIGGER hold_fits BEFORE INSERT ON hold
    WHEN NOT EXISTS (SELECT 1 FROM transfer WHERE id = NEW.pending_id AND kind = 'pending')
    BEGIN SELECT RAISE (ABORT, 'a hold is of a pending transfer'); END;
CREATE TRIGGER receipt_fits BEFORE INSERT ON receipt
    WHEN NOT EXISTS (SELECT 1 FROM account WHERE id = NEW.account)
    BEGIN SELECT RAISE (ABORT, 'a receipt is of an account'); END;
"""

# What moved to each account, less what moved from it, in each hour of the transfers up to `done`.
PERIODS = """
CREATE TABLE period_sum (
    account TEXT NOT NULL,
    hour INTEGER NOT NULL,
    moved_nano INTEGER NOT NULL,
    PRIMARY KEY (account, hour)
) STRICT, WITHOUT ROWID;
CREATE TABLE period_done (
    only_one INTEGER PRIMARY KEY CHECK (only_one = 1),
    done INTEGER NOT NULL
) STRICT;
INSERT INTO period_done VALUES (1, 0);
"""

# The SQL that leads from each version to the next.
MIGRATIONS = (TABLES, WHOLE_CHECKS, PERIODS)
