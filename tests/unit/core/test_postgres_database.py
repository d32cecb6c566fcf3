"""Our SQL in PostgreSQL's words; tests/servers run it there."""

from __future__ import annotations

import pytest

pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
from vllm_kvmarket.core.postgres_database import (  # needs psycopg
    translated,
    translated_tables,
    without_password,
)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("WHERE a = ? AND b IN (?, ?)", "WHERE a = %s AND b IN (%s, %s)"),
        ("WHERE (:a_b IS NULL OR a = :a_b)", "WHERE (%(a_b)s IS NULL OR a = %(a_b)s)"),
        ("WHERE a % 4 = ?", "WHERE a %% 4 = %s"),
        ("SELECT a::text", "SELECT a::text"),
        ("FROM listing INDEXED BY listing_expiry WHERE a", "FROM listing WHERE a"),
    ],
)
def test_a_statement_is_translated(ours, theirs):
    """Parameters, a literal per cent, and no index by name; a cast stays."""
    assert translated(ours) == theirs.encode()


def test_tables_are_translated():
    """Types, flags and numbers that count by themselves."""
    ours = (
        "CREATE TABLE a (id INTEGER PRIMARY KEY, n INTEGER, x REAL, b BLOB, t TEXT NOT NULL, "
        "f INTEGER NOT NULL DEFAULT 0 CHECK (f IN (0, 1))) STRICT, WITHOUT ROWID;"
    )
    assert translated_tables(ours).decode() == (
        "CREATE TABLE a (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n bigint, "
        'x double precision, b bytea, t text COLLATE "C" NOT NULL, '
        "f boolean NOT NULL DEFAULT false);"
    )


def test_a_place_has_no_password():
    """It is shown in messages."""
    assert without_password("postgresql://me:secret@db/market") == "market at db"
