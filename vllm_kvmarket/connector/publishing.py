"""The scheduler half's publishing: what may be listed, and which chunks are to be stored."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.connector.messages import ChunkSave, SavePlan
from vllm_kvmarket.connector.params import PublishParams
from vllm_kvmarket.connector.requests import Decision, Publishing, RequestState
from vllm_kvmarket.identity import ROOT, chunk_keys, document_id, pack_tokens
from vllm_kvmarket.market import Market

if TYPE_CHECKING:
    from vllm.v1.request import Request

TOKEN_BYTES = 4


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
    block_tokens: int,
    engine: str,
) -> None:
    """Note the document in the catalogue and the work in `state`, or decline; mutates `state`."""
    state.declined = refusal(request, namespace, block_tokens)
    if state.declined:
        return
    assert namespace is not None and request.prompt_token_ids is not None
    chunk_tokens = market.config.chunk_tokens
    keys = tuple(chunk_keys(namespace, request.prompt_token_ids, chunk_tokens))
    packed = pack_tokens(request.prompt_token_ids)
    width = chunk_tokens * TOKEN_BYTES
    name = document_id(keys[-1])
    listing = Listing(
        document_id=name,
        namespace=namespace,
        title=wish.title,
        publisher=wish.publisher,
        token_count=request.num_prompt_tokens,
        rendered_as=wish.rendered_as,
        cache_read_nano_per_mtok=wish.cache_read_nano_per_mtok,
        royalty_ppm=wish.royalty_ppm,
        created_at_s=time.time(),
    )
    state.publishing = Publishing(
        document_id=name,
        namespace=namespace,
        keys=keys,
        parents=(ROOT, *keys[:-1]),
        tokens=tuple(packed[i : i + width] for i in range(0, len(packed), width)),
        begun=market.begin_listing(listing, request.prompt_token_ids),
        charge=market.reserve_write(
            key=f"publish:{engine}:{request.request_id}",
            publisher=wish.publisher,
            document_id=name,
            tokens=request.num_prompt_tokens - state.limit,
        ),
    )
    state.decision = Decision.PENDING


def begun(publishing: Publishing) -> str | None:
    """None while the catalogue and the ledger are still at it; then why it cannot go on, or ""."""
    if not publishing.begun.done() or (publishing.charge and not publishing.charge.done()):
        return None
    if (error := publishing.begun.exception()) is not None:
        return str(error)
    return publishing.charge.refusal() if publishing.charge else ""


def save_plan(
    state: RequestState, block_ids: list[int], block_tokens: int, chunk_tokens: int
) -> SavePlan:
    """The chunks of the document that nobody has published yet, from the request's blocks."""
    publishing = state.publishing
    assert publishing is not None
    # What could not be loaded was computed again, and replaces the bad file.
    whole = state.match.chunks[: -(-state.limit // chunk_tokens)] if state.match else ()
    there = {chunk.key for chunk in whole}
    pages = chunk_tokens // block_tokens
    chunks = []
    for index, key in enumerate(publishing.keys):
        if key in there:
            continue
        tokens = publishing.tokens[index]
        start = index * pages
        count = -(-(len(tokens) // TOKEN_BYTES) // block_tokens)
        chunks.append(
            ChunkSave(
                key=key,
                parent=publishing.parents[index],
                tokens=tokens,
                block_ids=tuple(block_ids[start : start + count]),
            )
        )
    return SavePlan(
        request_id=state.request_id, namespace=publishing.namespace, chunks=tuple(chunks)
    )
