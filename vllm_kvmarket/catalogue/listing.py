"""The catalogue's values: listings, what a match says, what was made of a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import msgspec

from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import has_state, keeps_states

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
    the store needed its space. `stored_bytes` counts what this document's publishing wrote, not
    chunks that others had stored before. A `pinned` one is never evicted and is kept in the paged
    cache; only what is on offer or on its way can be. `paid_for` means that its publisher was
    charged for storing it.
    """

    document_id: str
    namespace: bytes
    token_count: int
    terms: ListingTerms
    state: ListingState = "publishing"
    reason: str = ""
    created_at_s: float = 0.0
    stored_bytes: int = 0
    pinned: bool = False
    paid_for: bool = False
    chunk_keys: tuple[bytes, ...] = ()

    @classmethod
    def of(
        cls,
        document: DocumentChunks,
        terms: ListingTerms,
        *,
        created_at_s: float = 0.0,
        paid_for: bool = False,
    ) -> Self:
        """Make the listing of a document that is to be published."""
        return cls(
            document_id=document.document_id,
            namespace=document.namespace,
            token_count=document.token_count,
            terms=terms,
            created_at_s=created_at_s,
            paid_for=paid_for,
            chunk_keys=document.keys,
        )

    def is_over(self, now_s: float) -> bool:
        """Say whether its time to live is over."""
        ends_at_s = self.terms.expires_at_s
        return ends_at_s is not None and ends_at_s <= now_s


class PublisherLimits(msgspec.Struct, frozen=True):
    """The most that one publisher may hold, None for no limit; what is being published counts."""

    documents: int | None
    bytes: int | None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingFilter:
    """The listings that a list shows: by default those on offer now, the newest first.

    `search` is a part of title, publisher or id, in upper or lower case. In other states only the
    listings of the account `seen_by` are shown, or all with `sees_all`. By "reuse" the most reused
    come first, by "price" the cheapest; `default_price` is of listings that name none.
    """

    search: str = ""
    publisher: str | None = None
    state: str | None = None
    any_state: bool = False
    seen_by: str | None = None
    sees_all: bool = False
    order: Literal["age", "reuse", "price"] = "age"
    default_price: int = 0


# A match is made for every request, of hundreds of chunks: these are msgspec's, which take a tenth
# of a dataclass's time to make, and garbage collection need not look into the chunks.
class MatchedChunk(msgspec.Struct, frozen=True, gc=False):
    """A chunk that a match reaches into: the first `matched` of its `token_count` tokens.

    `parent` is ROOT for a first chunk. Only a match's last chunk may have `matched` <
    `token_count`.
    """

    key: bytes
    parent: bytes
    token_count: int
    matched: int
    # Fingerprints of its stored shares, one after another; empty when none is known.
    known: bytes = b""


class Segment(msgspec.Struct, frozen=True):
    """Tokens `start` to `end` of a match, which `listing` was the first to offer."""

    listing: Listing
    start: int
    end: int


class Match(msgspec.Struct, frozen=True):
    """The longest published prefix of a token sequence, and who offered which part of it first.

    The segments follow each other from 0 to `token_count`. The chunks are those of the last
    segment's listing, in order; their `matched` add up to `token_count`. `whole` is the document
    that consists of exactly these tokens, if there is one.
    """

    segments: tuple[Segment, ...]
    token_count: int
    chunks: tuple[MatchedChunk, ...]
    whole: Listing | None = None

    @property
    def listing(self) -> Listing:
        """The last segment's listing, which contains the whole match."""
        return self.segments[-1].listing

    def last_end(self, end: int) -> int:
        """Find the last place up to `end` behind which a request can go on: there, unless the model
        keeps a state, which is stored at the end and behind some chunks. 0: nowhere.
        """
        if end >= self.token_count or not keeps_states(self.listing.namespace):
            return min(end, self.token_count)
        found = total = 0
        for chunk in self.chunks:
            total += chunk.matched
            if total > end:
                break
            if has_state(chunk.key):
                found = total
        return found

    def until(self, end: int) -> Match:
        """Return the match as it would be for the first `end` tokens, at least one, only."""
        if end >= self.token_count:
            return self
        chunks = []
        left = end
        for chunk in self.chunks:
            if left <= 0:
                break
            chunks.append(msgspec.structs.replace(chunk, matched=min(chunk.matched, left)))
            left -= chunk.matched
        segments = tuple(
            Segment(each.listing, each.start, min(each.end, end))
            for each in self.segments
            if each.start < end
        )
        return Match(segments, end, tuple(chunks))
