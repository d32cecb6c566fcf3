"""A scheduler half over a market with one document, and requests as vLLM's scheduler has them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.paged import one_group
from vllm_kvmarket.connector import scheduler
from vllm_kvmarket.connector.request_state import EngineFacts
from vllm_kvmarket.core.config import load
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.pricing import NANO
from vllm_kvmarket.market.market import Market

DOCUMENT = tokens(600)
BLOCK_TOKENS = 128
FACTS = EngineFacts("e", (one_group(["a", "b", "c"], BLOCK_TOKENS),), 256, 1)
# What a buyer of DOCUMENT finds in vLLM's own prefix cache; see `local_tokens`.
CACHED = 600 // BLOCK_TOKENS * BLOCK_TOKENS


@contextmanager
def opened_market(home: Path) -> Iterator[Market]:
    """DOCUMENT is listed by pat; alice has funds, poor has none."""
    with Market.open(home) as opened:
        opened.create_account("pat", "publisher")
        opened.create_account("alice")
        opened.create_account("poor")
        opened.deposit("alice", NANO, "d1")
        store_and_list(opened, DOCUMENT, publisher="pat")
        yield opened


def half_of(
    market: Market, monkeypatch: Any, algorithm: str = "sha256", **settings: Any
) -> scheduler.SchedulerHalf:
    """A half whose model's namespace is the documents', and a pool of blocks in which DOCUMENT is;
    the caller closes it.
    """
    known = SimpleNamespace(of=lambda _: NAMESPACE)
    monkeypatch.setattr(scheduler, "Namespaces", lambda *_: known)
    engine: Any = SimpleNamespace(
        model_config=SimpleNamespace(model="m", max_model_len=4096),
        cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, nnodes=1),
    )
    config = load({"home": str(market.home), "trust_requests": True} | settings)
    half = scheduler.SchedulerHalf(engine, config, FACTS)
    half.bind(BlockPool(64, enable_caching=True, hash_block_size=BLOCK_TOKENS))
    cache_document(half, DOCUMENT, algorithm)
    return half


def cache_document(
    half: scheduler.SchedulerHalf, prompt: list[int], algorithm: str = "sha256"
) -> list[int]:
    """Put a document's whole blocks into vLLM's cache, as after it was published; their ids."""
    request = request_of(prompt, {}, algorithm=algorithm)
    document = DocumentChunks.of(NAMESPACE, prompt, half._config.chunk_tokens)
    half._engine.hashes.share(request, NAMESPACE, document.keys, len(prompt))
    return cache_blocks(half, request)


def cache_blocks(half: scheduler.SchedulerHalf, request: Request) -> list[int]:
    """Put a request's whole blocks into vLLM's cache, as after its prefill; their ids."""
    pool = half._engine.pins._pool
    assert pool is not None
    count = len(request.block_hashes)
    blocks = pool.get_new_blocks(count)
    pool.cache_full_blocks(request, blocks, 0, count, BLOCK_TOKENS, 0)
    pool.free_blocks(reversed(blocks))
    return [block.block_id for block in blocks]


def local_tokens(half: scheduler.SchedulerHalf, request: Request) -> int:
    """What vLLM finds of a request in its cache."""
    pool = half._engine.pins._pool
    assert pool is not None
    hits = itertools.takewhile(lambda each: pool.get_cached_block(each, [0]), request.block_hashes)
    return min(len(list(hits)), (request.num_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS


@functools.cache
def _hasher(algorithm: str) -> Callable[[Request], list[BlockHash]]:
    function = get_hash_fn_by_name(algorithm)
    init_none_hash(function)
    return get_request_block_hasher(BLOCK_TOKENS, function)


def request_of(
    prompt: list[int],
    params: dict[str, Any],
    name: str = "r-1",
    status: RequestStatus = RequestStatus.FINISHED_STOPPED,
    output: int = 5,
    *,
    salt: str | None = None,
    algorithm: str = "sha256",
    **more: Any,
) -> Request:
    """A request of vLLM's, with so many tokens of output."""
    request = Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=100, extra_args=dict(params)),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=_hasher(algorithm),
        **more,
    )
    request.status = status
    request._output_token_ids.extend([9] * output)
    return request
