"""The scheduler half's audits: which stored chunks are compared, and what is recorded."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from vllm_kvmarket.catalogue import Audit
from vllm_kvmarket.connector.messages import AuditPlan
from vllm_kvmarket.connector.publish_requests import chunk_pages
from vllm_kvmarket.connector.request_params import AuditParams
from vllm_kvmarket.connector.request_state import Auditing, Decision, RequestState
from vllm_kvmarket.core.document_chunks import DocumentChunks

if TYPE_CHECKING:
    from vllm.v1.request import Request


def start_auditing(
    state: RequestState,
    request: Request,
    *,
    wish: AuditParams,
    namespace: bytes | None,
    block_tokens: int,
    chunk_tokens: int,
) -> None:
    """Note what is to be compared in `state`, or decline; mutates both.

    Nothing of an audited prompt is reused, or stored bytes would be compared with themselves.
    """
    if namespace is None or request.prompt_token_ids is None or request.mm_features:
        state.declined = "only prompts of tokens, on a model whose weights are known, are audited"
        return
    document = DocumentChunks.of(namespace, request.prompt_token_ids, chunk_tokens)
    count = len(document.keys)
    if not wish.chunks or max(wish.chunks) >= count:
        state.declined = f"the prompt has {count} chunks; name one to {count} of them"
        return
    everything = range(count * (chunk_tokens // block_tokens))
    chunks = chunk_pages(document, everything, block_tokens)
    state.auditing = Auditing(
        document_id=wish.document_id,
        namespace=namespace,
        chunks=tuple(chunks[index] for index in wish.chunks),
    )
    state.decision = Decision.RECOMPUTE
    request.skip_reading_prefix_cache = True


def audit_plan(state: RequestState, block_ids: list[int]) -> AuditPlan:
    """The chosen chunks with the request's blocks, now that it has been computed."""
    auditing = state.auditing
    assert auditing is not None
    return AuditPlan(
        request_id=state.request_id,
        namespace=auditing.namespace,
        chunks=tuple(
            dataclasses.replace(chunk, block_ids=tuple(block_ids[i] for i in chunk.block_ids))
            for chunk in auditing.chunks
        ),
    )


def audit_record(auditing: Auditing, engine: str) -> Audit:
    """What the catalogue keeps of an audit that has ended on every rank."""
    report = auditing.report
    return Audit(
        document_id=auditing.document_id,
        at_s=time.time(),
        engine=engine,
        chunks=len(report.chunks) - report.unread,
        result=report.result,
        worst_difference=report.worst_difference,
        detail="; ".join(report.details),
    )
