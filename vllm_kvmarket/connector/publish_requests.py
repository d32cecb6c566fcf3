"""The scheduler half's publishing: what may be listed, and which chunks are to be stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.connector.messages import ChunkSave, SavePlan
from vllm_kvmarket.connector.request_params import PublishParams
from vllm_kvmarket.connector.request_state import Decision, Publishing, RequestState, ledger_key
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.model_identity import TOKEN_BYTES
from vllm_kvmarket.market.eviction import make_room
from vllm_kvmarket.market.market import Market

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Headers and the padding of layers come in these.
_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What publishing needs to know of the engine; `block_bytes` is a block on all ranks."""

    id: str
    block_tokens: int
    block_bytes: int
    layers: int


def _file_bytes(tokens: int, chunks: int, engine: EngineFacts) -> int:
    """At most so many bytes go into the store for so many new tokens, headers included."""
    overhead = chunks * (engine.layers + 2) * _ALIGNMENT
    return -(-tokens // engine.block_tokens) * engine.block_bytes + overhead


def refusal(request: Request, namespace: bytes | None, block_tokens: int) -> str:
    """Why this request's prompt cannot be published; empty when it can."""
    if request.mm_features:
        return (
            "documents with images, audio or video cannot be published yet; publish the text alone"
        )
    if request.prompt_token_ids is None:
        return "a prompt of embeddings has no tokens to match; publish token ids or text"
    if namespace is None:
        return "the adapter's weights are still being read; publish again in a moment"
    if request.num_prompt_tokens < block_tokens:
        return (
            f"the document has {request.num_prompt_tokens} tokens, fewer than one block "
            f"({block_tokens}); reusing it would save nothing"
        )
    return ""


def start_publishing(
    market: Market,
    state: RequestState,
    request: Request,
    *,
    wish: PublishParams,
    namespace: bytes | None,
    engine: EngineFacts,
) -> None:
    """Note the document in the catalogue and the work in `state`, or decline; mutates `state`."""
    state.declined = refusal(request, namespace, engine.block_tokens)
    if state.declined:
        return
    assert namespace is not None and request.prompt_token_ids is not None
    document = DocumentChunks.of(namespace, request.prompt_token_ids, market.config.chunk_tokens)
    new_tokens = request.num_prompt_tokens - state.limit
    listing = Listing.of(
        document,
        wish.terms,
        created_at_s=time.time(),
        paid_for=market.config.tariff.write_nano(new_tokens) > 0,
    )
    state.publishing = Publishing(
        document=document,
        begun=market.begin_listing(
            listing,
            document,
            partial(
                make_room,
                market,
                _file_bytes(new_tokens, len(document.keys), engine),
                {listing.document_id},
            ),
        ),
        charge=market.reserve_write(
            key=f"publish:{ledger_key(engine.id, request.request_id, request.arrival_time)}",
            publisher=wish.terms.publisher,
            document_id=listing.document_id,
            tokens=new_tokens,
        )
        if wish.charge
        else None,
    )
    state.decision = Decision.PENDING


def begun(publishing: Publishing) -> str | None:
    """None while the catalogue and the ledger are still at it; then why it cannot go on, or ""."""
    if not publishing.begun.done() or (publishing.charge and not publishing.charge.done()):
        return None
    if (error := publishing.begun.exception()) is not None:
        return str(error)
    return publishing.charge.refusal() if publishing.charge else ""


def save_plan(state: RequestState, block_ids: list[int], block_tokens: int) -> SavePlan:
    """Every chunk of the document, from the request's blocks; the worker skips what is stored.

    Also what the catalogue says is stored: it may have gone since it was matched, or be damaged.
    """
    publishing = state.publishing
    assert publishing is not None
    return SavePlan(
        request_id=state.request_id,
        namespace=publishing.document.namespace,
        chunks=chunk_pages(publishing.document, block_ids, block_tokens),
    )


def chunk_pages(
    document: DocumentChunks, block_ids: Sequence[int], block_tokens: int
) -> tuple[ChunkSave, ...]:
    """Which of a prompt's blocks hold each of its chunks; all but the last chunk are whole."""
    chunks = []
    start = 0
    for key, parent, packed in zip(document.keys, document.parents, document.tokens, strict=True):
        count = -(-(len(packed) // TOKEN_BYTES) // block_tokens)
        pages = tuple(block_ids[start : start + count])
        chunks.append(ChunkSave(key=key, parent=parent, tokens=packed, block_ids=pages))
        start += count
    return tuple(chunks)
