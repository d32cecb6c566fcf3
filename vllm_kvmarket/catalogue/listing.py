"""The catalogue's values: listings, what a match says, what was made of a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

ListingState = Literal["publishing", "live", "failed", "delisted", "damaged", "expired", "evicted"]
# What can be matched; `damaged` up to its first damaged chunk.
ON_OFFER: tuple[ListingState, ...] = ("live", "damaged")
# Whose chunks the store must keep.
NEEDED: tuple[ListingState, ...] = (*ON_OFFER, "publishing")
AuditResult = Literal["exact", "close", "different", "unread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A document on offer, or on its way there, or no longer.

    `publishing` until every chunk is durable, then `live`; `damaged` when a chunk was lost since
    (what lies before it still matches); `failed` with a reason when publishing ended without a
    listing; `delisted` by its publisher; `expired` when its time to live was over; `evicted` when
    the store needed its room. Prices that are None follow the tariff. `stored_bytes` counts what
    this document's publishing wrote, not chunks that others had stored before. `expires_at_s` is
    None for a document that is on offer for good. A `pinned` one is never evicted and is kept in
    the paged cache; only what is on offer or on its way can be. `paid_for` tells that storing it
    was charged to its publisher.
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
    expires_at_s: float | None = None
    pinned: bool = False
    paid_for: bool = False
    chunk_keys: tuple[bytes, ...] = ()

    def is_over(self, now_s: float) -> bool:
        """Say whether its time to live is over."""
        return self.expires_at_s is not None and self.expires_at_s <= now_s


@dataclass(frozen=True, slots=True)
class Use:
    """One reuse of a listing: `tokens` that were not computed, and what it brought the provider."""

    document_id: str
    tokens: int
    earned_nano: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Usage:
    """All reuses of a listing so far; `score` is eviction's, as of `last_used_s`."""

    uses: int
    tokens_reused: int
    earned_nano: int
    score: float
    last_used_s: float


@dataclass(frozen=True, slots=True)
class Audit:
    """What an engine found when it computed some of a document's stored chunks again.

    `exact`: bit for bit the same; `close`: within the tolerance; `different`: not what was sold;
    `unread`: some could not be read.
    `worst_difference` is the largest of two values that should be the same.
    """

    document_id: str
    at_s: float
    engine: str
    chunks: int
    result: AuditResult
    worst_difference: float = 0.0
    detail: str = ""


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

    def is_final(self, prompt_tokens: int) -> bool:
        """Say whether no other document could give a prompt of so many tokens a better match: it is
        the listing, from end to end.
        """
        return self.token_count == prompt_tokens == self.listing.token_count
