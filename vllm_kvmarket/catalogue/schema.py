"""The catalogue's tables, version by version."""

ROOM = "catalogue"

# `revision` numbers every change; a listing keeps that of its own last change.
# `listed` is the revision that put a listing on offer: its place in line while it stays there.
MIGRATIONS = (
    """
    CREATE TABLE catalogue (
        revision INTEGER NOT NULL,
        chunk_tokens INTEGER
    ) STRICT;
    INSERT INTO catalogue VALUES (0, NULL);
    CREATE TABLE listing (
        document_id TEXT PRIMARY KEY,
        namespace BLOB NOT NULL CHECK (length(namespace) = 32),
        title TEXT NOT NULL,
        publisher TEXT NOT NULL,
        token_count INTEGER NOT NULL CHECK (token_count > 0),
        rendered_as TEXT NOT NULL CHECK (rendered_as IN ('text', 'chat')),
        cache_read_nano_per_mtok INTEGER CHECK (cache_read_nano_per_mtok >= 0),
        royalty_ppm INTEGER CHECK (royalty_ppm BETWEEN 0 AND 1000000),
        state TEXT NOT NULL
            CHECK (state IN ('publishing', 'live', 'failed', 'delisted', 'damaged')),
        reason TEXT NOT NULL,
        created_at_s REAL NOT NULL,
        stored_bytes INTEGER NOT NULL CHECK (stored_bytes >= 0),
        listed INTEGER UNIQUE,
        revision INTEGER NOT NULL,
        CHECK (state NOT IN ('live', 'damaged') OR listed IS NOT NULL)
    ) STRICT;
    CREATE INDEX listing_revision ON listing (revision);
    CREATE TABLE chunk (
        key BLOB PRIMARY KEY CHECK (length(key) = 32),
        tokens BLOB NOT NULL CHECK (length(tokens) > 0 AND length(tokens) % 4 = 0),
        damaged INTEGER NOT NULL DEFAULT 0 CHECK (damaged IN (0, 1))
    ) STRICT;
    CREATE TABLE listing_chunk (
        document_id TEXT NOT NULL REFERENCES listing (document_id),
        position INTEGER NOT NULL,
        key BLOB NOT NULL REFERENCES chunk (key),
        PRIMARY KEY (document_id, position)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX listing_chunk_key ON listing_chunk (key);
    CREATE TABLE publishing (
        id INTEGER PRIMARY KEY,
        document_id TEXT NOT NULL REFERENCES listing (document_id),
        owner TEXT NOT NULL
    ) STRICT;
    CREATE INDEX publishing_document ON publishing (document_id);
    """,
    # The new states need another CHECK, which SQLite can only give a new table. The rows that refer
    # to listings find them again when they are back, before the transaction ends.
    """
    PRAGMA defer_foreign_keys = ON;
    CREATE TEMP TABLE listing_1 AS SELECT * FROM listing;
    DROP TABLE listing;
    CREATE TABLE listing (
        document_id TEXT PRIMARY KEY,
        namespace BLOB NOT NULL CHECK (length(namespace) = 32),
        title TEXT NOT NULL,
        publisher TEXT NOT NULL,
        token_count INTEGER NOT NULL CHECK (token_count > 0),
        rendered_as TEXT NOT NULL CHECK (rendered_as IN ('text', 'chat')),
        cache_read_nano_per_mtok INTEGER CHECK (cache_read_nano_per_mtok >= 0),
        royalty_ppm INTEGER CHECK (royalty_ppm BETWEEN 0 AND 1000000),
        state TEXT NOT NULL CHECK (state IN
            ('publishing', 'live', 'failed', 'delisted', 'damaged', 'expired', 'evicted')),
        reason TEXT NOT NULL,
        created_at_s REAL NOT NULL,
        stored_bytes INTEGER NOT NULL CHECK (stored_bytes >= 0),
        expires_at_s REAL,
        pinned INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1)),
        paid_for INTEGER NOT NULL DEFAULT 0 CHECK (paid_for IN (0, 1)),
        listed INTEGER UNIQUE,
        revision INTEGER NOT NULL,
        CHECK (state NOT IN ('live', 'damaged') OR listed IS NOT NULL),
        CHECK (NOT pinned OR state IN ('live', 'damaged', 'publishing'))
    ) STRICT;
    INSERT INTO listing (
        document_id, namespace, title, publisher, token_count, rendered_as,
        cache_read_nano_per_mtok, royalty_ppm, state, reason, created_at_s, stored_bytes, listed,
        revision
    ) SELECT
        document_id, namespace, title, publisher, token_count, rendered_as,
        cache_read_nano_per_mtok, royalty_ppm, state, reason, created_at_s, stored_bytes, listed,
        revision
    FROM listing_1;
    DROP TABLE listing_1;
    CREATE INDEX listing_revision ON listing (revision);
    CREATE INDEX listing_state ON listing (state);
    CREATE INDEX listing_expiry ON listing (expires_at_s)
        WHERE expires_at_s IS NOT NULL AND state IN ('live', 'damaged');
    CREATE TABLE listing_use (
        document_id TEXT PRIMARY KEY REFERENCES listing (document_id),
        uses INTEGER NOT NULL CHECK (uses >= 0),
        tokens_reused INTEGER NOT NULL CHECK (tokens_reused >= 0),
        earned_nano INTEGER NOT NULL,
        score REAL NOT NULL CHECK (score >= 0),
        last_used_s REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY,
        document_id TEXT NOT NULL REFERENCES listing (document_id),
        at_s REAL NOT NULL,
        engine TEXT NOT NULL,
        chunks INTEGER NOT NULL CHECK (chunks > 0),
        result TEXT NOT NULL CHECK (result IN ('exact', 'close', 'different', 'unread')),
        worst_difference REAL NOT NULL CHECK (worst_difference >= 0),
        detail TEXT NOT NULL
    ) STRICT;
    CREATE INDEX audit_document ON audit (document_id);
    """,
    # Of uses that were noted before this version, the first is not known: their listing's time is.
    "ALTER TABLE listing_use ADD COLUMN first_used_s REAL",
)

# Made only where documents may be beyond the prefix tree: a chunk takes about five kilobytes here.
BEYOND_ROOM = "catalogue_beyond"

# `offered` has a chunk once for each listing on offer that it can be matched for, under that one's
# place in line, and the namespace as the chunk that all of its listings begin with. `continuation`
# has what can be matched behind a chunk, in the order of the packed tokens.
# Triggers keep both in step, whichever process writes. A migration above that makes `listing` anew
# drops them with it: it must be followed by one that makes them again, here.
BEYOND_MIGRATIONS = (
    """
    CREATE TABLE offered (
        key BLOB NOT NULL,
        listed INTEGER NOT NULL,
        PRIMARY KEY (key, listed)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE continuation (
        parent BLOB NOT NULL,
        tokens BLOB NOT NULL,
        key BLOB NOT NULL,
        PRIMARY KEY (parent, tokens)
    ) STRICT, WITHOUT ROWID;
    CREATE VIEW followed AS
        SELECT own.document_id, own.position, own.key, tokens,
            coalesce(before.key, listing.namespace) AS parent
        FROM listing_chunk AS own JOIN listing USING (document_id)
        JOIN chunk ON chunk.key = own.key LEFT JOIN listing_chunk AS before
            ON before.document_id = own.document_id AND before.position = own.position - 1;
    CREATE TRIGGER listing_offered
    AFTER UPDATE OF state, listed ON listing
    WHEN OLD.listed IS NOT NEW.listed OR OLD.state <> NEW.state OR NEW.state = 'damaged'
    BEGIN
        DELETE FROM offered WHERE listed = OLD.listed AND key IN (
            SELECT key FROM listing_chunk WHERE document_id = NEW.document_id
            UNION ALL SELECT NEW.namespace
        );
        INSERT INTO offered SELECT NEW.namespace, NEW.listed WHERE NEW.state IN ('live', 'damaged');
        INSERT INTO offered SELECT key, NEW.listed FROM listing_chunk
        WHERE document_id = NEW.document_id AND NEW.state IN ('live', 'damaged')
        AND position < coalesce(
            (SELECT min(position) FROM listing_chunk JOIN chunk USING (key)
             WHERE document_id = NEW.document_id AND damaged),
            position + 1
        );
        DELETE FROM continuation WHERE (parent, tokens) IN (
            SELECT parent, tokens FROM followed WHERE document_id = NEW.document_id
            AND NOT EXISTS (SELECT 1 FROM offered WHERE offered.key = followed.key)
        );
        INSERT INTO continuation SELECT parent, tokens, key FROM followed
        WHERE document_id = NEW.document_id
        AND EXISTS (SELECT 1 FROM offered WHERE offered.key = followed.key)
        ON CONFLICT DO NOTHING;
    END;
    INSERT INTO offered
        SELECT namespace, listed FROM listing WHERE state IN ('live', 'damaged');
    INSERT INTO offered
        SELECT key, listed FROM listing AS held JOIN listing_chunk USING (document_id)
        WHERE state IN ('live', 'damaged') AND position < coalesce(
            (SELECT min(position) FROM listing_chunk JOIN chunk USING (key)
             WHERE document_id = held.document_id AND damaged),
            position + 1
        );
    INSERT INTO continuation
        SELECT parent, tokens, key FROM followed
        WHERE EXISTS (SELECT 1 FROM offered WHERE offered.key = followed.key)
        ON CONFLICT DO NOTHING;
    """,
)
