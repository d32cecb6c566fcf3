"""Requests that audit a document: stored chunks are compared with what this engine computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_kvmarket.catalogue import Audit, Match
from vllm_kvmarket.connector.messages import AuditReport, PageCopy, SavePlan
from vllm_kvmarket.connector.publish_requests import chunk_pages, log_failure, page_copies
from vllm_kvmarket.connector.request_params import AuditParams
from vllm_kvmarket.connector.request_state import (
    ANSWERED,
    Ended,
    Engine,
    Lookup,
    Reuse,
    only_tokens,
)
from vllm_kvmarket.connector.reuse_requests import PreloadRequest
from vllm_kvmarket.core.document_chunks import DocumentChunks

if TYPE_CHECKING:
    from vllm.v1.request import Request


class AuditRequest:
    """One audit. Nothing of its prompt is reused, or stored bytes would be compared with
    themselves.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        wanted: AuditParams,
        namespace: bytes,
        match: Match | None,
    ) -> None:
        self._engine = engine
        self._request = request
        self._wanted = wanted
        self.reuse = Reuse(request, match, grain=engine.facts.grain)
        self._document = DocumentChunks.of(
            namespace, request.prompt_token_ids, engine.market.config.chunk_tokens
        )
        self.report = AuditReport()
        self._is_void = False

    @classmethod
    def arrived(
        cls,
        engine: Engine,
        request: Request,
        wanted: AuditParams,
        namespace: bytes | None,
        match: Match | None,
    ) -> AuditRequest | PreloadRequest:
        """Keep the request from finding anything in vLLM's cache, or decline; mutates it."""
        if namespace is None or only_tokens(request) is None:
            reason = "only prompts of tokens, on a model whose weights are known, are audited"
            return PreloadRequest(engine, request, match, declined=reason)
        self = cls(engine, request, wanted, namespace, match)
        count = len(self._document.keys)
        if not wanted.chunks or max(wanted.chunks) >= count:
            reason = f"the prompt has {count} chunks; name one to {count} of them"
            return PreloadRequest(engine, request, match, declined=reason)
        engine.hashes.isolate(request)
        return self

    def weights_changed(self) -> None:
        """Compare nothing: other weights have other KV. Mutates."""
        self._is_void = True

    def ready(self) -> Lookup:
        """Everything is computed."""
        return Lookup.MISS

    def copies(self, count: int, block_ids: Sequence[Sequence[int]]) -> list[PageCopy]:
        """The pages to copy, and then to compare, after a step that computes `count` tokens."""
        start = self._request.num_computed_tokens
        computed, facts = range(start, start + count), self._engine.facts
        copies = page_copies(self._request, self._document, facts, computed, block_ids)
        keys = {self._document.keys[index] for index in self._wanted.chunks}
        return [replace(copy, compares=True) for copy in copies if copy.chunk.key in keys]

    def finished(self, block_ids: Sequence[Sequence[int]]) -> Ended:
        """Have the chosen chunks compared with the request's blocks."""
        answer = self.reuse.answer()
        if self._request.status not in ANSWERED or self._is_void:
            return Ended(answer)
        chunks = chunk_pages(self._document, block_ids, self._engine.facts.groups)
        chosen = tuple(chunks[index] for index in self._wanted.chunks)
        namespace = self._document.namespace
        return Ended(answer, compares=SavePlan(self._request.request_id, namespace, chosen))

    def transferred(self) -> None:
        """Every rank has compared its part: record the result with the listing."""
        report = self.report
        record = Audit(
            document_id=self._wanted.document_id,
            at_s=time.time(),
            engine=self._engine.facts.id,
            chunks=len(report.chunks) - report.count("unread"),
            result=report.result,
            worst_difference=report.worst_difference,
            detail="; ".join(report.details),
        )
        noted = self._engine.market.record_audit(record, report.refuted)
        noted.add_done_callback(log_failure)
