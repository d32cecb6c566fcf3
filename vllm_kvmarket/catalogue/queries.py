"""The catalogue's tables, and the statements on them. Transactions belong to the caller."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import msgspec

from vllm_kvmarket.catalogue.listing import (
    NEEDED,
    ON_OFFER,
    Listing,
    ListingFilter,
    ListingState,
    PublisherLimits,
)
from vllm_kvmarket.core.database import Bindings, Connection, Value
from vllm_kvmarket.core.errors import CatalogueRefusedError
from vllm_kvmarket.core.listing_terms import ListingTerms

# The terms are columns of their own; chunk keys have their own table.
_TERMS = ListingTerms.__struct_fields__
_FACTS = tuple(field.name for field in fields(Listing) if field.name not in ("terms", "chunk_keys"))
_COLUMNS = ", ".join((*_FACTS, *_TERMS))
_FLAGS = ("pinned", "paid_for")

_ALL = 2**62
# Chunks in one statement.
_ASKED_AT_ONCE = 500
# The numbers that listings are ordered by, smallest first.
_NUMBERS = {
    "age": "-created_at_s",
    "reuse": "-coalesce(uses, 0)",
    "price": "coalesce(cache_read_nano_per_mtok, :default_price)",
}
_OFFERED = "(state IN ('live', 'damaged') AND (expires_at_s IS NULL OR expires_at_s > :now_s))"
_FILTER = (
    "(:publisher IS NULL OR publisher = :publisher) "
    "AND (:search = '' OR instr(search_text, :search)) "
    "AND (:state IS NULL OR state = :state) "
    f"AND ({_OFFERED} OR ((:any_state OR :state IS NOT NULL) "
    "AND (:sees_all OR publisher = :seen_by)))"
)


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A document's chunk as the database has it; `tokens` are packed, and so are the fingerprints
    of its shares that are `known`.
    """

    key: bytes
    tokens: bytes
    damaged: bool
    known: bytes = b""


@dataclass(frozen=True, slots=True)
class Change:
    """A listing that changed: its place in the order of first offers, and of its chunks that can be
    matched, if any, the tokens and the known fingerprints.
    """

    revision: int
    listing: Listing
    place: int | None
    chunks: tuple[bytes, ...]
    known: tuple[bytes, ...]


def rows(db: Connection, statement: str, bindings: Bindings = ()) -> list[tuple[Any, ...]]:
    """Run one statement and return all its rows."""
    return db.execute(statement, bindings).fetchall()


def revision(db: Connection) -> int:
    """Return the number of the last change."""
    return int(rows(db, "SELECT revision FROM catalogue")[0][0])


def fix_identity(db: Connection, chunk_tokens: int) -> tuple[int, str]:
    """Return this catalogue's chunk size, `chunk_tokens` if none was chosen, and its market's id;
    mutates the first time.
    """
    db.execute(
        "UPDATE catalogue SET chunk_tokens = coalesce(chunk_tokens, ?), "
        "store_id = coalesce(store_id, ?) WHERE chunk_tokens IS NULL OR store_id IS NULL",
        (chunk_tokens, secrets.token_hex(16)),
    )
    chosen, market_id = rows(db, "SELECT chunk_tokens, store_id FROM catalogue")[0]
    return int(chosen), str(market_id)


def check_limits(
    db: Connection, listing: Listing, limits: PublisherLimits, needed_bytes: int
) -> None:
    """Raise CatalogueRefusedError where one more document, of so many bytes, is too much."""
    publisher = listing.terms.publisher
    count, stored_bytes = held_by(db, publisher, listing.document_id)
    if limits.documents is not None and count >= limits.documents:
        raise CatalogueRefusedError(
            f"publisher {publisher!r} has {count} documents and may have {limits.documents}; "
            "withdraw one first"
        )
    if limits.bytes is not None and stored_bytes + needed_bytes > limits.bytes:
        raise CatalogueRefusedError(
            f"publisher {publisher!r} stores {stored_bytes} bytes and may store "
            f"{limits.bytes}, too few for {needed_bytes} more; withdraw a document first"
        )


def held_by(db: Connection, publisher: str, except_id: str) -> tuple[int, int]:
    """Count the documents of a publisher that are on offer or on their way, and their bytes,
    without one of them.
    """
    statement = (
        "SELECT count(*), coalesce(sum(stored_bytes), 0) FROM listing WHERE publisher = ? "
        "AND document_id <> ? AND state IN ('live', 'damaged', 'publishing')"
    )
    count, stored_bytes = rows(db, statement, (publisher, except_id))[0]
    return int(count), int(stored_bytes)


def _next_revision(db: Connection) -> int:
    statement = "UPDATE catalogue SET revision = revision + 1 RETURNING revision"
    return int(rows(db, statement)[0][0])


def find_listing(db: Connection, document_id: str) -> Listing | None:
    """Return one listing, if there is one of that id."""
    found = read_listings(db, "document_id = ?", (document_id,))
    return found[0] if found else None


def read_listings(
    db: Connection, where: str = "TRUE", bindings: Sequence[Value] = ()
) -> list[Listing]:
    """Return the listings that satisfy a condition, newest first."""
    order = "ORDER BY created_at_s DESC, document_id"
    found = rows(db, f"SELECT {_COLUMNS} FROM listing WHERE {where} {order}", bindings)  # noqa: S608  # conditions are ours, values are bound
    return [Listing(**_fields(row), chunk_keys=_chunk_keys(db, row[0])) for row in found]


def read_page(
    db: Connection,
    wanted: ListingFilter,
    now_s: float,
    *,
    after: tuple[float, str] | None = None,
    limit: int = -1,
    offset: int = 0,
) -> list[tuple[str, float]]:
    """Return the ids of some listings, in order, with the numbers that they are ordered by.

    `after` is the last number and id of the page before.
    """
    number = _NUMBERS[wanted.order]
    uses = "LEFT JOIN listing_use USING (document_id) " if wanted.order == "reuse" else ""
    values = _bindings(wanted, now_s)
    condition = _FILTER
    if after is not None:
        condition += f" AND ({number}, document_id) > (:number, :document_id)"
        values |= {"number": after[0], "document_id": after[1]}
    statement = (
        f"SELECT document_id, {number} FROM listing {uses}WHERE {condition} "  # noqa: S608  # texts are ours, values are bound
        f"ORDER BY {number}, document_id LIMIT :limit OFFSET :offset"
    )
    most = limit if limit >= 0 else _ALL
    return rows(db, statement, values | {"limit": most, "offset": offset})


def count(db: Connection, wanted: ListingFilter, now_s: float) -> int:
    """Return how many listings a filter shows."""
    statement = f"SELECT count(*) FROM listing WHERE {_FILTER}"  # noqa: S608  # a text of ours
    return int(rows(db, statement, _bindings(wanted, now_s))[0][0])


def _bindings(wanted: ListingFilter, now_s: float) -> dict[str, Value]:
    values = {field.name: getattr(wanted, field.name) for field in fields(wanted)}
    return values | {"search": wanted.search.casefold(), "now_s": now_s}


def read_changes(db: Connection, since: int, now_s: float, most: int) -> list[Change]:
    """Return what became, until now, of (the first `most`) listings that changed after a revision,
    in the order of their changes.
    """
    statement = (
        f"SELECT {_COLUMNS}, offered_seq, revision FROM listing WHERE revision > ? "  # noqa: S608  # column names are ours
        "ORDER BY revision LIMIT ?"
    )
    return [_change(db, row, now_s) for row in rows(db, statement, (since, most))]


def _fields(row: Sequence[Any]) -> dict[str, Any]:
    facts = dict(zip(_FACTS, row, strict=False))
    facts |= {flag: bool(facts[flag]) for flag in _FLAGS}
    return facts | {"terms": ListingTerms(*row[len(_FACTS) :])}


def _chunk_keys(db: Connection, document_id: str) -> tuple[bytes, ...]:
    statement = "SELECT key FROM listing_chunk WHERE document_id = ? ORDER BY position"
    return tuple(key for (key,) in rows(db, statement, (document_id,)))


def _change(db: Connection, row: Sequence[Any], now_s: float) -> Change:
    *columns, place, number = row
    chunks = chunks_of(db, row[0])
    listing = Listing(**_fields(columns), chunk_keys=tuple(chunk.key for chunk in chunks))
    found = matchable(listing, chunks, now_s)
    known = tuple(chunk.known for chunk in chunks[: len(found)])
    return Change(number, listing, place, found, known)


def matchable(listing: Listing, chunks: Iterable[StoredChunk], now_s: float) -> tuple[bytes, ...]:
    """Return the tokens of a listing's chunks up to the first damaged one; none if not on offer."""
    tokens: list[bytes] = []
    if listing.state in ON_OFFER and not listing.is_over(now_s):
        for chunk in chunks:
            if chunk.damaged:
                break
            tokens.append(chunk.tokens)
    return tuple(tokens)


def chunks_of(db: Connection, document_id: str) -> list[StoredChunk]:
    """Return a document's chunks, in order."""
    statement = (
        "SELECT key, tokens, damaged, (SELECT string_agg(hex(fingerprint), '' ORDER BY rank, "
        "world_size, layout) FROM chunk_share WHERE chunk_share.key = chunk.key) "
        "FROM listing_chunk JOIN chunk USING (key) "
        "WHERE document_id = ? ORDER BY position"
    )
    return [
        StoredChunk(key, tokens, bool(damaged), bytes.fromhex(known or ""))
        for key, tokens, damaged, known in rows(db, statement, (document_id,))
    ]


def tokens_of(db: Connection, key: bytes) -> bytes | None:
    """Return a chunk's packed tokens, if they are stored."""
    found = rows(db, "SELECT tokens FROM chunk WHERE key = ?", (key,))
    return found[0][0] if found else None


def write_listing(db: Connection, listing: Listing) -> None:
    """Insert a listing, or restart the one of the same document; its chunks are not touched.

    One that is damaged keeps its bytes, its pin, that it was paid for, and its end where it is
    given no other. The place in the order of first offers is the publisher's own: anyone else
    who lists the document again gets a new one.
    """
    values = [getattr(listing, name) for name in _FACTS]
    values += msgspec.structs.astuple(listing.terms)
    changed_terms = ", ".join(
        f"{name} = excluded.{name}" for name in _TERMS if name != "expires_at_s"
    )
    texts = (listing.terms.title, listing.terms.publisher, listing.document_id)
    values += ["\n".join(texts).casefold(), _next_revision(db)]
    marks = ", ".join("?" * len(values))
    db.execute(
        f"INSERT INTO listing ({_COLUMNS}, search_text, revision) VALUES ({marks}) "  # noqa: S608  # column names are ours
        f"ON CONFLICT (document_id) DO UPDATE SET {changed_terms}, "
        "state = excluded.state, reason = excluded.reason, search_text = excluded.search_text, "
        "created_at_s = excluded.created_at_s, revision = excluded.revision, "
        "stored_bytes = CASE WHEN listing.listed THEN listing.stored_bytes "
        "ELSE excluded.stored_bytes END, "
        "pinned = excluded.pinned OR (listing.listed AND listing.pinned), "
        "paid_for = excluded.paid_for OR (listing.listed AND listing.paid_for), "
        "stored = TRUE, purged = FALSE, ended_at_s = NULL, "
        "expires_at_s = coalesce(excluded.expires_at_s, "
        "CASE WHEN listing.listed THEN listing.expires_at_s END), "
        "offered_seq = CASE WHEN listing.listed THEN listing.offered_seq "
        "ELSE (SELECT seq FROM first_offer WHERE first_offer.document_id = excluded.document_id "
        "AND first_offer.publisher = excluded.publisher) END",
        values,
    )


def write_chunks(db: Connection, document_id: str, chunks: Sequence[tuple[bytes, bytes]]) -> None:
    """Insert a document's chunks, given as (key, packed tokens), where they are not there yet."""
    db.executemany("INSERT INTO chunk (key, tokens) VALUES (?, ?) ON CONFLICT DO NOTHING", chunks)
    db.executemany(
        "INSERT INTO listing_chunk VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        [(document_id, position, key) for position, (key, _) in enumerate(chunks)],
    )


def set_state(db: Connection, document_id: str, state: ListingState, reason: str = "") -> None:
    """Move one listing to another state, on the market or off it.

    Its first offer gives it its place. What leaves the market is pinned no more.
    """
    number = _next_revision(db)
    offered = state in ON_OFFER
    db.execute(
        "UPDATE listing SET state = ?, reason = ?, revision = ?, pinned = pinned AND ?, "
        "listed = ?, offered_seq = coalesce(offered_seq, CASE WHEN ? THEN ? END), "
        "ended_at_s = CASE WHEN ? THEN NULL ELSE coalesce(ended_at_s, ?) END WHERE document_id = ?",
        (state, reason, number, *[offered] * 3, number, offered, time.time(), document_id),
    )
    if offered:
        db.execute(
            "INSERT INTO first_offer SELECT document_id, publisher, offered_seq FROM listing "
            "WHERE document_id = ? ON CONFLICT DO NOTHING",
            (document_id,),
        )


def set_field(
    db: Connection,
    document_id: str,
    column: Literal["expires_at_s", "pinned", "cache_read_nano_per_mtok"],
    value: float | None,
) -> None:
    """Set one of a listing's fields; a change only where the value is another."""
    statement = f"SELECT 1 FROM listing WHERE document_id = ? AND {column} IS DISTINCT FROM ?"  # noqa: S608  # column names are ours
    if rows(db, statement, (document_id, value)):
        statement = f"UPDATE listing SET {column} = ?, revision = ? WHERE document_id = ?"  # noqa: S608  # the same
        db.execute(statement, (value, _next_revision(db), document_id))


def touch(db: Connection, document_id: str) -> None:
    """Have every process read a listing again."""
    statement = "UPDATE listing SET revision = ? WHERE document_id = ?"
    db.execute(statement, (_next_revision(db), document_id))


def set_offered(
    db: Connection, document_id: str, reason: str = "a stored chunk could not be loaded"
) -> None:
    """Make a listing live when all its chunks are whole, damaged (for that reason) when not."""
    if any(chunk.damaged for chunk in chunks_of(db, document_id)):
        set_state(db, document_id, "damaged", reason)
    else:
        set_state(db, document_id, "live")


def set_stored_bytes(db: Connection, document_id: str, stored_bytes: int) -> None:
    """Note how much publishing wrote; repairing a listing writes a part of it only."""
    statement = (
        "UPDATE listing SET stored_bytes = ? WHERE document_id = ? "
        "AND (stored_bytes < ? OR NOT listed)"
    )
    db.execute(statement, (stored_bytes, document_id, stored_bytes))


def is_listed(db: Connection, document_id: str) -> bool:
    """Return whether a listing is on the market, or was when it was published again."""
    statement = "SELECT 1 FROM listing WHERE document_id = ? AND listed"
    return bool(rows(db, statement, (document_id,)))


def set_damaged(db: Connection, key: bytes, damaged: bool) -> bool:
    """Mark a chunk as lost or whole; returns whether that was news. A refuted one stays lost."""
    statement = (
        "UPDATE chunk SET damaged = ? WHERE key = ? AND damaged <> ? AND (? OR NOT refuted) "
        "RETURNING 1"
    )
    return bool(rows(db, statement, (damaged, key, damaged, damaged)))


def report_damage(db: Connection, key: bytes, reason: str) -> None:
    """Mark a chunk as lost that a listing needs, and the listings on offer that hold it."""
    if is_held(db, key, NEEDED) and set_damaged(db, key, damaged=True):
        # Also those that were damaged before: what can be matched of them may be less now.
        for name in holders(db, key, ON_OFFER):
            set_state(db, name, "damaged", reason)


def holders(db: Connection, key: bytes, states: Sequence[ListingState]) -> list[str]:
    """Return the documents in one of these states that hold a chunk."""
    statement = (
        "SELECT document_id FROM listing_chunk JOIN listing USING (document_id) WHERE key = ? "  # noqa: S608  # only question marks are put in
        f"AND state IN ({', '.join('?' * len(states))})"
    )
    return [document_id for (document_id,) in rows(db, statement, (key, *states))]


def is_held(db: Connection, key: bytes, states: Sequence[ListingState]) -> bool:
    """Return whether a document in one of these states holds a chunk."""
    statement = (
        "SELECT 1 FROM listing_chunk JOIN listing USING (document_id) WHERE key = ? "  # noqa: S608  # only question marks are put in
        f"AND state IN ({', '.join('?' * len(states))}) LIMIT 1"
    )
    return bool(rows(db, statement, (key, *states)))


def needed(db: Connection, keys: Sequence[bytes]) -> set[bytes]:
    """Return those of some chunks that must be kept: for a document that is on its way, or for one
    on offer unless they are refuted.
    """
    statement = (
        "SELECT key FROM listing_chunk JOIN listing USING (document_id) JOIN chunk USING (key) "
        "WHERE key IN ({}) AND (state = 'publishing' "
        "OR state IN ('live', 'damaged') AND NOT refuted)"
    )
    return {key for (key,) in rows_of_keys(db, statement, keys)}


def rows_of_keys(
    db: Connection, statement: str, keys: Sequence[bytes]
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a statement about some keys, each once; their marks are put into it."""
    asked = list(dict.fromkeys(keys))
    for start in range(0, len(asked), _ASKED_AT_ONCE):
        some = asked[start : start + _ASKED_AT_ONCE]
        yield from db.execute(statement.format(", ".join("?" * len(some))), some)


def refute(db: Connection, key: bytes) -> None:
    """Mark a chunk whose pages are wrong."""
    db.execute("UPDATE chunk SET refuted = TRUE, damaged = TRUE WHERE key = ?", (key,))


def refuted(db: Connection, keys: Iterable[bytes]) -> list[bytes]:
    """Return those of some chunks that are refuted."""
    statement = "SELECT 1 FROM chunk WHERE key = ? AND refuted"
    return [key for key in keys if rows(db, statement, (key,))]


def forget_refuted(db: Connection, keys: Iterable[bytes]) -> None:
    """Note that what was stored of refuted chunks is gone; they are lost still."""
    db.executemany("UPDATE chunk SET refuted = FALSE WHERE key = ?", [(key,) for key in keys])


def all_held(db: Connection, states: Sequence[ListingState]) -> set[bytes]:
    """Return every chunk that a document in one of these states holds."""
    statement = (
        "SELECT key FROM listing JOIN listing_chunk USING (document_id) "  # noqa: S608  # only question marks are put in
        f"WHERE state IN ({', '.join('?' * len(states))})"
    )
    return {key for (key,) in db.execute(statement, states)}


def add_publishing(db: Connection, document_id: str, owner: str) -> None:
    """Note that an owner publishes a document, once more if it did already."""
    statement = "INSERT INTO publishing (document_id, owner) VALUES (?, ?)"
    db.execute(statement, (document_id, owner))


def end_publishing(db: Connection, document_id: str, owner: str | None = None) -> None:
    """Note that one publishing by an owner ended; without an owner, all of the document's."""
    if owner is None:
        db.execute("DELETE FROM publishing WHERE document_id = ?", (document_id,))
    else:
        db.execute(
            "DELETE FROM publishing WHERE id = "
            "(SELECT min(id) FROM publishing WHERE document_id = ? AND owner = ?)",
            (document_id, owner),
        )


def forget_owner(db: Connection, owner: str) -> None:
    """Note that an owner publishes no more."""
    db.execute("DELETE FROM publishing WHERE owner = ?", (owner,))


def owners_of(db: Connection, document_id: str) -> set[str]:
    """Return who publishes a document."""
    statement = "SELECT DISTINCT owner FROM publishing WHERE document_id = ?"
    return {owner for (owner,) in rows(db, statement, (document_id,))}


# The end of listings


def ended(db: Connection, now_s: float) -> list[str]:
    """Return the documents on offer whose time to live is over; an index's first rows."""
    statement = (
        "SELECT document_id FROM listing INDEXED BY listing_expiry "
        "WHERE expires_at_s IS NOT NULL AND expires_at_s <= ? AND state IN ('live', 'damaged') "
        "ORDER BY expires_at_s, document_id"
    )
    return [document_id for (document_id,) in rows(db, statement, (now_s,))]


def being_published(db: Connection) -> list[str]:
    """Return the documents that someone publishes, or did until it died."""
    statement = "SELECT document_id FROM listing WHERE state = 'publishing' ORDER BY document_id"
    return [document_id for (document_id,) in rows(db, statement)]
