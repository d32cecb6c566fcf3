"""Requests that must be reserved: what cannot be reserved is ended, and none of it is computed."""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.scheduler_half import (
    CACHED,
    DOCUMENT,
    half_of,
    local_tokens,
    request_of,
)
from vllm_kvmarket.connector import step_ends
from vllm_kvmarket.core.errors import CatalogueError, LedgerUnavailableError

PROMPT = [*DOCUMENT, 7, 8]


def params(**fields):
    return {"kv_transfer_params": {"kvmarket": {"must_reserve": True, **fields}}}


def name_of(market):
    return market.match(NAMESPACE, PROMPT).listing.document_id


def decided(half, request):
    """Ask as vLLM's scheduler asks, until the request can go on or is to be ended."""
    deadline = time.monotonic() + 10
    while True:
        external, _ = half.ready(request, local_tokens(half, request))
        assert not request.skip_reading_prefix_cache, "vLLM would compute it in full"
        half.take_instructions()
        refused = half.take_refusals()
        if external is not None or refused:
            return external, refused.get(request.request_id)
        assert time.monotonic() < deadline
        time.sleep(0.001)


REFUSED = [
    ({"account": "poor"}, PROMPT, "insufficient_funds", 402),
    ({"account": "nobody"}, PROMPT, "account_unknown", 402),
    ({}, PROMPT, "account_missing", 402),
    ({"account": "alice", "max_price_nano": 0}, PROMPT, "price_above_limit", 402),
    ({"account": "alice", "max_price_nano": 600 * 500 - 1}, PROMPT, "price_above_limit", 402),
    ({"account": "alice", "max_cache_read_nano_per_mtok": 1}, PROMPT, "price_above_limit", 402),
    ({"account": "alice"}, tokens(600, 9), "document_not_on_offer", 404),
    ({"account": "alice", "document": "DOCUMENT"}, PROMPT[1:], "document_not_on_offer", 404),
    ({"account": "alice", "document": "DOCUMENT"}, PROMPT[:599], "document_mismatch", 409),
    ({"account": "alice", "document": "kvd_other"}, PROMPT, "document_not_on_offer", 404),
    ({"account": "alice", "declined": "never"}, PROMPT, "request_refused", 409),
    ({"account": "alice", "nonsense": 1}, PROMPT, "request_refused", 409),
]


@pytest.mark.parametrize(("fields", "prompt", "code", "status"), REFUSED)
def test_what_cannot_be_reserved_is_ended_with_a_reason(
    market, half, *, fields, prompt, code, status
):
    """vLLM never goes on with it, whatever it has cached; nothing is charged or stays reserved."""
    if fields.get("document") == "DOCUMENT":
        fields = {**fields, "document": name_of(market)}
    request = request_of(prompt, params(**fields), status=RequestStatus.WAITING, output=0)
    half.arrived(request)
    external, refusal = decided(half, request)
    assert (external, refusal.code, refusal.status) == (None, code, status)
    assert refusal.message
    request.status = RequestStatus.FINISHED_ABORTED
    half.finished(request, [[]])
    assert half._requests == {}
    market.ledger.submit([]).result()
    for account in ("alice", "poor"):
        found = market.ledger.account(account)
        assert found.debits_posted == found.debits_pending == 0


def test_what_can_be_reserved_is_sold(market, half):
    """To the document's end."""
    fields = {"account": "alice", "document": name_of(market), "max_price_nano": 600 * 500}
    request = request_of(PROMPT, params(**fields))
    half.arrived(request)
    assert decided(half, request) == (600 - CACHED, None)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_named_document_that_lost_a_chunk_since_its_quote_is_not_on_offer(market, half, lost):
    """The client was told a price; what is left is not sold as the document. Healed, it is."""
    listing = market.match(NAMESPACE, PROMPT).listing
    key = listing.chunk_keys[lost]
    assert market.quote(NAMESPACE, PROMPT, named=True).tokens == 600
    market.catalogue.report_damage(key)
    fields = {"account": "alice", "document": listing.document_id}
    request = request_of(PROMPT, params(**fields))
    half.arrived(request)
    external, refusal = decided(half, request)
    assert (external, refusal.code, refusal.status) == (None, "document_not_on_offer", 404)
    assert listing.document_id in refusal.message
    half.finished(request, [[]])
    market.catalogue.heal(key)
    request = request_of(PROMPT, params(**fields), "r-2")
    half.arrived(request)
    assert decided(half, request) == (600 - CACHED, None)


@pytest.mark.parametrize(("has_cap", "reused"), [(True, 600), (False, 900)])
def test_a_dear_addition_does_not_keep_a_buyer_with_a_price_cap_from_the_rest(
    market, half, has_cap, reused
):
    """Older documents are sold as before, also to a request that must reuse."""
    tariff = market.config.tariff.terms()
    store_and_list(
        market,
        [*DOCUMENT, *range(100, 400)],
        publisher="mallory",
        cache_read_nano_per_mtok=tariff.input_nano_per_mtok,
    )
    half._market.catalogue.refresh()
    half._market.catalogue.refresh()
    prompt = [*DOCUMENT, *range(100, 400), 7]
    cap = {"max_cache_read_nano_per_mtok": tariff.cache_read_nano_per_mtok}
    request = request_of(prompt, params(account="alice", **(cap if has_cap else {})))
    half.arrived(request)
    assert decided(half, request) == (reused - CACHED, None)


@pytest.fixture
def longer(market, half):
    """Another publisher's document that begins with DOCUMENT, eight times as dear a token."""
    market.create_account("sam", "publisher")
    document = [*DOCUMENT, *tokens(200, 5)]
    store_and_list(market, document, publisher="sam", cache_read_nano_per_mtok=4_000_000_000)
    half._market.catalogue.refresh()
    return document


def buy(half, prompt, **fields):
    """One purchase from its arrival to its answer; what of it was sold, and the charge."""
    request = request_of([*prompt, 7, 8], params(**{"account": "alice", **fields}))
    half.arrived(request)
    external, refusal = decided(half, request)
    assert refusal is None
    made = half._requests[request.request_id]
    sold = [(line.listing.terms.publisher, line.end) for line in lines_of(half, made)]
    half.finished(request, [[]])
    return external + CACHED, sold


def lines_of(half, made):
    return half._market.quote_match(made.purchase.item.match).lines


def test_a_named_document_is_bought_at_its_terms_and_nothing_behind_it(market, half, longer):
    """Somebody else's longer document, which the prompt contains too, is not."""
    name = market.match(NAMESPACE, DOCUMENT).whole.document_id
    assert buy(half, longer) == (800, [("pat", 600), ("sam", 800)])
    assert buy(half, longer, document=name) == (600, [("pat", 600)])


def test_a_dear_continuation_keeps_nobody_from_buying_the_document(market, half, longer):
    """Where an account has agreed to a price a token, the match ends before what is dearer."""
    cap = {"max_cache_read_nano_per_mtok": 500_000_000}
    assert buy(half, longer, **cap) == (600, [("pat", 600)])
    name = market.match(NAMESPACE, longer).whole.document_id
    request = request_of([*longer, 7], params(account="alice", document=name, **cap))
    half.arrived(request)
    assert decided(half, request)[1].code == "price_above_limit"


def test_a_limit_buys_the_part_that_it_pays_for(market, half, longer):
    """Also where several prompts have a limit each."""
    assert buy(half, longer, max_price_nano=600 * 500) == (600, [("pat", 600)])
    assert buy(half, longer, max_price_nano=[600 * 500, 0]) == (600, [("pat", 600)])
    request = request_of(PROMPT, params(account="alice", max_price_nano=[10**9, 0]), "cmpl-a-1")
    half.arrived(request)
    assert decided(half, request)[1].code == "price_above_limit"
    request = request_of(PROMPT, params(account="alice", max_price_nano=[0, 600 * 500]), "cmpl-b-1")
    half.arrived(request)
    assert decided(half, request) == (600 - CACHED, None)


def test_an_account_buys_the_part_that_its_funds_pay_for(market, half, longer):
    """Once the ledger has refused the whole. A document that is named is bought whole, or not."""
    market.create_account("bob")
    market.deposit("bob", 600 * 500 + 10, "d2")
    request = request_of([*longer, 7, 8], params(account="bob"))
    half.arrived(request)
    assert decided(half, request)[1].code == "insufficient_funds"
    half.finished(request, [[]])
    name = market.match(NAMESPACE, longer).whole.document_id
    request = request_of([*longer, 7], params(account="bob", document=name))
    half.arrived(request)
    assert decided(half, request)[1].code == "insufficient_funds"
    assert buy(half, longer, account="bob") == (600, [("pat", 600)])


def test_a_request_that_would_read_no_cache_is_ended_too(market, half):
    """vLLM would compute it at once, and asks nobody."""
    request = request_of(PROMPT, params(account="alice"))
    request.skip_reading_prefix_cache = True
    half.arrived(request)
    external, refusal = decided(half, request)
    assert (external, refusal.code) == (None, "document_mismatch")


def test_a_ledger_that_is_away_refuses_for_now(half, monkeypatch):
    """503: the client may try again."""
    failed: Future[object] = Future()
    failed.set_exception(LedgerUnavailableError("no database"))
    monkeypatch.setattr(half._market.ledger, "submit", lambda *_, **__: failed)
    request = request_of(PROMPT, params(account="alice"))
    half.arrived(request)
    _, refusal = decided(half, request)
    assert (refusal.code, refusal.status) == ("ledger_unavailable", 503)


def test_a_document_that_cannot_be_looked_up_is_not_computed(market, monkeypatch):
    """Its last chunk's tokens are on another machine, which is away."""
    half = half_of(market, monkeypatch)
    failed: Future = Future()
    failed.set_exception(CatalogueError("locked"))
    monkeypatch.setattr(half._market.catalogue, "match_later", lambda *_: failed)
    request = request_of(PROMPT, params(account="alice"))
    half.arrived(request)
    _, refusal = decided(half, request)
    assert (refusal.code, refusal.status) == ("catalogue_unavailable", 503)
    half.close()


def test_without_a_valid_token_nothing_is_computed_for_it(market, monkeypatch):
    """A token for another request, or none, refuses; the right one buys."""
    half = half_of(market, monkeypatch, trust_requests=False)
    fields = {"account": "alice", "must_reserve": True, "request_id": "r-1"}
    signed = market.credentials.sign_params(fields)
    for name, sent, sold in (
        ("cmpl-r-1-0", signed, True),
        ("cmpl-r-2-0", signed, False),
        ("cmpl-r-1-1", {**fields, "token": "0" * 64}, False),
        ("cmpl-r-1-2", {**signed, "max_price_nano": 10**12}, False),
    ):
        request = request_of(PROMPT, {"kv_transfer_params": {"kvmarket": sent}}, name)
        half.arrived(request)
        external, refusal = decided(half, request)
        assert (external is not None) == sold
        assert sold or (refusal.code, refusal.status) == ("request_refused", 409)
    half.close()


@pytest.mark.parametrize("trust", [None, False])
def test_only_an_explicit_true_trusts_requests(market, monkeypatch, trust):
    """Not a configuration that nobody has completed."""
    half = half_of(market, monkeypatch, trust_requests=trust)
    request = request_of(PROMPT, params(account="alice"))
    half.arrived(request)
    _, refusal = decided(half, request)
    assert "token" in refusal.message
    half.close()


def test_vllms_scheduler_ends_them_and_answers(half):
    """In the step in which they were refused: with the reason, and without a token."""
    request = request_of(PROMPT, params(account="poor"), status=RequestStatus.WAITING)
    request.client_index, request.trace_headers = 3, None
    request.record_event = request.take_events = lambda *_: None
    request.get_finished_reason = lambda: FinishReason.ABORT
    half.arrived(request)
    while not half._engine.refusals:
        half.ready(request, CACHED)
    ended = []

    def finish_requests(ids, status):
        ended.extend((each, status) for each in ids)
        return [request]

    scheduler = SimpleNamespace(finish_requests=finish_requests, log_stats=True)
    outputs: dict = {}
    step_ends.end_refused(scheduler, half.take_refusals(), outputs)
    (answer,) = outputs[3].outputs
    assert ended == [(request.request_id, RequestStatus.FINISHED_ABORTED)]
    assert (answer.new_token_ids, answer.finish_reason) == ([], FinishReason.ABORT)
    assert answer.kv_transfer_params["kvmarket"]["error"]["status"] == 402


def test_vllms_scheduler_is_changed_once():
    """However many connectors are made in a process."""
    step_ends.install()
    changed = Scheduler.update_from_output
    step_ends.install()
    assert Scheduler.update_from_output is changed
