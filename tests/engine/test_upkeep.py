"""Pins, times to live, quotas and eviction, audits: what an operator does with an engine."""

from __future__ import annotations

import time

import pytest

from tests.support.engines import NANO, running, words
from tests.support.store_chunks import replace_pages
from vllm_kvmarket import Market, PublishFailedError
from vllm_kvmarket.core.errors import PinError
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache
from vllm_kvmarket.store import open_chunk

QUESTION = words(995, 9)


def flood(llm, count: int = 6) -> None:
    """Requests that need the paged cache's room, so that what nobody holds is dropped."""
    for number in range(count):
        ask(llm, words(6900 + number, 900), max_tokens=2, rest_s=0)


def test_a_pinned_document_stays_in_the_paged_cache_until_it_is_unpinned(llm, market: Market):
    """Other requests push everything else out. An emptied cache has it again after its next use."""
    document = words(6000, 700)
    listing = market.publish(llm, token_ids=document, title="pinned")
    empty_prefix_cache(llm)
    assert market.pin(llm, listing.document_id) == 5 * 128
    assert market.catalogue.get(listing.document_id).pinned

    def loaded() -> int:
        flood(llm)
        answer = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
        assert answer.market["reused_tokens"] == 700
        answers.add(answer.token_ids)
        return int(answer.market["loaded_tokens"])

    answers: set[tuple[int, ...]] = set()
    assert loaded() == 700 - 5 * 128
    assert llm.reset_prefix_cache(), "a pin is in nobody's way"
    assert loaded() == 700
    assert loaded() == 700 - 5 * 128

    market.unpin(listing.document_id)
    time.sleep(0.5)
    assert loaded() > 700 - 5 * 128
    assert len(answers) == 1


@pytest.mark.parametrize("how", ["reset while requests run", "pause"])
def test_an_engine_with_pins_can_take_new_weights(llm, market: Market, how):
    """vLLM empties its cache for that, with requests under way; nothing of the old ones stays."""
    document = words(6010, 300)
    listing = market.publish(llm, token_ids=document, title="reset")
    market.pin(llm, listing.document_id)
    core = llm.llm_engine.engine_core
    if how == "pause":
        core.call_utility("pause_scheduler", "abort", True)
        core.call_utility("resume_scheduler")
    else:
        assert llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    answer = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
    assert (answer.market["reused_tokens"], answer.market["loaded_tokens"]) == (300, 300)
    market.unpin(listing.document_id)


def test_pins_never_starve_the_engine(llm, market: Market):
    """43 blocks, of which the longest request needs 33: what is over the budget is refused."""
    listings = [
        market.publish(llm, token_ids=words(6020 + number, 768), title=f"pin {number}")
        for number in range(2)
    ]
    market.pin(llm, listings[0].document_id)
    with pytest.raises(PinError, match="unpin another document"):
        market.pin(llm, listings[1].document_id)
    assert not market.catalogue.get(listings[1].document_id).pinned
    longest = ask(llm, words(6030, 4000), max_tokens=4, rest_s=0)
    assert len(longest.token_ids) == 4
    market.unpin(listings[0].document_id)


def test_a_document_is_sold_until_its_time_is_over(llm, market: Market):
    """Then it does not match any more, and says that it expired."""
    document = words(6040, 300)
    listing = market.publish(llm, token_ids=document, title="brief", ttl_s=3.0)
    empty_prefix_cache(llm)
    sold = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
    assert sold.market["reused_tokens"] == 300
    time.sleep(max(0.0, (listing.terms.expires_at_s or 0) - time.time()) + 1.0)
    after = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
    assert after.market.get("reused_tokens", 0) == 0
    assert market.catalogue.get(listing.document_id).state == "expired"
    again = market.publish(llm, token_ids=document, title="brief")
    assert (again.state, again.terms.expires_at_s) == ("live", None)


def test_an_audit_tells_honest_chunks_from_poisoned_ones(llm, market: Market):
    """Recomputed here: equal, or different by more than rounding; the result stays on record."""
    document = words(6050, 700)
    listing = market.publish(llm, token_ids=document, title="audited")
    honest = market.audit(llm, listing.document_id, chunks=3, seed=1)
    assert honest.chunks == 3
    assert honest.result in ("exact", "close")
    assert honest.worst_difference < 1e-4

    # Poison: another document's pages, stored under this one's key with checksums that fit.
    other = market.publish(llm, token_ids=words(6051, 700), title="other")
    poison(market, listing.chunk_keys[1], other.chunk_keys[1])
    market.store.verify(listing.chunk_keys[1])
    caught = market.audit(llm, listing.document_id, chunks=3, seed=1)
    assert caught.result == "different"
    assert caught.worst_difference > 1e-3
    results = [audit.result for audit in market.catalogue.audits_of(listing.document_id)]
    assert sorted(results) == sorted([honest.result, "different"])

    # It is sold no more, and the next publication does not keep what is stored.
    assert market.catalogue.get(listing.document_id).state == "damaged"
    market.store.verify(listing.chunk_keys[1])
    market.republish(llm, listing.document_id)
    assert market.audit(llm, listing.document_id, chunks=3, seed=1).result in ("exact", "close")
    market.delist(listing.document_id)


def poison(market: Market, key: bytes, source: bytes) -> None:
    """Give a chunk the pages of another one, in a file that verifies."""
    with open_chunk(market.store.disk.path(source), source) as chunk:
        layers = [[chunk.layer(index)] for index in range(len(chunk.header.layout.layers))]
    replace_pages(market.store.disk.path(key), key, layers)


def test_a_full_store_evicts_what_is_worth_least_and_never_exceeds_its_quota(tiny, tmp_path):
    """Bought documents stay, others go, and one that does not fit at all is refused."""
    with Market.open(tmp_path) as market:
        market.create_account("alice")
        market.deposit("alice", 1000 * NANO, "d")
    # A page of the tiny model is 64 KiB a layer and 128 tokens: a document of 1,280 takes 1.9 MB.
    quota = 7_000_000
    with (
        Market.open(tmp_path, {"disk_quota_bytes": quota}) as market,
        running(tiny(1), market, num_gpu_blocks_override=44) as llm,
    ):
        documents = [words(6100 + number, 1280) for number in range(5)]
        listings = []
        for number, document in enumerate(documents):
            listings.append(market.publish(llm, token_ids=document, title=str(number)))
            assert market.store.disk.usage().bytes_used <= quota
            if number == 0:
                answer = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
                assert answer.market["reused_tokens"] == 1280
                time.sleep(2.5)  # uses are written down every two seconds
        states = [market.catalogue.get(listing.document_id).state for listing in listings]
        assert states[0] == "live", "the one that sells"
        assert states[-1] == "live", "the newest"
        assert states.count("evicted") >= 1
        assert market.catalogue.check_integrity() == []

        empty_prefix_cache(llm)
        gone = states.index("evicted")
        full = ask(llm, documents[gone] + QUESTION, market.params("alice"), rest_s=0)
        assert full.market.get("reused_tokens", 0) == 0
        assert market.republish(llm, listings[gone].document_id).state == "live"

        before = market.catalogue.listings(state="live")
    with (
        Market.open(tmp_path, {"disk_quota_bytes": 1_000_000}) as market,
        running(tiny(1), market, num_gpu_blocks_override=44) as llm,
    ):
        with pytest.raises(PublishFailedError, match="quota"):
            market.publish(llm, token_ids=words(6110, 1280), title="too much")
        answer = ask(llm, documents[0] + QUESTION, market.params("alice"), rest_s=0)
        assert len(answer.token_ids) == 24, "serving goes on"
        assert market.catalogue.listings(state="live") == before, "it could not fit anyway"
        assert market.ledger.check_integrity() == []


@pytest.mark.long
def test_an_encoded_store_gives_the_same_tokens(tiny, tmp_path):
    """With zstd-exponent, in a fresh engine: smaller on the disk, equal in the paged cache."""
    document = words(6200, 700)
    with Market.open(tmp_path, {"codec": "zstd-exponent"}) as market:
        market.create_account("alice")
        market.deposit("alice", 1000 * NANO, "d")
        with running(tiny(1), market) as llm:
            listing = market.publish(llm, token_ids=document, title="encoded")
            full = ask(llm, document + QUESTION, rest_s=0)
            assert full.market["declined"]
            empty_prefix_cache(llm)
            reuse = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
        assert reuse.token_ids == full.token_ids
        assert reuse.market["reused_tokens"] == 700
        pages = 6 * 3 * 65_536
        assert listing.stored_bytes < pages / 1.1
