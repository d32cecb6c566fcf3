"""The catalogue's invariants as code: between listings, chunks and index."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.first_offers import (
    BEGINS,
    CHUNKS,
    LISTINGS,
    NAMES,
    OWNERS,
    POINTS,
    STARTS,
    WAITING,
    Asked,
    Record,
    TokensOf,
    beginning_of,
    fact,
    walk,
)
from vllm_kvmarket.catalogue.index_file import IndexRows
from vllm_kvmarket.catalogue.listing import NEEDED, Listing
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.model_identity import KEY_BYTES, TOKEN_BYTES, unpack_tokens


def problems(
    db: Connection, rows: IndexRows, chunk_tokens: int, now_s: float, tokens_of: TokensOf
) -> list[str]:
    """Return what is wrong, a line each; the index must be as new as `db`, and as of now."""
    found: list[str] = []
    there = {name.decode(): place for name, place in rows.scan(NAMES, b"")}
    for listing in queries.read_listings(db):
        name = listing.document_id
        chunks = queries.chunks_of(db, name)
        lines = [*_listing_problems(listing, chunks, chunk_tokens)]
        offered = b"".join(queries.matchable(listing, chunks, now_s))
        place = there.pop(name, None)
        matched = Record(rows.get(LISTINGS, place) or b"").matched if place is not None else 0
        if matched != len(offered) // TOKEN_BYTES:
            lines.append(f"{listing.state}, but what can be matched of it is something else")
        elif place is not None:
            asked = Asked(listing.namespace, chunk_tokens, unpack_tokens(offered))
            lines += _place_problems(rows, place, matched, asked, tokens_of)
        found += [f"{name}: {line}" for line in lines]
    found += [f"{name}: can be matched, but is not on offer" for name in there]
    return found + list(index_problems(rows))


def _listing_problems(
    listing: Listing, chunks: list[queries.StoredChunk], chunk_tokens: int
) -> Iterator[str]:
    if not chunks and listing.state not in NEEDED:
        # Its tokens were removed.
        return
    tokens = unpack_tokens(b"".join(chunk.tokens for chunk in chunks))
    if len(tokens) != listing.token_count:
        yield f"{len(tokens)} tokens stored, {listing.token_count} listed"
    document = DocumentChunks.of(listing.namespace, tokens, chunk_tokens)
    if document.keys != listing.chunk_keys:
        yield "its chunk keys do not follow from its tokens"
    elif not document.keys or document.document_id != listing.document_id:
        yield "its id does not follow from its tokens"
    damaged = any(chunk.damaged for chunk in chunks)
    if listing.state == "live" and damaged:
        yield "live, with a damaged chunk"
    if listing.state == "damaged" and not damaged:
        yield "damaged, with every chunk whole"


def _place_problems(
    rows: IndexRows, place: bytes, matched: int, asked: Asked, tokens_of: TokensOf
) -> Iterator[str]:
    """Match a listing with itself: it must be there to its end, and own what is behind others."""
    owned = walk(rows, asked, tokens_of)
    if not owned or owned[-1].end != matched:
        yield "it is not found to its end"
        return
    if any(one.place >= other.place for one, other in itertools.pairwise(owned)):
        yield "its tokens belong to others out of line"
    in_front = [each.end for each in owned if each.place < place]
    begins = beginning_of(rows.get(BEGINS, place) or bytes(8))
    depth = in_front[-1] if in_front else 0
    if (begins.depth, begins.digest) != (depth, asked.digest(depth)):
        yield "it does not begin where others in front of it end"


def index_problems(rows: IndexRows) -> Iterator[str]:
    """Yield what is wrong between the index's rows, a line each."""
    begins = {place: beginning_of(value) for place, value in rows.scan(BEGINS, b"")}
    if begins.keys() != {place for _, place in rows.scan(NAMES, b"")}:
        yield "the index has listings that begin nowhere, or are not there"
        return
    waiting = {each.digest + place for place, each in begins.items()}
    if waiting != {key for key, _ in rows.scan(WAITING, b"")}:
        yield "the index does not know who begins where"
    starts = {each.digest + each.token: at for at, each in begins.items() if each.token}
    if starts != dict(rows.scan(STARTS, b"")):
        yield "the index finds others than those who begin there"
    if sum(each.chunks for each in begins.values()) != fact(rows, CHUNKS):
        yield "the index counts its chunks wrongly"
    points = {value[:KEY_BYTES]: key for key, value in rows.scan(POINTS, b"")}
    if points != dict(rows.scan(OWNERS, b"")):
        yield "the index does not know whose tokens others begin on"
    if points.keys() != {each.digest for each in begins.values() if each.depth}:
        yield "the index has places where nobody begins"
