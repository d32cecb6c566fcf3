"""Two engines on one market at once: publishing the same, deleting what the other loads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.engines import NANO, running, words
from vllm_kvmarket import Market
from vllm_kvmarket.market.garbage_collection import collect_garbage
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

QUESTION = words(994, 9)
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """A market and two engines on it, each with its own processes; no host tier."""
    with Market.open(tmp_path_factory.mktemp("together"), {"host_cache_bytes": 0}) as market:
        market.create_account("alice")
        market.deposit("alice", 1000 * NANO, "d")
        small = {"num_gpu_blocks_override": 44}
        with running(tiny(1), market, **small) as one, running(tiny(1), market, **small) as two:
            yield market, one, two


def test_two_engines_publish_the_same_document_at_once(pair):
    """Both end with the one listing, its chunks are whole, and both sell it."""
    market, *engines = pair
    for number in range(3):
        document = words(6400 + number, 1500)
        start = threading.Barrier(2)

        def publish(llm, document=document, start=start):
            start.wait()
            return market.publish(llm, token_ids=document, title="twice")

        with ThreadPoolExecutor(2) as threads:
            listings = list(threads.map(publish, engines))
        assert listings[0] == listings[1]
        assert listings[0].state == "live"
        for key in listings[0].chunk_keys:
            market.store.verify(key)
        answers = []
        for llm in engines:
            empty_prefix_cache(llm)
            answers.append(ask(llm, document + QUESTION, market.params("alice"), rest_s=0.3))
        assert [answer.market["reused_tokens"] for answer in answers] == [1500, 1500]
        assert answers[0].token_ids == answers[1].token_ids
    assert market.catalogue.check_integrity() == []
    assert market.store.disk.usage().drafts == 0


def test_a_document_is_deleted_while_another_engine_loads_it(pair):
    """Delisted, collected and published again all the while: every answer is that of prefill."""
    market, one, two = pair
    document = words(6450, 1500)
    listing = market.publish(one, token_ids=document, title="coming and going")
    full = ask(two, document + QUESTION, rest_s=0)
    assert full.market.get("reused_tokens", 0) == 0
    done = threading.Event()
    deletions = 0

    def come_and_go() -> None:
        nonlocal deletions
        while not done.is_set():
            market.delist(listing.document_id)
            collect_garbage(market)
            deletions += 1
            market.publish(one, token_ids=document, title="coming and going")
            time.sleep(0.6)  # long enough for the other engine to see it

    reused = []
    with ThreadPoolExecutor(1) as threads:
        deleting = threads.submit(come_and_go)
        for _ in range(20):
            empty_prefix_cache(two)
            answer = ask(two, document + QUESTION, market.params("alice"), rest_s=0)
            assert answer.token_ids == full.token_ids
            reused.append(answer.market.get("reused_tokens", 0))
        done.set()
        deleting.result()
    assert deletions > 3
    assert 1500 in reused, "some loads found it whole"
    assert market.catalogue.get(listing.document_id).state == "live"
    for key in listing.chunk_keys:
        market.store.verify(key)
    assert market.ledger.check_integrity() == []
