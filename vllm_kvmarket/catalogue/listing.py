"""The catalogue's values: listings, and what a match says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

ListingState = Literal["publishing", "live", "failed", "delisted", "damaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A document on offer, or on its way there, or no longer.

    `publishing` until every chunk is durable, then `live`; `damaged` when a chunk was lost since
    (what lies before it still matches); `failed` with a reason when publishing ended without a
    listing; `delisted` by its publisher. Prices that are None follow the tariff. `stored_bytes`
    counts what this document's publishing wrote, not chunks that others had stored before.
    """

    document_id: str
    namespace: bytes
    title: str
    publisher: str
    token_count: int
    rendered_as: Literal["text", "chat"] = "text"
    cache_read_nano_per_mtok: int | None = None
    royalty_ppm: int | None = None
    state: ListingState = "publishing"
    reason: str = ""
    created_at_s: float = 0.0
    stored_bytes: int = 0
    chunk_keys: tuple[bytes, ...] = ()


# A match is made for every request, of hundreds of chunks: these are msgspec's, which take a tenth
# of a dataclass's time to make, and garbage collection need not look into the chunks.
class MatchedChunk(msgspec.Struct, frozen=True, gc=False):
    """A chunk that a match reaches into: the first `matched` of its `token_count` tokens.

    `tokens` are all of the chunk's, packed as little-endian uint32; `parent` is ROOT for a first
    chunk. Only a match's last chunk may have `matched` < `token_count`.
    """

    key: bytes
    parent: bytes
    tokens: bytes
    token_count: int
    matched: int


class Match(msgspec.Struct, frozen=True):
    """The longest published prefix of a token sequence, and the listing that is paid for it.

    The chunks are that listing's, in order; their `matched` add up to `token_count`.
    """

    listing: Listing
    token_count: int
    chunks: tuple[MatchedChunk, ...]
