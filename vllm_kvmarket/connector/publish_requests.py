"""Requests that publish a document: their prompt is computed once, stored and listed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_kvmarket.catalogue import Listing, Match
from vllm_kvmarket.connector.cache_groups import CacheGroup, GroupKind
from vllm_kvmarket.connector.messages import ChunkSave, PageCopy, SavePlan, SaveReport
from vllm_kvmarket.connector.purchases import ledger_key
from vllm_kvmarket.connector.request_params import PublishParams
from vllm_kvmarket.connector.request_state import (
    ANSWERED,
    Ended,
    Engine,
    EngineFacts,
    Lookup,
    Reuse,
    only_tokens,
)
from vllm_kvmarket.connector.reuse_requests import WEIGHTS_CHANGED, PreloadRequest
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.model_identity import TOKEN_BYTES, has_state
from vllm_kvmarket.market.purchase import Purchase, PurchaseState, StorageItem

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Headers and the padding of layers come in these.
_ALIGNMENT = 4096

logger = init_logger("vllm.kvmarket.publishing")


class PublishRequest:
    """One document on its way to a listing.

    Published chunks of it are loaded, not computed. When the request has finished, the worker
    stores what is missing, and the listing is committed.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        wanted: PublishParams,
        namespace: bytes,
        match: Match | None,
    ) -> None:
        self._engine = engine
        self._request = request
        self.reuse = Reuse(request, match, grain=engine.facts.grain)
        market = engine.market
        self._document = document = DocumentChunks.of(
            namespace, request.prompt_token_ids, market.config.chunk_tokens
        )
        new_tokens = document.token_count - self.reuse.limit
        if engine.facts.is_plain:
            # Its buyers find what it computes. Nobody else has these hashes before it is on offer.
            engine.hashes.share(request, namespace, document.keys, document.token_count)
        else:
            # Of what it found in the cache not all pages would be there.
            engine.hashes.isolate(request)
        if engine.facts.has_states:
            self.reuse.limit = 0
        elif engine.facts.forgets:
            # A chunk is stored whole, and a load does not bring all of its pages.
            self.reuse.limit -= self.reuse.limit % engine.facts.chunk_tokens
        price_nano = market.config.tariff.write_nano(new_tokens)
        listing = Listing.of(
            document, wanted.terms, created_at_s=time.time(), paid_for=price_nano > 0
        )
        space = _file_bytes(new_tokens, len(document.keys), engine.facts)
        self._begun = market.begin_listing(listing, document, space)
        self.charge: Purchase | None = None
        if wanted.charge and price_nano:
            key = ledger_key(engine.facts.id, request.request_id, request.arrival_time)
            self.charge = market.reserve(
                StorageItem(wanted.terms.publisher, listing.document_id, price_nano),
                key=f"publish:{key}",
                account=wanted.terms.publisher,
            )
        self._declined: str | None = None
        self.report = SaveReport()

    @classmethod
    def arrived(
        cls,
        engine: Engine,
        request: Request,
        wanted: PublishParams,
        namespace: bytes | None,
        match: Match | None,
    ) -> PublishRequest | PreloadRequest:
        """Start to note the document in the catalogue and to reserve what storing it costs."""
        if reason := refusal(request, namespace, engine.facts.block_tokens):
            return PreloadRequest(engine, request, match, declined=reason)
        assert namespace is not None
        return cls(engine, request, wanted, namespace, match)

    def weights_changed(self) -> None:
        """List nothing: a part of the KV may be of other weights. Mutates."""
        self._declined = WEIGHTS_CHANGED

    def ready(self) -> Lookup:
        """Wait for the catalogue and the ledger: nothing is computed for a document that could not
        be listed afterwards. Mutates.
        """
        if self._declined is None:
            self._declined = self._problem()
        return Lookup.PENDING if self._declined is None else self.reuse.lookup()

    def repairs(self, local: int) -> bool:
        """Whether vLLM found tokens in its cache that are not on offer; it forgets them then.

        They are left from an earlier offer, and what is wrong with them would be stored again.
        Mutates vLLM's cache.
        """
        limit = self.reuse.limit
        return local > limit and self._engine.hashes.forget_behind(self._request, limit)

    def _problem(self) -> str | None:
        """Why the document cannot be listed, empty when it can; None: not known yet."""
        state = self.charge.state() if self.charge else None
        if not self._begun.done() or state is PurchaseState.RESERVING:
            return None
        if (error := self._begun.exception()) is not None:
            return str(error)
        return self.charge.refusal if self.charge else ""

    def copies(self, count: int, block_ids: Sequence[Sequence[int]]) -> list[PageCopy]:
        """The pages to copy after a step that computes `count` tokens of the document."""
        if self._declined:
            return []
        start = self._request.num_computed_tokens
        computed, facts = range(start, start + count), self._engine.facts
        copies = page_copies(self._request, self._document, facts, computed, block_ids)
        return [replace(copy, chunk=self._told_new(copy.chunk)) for copy in copies]

    def _told_new(self, chunk: ChunkSave) -> ChunkSave:
        """Say of a chunk whether this request had to compute all of it."""
        on_offer = -(-self.reuse.limit // self._engine.facts.chunk_tokens)
        return replace(chunk, is_new=chunk.key not in self._document.keys[:on_offer])

    def finished(self, block_ids: Sequence[Sequence[int]]) -> Ended:
        """Have every chunk of the document stored from the request's blocks; mutates.

        Also chunks that the catalogue calls stored: they may have gone since, or be damaged. The
        worker skips what is there.
        """
        answer = self.reuse.answer(self._declined or "")
        answer["document_id"] = self._document.document_id
        if self._request.status not in ANSWERED or self._declined:
            self._end(self._declined or "the publishing request was aborted")
            return Ended(answer)
        document = self._document
        # An older reader of the document may have left some of it there meanwhile.
        self._engine.hashes.forget_behind(self._request, self.reuse.limit, but=block_ids[0])
        chunks = chunk_pages(document, block_ids, self._engine.facts.groups)
        chunks = tuple(self._told_new(chunk) for chunk in chunks)
        return Ended(answer, saves=SavePlan(self._request.request_id, document.namespace, chunks))

    def transferred(self) -> None:
        """Every rank has stored its part, or has reported why not: list the document. Mutates."""
        self._end(self.report.failure)

    def _end(self, failure: str) -> None:
        """List the document, or note why not; and charge for storing it, or do not."""
        market, document = self._engine.market, self._document
        if failure:
            done = market.fail_listing(document.document_id, failure, self.report.shares)
        else:
            stored_bytes = self.report.stored_bytes
            done = market.commit_listing(
                document.document_id, stored_bytes, document.keys, self.report.shares
            )
        done.add_done_callback(log_failure)
        if self.charge is not None:
            done.add_done_callback(partial(self._pay, self.charge, failure))

    def _pay(self, charge: Purchase, failure: str, done: Future[None]) -> None:
        """Charge for a document that the catalogue has listed; called on the catalogue's thread."""
        is_listed = not failure and done.exception() is None
        if is_listed and self.report.stored_bytes:
            charge.settle()
            self._engine.metrics.bought(charge)
        else:
            charge.void()


def refusal(request: Request, namespace: bytes | None, block_tokens: int) -> str:
    """Why this request's prompt cannot be published; empty when it can."""
    if request.mm_features:
        return (
            "documents with images, audio or video cannot be published yet; publish the text alone"
        )
    if only_tokens(request) is None:
        return "a prompt of embeddings has no tokens to match; publish token ids or text"
    if namespace is None:
        return (
            "nothing can be published now: weights are being read, or were changed in the running "
            "engine, or its self-test failed, which `kvmarket env` says; publish again in a moment"
        )
    if request.num_prompt_tokens < block_tokens:
        return (
            f"the document has {request.num_prompt_tokens} tokens, fewer than one block "
            f"({block_tokens}); reusing it would save nothing"
        )
    return ""


def log_failure(done: Future[None]) -> None:
    """Log a write to the catalogue that failed."""
    if (error := done.exception()) is not None:
        logger.error("kvmarket: the catalogue could not be written: %s", error)


def _file_bytes(tokens: int, chunks: int, engine: EngineFacts) -> int:
    """The most bytes that so many new tokens take in the store, headers included."""
    layers = sum(len(group.layers) for group in engine.groups)
    return engine.stored_bytes(tokens) + chunks * (layers + 2) * _ALIGNMENT


def page_copies(
    request: Request,
    document: DocumentChunks,
    facts: EngineFacts,
    computed: range,
    block_ids: Sequence[Sequence[int]],
) -> list[PageCopy]:
    """What to copy of a document in a step that computes these of a request's tokens.

    Of groups that keep all tokens, the whole chunk when it is complete; of others, what the step
    computes, since its blocks may be gone afterwards. Of recurrent layers the state that the last
    token of a chunk with a state has left, with which a step must end: the next token changes it.
    """
    copies = []
    size, stop = facts.chunk_tokens, min(computed.stop, document.token_count)
    for index in range(computed.start // size, -(-stop // size)):
        origin, end = index * size, min((index + 1) * size, document.token_count)
        first, last = max(computed.start, origin), min(stop, end)
        with_state = facts.has_states and last == end and has_state(document.keys[index])
        firsts = {
            GroupKind.FULL: origin if last == end else last,
            GroupKind.STATE: last - 1 if with_state else last,
        }
        pages = tuple(
            group.pages(blocks, firsts.get(group.kind, first), last, origin)
            for group, blocks in zip(facts.groups, block_ids, strict=True)
        )
        chunk = ChunkSave(
            document.keys[index], document.parents[index], document.tokens[index], pages
        )
        start = first - origin if facts.forgets else 0
        if with_state and last < computed.stop:
            start = last - origin  # its state is gone
        copies.append(PageCopy(request.request_id, document.namespace, chunk, start, last - origin))
    return copies


def chunk_pages(
    document: DocumentChunks, block_ids: Sequence[Sequence[int]], groups: Sequence[CacheGroup]
) -> tuple[ChunkSave, ...]:
    """Each chunk of a prompt with its blocks in each group; all but the last chunk are whole."""
    chunks = []
    start = 0
    for key, parent, packed in zip(document.keys, document.parents, document.tokens, strict=True):
        stop = start + len(packed) // TOKEN_BYTES
        pages = tuple(
            group.pages(blocks, start, stop, start)
            for group, blocks in zip(groups, block_ids, strict=True)
        )
        chunks.append(ChunkSave(key=key, parent=parent, tokens=packed, groups=pages))
        start = stop
    return tuple(chunks)
