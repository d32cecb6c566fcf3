"""The match in the database, for documents that are beyond the prefix tree.

Whole chunks are found by their keys, which chain: those that are there are the first ones of the
request. What comes behind the last one is matched into its continuations: the two neighbours in the
order of the packed tokens, as in the tree. Tokens are compared, a key alone is never believed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import apsw

from vllm_kvmarket.catalogue import schema
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.listing import Match, MatchedChunk
from vllm_kvmarket.catalogue.prefix_tree import common_tokens, pack_valid
from vllm_kvmarket.catalogue.queries import read_listings, rows
from vllm_kvmarket.core.errors import CatalogueError
from vllm_kvmarket.core.model_identity import ROOT, TOKEN_BYTES, chunk_key, document_id

THREADS = 2
# Keys that are asked for in one statement, and continuations that are looked at.
_KEYS_AT_ONCE = 128
_MOST_CONTINUATIONS = 1_000

# The places in line of the listings that a chunk can be matched for. What has ended is written
# down within a moment, so that few such rows are ever passed over. CROSS keeps the order of the
# join: by the chunk, in line.
_LINE = (
    "FROM offered CROSS JOIN listing ON listing.listed = offered.listed "
    "WHERE offered.key = {key} AND (expires_at_s IS NULL OR expires_at_s > :now_s) "
)
_IS_OFFERED = f"EXISTS (SELECT 1 {_LINE})"
_FIRST = f"(SELECT offered.listed {_LINE} ORDER BY offered.listed LIMIT 1)"
_NEIGHBOURS = " UNION ALL ".join(
    f"SELECT * FROM (SELECT tokens FROM continuation WHERE parent = :parent AND tokens {side} "  # noqa: S608  # fixed texts
    f"AND {_IS_OFFERED.format(key='continuation.key')} ORDER BY tokens {order} LIMIT 1)"
    for side, order in ((">= :tokens", "ASC"), ("< :tokens", "DESC"))
)
_BEGINNING_ALIKE = (
    f"SELECT key, tokens, {_FIRST.format(key='continuation.key')} AS first FROM continuation "  # noqa: S608  # fixed texts
    "WHERE parent = :parent AND tokens BETWEEN :low AND :high AND first IS NOT NULL "
    "ORDER BY tokens LIMIT :most"
)
_EARLIEST_ALIKE = (
    "SELECT chunk.key, tokens FROM "
    "(SELECT listed FROM offered WHERE key = :parent ORDER BY listed LIMIT :most) AS line "
    "CROSS JOIN listing ON listing.listed = line.listed "
    "CROSS JOIN listing_chunk AS held "
    "ON held.document_id = listing.document_id AND position = :position "
    "CROSS JOIN chunk ON chunk.key = held.key "
    "CROSS JOIN offered AS reached ON reached.key = held.key AND reached.listed = line.listed "
    "WHERE tokens BETWEEN :low AND :high AND (expires_at_s IS NULL OR expires_at_s > :now_s) "
    "ORDER BY line.listed LIMIT 1"
)
# The listing that ends with the chunk is named by its key.
_PAYEE = (
    "SELECT coalesce((SELECT offered.listed FROM listing CROSS JOIN offered "  # noqa: S608  # fixed texts
    "ON offered.listed = listing.listed AND offered.key = :key WHERE document_id = :document_id "
    "AND token_count = :total AND (expires_at_s IS NULL OR expires_at_s > :now_s)), "
    f"{_FIRST.format(key=':key')})"
)

InMemory = Callable[[bytes, Sequence[int]], Match | None]

logger = logging.getLogger(__name__)


def match(
    db: apsw.Connection, namespace: bytes, token_ids: Sequence[int], chunk_tokens: int, now_s: float
) -> Match | None:
    """Find what PrefixTree.match would, if every listing on offer were in the tree.

    `db` is as of one moment, and as of `now_s`. Each statement costs by the request's length and by
    a bounded number of continuations, not by the catalogue's size: where more than a thousand begin
    with the same part of a chunk, the payee is the first listed among the thousand that were first
    listed behind the chunk before, else among the first thousand in the order of their tokens.
    Raises CatalogueError for rows that contradict each other.
    """
    packed = pack_valid(token_ids)
    width = chunk_tokens * TOKEN_BYTES
    slices = [packed[start : start + width] for start in range(0, len(packed), width)]
    keys = _whole(db, namespace, slices, now_s)
    tokens = slices[: len(keys)]
    total = sum(map(len, tokens)) // TOKEN_BYTES
    if len(keys) < len(slices):
        parent = keys[-1] if keys else namespace
        rest = slices[len(keys)]
        end, shared = _inside(db, parent, rest, width, {"position": len(keys), "now_s": now_s})
        if end is not None:
            keys.append(end[0])
            tokens.append(end[1])
            total += shared
    if not keys:
        return None
    asked = {
        "key": keys[-1],
        "document_id": document_id(keys[-1]),
        "total": total,
        "now_s": now_s,
    }
    payee = rows(db, _PAYEE, asked)[0][0]
    payees = read_listings(db, "listed = ?", (payee,))
    if not payees:
        raise CatalogueError(f"chunk {keys[-1].hex()} is nobody's; run `kvmarket store check`")
    chunks = tuple(
        MatchedChunk(
            key=key,
            parent=keys[index - 1] if index else ROOT,
            tokens=own,
            token_count=len(own) // TOKEN_BYTES,
            matched=min(len(own) // TOKEN_BYTES, total - index * chunk_tokens),
        )
        for index, (key, own) in enumerate(zip(keys, tokens, strict=True))
    )
    return Match(payees[0], total, chunks)


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


def _inside(
    db: apsw.Connection, parent: bytes, rest: bytes, width: int, place: dict[str, int | float]
) -> tuple[tuple[bytes, bytes] | None, int]:
    """Find the continuation (key, tokens) of `parent` that shares most tokens with `rest`.

    And how many those are. Of several, the one that ends there, else the one that was listed first.
    `place` is the continuation's `position` in its documents, as of `now_s`.
    """
    asked: dict[str, apsw.SQLiteValue] = {"parent": parent, "tokens": rest, **place}
    neighbours = rows(db, _NEIGHBOURS, asked)
    shared = max((common_tokens(tokens, rest) for (tokens,) in neighbours), default=0)
    if shared == 0:
        return None, 0
    low = rest[: shared * TOKEN_BYTES]
    high = low.ljust(width, b"\xff")
    asked |= {"low": low, "high": high, "most": _MOST_CONTINUATIONS}
    alike = rows(db, _BEGINNING_ALIKE, asked)
    if alike[0][1] == low:
        return alike[0][:2], shared
    if len(alike) == _MOST_CONTINUATIONS:
        earliest = rows(db, _EARLIEST_ALIKE, asked)
        if earliest:
            return earliest[0], shared
    return min(alike, key=lambda row: row[2])[:2], shared


class Beyond:
    """Matches in the database for one process, by threads with a connection each; thread-safe."""

    def __init__(self, db: Connections, chunk_tokens: int) -> None:
        db.migrate(schema.BEYOND_ROOM, schema.BEYOND_MIGRATIONS)
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
