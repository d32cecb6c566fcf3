"""The ledger's tables and functions in PostgreSQL, in the schema `kvmarket`.

The same rules stand in both databases' schemas; see sqlite.py for SQLite's.
"""

from __future__ import annotations

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
"""

# Since version 3 writers do not take turns. Each holds the accounts that it spends from, and adds
# to balances in rows of its own.
PARTS = """
DROP TRIGGER IF EXISTS transfers_are_founded ON kvmarket.transfer;
DROP FUNCTION IF EXISTS kvmarket.find(json), kvmarket.keep(json), kvmarket.check_transfers();
-- What check_transfers, check_holds and check_receipts look up for all rows at once. Nothing that
-- they refer to is ever deleted.
ALTER TABLE kvmarket.transfer DROP CONSTRAINT transfer_debit_fkey,
    DROP CONSTRAINT transfer_credit_fkey, DROP CONSTRAINT transfer_pending_id_fkey;
ALTER TABLE kvmarket.hold DROP CONSTRAINT hold_pending_id_fkey;
ALTER TABLE kvmarket.receipt DROP CONSTRAINT receipt_account_fkey;
-- The order of arrival, with gaps: what depends on another transfer came after it.
ALTER TABLE kvmarket.transfer ALTER COLUMN sequence ADD GENERATED BY DEFAULT AS IDENTITY;
SELECT setval(pg_get_serial_sequence('kvmarket.transfer', 'sequence'),
    (SELECT coalesce(max(sequence), 0) + 1 FROM kvmarket.transfer), false);
-- An account's balance is its row, as it was at version 3, and what each writer changed since.
CREATE TABLE kvmarket.balance_part (
    account text COLLATE "C" NOT NULL REFERENCES kvmarket.account (id),
    writer integer NOT NULL,
    debits_pending numeric NOT NULL,
    credits_pending numeric NOT NULL,
    debits_posted numeric NOT NULL,
    credits_posted numeric NOT NULL,
    late_nano numeric NOT NULL,
    PRIMARY KEY (account, writer)
) WITH (fillfactor = 50);
-- The log's leaves are numbered behind the writers, without gaps; see number_leaves.
CREATE TABLE kvmarket.log_leaf (
    number bigint PRIMARY KEY,
    sequence bigint NOT NULL UNIQUE
);
INSERT INTO kvmarket.log_leaf SELECT sequence, sequence FROM kvmarket.transfer ORDER BY sequence;
-- Every transfer up to `complete` has its number. So has every one up to `seen`, once all
-- transactions before `seen_xid` have ended.
CREATE TABLE kvmarket.numbering (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    leaves bigint NOT NULL,
    complete bigint NOT NULL,
    seen bigint NOT NULL,
    seen_xid xid8 NOT NULL
);
INSERT INTO kvmarket.numbering (leaves, complete, seen, seen_xid)
    SELECT transfers, transfers, transfers, '0' FROM kvmarket.turn;
-- One clock for all machines: the server's, which never goes back behind this row.
CREATE TABLE kvmarket.clock (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    at_s double precision NOT NULL
);
INSERT INTO kvmarket.clock (at_s) SELECT at_s FROM kvmarket.turn;
CREATE OR REPLACE FUNCTION kvmarket.now_s() RETURNS double precision LANGUAGE sql AS $$
    SELECT greatest(at_s, extract(epoch FROM clock_timestamp())::double precision)
    FROM kvmarket.clock
$$;
DROP TABLE kvmarket.turn;
CREATE TRIGGER leaf_is_final BEFORE UPDATE OR DELETE ON kvmarket.log_leaf
    FOR EACH ROW EXECUTE FUNCTION kvmarket.refuse('leaves never change');
CREATE TRIGGER leaf_stays BEFORE TRUNCATE ON kvmarket.log_leaf
    EXECUTE FUNCTION kvmarket.refuse('leaves are never deleted');
CREATE FUNCTION kvmarket.check_transfers() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN END $$;
CREATE FUNCTION kvmarket.check_holds() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN END $$;
CREATE FUNCTION kvmarket.check_receipts() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN END $$;
-- Once a statement, over all that it added: row by row, this would be half of a group's time.
CREATE TRIGGER transfers_are_founded AFTER INSERT ON kvmarket.transfer
    REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION kvmarket.check_transfers();
CREATE TRIGGER holds_are_founded AFTER INSERT ON kvmarket.hold
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION kvmarket.check_holds();
CREATE TRIGGER receipts_are_founded AFTER INSERT ON kvmarket.receipt
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION kvmarket.check_receipts();
"""

# What runs with the owner's rights can be called by anyone, and trusts no names of the caller's.
CHECKS = """
-- Plans are kept from when the tables were empty, when any index seemed as good as another. So each
-- row of `added` looks others up by their ids and nothing else: OFFSET 0 keeps it so.
CREATE OR REPLACE FUNCTION kvmarket.check_transfers() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
BEGIN
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT debit, credit FROM added) AS pair
        WHERE (SELECT currency FROM kvmarket.account WHERE id = pair.debit)
            = (SELECT currency FROM kvmarket.account WHERE id = pair.credit) IS NOT TRUE
    ) THEN
        RAISE integrity_constraint_violation
            USING MESSAGE = 'both accounts of a transfer are there, and have one currency';
    END IF;
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
    -- Balances change by what transfers move, and by nothing else.
    INSERT INTO kvmarket.balance_part AS part
        WITH moved AS (
            SELECT debit, credit,
                CASE WHEN kind = 'pending' THEN amount_nano
                    WHEN kind IN ('post', 'void', 'expire') THEN -(
                        SELECT amount_nano FROM kvmarket.transfer AS held
                        WHERE held.id = added.pending_id)
                    ELSE 0 END AS held,
                CASE WHEN kind IN ('plain', 'post', 'late') THEN amount_nano ELSE 0 END AS posted,
                CASE WHEN (kind = 'late' OR (kind = 'plain' AND code = 'owed')) AND NOT (
                        SELECT may_go_negative FROM kvmarket.account WHERE id = added.debit)
                    THEN amount_nano ELSE 0 END AS late
            FROM added WHERE kind <> 'renew'
        ), side AS (
            SELECT debit AS id, held AS debits_pending, 0 AS credits_pending,
                posted AS debits_posted, 0 AS credits_posted, late FROM moved
            UNION ALL SELECT credit, 0, held, 0, posted, 0 FROM moved
        )
        SELECT id, coalesce(nullif(current_setting('kvmarket.writer', true), ''), '0')::integer,
            sum(debits_pending), sum(credits_pending), sum(debits_posted), sum(credits_posted),
            sum(late)
        FROM side GROUP BY id ORDER BY id
        ON CONFLICT (account, writer) DO UPDATE SET
            debits_pending = part.debits_pending + excluded.debits_pending,
            credits_pending = part.credits_pending + excluded.credits_pending,
            debits_posted = part.debits_posted + excluded.debits_posted,
            credits_posted = part.credits_posted + excluded.credits_posted,
            late_nano = part.late_nano + excluded.late_nano;
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT debit AS account FROM added) AS changed
        CROSS JOIN LATERAL (
            SELECT * FROM kvmarket.balance WHERE id = changed.account OFFSET 0) AS now
        WHERE debits_pending < 0
        OR (NOT may_go_negative AND debits_posted - late_nano + debits_pending > credits_posted)
    ) THEN
        RAISE integrity_constraint_violation USING MESSAGE = 'no account spends more than it has';
    END IF;
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION kvmarket.check_holds() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off AS $$
BEGIN
    IF EXISTS (
        SELECT FROM added WHERE NOT EXISTS (
            SELECT FROM kvmarket.transfer AS held WHERE held.id = added.pending_id
            AND held.kind = 'pending' OFFSET 0)
    ) THEN
        RAISE integrity_constraint_violation USING MESSAGE = 'a hold is of a pending transfer';
    END IF;
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION kvmarket.check_receipts() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off AS $$
BEGIN
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT account FROM added) AS buyer WHERE NOT EXISTS (
            SELECT FROM kvmarket.account WHERE id = buyer.account)
    ) THEN
        RAISE integrity_constraint_violation USING MESSAGE = 'a receipt is of an account';
    END IF;
    RETURN NULL;
END $$;
"""

# One call holds what a group spends from and ends, and finds all that it names; one call books what
# it changed.
FUNCTIONS = """
-- A plan that was made while the tables were small must not read all of them later.
CREATE OR REPLACE FUNCTION kvmarket.look_up(wanted json) RETURNS json LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off AS $$
DECLARE
    transfer_ids text[] := ARRAY(SELECT json_array_elements_text(wanted->'transfer_ids'));
    pending_ids text[] := ARRAY(SELECT json_array_elements_text(wanted->'pending_ids'));
    account_ids text[] := ARRAY(SELECT json_array_elements_text(wanted->'account_ids'));
    spender_ids text[] := ARRAY(SELECT json_array_elements_text(wanted->'spender_ids'));
    locked_ids text[];
    held_accounts text[] := '{}';
    held_holds text[] := '{}';
BEGIN
    -- In a fixed order, first accounts, then holds: so writers never wait for each other in a ring.
    IF (wanted->>'skip_held')::boolean THEN
        locked_ids := ARRAY(SELECT id FROM kvmarket.account
            WHERE id = ANY (spender_ids) AND NOT may_go_negative
            ORDER BY id FOR NO KEY UPDATE SKIP LOCKED);
        held_accounts := ARRAY(SELECT id FROM kvmarket.account
            WHERE id = ANY (spender_ids) AND NOT may_go_negative AND NOT id = ANY (locked_ids));
        locked_ids := ARRAY(SELECT pending_id FROM kvmarket.hold
            WHERE pending_id = ANY (pending_ids) ORDER BY pending_id FOR UPDATE SKIP LOCKED);
        held_holds := ARRAY(SELECT pending_id FROM kvmarket.hold
            WHERE pending_id = ANY (pending_ids) AND NOT pending_id = ANY (locked_ids));
    ELSE
        PERFORM FROM kvmarket.account WHERE id = ANY (spender_ids) AND NOT may_go_negative
            ORDER BY id FOR NO KEY UPDATE;
        PERFORM FROM kvmarket.hold WHERE pending_id = ANY (pending_ids)
            ORDER BY pending_id FOR UPDATE;
    END IF;
    -- A new statement sees everything that was committed before these were ours.
    RETURN (
        WITH named AS (
            SELECT kind, id, debit, credit, amount_nano, coalesce(pending_id, '') AS pending_id,
                timeout_s, code, user_data, receipt_digest, created_at_s
            FROM kvmarket.transfer WHERE id = ANY (transfer_ids)
        ), held AS (
            SELECT * FROM named WHERE kind = 'pending' AND id = ANY (pending_ids)
        )
        SELECT json_build_object(
            'accounts', (SELECT coalesce(json_agg(balance), '[]') FROM kvmarket.balance
                WHERE id = ANY (account_ids
                    || ARRAY(SELECT debit FROM held UNION SELECT credit FROM held))),
            'transfers', (SELECT coalesce(json_agg(named), '[]') FROM named),
            'dues', (SELECT coalesce(json_object_agg(pending_id, due_at_s), '{}')
                FROM kvmarket.hold WHERE pending_id = ANY (pending_ids)),
            'resolutions', (SELECT coalesce(json_agg(ended), '[]') FROM kvmarket.transfer AS ended
                WHERE pending_id = ANY (pending_ids)
                AND kind IN ('post', 'void', 'expire', 'late')),
            'now_s', kvmarket.now_s(),
            'held_accounts', held_accounts,
            'held_holds', held_holds
        )
    );
END $$;
CREATE OR REPLACE FUNCTION kvmarket.book(changes json) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off SET lock_timeout = '10s' AS $$
DECLARE
    booked_at_s double precision := (changes->>'now_s')::double precision;
BEGIN
    PERFORM pg_current_xact_id();  -- before the first sequence number: number_leaves relies on it
    -- A period is closed a minute after its end: nothing comes into it later.
    IF kvmarket.now_s() > booked_at_s + 30 THEN
        RAISE serialization_failure USING MESSAGE = 'this group was looked up too long ago';
    END IF;
    INSERT INTO kvmarket.transfer (id, kind, debit, credit, amount_nano, pending_id, timeout_s,
            code, user_data, receipt_digest, created_at_s)
        SELECT id, kind, debit, credit, amount_nano, nullif(pending_id, ''),
            timeout_s, code, user_data, receipt_digest, created_at_s
        FROM ROWS FROM (json_to_recordset(changes->'transfers') AS (
            id text, kind text, debit text, credit text, amount_nano bigint, pending_id text,
            timeout_s bigint, code text, user_data text, receipt_digest text,
            created_at_s double precision
        )) WITH ORDINALITY AS given (id, kind, debit, credit, amount_nano, pending_id, timeout_s,
            code, user_data, receipt_digest, created_at_s, number)
        ORDER BY number;
    INSERT INTO kvmarket.hold
        SELECT key, value::double precision FROM json_each_text(changes->'dues')
        WHERE value IS NOT NULL
        ON CONFLICT (pending_id) DO UPDATE SET due_at_s = excluded.due_at_s;
    DELETE FROM kvmarket.hold WHERE pending_id = ANY (ARRAY(
        SELECT key FROM json_each_text(changes->'dues') WHERE value IS NULL));
    IF json_array_length(changes->'receipts') > 0 THEN
        INSERT INTO kvmarket.receipt (id, request_id, account, document_id, charge_nano, body)
            SELECT id, request_id, account, document_id, charge_nano, body
            FROM ROWS FROM (json_to_recordset(changes->'receipts') AS (
                id text, request_id text, account text, document_id text, charge_nano bigint,
                body text
            )) WITH ORDINALITY AS given (id, request_id, account, document_id, charge_nano, body,
                number)
            ORDER BY number
            ON CONFLICT (id) DO NOTHING;
        INSERT INTO kvmarket.receipt_line (document_id, receipt_id)
            SELECT document_id, receipt_id FROM json_to_recordset(changes->'documents') AS (
                document_id text, receipt_id text)
            ON CONFLICT DO NOTHING;
    END IF;
    -- Twice a second, by the one writer who has it to do.
    UPDATE kvmarket.clock SET at_s = booked_at_s WHERE only_one = (
        SELECT only_one FROM kvmarket.clock WHERE at_s < booked_at_s - 0.5
        FOR UPDATE SKIP LOCKED);
END $$;
-- Number what has no number yet, in the order of arrival; how many that were. What a transfer
-- depends on was committed before it arrived, and so is numbered before it.
CREATE OR REPLACE FUNCTION kvmarket.number_leaves() RETURNS bigint LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE
    state kvmarket.numbering;
    newest bigint;
    found bigint[];
    added bigint;
BEGIN
    -- Who took a sequence number up to this one had its transaction's number before ours.
    SELECT coalesce(max(sequence), 0) INTO newest FROM kvmarket.transfer;
    PERFORM pg_current_xact_id();
    SELECT * INTO state FROM kvmarket.numbering WHERE only_one FOR UPDATE;
    IF pg_snapshot_xmin(pg_current_snapshot()) < state.seen_xid THEN
        newest := NULL;  -- one of those that took a number up to `seen` is under way still
    END IF;
    found := ARRAY(SELECT sequence FROM kvmarket.transfer
        WHERE sequence > state.complete AND NOT EXISTS (
            SELECT FROM kvmarket.log_leaf AS leaf WHERE leaf.sequence = transfer.sequence OFFSET 0)
        ORDER BY sequence);
    INSERT INTO kvmarket.log_leaf
        SELECT state.leaves + number, sequence
        FROM unnest(found) WITH ORDINALITY AS unnumbered (sequence, number);
    PERFORM kvmarket.sum_periods(found);
    added := cardinality(found);
    IF newest IS NOT NULL AND (added > 0 OR state.complete < state.seen) THEN
        UPDATE kvmarket.numbering SET leaves = leaves + added, complete = seen,
            seen = greatest(seen, newest), seen_xid = pg_current_xact_id();
    ELSIF added > 0 THEN
        UPDATE kvmarket.numbering SET leaves = leaves + added;
    END IF;
    RETURN added;
END $$;
"""

# What moved to each account, less what moved from it, in each hour of the transfers that have a
# number.
PERIODS = """
CREATE TABLE kvmarket.period_sum (
    account text COLLATE "C" NOT NULL,
    hour bigint NOT NULL,
    moved_nano numeric NOT NULL,
    PRIMARY KEY (account, hour)
);
CREATE FUNCTION kvmarket.sum_periods(sequences bigint[]) RETURNS void LANGUAGE sql
SET enable_seqscan = off SET jit = off AS $$
    INSERT INTO kvmarket.period_sum AS known
        SELECT account, hour, sum(moved_nano) FROM (
            SELECT floor(created_at_s / 3600)::bigint AS hour, debit, credit, amount_nano
            FROM unnest(sequences) AS wanted (sequence)
            CROSS JOIN LATERAL (SELECT * FROM kvmarket.transfer
                WHERE sequence = wanted.sequence OFFSET 0) AS booked
            WHERE kind IN ('plain', 'post', 'late')
        ) AS moved CROSS JOIN LATERAL (
            VALUES (credit, amount_nano), (debit, -amount_nano)) AS side (account, moved_nano)
        GROUP BY account, hour
        ON CONFLICT (account, hour)
            DO UPDATE SET moved_nano = known.moved_nano + excluded.moved_nano
$$;
SELECT kvmarket.sum_periods(ARRAY(SELECT sequence FROM kvmarket.log_leaf));
"""

# Posted sums are counted less the whole 2**62 that both have in common; see model.turned.
BALANCES = """
CREATE OR REPLACE VIEW kvmarket.balance AS
    SELECT id, kind, may_go_negative, currency, debits_pending, credits_pending,
        debits_posted - common AS debits_posted, credits_posted - common AS credits_posted,
        late_nano
    FROM (
        SELECT id, kind, may_go_negative, currency,
            whole.debits_pending + coalesce(part.debits_pending, 0) AS debits_pending,
            whole.credits_pending + coalesce(part.credits_pending, 0) AS credits_pending,
            whole.debits_posted + coalesce(part.debits_posted, 0) AS debits_posted,
            whole.credits_posted + coalesce(part.credits_posted, 0) AS credits_posted,
            whole.late_nano + coalesce(part.late_nano, 0) AS late_nano
        FROM kvmarket.account AS whole CROSS JOIN LATERAL (
            SELECT sum(debits_pending) AS debits_pending, sum(credits_pending) AS credits_pending,
                sum(debits_posted) AS debits_posted, sum(credits_posted) AS credits_posted,
                sum(late_nano) AS late_nano
            FROM kvmarket.balance_part WHERE account = whole.id
        ) AS part
    ) AS summed CROSS JOIN LATERAL (
        SELECT div(least(debits_posted, credits_posted), 4611686018427387904)
            * 4611686018427387904 AS common
    ) AS turned;
"""

# The SQL that leads from each version to the next; functions come new with the last one.
MIGRATIONS = (TABLES + GUARDS, "", PARTS, PERIODS, BALANCES + CHECKS + FUNCTIONS)
