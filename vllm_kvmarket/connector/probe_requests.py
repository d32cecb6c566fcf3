"""Requests of the self-test: they store and load as a publication and a purchase do, in a folder of
their own, and nothing of them is listed or charged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_kvmarket.catalogue import Listing, Match, MatchedChunk, Segment
from vllm_kvmarket.connector.messages import PageCopy, SavePlan, SaveReport
from vllm_kvmarket.connector.publish_requests import chunk_pages, page_copies
from vllm_kvmarket.connector.request_state import Ended, EngineFacts, Lookup, Reuse
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import TOKEN_BYTES

if TYPE_CHECKING:
    from vllm.v1.request import Request


class ProbeRequest:
    """Stores its prompt, which is `document`, or reuses `match`, or just computes."""

    def __init__(
        self,
        facts: EngineFacts,
        request: Request,
        document: DocumentChunks | None,
        match: Match | None,
    ) -> None:
        self._facts = facts
        self._document = document
        self.reuse = Reuse(request, match, grain=facts.grain)
        self.report = SaveReport()
        self.failure = ""

    def weights_changed(self) -> None:
        """Nothing: an engine that tests itself changes no weights."""

    def ready(self) -> Lookup:
        """There is nothing to wait for."""
        return self.reuse.lookup()

    def copies(self, count: int, block_ids: Sequence[Sequence[int]]) -> list[PageCopy]:
        """The pages to copy after a step that computes `count` tokens of the document."""
        if self._document is None:
            return []
        start = self.reuse.request.num_computed_tokens
        computed = range(start, start + count)
        return page_copies(self.reuse.request, self._document, self._facts, computed, block_ids)

    def finished(self, block_ids: Sequence[Sequence[int]]) -> Ended:
        """Have the document stored from the request's blocks."""
        if self._document is None:
            return Ended({})
        chunks = chunk_pages(self._document, block_ids, self._facts.groups)
        plan = SavePlan(self.reuse.request.request_id, self._document.namespace, chunks)
        return Ended({}, saves=plan)

    def transferred(self) -> None:
        """Every rank has stored its part, or has reported why not."""
        self.failure = self.report.failure


def match_of(document: DocumentChunks) -> Match:
    """A document's match with itself, as the catalogue would find it."""
    listing = Listing.of(document, ListingTerms(title="self-test"))
    chunks = tuple(
        MatchedChunk(key, parent, count := len(tokens) // TOKEN_BYTES, count)
        for key, parent, tokens in zip(
            document.keys, document.parents, document.tokens, strict=True
        )
    )
    return Match((Segment(listing, 0, document.token_count),), document.token_count, chunks)
