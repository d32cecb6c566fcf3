"""The ledger's tables and functions in PostgreSQL, in the schema `kvmarket`.

The same rules stand in both databases' schemas; see sqlite.py for SQLite's.
"""

from __future__ import annotations

# Two processes that open a new database at once: one of them makes the tables.
VERSION_TABLE = """
CREATE SCHEMA IF NOT EXISTS kvmarket;
CREATE TABLE IF NOT EXISTS kvmarket.schema_version (
    room text PRIMARY KEY,
    version integer NOT NULL
);
"""

TABLES = """
CREATE TABLE kvmarket.account (
    id text COLLATE "C" PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 128),
    kind text NOT NULL CHECK (kind IN ('buyer', 'publisher', 'provider', 'world', 'suspense')),
    may_go_negative boolean NOT NULL,
    currency text NOT NULL CHECK (length(currency) BETWEEN 3 AND 12),
    debits_pending bigint NOT NULL DEFAULT 0 CHECK (debits_pending >= 0),
    credits_pending bigint NOT NULL DEFAULT 0 CHECK (credits_pending >= 0),
    debits_posted bigint NOT NULL DEFAULT 0 CHECK (debits_posted >= 0),
    credits_posted bigint NOT NULL DEFAULT 0 CHECK (credits_posted >= 0),
    late_nano bigint NOT NULL DEFAULT 0 CHECK (late_nano >= 0),
    CHECK (may_go_negative
        OR debits_posted::numeric - late_nano + debits_pending <= credits_posted)
) WITH (fillfactor = 50);
CREATE TABLE kvmarket.transfer (
    sequence bigint PRIMARY KEY,
    id text COLLATE "C" NOT NULL UNIQUE CHECK (length(id) BETWEEN 1 AND 512),
    kind text NOT NULL
        CHECK (kind IN ('plain', 'pending', 'renew', 'post', 'void', 'expire', 'late')),
    debit text COLLATE "C" NOT NULL REFERENCES kvmarket.account (id),
    credit text COLLATE "C" NOT NULL REFERENCES kvmarket.account (id),
    amount_nano bigint NOT NULL CHECK (amount_nano >= 0),
    pending_id text COLLATE "C" REFERENCES kvmarket.transfer (id),
    timeout_s bigint NOT NULL CHECK (timeout_s >= 0),
    code text NOT NULL,
    user_data text NOT NULL,
    receipt_digest text NOT NULL,
    created_at_s double precision NOT NULL,
    CHECK (debit <> credit),
    CHECK ((pending_id IS NULL) = (kind IN ('plain', 'pending'))),
    CHECK ((timeout_s > 0) = (kind IN ('pending', 'renew')))
);
CREATE UNIQUE INDEX transfer_resolution ON kvmarket.transfer (pending_id)
    WHERE kind IN ('post', 'void', 'expire');
CREATE UNIQUE INDEX transfer_late ON kvmarket.transfer (pending_id) WHERE kind = 'late';
CREATE INDEX transfer_debit ON kvmarket.transfer (debit, sequence);
CREATE INDEX transfer_credit ON kvmarket.transfer (credit, sequence);
CREATE TABLE kvmarket.hold (
    pending_id text COLLATE "C" PRIMARY KEY REFERENCES kvmarket.transfer (id),
    due_at_s double precision NOT NULL
);
CREATE INDEX hold_due ON kvmarket.hold (due_at_s);
CREATE TABLE kvmarket.receipt (
    sequence bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text COLLATE "C" NOT NULL UNIQUE,
    request_id text COLLATE "C" NOT NULL,
    account text COLLATE "C" NOT NULL REFERENCES kvmarket.account (id),
    document_id text COLLATE "C" NOT NULL,
    charge_nano bigint NOT NULL CHECK (charge_nano >= 0),
    body text NOT NULL
);
CREATE TABLE kvmarket.receipt_line (
    document_id text COLLATE "C" NOT NULL,
    receipt_id text COLLATE "C" NOT NULL REFERENCES kvmarket.receipt (id),
    PRIMARY KEY (document_id, receipt_id)
);
CREATE TABLE kvmarket.keyed_request (
    account text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    body_digest text NOT NULL,
    purchase_key text NOT NULL,
    first_used_at_s double precision NOT NULL,
    uses integer NOT NULL,
    PRIMARY KEY (account, key)
);
CREATE INDEX keyed_request_age ON kvmarket.keyed_request (first_used_at_s);
CREATE INDEX receipt_account ON kvmarket.receipt (account, sequence);
CREATE INDEX receipt_request ON kvmarket.receipt (request_id);
CREATE INDEX receipt_document ON kvmarket.receipt (document_id, sequence);
-- The writer of a group locks this row: groups are applied one after another, on any machine.
-- at_s is the time of the last group: the ledger's time never goes back.
CREATE TABLE kvmarket.turn (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    transfers bigint NOT NULL,
    at_s double precision NOT NULL
);
INSERT INTO kvmarket.turn (transfers, at_s) VALUES (0, 0);
-- One clock for all machines: the server's.
CREATE FUNCTION kvmarket.now_s() RETURNS double precision LANGUAGE sql AS $$
    SELECT greatest(at_s, extract(epoch FROM clock_timestamp())::double precision)
    FROM kvmarket.turn
$$;
"""

GUARDS = """
CREATE FUNCTION kvmarket.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE integrity_constraint_violation USING MESSAGE = TG_ARGV[0];
END $$;
CREATE TRIGGER transfer_is_final BEFORE UPDATE OR DELETE ON kvmarket.transfer
    FOR EACH ROW EXECUTE FUNCTION kvmarket.refuse('transfers never change');
CREATE TRIGGER transfer_stays BEFORE TRUNCATE ON kvmarket.transfer
    EXECUTE FUNCTION kvmarket.refuse('transfers are never deleted');
CREATE TRIGGER receipt_is_final BEFORE UPDATE OR DELETE ON kvmarket.receipt
    FOR EACH ROW EXECUTE FUNCTION kvmarket.refuse('receipts never change');
CREATE TRIGGER receipt_stays BEFORE TRUNCATE ON kvmarket.receipt
    EXECUTE FUNCTION kvmarket.refuse('receipts are never deleted');
CREATE TRIGGER account_stays BEFORE DELETE ON kvmarket.account
    FOR EACH ROW EXECUTE FUNCTION kvmarket.refuse('accounts are never deleted');
CREATE TRIGGER account_is_itself BEFORE UPDATE ON kvmarket.account FOR EACH ROW
    WHEN ((OLD.id, OLD.kind, OLD.may_go_negative, OLD.currency)
        IS DISTINCT FROM (NEW.id, NEW.kind, NEW.may_go_negative, NEW.currency))
    EXECUTE FUNCTION kvmarket.refuse('accounts keep their id, kind, limit and currency');
-- Once a statement, over all that it added: row by row, this would be half of a group's time.
CREATE FUNCTION kvmarket.check_transfers() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off AS $$
BEGIN
    -- Plans are kept from when the tables were empty, when any index seemed as good as another.
    -- So each row of `added` looks others up by their ids and nothing else: OFFSET 0 keeps it so.
    IF EXISTS (
        SELECT FROM added WHERE pending_id IS NOT NULL AND NOT EXISTS (
            SELECT FROM (
                SELECT * FROM kvmarket.transfer WHERE id = added.pending_id OFFSET 0
            ) AS held
            WHERE held.kind = 'pending'
            AND held.debit = added.debit AND held.credit = added.credit
            AND added.amount_nano
                <= CASE WHEN added.kind IN ('post', 'late') THEN held.amount_nano ELSE 0 END)
    ) THEN
        RAISE integrity_constraint_violation
            USING MESSAGE = 'what names a pending transfer fits it';
    END IF;
    IF EXISTS (
        SELECT FROM added WHERE kind = 'renew' AND EXISTS (
            SELECT FROM kvmarket.transfer AS ended WHERE ended.pending_id = added.pending_id
            AND ended.kind IN ('post', 'void', 'expire') AND ended.sequence < added.sequence
            OFFSET 0)
    ) THEN
        RAISE integrity_constraint_violation USING MESSAGE = 'what is over cannot be renewed';
    END IF;
    IF EXISTS (
        SELECT FROM added WHERE kind = 'late' AND NOT EXISTS (
            SELECT FROM kvmarket.transfer AS ended WHERE ended.pending_id = added.pending_id
            AND ended.kind = 'expire' OFFSET 0)
    ) THEN
        RAISE integrity_constraint_violation USING MESSAGE = 'only an expired hold is paid late';
    END IF;
    IF EXISTS (
        SELECT FROM added
        WHERE (SELECT currency FROM kvmarket.account WHERE id = added.debit)
            <> (SELECT currency FROM kvmarket.account WHERE id = added.credit)
    ) THEN
        RAISE integrity_constraint_violation
            USING MESSAGE = 'both accounts of a transfer have one currency';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER transfers_are_founded AFTER INSERT ON kvmarket.transfer
    REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION kvmarket.check_transfers();
"""

# One call finds all that a group names, and takes the turn; one call writes all that it changed.
FUNCTIONS = """
-- A plan that was made while the tables were small must not read all of them later.
CREATE OR REPLACE FUNCTION kvmarket.find(wanted json) RETURNS json LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off AS $$
DECLARE
    transfer_ids text[] := ARRAY(SELECT json_array_elements_text(wanted->'transfer_ids'));
    pending_ids text[] := ARRAY(SELECT json_array_elements_text(wanted->'pending_ids'));
    account_ids text[] := ARRAY(SELECT json_array_elements_text(wanted->'account_ids'));
BEGIN
    PERFORM FROM kvmarket.turn WHERE only_one FOR UPDATE;
    -- A new statement sees everything that was committed before this turn.
    RETURN (
        WITH named AS (
            SELECT kind, id, debit, credit, amount_nano, coalesce(pending_id, '') AS pending_id,
                timeout_s, code, user_data, receipt_digest, created_at_s
            FROM kvmarket.transfer WHERE id = ANY (transfer_ids)
        ), held AS (
            SELECT * FROM named WHERE kind = 'pending' AND id = ANY (pending_ids)
        )
        SELECT json_build_object(
            'accounts', (SELECT coalesce(json_agg(account), '[]') FROM kvmarket.account
                WHERE id = ANY (account_ids
                    || ARRAY(SELECT debit FROM held UNION SELECT credit FROM held))),
            'transfers', (SELECT coalesce(json_agg(named), '[]') FROM named),
            'dues', (SELECT coalesce(json_object_agg(pending_id, due_at_s), '{}')
                FROM kvmarket.hold WHERE pending_id = ANY (pending_ids)),
            'resolutions', (SELECT coalesce(json_agg(ended), '[]') FROM kvmarket.transfer AS ended
                WHERE pending_id = ANY (pending_ids)
                AND kind IN ('post', 'void', 'expire', 'late')),
            'now_s', kvmarket.now_s()
        )
    );
END $$;
CREATE OR REPLACE FUNCTION kvmarket.keep(changes json) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off AS $$
DECLARE
    before bigint;
    changed record;
BEGIN
    UPDATE kvmarket.turn SET transfers = transfers + json_array_length(changes->'transfers'),
        at_s = (changes->>'now_s')::double precision
        WHERE only_one
        RETURNING transfers - json_array_length(changes->'transfers') INTO before;
    INSERT INTO kvmarket.transfer
        SELECT before + number, id, kind, debit, credit, amount_nano, nullif(pending_id, ''),
            timeout_s, code, user_data, receipt_digest, created_at_s
        FROM ROWS FROM (json_to_recordset(changes->'transfers') AS (
            id text, kind text, debit text, credit text, amount_nano bigint, pending_id text,
            timeout_s bigint, code text, user_data text, receipt_digest text,
            created_at_s double precision
        )) WITH ORDINALITY AS given (id, kind, debit, credit, amount_nano, pending_id, timeout_s,
            code, user_data, receipt_digest, created_at_s, number)
        ORDER BY number;
    -- Balances change by what the new transfers move, and by nothing else. The hold of each is
    -- looked up by its id: a join that is planned while the tables are empty would read them all.
    FOR changed IN
        WITH moved AS (
            SELECT debit, credit,
                CASE WHEN kind = 'pending' THEN amount_nano
                    WHEN kind IN ('post', 'void', 'expire') THEN -(
                        SELECT amount_nano FROM kvmarket.transfer AS held
                        WHERE held.id = added.pending_id)
                    ELSE 0 END AS held,
                CASE WHEN kind IN ('plain', 'post', 'late') THEN amount_nano ELSE 0 END AS posted,
                CASE WHEN kind = 'late' OR (kind = 'plain' AND code = 'owed')
                    THEN amount_nano ELSE 0 END AS late
            FROM kvmarket.transfer AS added WHERE sequence > before
        ), side AS (
            SELECT debit AS id, held AS debits_pending, 0 AS credits_pending,
                posted AS debits_posted, 0 AS credits_posted, late FROM moved
            UNION ALL SELECT credit, 0, held, 0, posted, 0 FROM moved
        )
        SELECT id, sum(debits_pending)::bigint AS debits_pending,
            sum(credits_pending)::bigint AS credits_pending,
            sum(debits_posted)::bigint AS debits_posted,
            sum(credits_posted)::bigint AS credits_posted, sum(late)::bigint AS late
        FROM side GROUP BY id ORDER BY id
    LOOP
        UPDATE kvmarket.account SET debits_pending = debits_pending + changed.debits_pending,
            credits_pending = credits_pending + changed.credits_pending,
            debits_posted = debits_posted + changed.debits_posted,
            credits_posted = credits_posted + changed.credits_posted,
            late_nano = late_nano + CASE WHEN may_go_negative THEN 0 ELSE changed.late END
            WHERE id = changed.id;
    END LOOP;
    INSERT INTO kvmarket.hold
        SELECT key, value::double precision FROM json_each_text(changes->'dues')
        WHERE value IS NOT NULL
        ON CONFLICT (pending_id) DO UPDATE SET due_at_s = excluded.due_at_s;
    DELETE FROM kvmarket.hold WHERE pending_id = ANY (ARRAY(
        SELECT key FROM json_each_text(changes->'dues') WHERE value IS NULL));
    INSERT INTO kvmarket.receipt (id, request_id, account, document_id, charge_nano, body)
        SELECT id, request_id, account, document_id, charge_nano, body
        FROM ROWS FROM (json_to_recordset(changes->'receipts') AS (
            id text, request_id text, account text, document_id text, charge_nano bigint, body text
        )) WITH ORDINALITY AS given (id, request_id, account, document_id, charge_nano, body,
            number)
        ORDER BY number
        ON CONFLICT (id) DO NOTHING;
    INSERT INTO kvmarket.receipt_line (document_id, receipt_id)
        SELECT document_id, receipt_id FROM json_to_recordset(changes->'documents') AS (
            document_id text, receipt_id text)
        ON CONFLICT DO NOTHING;
END $$;
"""

# The SQL that leads from each version to the next.
MIGRATIONS = (TABLES + GUARDS + FUNCTIONS, FUNCTIONS)
