"""A document of a model with windows: its pages are kept although vLLM frees their blocks."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec.structs import replace as structs_replace

from tests.support.paged import HEAD_DIM, HEADS, NAMESPACE, PLENTY, Bench, config_of
from vllm_kvmarket.connector import step_copies
from vllm_kvmarket.connector.cache_groups import CacheGroup, GroupKind
from vllm_kvmarket.connector.messages import ChunkLoad, SavePlan
from vllm_kvmarket.connector.paged_cache import PagedCache
from vllm_kvmarket.connector.publish_requests import chunk_pages, page_copies
from vllm_kvmarket.connector.request_state import EngineFacts
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.model_identity import marked
from vllm_kvmarket.store.conversion import why_not

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
    memory = torch.zeros((48, HEADS, BLOCK, 2 * HEAD_DIM))
    cache = PagedCache(config_of(), {"full": memory, "window": memory[:]}, GROUPS, 48)
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


# Recurrent states

STATEFUL = marked(NAMESPACE)
STATES = (GROUPS[0], CacheGroup(GroupKind.STATE, 4096, ("state",), 1, states=("mamba2:3=float32",)))
STATE_FACTS = EngineFacts("e", STATES, CHUNK, 1)
LONG = DocumentChunks.of(STATEFUL, range(1000, 1000 + TOKENS), CHUNK)
SHORT = DocumentChunks.of(STATEFUL, range(1000, 1000 + 2 * CHUNK), CHUNK)


@pytest.fixture(params=["raw", "zstd-exponent"])
def recurrent(tmp_path, request):
    pages = torch.zeros((48, HEADS, BLOCK, 2 * HEAD_DIM))
    states = torch.zeros((48, 1, 1, 12), dtype=torch.int8)
    cache = PagedCache(config_of(), {"full": pages, "state": states}, STATES, 48)
    with Bench(tmp_path, cache, namespace=STATEFUL, codec=request.param) as opened:
        yield opened


def states_of(bench, document, steps, *, compares=False):
    """Compute a document of a model with a state, which is the count of tokens it has seen."""
    blocks = (BLOCKS[0], (40,))
    for computed in steps:
        bench.cache.host_pages(1, [40])[0].view(np.float32).fill(computed.stop)
        for copy in page_copies(REQUEST, document, STATE_FACTS, computed, blocks):
            bench.transfers.copy(replace(copy, compares=compares))
    return SavePlan("r", document.namespace, chunk_pages(document, blocks, STATES))


def steps_of(document, step=50):
    """Its prompt in pieces, and the first token of an answer."""
    count = document.token_count
    prompt = [range(start, min(start + step, count)) for start in range(0, count, step)]
    return [*prompt, range(count, count + 1)]


def publish_state(bench, document, steps=None):
    bench.transfers.save(states_of(bench, document, steps or steps_of(document)))
    return bench._wait("r")


def load_state(bench, document):
    """Load what a reuse of a whole document reads of its last chunk; the state's block is 41."""
    pages = chunk_pages(document, (BLOCKS[0], (41,)), STATES)[-1].groups
    report = bench.load(ChunkLoad(document.keys[-1], pages))
    return report.failures, float(bench.cache.host_pages(1, [41])[0].view(np.float32)[0])


def test_the_state_at_the_documents_end_is_stored_with_its_last_chunk(recurrent):
    """And with no other, and not what an answer makes of it."""
    assert publish_state(recurrent, LONG).failure == ""
    assert load_state(recurrent, LONG) == ({}, TOKENS)
    for index, (with_state, counts) in enumerate(
        [(False, (4, 0)), (False, (4, 0)), (True, (2, 1))]
    ):
        layout = recurrent.cache.layout
        with recurrent.store.disk.open(LONG.keys[index], layout, STATEFUL) as chunk:
            assert (chunk.header.has_state, chunk.header.page_counts) == (with_state, counts)
            chunk.verify()


def test_the_end_of_a_document_is_another_chunk_than_the_same_tokens_in_a_longer_one(recurrent):
    """So neither can be taken for the other, whichever is stored first."""
    assert SHORT.keys[0] == LONG.keys[0]
    assert SHORT.keys[1] != LONG.keys[1]
    assert SHORT.document_id != LONG.document_id
    assert publish_state(recurrent, LONG).failure == ""
    failures, _ = load_state(recurrent, SHORT)
    assert "no such chunk" in failures[SHORT.keys[1]]
    assert publish_state(recurrent, SHORT).failure == ""
    assert load_state(recurrent, SHORT) == ({}, 2 * CHUNK)
    assert load_state(recurrent, LONG) == ({}, TOKENS)


def test_a_document_that_is_computed_again_after_a_preemption_is_stored_with_its_state(recurrent):
    """From its first token, since vLLM has lost the state that it had."""
    steps = [range(50), range(50, 100), range(100), *steps_of(LONG)[2:]]
    assert publish_state(recurrent, LONG, steps).failure == ""
    assert load_state(recurrent, LONG) == ({}, TOKENS)


def test_a_step_that_goes_beyond_the_documents_end_stores_no_state(recurrent):
    """As after a preemption: what it leaves has seen a token of the answer."""
    report = publish_state(recurrent, LONG, [range(100), range(100, TOKENS + 1)])
    assert "publish the document again" in report.failure
    assert not recurrent.store.has(LONG.keys[-1])


OFTEN = DocumentChunks.of(marked(NAMESPACE, 2), range(1000, 1000 + TOKENS), CHUNK)


def test_states_inside_a_document_are_stored_with_their_chunks(recurrent):
    """Where steps end there; where one does not, the publication fails."""
    recurrent.namespace = OFTEN.namespace
    assert "publish the document again" in publish_state(recurrent, OFTEN).failure
    recurrent.transfers.forget("r")
    steps = [range(50), range(50, 2 * CHUNK), range(2 * CHUNK, TOKENS)]
    assert publish_state(recurrent, OFTEN, steps).failure == ""
    blocks = (BLOCKS[0], (41,))
    for index, seen in ((1, 2 * CHUNK), (2, TOKENS)):
        pages = chunk_pages(OFTEN, blocks, STATES)[index].groups
        assert recurrent.load(ChunkLoad(OFTEN.keys[index], pages)).failures == {}
        assert recurrent.cache.host_pages(1, [41])[0].view(np.float32)[0] == seen


@pytest.mark.parametrize(
    ("factor", "result"), [(1, "exact"), (1.0001, "close"), (1.1, "different")]
)
def test_an_audit_compares_the_state(recurrent, factor, result):
    """As numbers, with what rounding may do to them."""
    assert publish_state(recurrent, LONG).failure == ""
    page = recurrent.cache.host_pages(1, [40])[0].view(np.float32)
    plan = states_of(recurrent, LONG, [range(100)], compares=True)
    page.fill(TOKENS * factor)
    for copy in page_copies(REQUEST, LONG, STATE_FACTS, range(100, TOKENS), (BLOCKS[0], (40,))):
        recurrent.transfers.copy(replace(copy, compares=True))
    recurrent.transfers.audit(plan)
    report = recurrent._wait("r")
    assert (report.result, report.count("exact")) == (result, 3 if factor == 1 else 2)


def test_a_layout_with_a_state_is_not_converted(recurrent):
    """Nor is a chunk of it read as one without."""
    layout = recurrent.cache.layout
    assert layout.layers[1].state == "mamba2:3=float32"
    assert "recurrent states" in why_not(layout, structs_replace(layout, tag="012/cpu-vec"))
