"""The match in the database, for documents that are beyond the prefix tree.

Whole chunks are found by their keys, which chain: those that are there are the first ones of the
request. Beside each of them, and behind the last one, other continuations may share some tokens and
may have been offered earlier. Tokens are compared, a key alone is never believed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import apsw

from vllm_kvmarket.catalogue.listing import Match, MatchedChunk, Segment
from vllm_kvmarket.catalogue.prefix_tree import common_tokens, pack_valid
from vllm_kvmarket.catalogue.queries import chunks_of, read_listings, rows
from vllm_kvmarket.catalogue.sqlite_connections import SqliteConnections
from vllm_kvmarket.core.errors import CatalogueError
from vllm_kvmarket.core.model_identity import ROOT, TOKEN_BYTES, chunk_key, document_id

THREADS = 2
# Keys that are asked for in one statement, and continuations that are looked at.
_KEYS_AT_ONCE = 128
_MOST_CONTINUATIONS = 1_000

# The places of the listings that a chunk can be matched for. What has ended is written down within
# a moment, so that few such rows are ever passed over. CROSS keeps the order of the join: by the
# chunk, in the order of first offers.
_PLACES = (
    "FROM offered CROSS JOIN listing ON listing.offered_seq = offered.place "
    "WHERE offered.key = {key} AND (expires_at_s IS NULL OR expires_at_s > :now_s) "
)
_IS_OFFERED = f"EXISTS (SELECT 1 {_PLACES})"
_FIRST = f"(SELECT offered.place {_PLACES} ORDER BY offered.place LIMIT 1)"
_NEIGHBOURS = " UNION ALL ".join(
    f"SELECT * FROM (SELECT tokens FROM continuation WHERE parent = :parent AND tokens {side} "  # noqa: S608  # fixed texts
    f"AND {_IS_OFFERED.format(key='continuation.key')} ORDER BY tokens {order} LIMIT 1)"
    for side, order in (("> :tokens", "ASC"), ("< :tokens", "DESC"))
)
_BEGINNING_ALIKE = (
    f"SELECT tokens, {_FIRST.format(key='continuation.key')} AS first FROM continuation "  # noqa: S608  # fixed texts
    "WHERE parent = :parent AND tokens BETWEEN :low AND :high AND first IS NOT NULL "
    "LIMIT :most"
)
_EARLIEST_ALIKE = (
    "SELECT tokens, line.place FROM "
    "(SELECT place FROM offered WHERE key = :parent ORDER BY place LIMIT :most) AS line "
    "CROSS JOIN listing ON listing.offered_seq = line.place "
    "CROSS JOIN listing_chunk AS held "
    "ON held.document_id = listing.document_id AND position = :position "
    "CROSS JOIN chunk ON chunk.key = held.key "
    "CROSS JOIN offered AS reached ON reached.key = held.key AND reached.place = line.place "
    "WHERE tokens BETWEEN :low AND :high AND (expires_at_s IS NULL OR expires_at_s > :now_s)"
)

_IS_WHOLE = (
    "document_id = ? AND token_count = ? AND (expires_at_s IS NULL OR expires_at_s > ?) "
    "AND EXISTS (SELECT 1 FROM offered WHERE key = ? AND place = offered_seq)"
)

InMemory = Callable[[bytes, Sequence[int]], Match | None]

logger = logging.getLogger(__name__)


def match(
    db: apsw.Connection, namespace: bytes, token_ids: Sequence[int], chunk_tokens: int, now_s: float
) -> Match | None:
    """Find what PrefixTree.match would, if every listing on offer were in the tree.

    `db` is as of one moment, and as of `now_s`. Each statement costs by the request's length and by
    a bounded number of continuations, not by the catalogue's size: where more than a thousand begin
    with the same part of a chunk, the owner is the first among the thousand that were first offered
    behind the chunk before, and some thousand others.
    Raises CatalogueError for rows that contradict each other.
    """
    packed = pack_valid(token_ids)
    width = chunk_tokens * TOKEN_BYTES
    slices = [packed[start : start + width] for start in range(0, len(packed), width)]
    keys = _whole(db, namespace, slices, now_s)
    found: list[tuple[int, int]] = []
    parent = namespace
    for position, tokens in enumerate(slices[: len(keys) + 1]):
        key = keys[position] if position < len(keys) else None
        asked = {"parent": parent, "tokens": tokens, "position": position, "now_s": now_s}
        for shared, place in _owners(db, key, asked, width):
            if found and found[-1][1] == place:
                found.pop()
            found.append((position * chunk_tokens + shared, place))
        parent = key or parent
    if not found:
        return None
    segments = []
    start = 0
    for end, place in found:
        listings = read_listings(db, "offered_seq = ?", (place,))
        if not listings:
            raise CatalogueError(f"no listing was offered as {place}; run `kvmarket store check`")
        segments.append(Segment(listings[0], start, end))
        start = end
    stored = chunks_of(db, segments[-1].listing.document_id)[: -(-start // chunk_tokens)]
    chunks = tuple(
        MatchedChunk(
            key=chunk.key,
            parent=stored[index - 1].key if index else ROOT,
            tokens=chunk.tokens,
            token_count=len(chunk.tokens) // TOKEN_BYTES,
            matched=min(len(chunk.tokens) // TOKEN_BYTES, start - index * chunk_tokens),
            known=chunk.known,
        )
        for index, chunk in enumerate(stored)
    )
    last = chunks[-1]
    key = chunk_key(namespace, last.parent, last.tokens[: last.matched * TOKEN_BYTES])
    whole = read_listings(db, _IS_WHOLE, (document_id(key), start, now_s, key))
    return Match(tuple(segments), start, chunks, whole[0] if whole else None)


def whole_chunks(count: int) -> str:
    """The statement that asks which of so many keys are chunks on offer; binds the time behind."""
    marks = ", ".join("?" * count)
    offered = _IS_OFFERED.format(key="chunk.key").replace(":now_s", "?")
    return f"SELECT key, tokens FROM chunk WHERE key IN ({marks}) AND {offered}"  # noqa: S608  # marks only


def _whole(
    db: apsw.Connection, namespace: bytes, slices: Sequence[bytes], now_s: float
) -> list[bytes]:
    """Return the keys of the leading slices of a request that are chunks on offer."""
    found: list[bytes] = []
    parent = ROOT
    for start in range(0, len(slices), _KEYS_AT_ONCE):
        some = slices[start : start + _KEYS_AT_ONCE]
        keys = []
        for tokens in some:
            parent = chunk_key(namespace, parent, tokens)
            keys.append(parent)
        there = dict(rows(db, whole_chunks(len(keys)), (*keys, now_s)))
        for key, tokens in zip(keys, some, strict=True):
            if there.get(key) != tokens:
                return found
            found.append(key)
    return found


def _owners(
    db: apsw.Connection, key: bytes | None, asked: dict[str, apsw.SQLiteValue], width: int
) -> list[tuple[int, int]]:
    """Return (shared tokens, place) as Children.owners does, for what continues `asked["parent"]`.

    `asked["tokens"]` are the request's; `key` is the chunk that has exactly these, if there is one.
    """
    tokens = asked["tokens"]
    assert isinstance(tokens, bytes)
    found: list[tuple[int, int]] = []
    reached = 0
    near = [common_tokens(other, tokens) for (other,) in rows(db, _NEIGHBOURS, asked)]
    # Beyond what a neighbour in the order of tokens shares, only the exact chunk goes.
    while reached < max(near, default=0):
        low = tokens[: (reached + 1) * TOKEN_BYTES]
        high = low.ljust(width, b"\xff")
        asked |= {"low": low, "high": high, "most": _MOST_CONTINUATIONS}
        alike = rows(db, _BEGINNING_ALIKE, asked)
        if len(alike) == _MOST_CONTINUATIONS:
            alike += rows(db, _EARLIEST_ALIKE, asked)
        other, place = min(alike, key=lambda row: row[1])
        reached = common_tokens(other, tokens)
        found.append((reached, place))
    if key is not None and reached < len(tokens) // TOKEN_BYTES:
        statement = f"SELECT {_FIRST.format(key=':key')}"
        place = rows(db, statement, {**asked, "key": key})[0][0]
        found.append((len(tokens) // TOKEN_BYTES, place))
    return found


class DatabaseMatches:
    """Matches in the database for one process, by threads with a connection each; thread-safe."""

    def __init__(self, db: SqliteConnections, chunk_tokens: int) -> None:
        db.add_match_tables()
        self._db = db
        self._chunk_tokens = chunk_tokens
        self._own = threading.local()
        self._readers: list[apsw.Connection] = []
        # It starts a thread when there is something to do.
        self._pool = ThreadPoolExecutor(THREADS, "kvmarket-match")
        self._last_error = ""

    def match_later(
        self, namespace: bytes, token_ids: Sequence[int], in_memory: InMemory
    ) -> Future[Match | None]:
        """Start to match; the longer of what the database and `in_memory` say.

        Of equal ones the database's: it knows every listing that could be paid. The future raises
        CatalogueError when the database cannot be used.
        """
        return self._pool.submit(self._longer, namespace, token_ids, in_memory)

    def _longer(
        self, namespace: bytes, token_ids: Sequence[int], in_memory: InMemory
    ) -> Match | None:
        found = self._match(namespace, token_ids)
        known = in_memory(namespace, token_ids)
        if found is None or (known is not None and known.token_count > found.token_count):
            return known
        return found

    def _match(self, namespace: bytes, token_ids: Sequence[int]) -> Match | None:
        try:
            with self._db.snapshot_of(self._reader()) as db:
                found = match(db, namespace, token_ids, self._chunk_tokens, time.time())
        except Exception as error:
            # Every request would say the same.
            if str(error) != self._last_error:
                logger.warning("kvmarket: documents beyond memory are not matched: %s", error)
            self._last_error = str(error)
            raise
        self._last_error = ""
        return found

    def _reader(self) -> apsw.Connection:
        reader: apsw.Connection | None = getattr(self._own, "reader", None)
        if reader is None:
            reader = self._own.reader = self._db.open_reader()
            self._readers.append(reader)
        return reader

    def close(self) -> None:
        """Finish what is being matched, drop what is not, end the threads and their connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers:
            reader.close()
