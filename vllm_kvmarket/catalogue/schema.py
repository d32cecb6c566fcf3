"""The catalogue's tables, as SQLite makes them; core/postgres_database.py translates them."""

from __future__ import annotations

from vllm_kvmarket.core.database import Room
from vllm_kvmarket.core.errors import CatalogueUnavailableError

# `revision` numbers every change; a listing keeps that of its own last change.
# `offered_seq` is the revision at which its publisher first put a listing on offer: earlier ones
# are paid for what later ones repeat. `first_offer` keeps it for each publisher, also when the
# listing leaves the market and someone else lists the document again. `listed` is 1 while a listing
# is on the market, also while a damaged one is published again. A listing is `stored` until what
# only it needs may be deleted, and `purged` when its tokens are gone; `ended_at_s` is when it left.
#
# `store_url` is the object store that the chunks are in, NULL for the disk alone; `store_id` is
# this market's id, which its object store and each machine's index are marked with. `taken_bytes`
# are the bytes of all shares, which are too many to be added up at each publication.
#
# A chunk is `refuted` when an audit has found other pages than its engine computes, whatever its
# checksums say: it stays damaged until what is stored has been deleted and is stored anew. Its
# shares may be in several layouts that nobody converts; their digests are in their files' names,
# and others have none. `releasing` has the chunks whose files are being deleted, and by which
# process.
SCHEMA = """
CREATE TABLE catalogue (
    revision INTEGER NOT NULL,
    chunk_tokens INTEGER,
    store_url TEXT,
    store_id TEXT,
    taken_bytes INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO catalogue (revision) VALUES (0);
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
    listed INTEGER NOT NULL DEFAULT 0 CHECK (listed IN (0, 1)),
    offered_seq INTEGER UNIQUE,
    revision INTEGER NOT NULL,
    search_text TEXT NOT NULL DEFAULT '',  -- title, publisher and id without upper case
    stored INTEGER NOT NULL DEFAULT 1 CHECK (stored IN (0, 1)),
    purged INTEGER NOT NULL DEFAULT 0 CHECK (purged IN (0, 1)),
    ended_at_s REAL,
    CHECK (listed OR state NOT IN ('live', 'damaged')),
    CHECK (offered_seq IS NOT NULL OR NOT listed),
    CHECK (NOT pinned OR state IN ('live', 'damaged', 'publishing'))
) STRICT;
CREATE INDEX listing_revision ON listing (revision);
CREATE INDEX listing_state ON listing (state);
CREATE INDEX listing_age ON listing ((-created_at_s), document_id);
CREATE INDEX listing_publisher ON listing (publisher);
CREATE INDEX listing_expiry ON listing (expires_at_s)
    WHERE expires_at_s IS NOT NULL AND state IN ('live', 'damaged');
CREATE INDEX listing_left ON listing (state)
    WHERE stored AND state NOT IN ('live', 'damaged', 'publishing');
CREATE INDEX listing_end ON listing (ended_at_s) WHERE ended_at_s IS NOT NULL AND NOT purged;
CREATE TABLE first_offer (
    document_id TEXT NOT NULL REFERENCES listing (document_id),
    publisher TEXT NOT NULL,
    seq INTEGER NOT NULL UNIQUE,
    PRIMARY KEY (document_id, publisher)
) STRICT, WITHOUT ROWID;
CREATE TABLE chunk (
    key BLOB PRIMARY KEY CHECK (length(key) = 32),
    tokens BLOB NOT NULL CHECK (length(tokens) > 0 AND length(tokens) % 4 = 0),
    damaged INTEGER NOT NULL DEFAULT 0 CHECK (damaged IN (0, 1)),
    refuted INTEGER NOT NULL DEFAULT 0 CHECK (refuted IN (0, 1))
) STRICT;
CREATE TABLE chunk_share (
    key BLOB NOT NULL CHECK (length(key) = 32),
    layout TEXT NOT NULL,
    rank INTEGER NOT NULL CHECK (rank >= 0),
    world_size INTEGER NOT NULL CHECK (world_size > rank),
    bytes INTEGER NOT NULL CHECK (bytes >= 0),
    fingerprint BLOB NOT NULL CHECK (length(fingerprint) = 8),
    PRIMARY KEY (key, layout, rank, world_size)
) STRICT, WITHOUT ROWID;
CREATE TABLE releasing (
    key BLOB PRIMARY KEY CHECK (length(key) = 32),
    owner TEXT NOT NULL
) STRICT, WITHOUT ROWID;
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
CREATE TABLE listing_use (
    document_id TEXT PRIMARY KEY REFERENCES listing (document_id),
    uses INTEGER NOT NULL CHECK (uses >= 0),
    tokens_reused INTEGER NOT NULL CHECK (tokens_reused >= 0),
    earned_nano INTEGER NOT NULL,
    score REAL NOT NULL CHECK (score >= 0),
    last_used_s REAL NOT NULL,
    first_used_s REAL NOT NULL
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
"""

# Only on PostgreSQL: every change is announced when it is committed, and who is publishing or
# deleting has a lease, by the server's clock.
POSTGRES_ONLY = """
CREATE FUNCTION kvmarket.announce_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('kvmarket_catalogue', '');
    RETURN NULL;
END $$;
CREATE TRIGGER catalogue_changed AFTER UPDATE OF revision ON catalogue
    FOR EACH STATEMENT EXECUTE FUNCTION kvmarket.announce_change();
CREATE TABLE publisher_lease (
    name text COLLATE "C" PRIMARY KEY,
    renewed_at_s double precision NOT NULL
);
"""
CATALOGUE = Room(
    "catalogue",
    (SCHEMA,),
    CatalogueUnavailableError,
    postgres_only=POSTGRES_ONLY,
    # Those before never left this repository.
    oldest=8,
)
