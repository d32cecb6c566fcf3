"""Other engines on the same market: other weights, other settings, damaged files, restarts."""

from __future__ import annotations

import os
from multiprocessing import get_context

import pytest

from tests.support.engines import NANO, running, words
from vllm_kvmarket import Market
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

pytestmark = pytest.mark.long

QUESTION = words(997, 10)
DOCUMENT = words(80, 700)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="module")
def published(tiny, home):
    """A market on which an engine that is gone has published DOCUMENT."""
    with Market.open(home) as market:
        market.create_account("alice")
        market.deposit("alice", 1000 * NANO, "d")
        with running(tiny(1), market) as llm:
            market.publish(llm, token_ids=DOCUMENT, title="variants")
            expected = ask(llm, DOCUMENT + QUESTION, rest_s=0)
            assert expected.market["declined"]
        yield market, expected


def test_an_engine_without_prefix_caching_loads_all_of_it_every_time(tiny, published):
    """vLLM's prefix cache off, in a fresh process: the store alone serves, again and again."""
    market, expected = published
    with running(tiny(1), market, enable_prefix_caching=False) as llm:
        for _ in range(2):
            answer = ask(llm, DOCUMENT + QUESTION, market.params("alice"), rest_s=0)
            assert answer.token_ids == expected.token_ids
            assert answer.market["loaded_tokens"] == 700


def test_another_model_of_the_same_name_shares_nothing(tiny, published):
    """Same folder name, same shapes, other weights: another namespace."""
    market, expected = published
    with running(tiny(2), market) as llm:
        answer = ask(llm, DOCUMENT + QUESTION, market.params("alice"), rest_s=0)
        assert answer.market.get("matched_tokens", 0) == 0
        assert answer.token_ids != expected.token_ids
        mine = market.publish(llm, token_ids=DOCUMENT)
    listed = market.catalogue.listings(state="live")
    assert len({listing.namespace for listing in listed}) == 2
    assert mine.document_id in {listing.document_id for listing in listed}


def test_a_damaged_chunk_is_recomputed_and_not_charged_and_repaired_by_publishing(tiny, published):
    """A flipped byte in the second chunk: what lies before it is sold, the rest computed."""
    market, expected = published
    (listing,) = (each for each in market.catalogue.listings() if each.terms.title == "variants")
    path = market.store.disk.path(listing.chunk_keys[1])
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    # Without the host tier, which would go on selling chunks whose files are gone.
    on_disk = market.transfer_config(host_cache_bytes=0)
    with running(tiny(1), market, kv_transfer_config=on_disk) as llm:
        answer = ask(llm, DOCUMENT + QUESTION, market.params("alice"), rest_s=0)
        assert answer.token_ids == expected.token_ids
        assert answer.market["reused_tokens"] == 256
        receipt = market.receipt(answer.market["receipt_id"])
        assert (receipt.tokens_reused, receipt.tokens_failed) == (256, 444)
        assert receipt.charge_nano == 256 * 500
        assert market.catalogue.get(listing.document_id).state == "damaged"

        repaired = market.publish(llm, token_ids=DOCUMENT, title="variants")
        assert repaired.state == "live"
        empty_prefix_cache(llm)
        again = ask(llm, DOCUMENT + QUESTION, market.params("alice"), rest_s=0.5)
        assert again.token_ids == expected.token_ids
        assert again.market["reused_tokens"] == 700

        for key in listing.chunk_keys:
            market.store.disk.delete(key)
        empty_prefix_cache(llm)
        lost = ask(llm, DOCUMENT + QUESTION, market.params("alice"), rest_s=0)
        assert lost.token_ids == expected.token_ids
        assert lost.market["charge_nano"] == 0
    assert market.ledger.check_integrity() == []


def test_a_publisher_who_cannot_pay_for_storing_is_refused(tiny, home, tmp_path):
    """With a price for publishing, an account without funds lists nothing; one with funds pays."""
    with Market.open(tmp_path, {"tariff": {"cache_write_nano_per_mtok": NANO}}) as market:
        with running(tiny(1), market) as llm:
            with pytest.raises(Exception, match="cannot pay"):
                market.publish(llm, token_ids=DOCUMENT, publisher="poor")
            market.create_account("rich", "publisher")
            market.deposit("rich", NANO, "d")
            listing = market.publish(llm, token_ids=DOCUMENT, publisher="rich")
        assert listing.state == "live"
        assert market.ledger.account("rich").balance_nano == NANO - 700 * 1000
        assert market.ledger.check_integrity() == []


def _publish_and_buy(model, home):
    """In a process of its own, which vLLM's engine shares."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with Market.open(home, {"host_cache_bytes": 0}) as market:
        market.create_account("alice")
        market.deposit("alice", 1000 * NANO, "d")
        with running(model, market) as llm:
            assert hasattr(llm.llm_engine.engine_core, "engine_core")
            full = ask(llm, DOCUMENT + QUESTION, rest_s=0)
            listing = market.publish(llm, token_ids=DOCUMENT)
            assert market.audit(llm, listing.document_id).result == "exact"
            empty_prefix_cache(llm)
            answer = ask(llm, DOCUMENT + QUESTION, market.params("alice"), rest_s=0)
    assert answer.market["loaded_tokens"] == len(DOCUMENT)
    assert (answer.token_ids, answer.logprobs) == (full.token_ids, full.logprobs)


def test_an_engine_in_the_process_that_asks_it_publishes_and_sells(tiny, tmp_path):
    """It computes only while it is asked to: publishing waits for a listing and asks."""
    process = get_context("spawn").Process(target=_publish_and_buy, args=(tiny(1), tmp_path))
    process.start()
    process.join(300)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()
