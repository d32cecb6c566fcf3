"""The catalogue's match as a database would do it, for more chunks than a process can hold.

Whole chunks are found by their keys, which chain: those that are there are the first ones of the
request. What comes behind the last one is matched into its children: the two neighbours in the
order of the packed tokens, as in the tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import apsw
import numpy as np
from ledger import percentiles, postgres_places

from vllm_kvmarket.catalogue.tree import common_tokens
from vllm_kvmarket.identity import CHUNK_TOKENS, ROOT, chunk_keys, pack_tokens

NAMESPACE = bytes(range(32))
VOCABULARY = 150_000
CHUNKS_A_DOCUMENT = 16
INSERTED_AT_ONCE = 1_000
Row = tuple[bytes, bytes, bytes]
Query = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]

TABLE = (
    "CREATE TABLE chunk (key {blob} PRIMARY KEY, parent {blob} NOT NULL, tokens {blob} NOT NULL)"
)
INDEX = "CREATE INDEX chunk_children ON chunk (parent, tokens)"


class DatabaseMatch:
    """Matches by two rounds of statements; `marks` is how the database spells a parameter."""

    def __init__(self, query: Query, mark: str, *, arrays: bool) -> None:
        self._query = query
        self._arrays = arrays
        self._after = (
            f"SELECT tokens FROM chunk WHERE parent = {mark} AND tokens >= {mark} "  # noqa: S608  # a fixed mark
            "ORDER BY tokens LIMIT 1"
        )
        self._before = (
            f"SELECT tokens FROM chunk WHERE parent = {mark} AND tokens < {mark} "  # noqa: S608  # a fixed mark
            "ORDER BY tokens DESC LIMIT 1"
        )

    def match(self, token_ids: Sequence[int]) -> int:
        """Count the leading tokens that are published."""
        keys = chunk_keys(NAMESPACE, token_ids)
        there = self._there(keys)
        whole = 0
        while whole < len(keys) and keys[whole] in there:
            whole += 1
        matched = min(len(token_ids), whole * CHUNK_TOKENS)
        rest = pack_tokens(token_ids[matched : matched + CHUNK_TOKENS])
        if not rest:
            return matched
        parent = keys[whole - 1] if whole else ROOT
        found = self._query(self._after, (parent, rest)) + self._query(self._before, (parent, rest))
        return matched + max((common_tokens(bytes(row[0]), rest) for row in found), default=0)

    def _there(self, keys: list[bytes]) -> set[bytes]:
        if self._arrays:
            rows = self._query("SELECT key FROM chunk WHERE key = ANY(%s)", (keys,))
        else:
            marks = ", ".join("?" * len(keys))
            rows = self._query(f"SELECT key FROM chunk WHERE key IN ({marks})", keys)  # noqa: S608  # marks only
        return {bytes(row[0]) for row in rows}


def rows_of(tokens: list[int]) -> list[Row]:
    """A document's rows: key, parent, packed tokens."""
    keys = chunk_keys(NAMESPACE, tokens)
    starts = range(0, len(tokens), CHUNK_TOKENS)
    packed = [pack_tokens(tokens[start : start + CHUNK_TOKENS]) for start in starts]
    return list(zip(keys, [ROOT, *keys], packed, strict=False))


def measure_databases(folder: Path, count: int, url: str | None, seed: int) -> dict[str, Any]:
    """Fill and ask SQLite, and PostgreSQL where there is one; `count` documents of 4k tokens."""
    result = {"documents": count, "sqlite": _sqlite(folder / "chunks.sqlite", count, seed)}
    print(f"in SQLite: {result['sqlite']}", flush=True)
    with postgres_places(url) as new_place:
        if new_place is None:
            print("PostgreSQL: left out, no server and no psycopg here")
        else:
            result["postgres"] = _postgres(new_place(), count, seed)
            print(f"in PostgreSQL: {result['postgres']}", flush=True)
    return result


def _sqlite(path: Path, count: int, seed: int) -> dict[str, Any]:
    db = apsw.Connection(str(path))
    try:
        db.execute(TABLE.format(blob="BLOB") + "; " + INDEX)

        def insert(rows: list[Row]) -> None:
            with db:
                db.executemany("INSERT INTO chunk VALUES (?, ?, ?)", rows)

        def query(statement: str, bindings: Sequence[Any]) -> list[tuple[Any, ...]]:
            return db.execute(statement, bindings).fetchall()

        return _fill_and_ask(insert, DatabaseMatch(query, "?", arrays=False), count, seed)
    finally:
        db.close()


def _postgres(place: str, count: int, seed: int) -> dict[str, Any]:
    import psycopg

    with psycopg.connect(place, autocommit=True) as db:
        db.execute(TABLE.format(blob="bytea"))
        # A chunk's kilobyte of tokens fits into PostgreSQL's 2.7 KB a key.
        db.execute(INDEX)

        def insert(rows: list[Row]) -> None:
            with (
                db.cursor() as cursor,
                cursor.copy("COPY chunk FROM STDIN (FORMAT BINARY)") as copy,
            ):
                copy.set_types(["bytea", "bytea", "bytea"])
                for row in rows:
                    copy.write_row(row)

        def query(statement: str, bindings: Sequence[Any]) -> list[tuple[Any, ...]]:
            return db.execute(statement, bindings, prepare=True, binary=True).fetchall()

        return _fill_and_ask(insert, DatabaseMatch(query, "%s", arrays=True), count, seed)


def _fill_and_ask(
    insert: Callable[[list[Row]], None], database: DatabaseMatch, count: int, seed: int
) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    kept: list[list[int]] = []
    rows: list[Row] = []
    started = time.perf_counter()
    for number in range(count):
        size = CHUNKS_A_DOCUMENT * CHUNK_TOKENS
        tokens = random.integers(VOCABULARY, size=size, dtype=np.uint32).tolist()
        rows += rows_of(tokens)
        if len(rows) > INSERTED_AT_ONCE or number == count - 1:
            insert(rows)
            rows = []
        if number % max(1, count // 200) == 0:
            kept.append(tokens)
    seconds = time.perf_counter() - started
    figures: dict[str, Any] = {"chunks": count * CHUNKS_A_DOCUMENT, "fill_s": round(seconds, 1)}
    question = [VOCABULARY + 1] * (128 * CHUNK_TOKENS)
    inside = 5 * CHUNK_TOKENS + 100
    for name, published, length in (
        ("4k_us", CHUNKS_A_DOCUMENT * CHUNK_TOKENS, 16 * CHUNK_TOKENS),
        ("4k_ends_inside_a_chunk_us", inside, 16 * CHUNK_TOKENS),
        ("32k_us", CHUNKS_A_DOCUMENT * CHUNK_TOKENS, 128 * CHUNK_TOKENS),
    ):
        took = []
        for tokens in kept * 3:
            asked = (tokens[:published] + question)[:length]
            started = time.perf_counter()
            matched = database.match(asked)
            took.append(time.perf_counter() - started)
            assert matched == published, (name, matched, published)
        figures[name] = percentiles(took, 1e-6)
    return figures
