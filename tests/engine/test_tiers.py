"""Where a reused chunk comes from in a real engine: host memory, the disk, the object store."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.engines import NANO, SMALL, running, words
from tests.support.store_chunks import falsify
from vllm_kvmarket import Market
from vllm_kvmarket.connector.metrics import PREFIX
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

LENGTH = 700  # two whole chunks and a short one
CHUNKS = 3
QUESTION = words(995, 10)


@pytest.fixture(scope="module")
def llm(tiny, market: Market):
    """An engine of this file's own: vLLM forgets the metrics of one when another starts."""
    with running(tiny(1), market, **SMALL) as engine:
        yield engine


def counted(llm, name: str, **labels: str) -> float:
    """A counter of the connector, as Prometheus would see it."""
    found = [
        metric.value
        for metric in llm.get_metrics()
        if metric.name == PREFIX + name and labels.items() <= metric.labels.items()
    ]
    return sum(found)


def reuse(llm, market: Market, prompt: list[int], seconds: float = 60):
    """Ask as a buyer, with nothing in vLLM's own cache."""
    empty_prefix_cache(llm)
    started = time.monotonic()
    answer = ask(llm, prompt, market.params("alice"), rest_s=0)
    assert time.monotonic() - started < seconds
    return answer


def computed(llm, market: Market, prompt: list[int]):
    """Ask as somebody who gets everything computed."""
    empty_prefix_cache(llm)
    answer = ask(llm, prompt, market.params("dave"), rest_s=0)
    assert answer.market.get("reused_tokens", 0) == 0
    return answer


def wait_until_the_host_tier_rests(llm) -> None:
    """Hot chunks come into host memory when the machine has nothing else to do."""
    before = -1.0
    for _ in range(30):
        time.sleep(0.3)
        ask(llm, [17, 29], None, max_tokens=1, rest_s=0)  # a step, with which figures travel
        now = counted(llm, "host_cache_bytes")
        if now == before:
            return
        before = now
    raise AssertionError("the host tier goes on growing")


def test_a_hot_document_is_served_from_host_memory(llm, market: Market):
    """From the third time on, token for token the same, even with the files gone."""
    document = words(501, LENGTH)
    listing = market.publish(llm, token_ids=document)
    full = computed(llm, market, document + QUESTION)
    for _ in range(2):
        assert reuse(llm, market, document + QUESTION).market["reused_tokens"] == LENGTH
    wait_until_the_host_tier_rests(llm)
    for key in listing.chunk_keys:
        market.store.disk.delete(key)
    before = counted(llm, "chunks_loaded", tier="host")
    answer = reuse(llm, market, document + QUESTION)
    assert answer.market["reused_tokens"] == LENGTH
    assert answer.token_ids == full.token_ids
    assert counted(llm, "chunks_loaded", tier="host") - before == CHUNKS
    assert counted(llm, "host_cache_bytes") > 0


def test_chunks_of_a_request_that_waits_are_read_ahead(llm, market: Market):
    """While another prompt takes all the tokens of a step; it then loads from host memory."""
    document = words(502, LENGTH)
    market.publish(llm, token_ids=document)
    full = computed(llm, market, document + QUESTION)
    empty_prefix_cache(llm)
    done = counted(llm, "prefetches", result="done")
    host = counted(llm, "chunks_loaded", tier="host")
    sampling = llm.get_default_sampling_params()
    sampling.temperature, sampling.max_tokens = 0.0, 24
    sampling.min_tokens = 24
    buyer = sampling.clone()
    buyer.extra_args = market.params("alice")
    long = {"prompt_token_ids": words(503, 3000)}
    short = {"prompt_token_ids": document + QUESTION}
    outputs = llm.generate([long, short], [sampling, buyer], use_tqdm=False)
    assert tuple(outputs[1].outputs[0].token_ids) == full.token_ids
    assert outputs[1].kv_transfer_params["kvmarket"]["reused_tokens"] == LENGTH
    assert counted(llm, "prefetches", result="done") - done == CHUNKS
    assert counted(llm, "chunks_loaded", tier="host") - host == CHUNKS


def test_a_damaged_chunk_is_counted_by_its_reason(llm, market: Market):
    """And so is that it was set aside."""
    document = words(504, LENGTH)
    listing = market.publish(llm, token_ids=document)
    full = computed(llm, market, document + QUESTION)
    market.store.disk.path(listing.chunk_keys[1]).write_bytes(b"nonsense")
    failures = counted(llm, "load_failures", reason="damaged")
    quarantined = counted(llm, "chunks_quarantined")
    answer = reuse(llm, market, document + QUESTION)
    assert answer.market["reused_tokens"] == 256
    assert answer.token_ids == full.token_ids
    assert counted(llm, "load_failures", reason="damaged") - failures == 1
    assert counted(llm, "chunks_quarantined") - quarantined == 1


def funded(home, **config) -> Market:
    market = Market.open(home, config)
    market.create_account("alice")
    market.deposit("alice", 1000 * NANO, "first-deposit")
    market.create_account("dave")
    return market


def test_a_document_is_fetched_from_the_object_store(tiny, tmp_path):
    """Chunks that left the disk come back, once; the publishing engine has uploaded them."""
    document = words(505, LENGTH)
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    with (
        funded(tmp_path / "home", object_store_url=bucket.as_uri()) as market,
        running(tiny(1), market, disable_log_stats=False) as llm,
    ):
        listing = market.publish(llm, token_ids=document)
        full = computed(llm, market, document + QUESTION)
        for key in listing.chunk_keys:
            market.store.disk.delete(key)
        for tier in ("objects", "disk"):
            answer = reuse(llm, market, document + QUESTION)
            assert answer.market["reused_tokens"] == LENGTH
            assert answer.token_ids == full.token_ids
            assert counted(llm, "chunks_loaded", tier=tier) == CHUNKS
        # An old copy of another publication: whole, of these tokens, with other bytes.
        document = words(507, LENGTH)
        listing = market.publish(llm, token_ids=document)
        full = computed(llm, market, document + QUESTION)
        for key in listing.chunk_keys:
            falsify(market.store.disk, key)
        fetched = counted(llm, "chunks_loaded", tier="objects")
        answer = reuse(llm, market, document + QUESTION)
        assert answer.market["reused_tokens"] == LENGTH
        assert answer.token_ids == full.token_ids
        assert counted(llm, "chunks_loaded", tier="objects") - fetched == CHUNKS


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield listener.getsockname()[1]


@pytest.mark.long
def test_an_object_store_that_never_answers_costs_a_deadline_and_no_token(
    tiny, tmp_path, black_hole, monkeypatch
):
    """The document is computed, not charged, and stays on offer: nothing says that it is bad."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    document = words(506, LENGTH)
    home = tmp_path / "home"
    with funded(home) as market, running(tiny(1), market) as llm:
        listing = market.publish(llm, token_ids=document)
        full = computed(llm, market, document + QUESTION)
        for key in listing.chunk_keys:
            market.store.disk.delete(key)
        # As if it had always been a cache of that bucket.
        market.catalogue.store_record.write("s3://bucket/prefix")
    dead = {
        "object_store_url": "s3://bucket/prefix",
        "object_store_options": {
            "endpoint": f"http://127.0.0.1:{black_hole}",
            "region": "us-east-1",
            "allow_http": "true",
        },
        "object_store_timeout_s": 2.0,
    }
    with funded(home, **dead) as market, running(tiny(1), market, disable_log_stats=False) as llm:
        for _ in range(2):
            answer = reuse(llm, market, document + QUESTION, seconds=20)
            assert answer.token_ids == full.token_ids
            assert answer.market["reused_tokens"] == 0
            assert answer.market["charge_nano"] == 0
        assert counted(llm, "load_failures", reason="io") == 2 * CHUNKS
        assert market.catalogue.get(listing.document_id).state == "live"
