"""A document on its way to a listing, called as vLLM's scheduler calls the half."""

from __future__ import annotations

import time

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from tests.support.catalogue_documents import tokens
from tests.support.paged import blocks_of
from tests.support.scheduler_half import (
    BLOCK_TOKENS,
    CACHED,
    DOCUMENT,
    cache_blocks,
    cache_document,
    half_of,
    local_tokens,
    opened_market,
    request_of,
)
from vllm_kvmarket.connector.messages import SaveReport, WorkerReport
from vllm_kvmarket.core.errors import CatalogueError
from vllm_kvmarket.core.pricing import NANO

NEW = tokens(600, 4)
PRICE_NANO = 600 * 2


@pytest.fixture
def market(tmp_path):
    with opened_market(tmp_path) as opened:
        opened.deposit("pat", NANO, "for storing")
        yield opened


@pytest.fixture
def half(market, monkeypatch):
    tariff = {"cache_write_nano_per_mtok": 2_000_000}
    made = half_of(market, monkeypatch, tariff=tariff)
    yield made
    made.close()


def begun(half, publisher="pat", **more):
    """A publishing request that may be computed, or was declined."""
    request = arrived(half, publisher, **more)
    assert found(half, request) == (0, 0)
    return request


def arrived(half, publisher="pat", prompt=NEW, **more):
    wish = {"publish": {"terms": {"title": "new", "publisher": publisher}}}
    request = request_of(prompt, {"kv_transfer_params": {"kvmarket": wish}}, output=1, **more)
    half.arrived(request)
    return request


def found(half, request):
    """What vLLM finds in its cache in the end, and what it is to load behind that."""
    deadline = time.monotonic() + 10
    while (external := half.ready(request, local := local_tokens(half, request))[0]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return local, external


def stored(half, request, **report):
    """The request ends, and its chunks are stored as the report says; the answer."""
    blocks = list(range(-(-len(NEW) // BLOCK_TOKENS)))
    waits, answer = half.finished(request, [blocks])
    if waits:
        (plan,) = half.take_instructions().saves
        assert [len(blocks_of(chunk)) for chunk in plan.chunks] == [2, 2, 1]
        assert all(chunk.is_new for chunk in plan.chunks)
        saves = {request.request_id: SaveReport(**report)}
        half.worker_reported(
            KVConnectorOutput(
                kv_connector_worker_meta=WorkerReport(saves=saves),
                finished_sending={request.request_id},
            )
        )
    half._market._clerk.submit(lambda: None).result()
    half._market.ledger.submit([]).result()
    assert half._requests == {}
    return answer["kvmarket"]


def paid(market, account="pat"):
    found = market.ledger.account(account)
    assert found.debits_pending == 0
    return found.debits_posted


def test_a_stored_document_is_listed_and_paid_for(market, half):
    """Once its listing is in the catalogue."""
    answer = stored(half, begun(half), stored_bytes=1000)
    assert market.catalogue.get(answer["document_id"]).state == "live"
    assert paid(market) == PRICE_NANO


def test_a_listing_that_is_not_committed_costs_nothing(market, half, monkeypatch):
    """The catalogue cannot be written: the publisher pays for no listing."""

    def away(*_):
        raise CatalogueError("disk full")

    request = begun(half)
    monkeypatch.setattr(half._market.catalogue, "commit", away)
    stored(half, request, stored_bytes=1000)
    assert paid(market) == 0


@pytest.mark.parametrize(
    "report", [{"failure": "no space", "stored_bytes": 10}, {"stored_bytes": 0}]
)
def test_what_was_not_stored_costs_nothing(market, half, report):
    """Nor does what was there before."""
    stored(half, begun(half), **report)
    assert paid(market) == 0


def test_an_aborted_publication_costs_nothing(market, half):
    """And is not listed."""
    request = begun(half)
    request.status = RequestStatus.FINISHED_ABORTED
    answer = stored(half, request)
    assert market.catalogue.get(answer["document_id"]).state != "live"
    assert paid(market) == 0


def test_a_publisher_without_funds_is_declined(market, half):
    """With the reason; nothing is listed."""
    answer = stored(half, begun(half, publisher="alex"))
    assert "cannot pay" in answer["declined"]
    assert market.catalogue.get(answer["document_id"]).state != "live"


def test_nothing_is_taken_from_the_cache_that_is_not_on_offer(half):
    """It is left from an earlier offer, and may be what has to be repaired."""
    cache_document(half, NEW)
    request = arrived(half)
    assert local_tokens(half, request) == 512
    assert found(half, request) == (0, 0)


def test_what_is_on_offer_is_taken_from_the_cache_and_the_rest_computed(half):
    """The document becomes longer. Its readers have left all of it in the cache."""
    longer = DOCUMENT + NEW
    cache_document(half, longer)
    request = arrived(half, prompt=longer)
    assert local_tokens(half, request) == 1152
    assert found(half, request) == (512, 600 - 512)
    half.finished(request, [list(range(10))])
    (plan,) = half.take_instructions().saves
    assert [chunk.is_new for chunk in plan.chunks] == [False, False, False, True, True]


def test_buyers_find_what_was_just_published_and_not_what_lay_there(half):
    """An older reader has left its blocks while the document was computed."""
    request = begun(half)
    older, own = cache_document(half, NEW), cache_blocks(half, request)
    pool = half._engine.pins._pool
    assert [pool.get_cached_block(each, [0])[0].block_id for each in request.block_hashes] == older
    half.finished(request, [[*own, 0]])
    assert [pool.get_cached_block(each, [0])[0].block_id for each in request.block_hashes] == own


def test_a_prompt_of_embeddings_is_neither_published_nor_matched(market, half):
    """Its token ids, where it has some, do not say what its KV is."""
    wish = {"publish": {"terms": {"title": "new", "publisher": "pat"}}}
    mixed = request_of(NEW, {"kv_transfer_params": {"kvmarket": wish}}, output=1)
    mixed.prompt_embeds = object()
    half.arrived(mixed)
    assert "embeddings" in stored(half, mixed)["declined"]

    buyer = request_of(DOCUMENT, {"kv_transfer_params": {"kvmarket": {"account": "alice"}}}, "r-2")
    buyer.prompt_embeds = object()
    half.arrived(buyer)
    assert half.ready(buyer, 0) == (0, False)
    _, answer = half.finished(buyer, [[]])
    assert answer["kvmarket"]["matched_tokens"] == 0


@pytest.fixture
def changing(half):
    """A half whose model's weights change."""
    half.namespaces.weights_changed = lambda **_: None
    half.namespaces.adapter_changed = lambda _: None
    return half


def buyer_of(name="r-1", **more):
    params = {"kv_transfer_params": {"kvmarket": {"account": "alice"}}}
    return request_of([*DOCUMENT, 1], params, name=name, **more)


def test_a_document_is_not_listed_when_weights_change_while_it_is_computed(market, changing):
    """A part of its KV may be of other weights."""
    request = begun(changing)
    changing.weights_changed("update_weights")
    answer = stored(changing, request, stored_bytes=1000)
    assert "weights were changed" in answer["declined"]
    assert market.catalogue.get(answer["document_id"]).state == "failed"


def test_a_match_is_not_loaded_when_weights_change_while_it_waits(changing):
    """It is computed with the new weights, and free."""
    buyer = buyer_of()
    changing.arrived(buyer)
    changing.weights_changed("update_weights")
    while (found := changing.ready(buyer, 0))[0] is None:
        time.sleep(0.001)
        changing.take_instructions({})
    assert found == (0, False)
    _, answer = changing.finished(buyer, [[]])
    assert "weights were changed" in answer["kvmarket"]["declined"]
    assert answer["kvmarket"]["charge_nano"] == 0


def test_blocks_of_old_weights_are_not_found_again(changing):
    """Requests that run write KV of the new weights behind them, under hashes of the old ones."""
    before, after = buyer_of("r-1"), buyer_of("r-2")
    changing.arrived(before)
    assert local_tokens(changing, before) == CACHED
    changing.weights_changed("reload_weights", adapters=False)
    assert local_tokens(changing, before) == 0
    changing.arrived(after)
    assert local_tokens(changing, after) == 0


def test_requests_of_another_adapter_go_on(changing):
    """Only those of the one that is loaded anew are computed."""
    first, second = (
        buyer_of(name, lora_request=LoRARequest(name, number, "folder"))
        for number, name in enumerate(("r-1", "r-2"), 1)
    )
    changing.arrived(first)
    changing.arrived(second)
    changing.adapter_changed(2)
    assert changing._requests["r-1"].declined == ""
    assert "weights were changed" in changing._requests["r-2"].declined


def test_a_document_of_an_adapter_whose_files_changed_is_not_listed(market, half):
    """The worker may have read either of them."""
    request = begun(half, lora_request=LoRARequest("a", 1, "folder"))
    half.namespaces.of = lambda _: None
    answer = stored(half, request, stored_bytes=1000)
    assert market.catalogue.get(answer["document_id"]).state == "failed"
