"""A document of a model with windows: its pages are kept although vLLM frees their blocks."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.paged import HEAD_DIM, HEADS, NAMESPACE, PLENTY, Bench
from vllm_kvmarket.connector import step_copies
from vllm_kvmarket.connector.cache_groups import CacheGroup, GroupKind
from vllm_kvmarket.connector.messages import ChunkLoad, SavePlan
from vllm_kvmarket.connector.paged_cache import PagedCache
from vllm_kvmarket.connector.publish_requests import chunk_pages, page_copies
from vllm_kvmarket.connector.request_state import EngineFacts
from vllm_kvmarket.core.document_chunks import DocumentChunks

CHUNK, BLOCK, TOKENS, WINDOW = 64, 16, 150, 40
GROUPS = (
    CacheGroup(GroupKind.FULL, BLOCK, ("full",), 1),
    CacheGroup(GroupKind.WINDOW, BLOCK, ("window",), 1, reach=WINDOW),
)
FACTS = EngineFacts("e", GROUPS, CHUNK, 1)
DOCUMENT = DocumentChunks.of(NAMESPACE, range(1000, 1000 + TOKENS), CHUNK)
REQUEST = SimpleNamespace(request_id="r")
# Each group's blocks of the request; a block belongs to one group.
BLOCKS = (tuple(range(1, 11)), tuple(range(11, 21)))


@pytest.fixture
def bench(tmp_path):
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32, get_head_size=lambda: HEAD_DIM),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(rank=0, world_size=1),
    )
    memory = torch.zeros((48, HEADS, BLOCK, 2 * HEAD_DIM))
    cache = PagedCache(config, {"full": memory, "window": memory[:]}, GROUPS, 48)
    with Bench(tmp_path, cache) as opened:
        yield opened


def page_of(group: int, index: int) -> float:
    """What this test's model writes into a page."""
    return 100.0 * group + index + 1


def compute(bench, computed, *, compares=False):
    """One step: vLLM frees what the window has left, the model fills pages, and we copy."""
    kept = GROUPS[1].first_token(computed.start) // BLOCK
    blocks = (BLOCKS[0], (0,) * kept + BLOCKS[1][kept:])
    for index in range(kept):
        bench.cache.host_pages(1, [BLOCKS[1][index]])[0].fill(0xFF)
    for group in (0, 1):
        for index in range(computed.start // BLOCK, -(-computed.stop // BLOCK)):
            page = bench.cache.host_pages(group, [BLOCKS[group][index]])[0]
            page.view(np.float32).fill(page_of(group, index))
    for copy in page_copies(REQUEST, DOCUMENT, FACTS, computed, blocks):
        bench.transfers.copy(copy)
    return blocks


def stored(bench, blocks):
    plan = SavePlan("r", NAMESPACE, chunk_pages(DOCUMENT, blocks, GROUPS))
    bench.transfers.save(plan)
    return bench._wait("r")


def loaded(bench):
    """Load every page of the document into other blocks; the first number of each."""
    target = (tuple(range(21, 31)), tuple(range(31, 41)))
    loads = [ChunkLoad(each.key, each.groups) for each in chunk_pages(DOCUMENT, target, GROUPS)]
    assert bench.load(*loads).failures == {}
    return [
        [float(bench.cache.host_pages(group, [block])[0].view(np.float32)[0]) for block in blocks]
        for group, blocks in enumerate(target)
    ]


STEPS = [
    [range(TOKENS)],
    [range(50), range(50, 100), range(100, TOKENS)],
    [range(start, min(start + 7, TOKENS)) for start in range(0, TOKENS, 7)],
]


@pytest.mark.parametrize("steps", STEPS, ids=["at once", "in pieces", "in small pieces"])
def test_all_pages_are_stored_though_the_window_has_left_them(bench, steps):
    """Whatever pieces the prompt is computed in."""
    for computed in steps:
        blocks = compute(bench, computed)
    report = stored(bench, blocks)
    assert report.failure == ""
    assert report.stored_bytes > 0
    assert loaded(bench) == [[page_of(group, index) for index in range(10)] for group in (0, 1)]


def test_a_request_that_is_computed_again_after_a_preemption_stores_the_same(bench):
    """vLLM finds whole blocks of it again, inside a chunk that was begun, and computes the rest."""
    compute(bench, range(50))
    compute(bench, range(50, 100))
    for computed in (range(48, 100), range(100, TOKENS)):
        blocks = compute(bench, computed)
    assert stored(bench, blocks).failure == ""
    assert loaded(bench) == [[page_of(group, index) for index in range(10)] for group in (0, 1)]


def test_a_chunk_whose_beginning_was_not_computed_is_not_stored(bench):
    """Then the publication fails, and says so."""
    blocks = compute(bench, range(80, TOKENS))
    report = stored(bench, blocks)
    assert "left the store" in report.failure
    assert not bench.store.has(DOCUMENT.keys[1])


def test_a_request_that_ended_early_leaves_no_copies(bench):
    """And no listing: its chunks may be there, and garbage collection takes them."""
    blocks = compute(bench, range(100))
    bench.transfers.forget("r")
    assert "left the store" in stored(bench, blocks).failure


def test_a_slow_store_makes_steps_wait_and_not_the_memory_full(bench, monkeypatch):
    """Copies that wait to be stored have a bound; one chunk always fits."""
    monkeypatch.setattr(step_copies, "MOST_BYTES", 1)
    monkeypatch.setattr(step_copies, "PATIENCE_S", 60.0)
    blocks = compute(bench, range(TOKENS))
    assert stored(bench, blocks).failure == ""


def test_a_store_that_stands_still_fails_the_publication_and_lets_the_model_go_on(
    bench, monkeypatch
):
    """No step waits for it without end. What comes later is published as before."""
    monkeypatch.setattr(step_copies, "MOST_BYTES", 1)
    save, goes_on = bench.transfers._chunks.save, threading.Event()

    def stands_still(*args):
        assert goes_on.wait(60)
        return save(*args)

    monkeypatch.setattr(bench.transfers._chunks, "save", stands_still)
    compute(bench, range(100))
    blocks = compute(bench, range(100, TOKENS))
    goes_on.set()
    assert step_copies.TOO_SLOW in stored(bench, blocks).failure
    monkeypatch.setattr(step_copies, "MOST_BYTES", PLENTY)
    assert stored(bench, compute(bench, range(TOKENS))).failure == ""
