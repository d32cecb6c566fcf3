"""The catalogue's match as a database would do it, for more chunks than a process can hold.

Whole chunks are found by their keys, which chain: those that are there are the first ones of the
request. What comes behind the last one is matched into its children: the two neighbours in the
order of the packed tokens, as in the tree.

A scheduler must not wait for a database. "asked_asynchronously" is what it would see: threads with
a connection each ask, as many matches are under way as the scheduler has requests, and what is
counted is the scheduler's own time besides how long a match takes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from benchmarks.ledger import percentiles, postgres_places
from vllm_kvmarket.catalogue.prefix_tree import common_tokens
from vllm_kvmarket.core.model_identity import CHUNK_TOKENS, ROOT, chunk_keys, pack_tokens

NAMESPACE = bytes(range(32))
VOCABULARY = 150_000
CHUNKS_A_DOCUMENT = 16
INSERTED_AT_ONCE = 1_000
THREADS = 8
IN_FLIGHT = (1, 8, 64)
ASKED = 2_000
Row = tuple[bytes, bytes, bytes]
Query = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]
Connect = Callable[[], tuple["DatabaseMatch", Callable[[], None]]]

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


class AsynchronousMatch:
    """Asks in its own threads, each with a connection that `connect` makes."""

    def __init__(self, connect: Connect, threads: int) -> None:
        self._connect = connect
        self._own = threading.local()
        self._closing: list[Callable[[], None]] = []
        self._pool = ThreadPoolExecutor(threads, "match", initializer=self._open)

    def _open(self) -> None:
        self._own.database, close = self._connect()
        self._closing.append(close)

    def match(self, token_ids: Sequence[int]) -> Future[int]:
        """Begin to count the leading tokens that are published."""
        return self._pool.submit(lambda: self._own.database.match(token_ids))

    def close(self) -> None:
        """End the threads, then their connections."""
        self._pool.shutdown(wait=True)
        for close in self._closing:
            close()


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

        def connect() -> tuple[DatabaseMatch, Callable[[], None]]:
            own = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)

            def ask(statement: str, bindings: Sequence[Any]) -> list[tuple[Any, ...]]:
                return own.execute(statement, bindings).fetchall()

            return DatabaseMatch(ask, "?", arrays=False), own.close

        return _fill_and_ask(insert, connect, count, seed)
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

        def connect() -> tuple[DatabaseMatch, Callable[[], None]]:
            own = psycopg.connect(place, autocommit=True)

            def ask(statement: str, bindings: Sequence[Any]) -> list[tuple[Any, ...]]:
                return own.execute(statement, bindings, prepare=True, binary=True).fetchall()

            return DatabaseMatch(ask, "%s", arrays=True), own.close

        return _fill_and_ask(insert, connect, count, seed)


def _fill_and_ask(
    insert: Callable[[list[Row]], None], connect: Connect, count: int, seed: int
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
    database, close = connect()
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
    close()
    size = CHUNKS_A_DOCUMENT * CHUNK_TOKENS
    asked = [(tokens[:inside] + question)[:size] for tokens in kept]
    figures["asked_asynchronously"] = {
        str(in_flight): ask_asynchronously(connect, asked, inside, in_flight)
        for in_flight in IN_FLIGHT
    }
    return figures


def ask_asynchronously(
    connect: Connect, asked: Sequence[Sequence[int]], expected: int, in_flight: int
) -> dict[str, Any]:
    """Keep so many matches under way from one thread, as a scheduler would.

    `caller_us` is that thread's CPU time a match: handing it over, and taking the answer.
    """
    took: list[float] = []
    caller_s = 0.0
    with _opened(connect) as matching:
        wait([matching.match(asked[0]) for _ in range(4 * THREADS)])
        under_way: dict[Future[int], float] = {}
        begun = 0
        started = time.perf_counter()
        while begun < ASKED or under_way:
            cpu_started = time.thread_time()
            while begun < ASKED and len(under_way) < in_flight:
                under_way[matching.match(asked[begun % len(asked)])] = time.perf_counter()
                begun += 1
            caller_s += time.thread_time() - cpu_started
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            now = time.perf_counter()
            cpu_started = time.thread_time()
            for answer in done:
                assert answer.result() == expected
                took.append(now - under_way.pop(answer))
            caller_s += time.thread_time() - cpu_started
        seconds = time.perf_counter() - started
    return {
        "matches_per_s": round(ASKED / seconds),
        "latency_us": percentiles(took, 1e-6),
        "caller_us": round(caller_s / ASKED * 1e6, 1),
    }


@contextlib.contextmanager
def _opened(connect: Connect) -> Iterator[AsynchronousMatch]:
    matching = AsynchronousMatch(connect, THREADS)
    try:
        yield matching
    finally:
        matching.close()
