"""Requests whose match ends inside a chunk that is read from another machine, called as vLLM's
scheduler calls the half.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from vllm.v1.request import RequestStatus

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.scheduler_half import (
    CACHED,
    DOCUMENT,
    cache_document,
    half_of,
    local_tokens,
    request_of,
)
from vllm_kvmarket.catalogue.sqlite_connections import SqliteConnections
from vllm_kvmarket.connector.scheduler import NOT_LOOKED_UP
from vllm_kvmarket.core.errors import CatalogueError

MATCHED = 598
PROMPT = [*DOCUMENT[:MATCHED], 7, 8]


@pytest.fixture
def new_half(market, monkeypatch):
    """Make a scheduler half whose database is read as if it were on another machine, or is not."""
    made = []

    def new(*, near: bool = False):
        monkeypatch.setattr(SqliteConnections, "is_near", near)
        made.append(half_of(market, monkeypatch))
        return made[-1]

    yield new
    for half in made:
        half.close()


def asked(half, request) -> tuple[int, int] | None:
    """One look of vLLM's scheduler: the local and the external tokens it goes on with, if it does.

    It looks into its cache first.
    """
    local = local_tokens(half, request)
    external, _ = half.ready(request, local)
    return None if external is None else (local, external)


def admitted(half, request) -> tuple[int, int]:
    """Look until the request can go on."""
    deadline = time.monotonic() + 10
    while (found := asked(half, request)) is None:
        assert time.monotonic() < deadline
        half.take_instructions()
        time.sleep(0.001)
    return found


def end(half, request, external=0):
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 6)),))
    half.allocated(request, blocks, external)
    loads = half.take_instructions().loads
    return loads, (half.finished(request, [[1, 2, 3, 4, 5]])[1] or {}).get("kvmarket", {})


def test_what_is_looked_up_is_sold_as_any_other(new_half, market):
    """To the token, charged once."""
    store_and_list(market, tokens(600, 1), publisher="pat")
    half = new_half()
    cache_document(half, tokens(600, 1))
    for number, prompt in enumerate((PROMPT, [*tokens(600, 1)[:MATCHED], 7, 8])):
        request = request_of(prompt, market.params("alice"), f"r-{number}")
        half.arrived(request)
        assert admitted(half, request) == (CACHED, MATCHED - CACHED)
        # Here vLLM has no room to load, and goes on with what it has cached.
        _, answer = end(half, request)
        assert answer["document_id"] == market.match(NAMESPACE, prompt).listing.document_id
        assert (answer["matched_tokens"], answer["charge_nano"]) == (MATCHED, CACHED * 500)
        assert market.receipt(answer["receipt_id"]).charge_nano == CACHED * 500
    assert market.ledger.account("alice").debits_posted == 2 * CACHED * 500
    assert half._requests == {}


def test_what_is_loaded_are_the_documents_own_chunks(new_half, market):
    """From the first token that vLLM has not cached."""
    half = new_half()
    request = request_of(PROMPT, market.params("alice"))
    half.arrived(request)
    local, external = admitted(half, request)
    (plan,), _ = end(half, request, external)
    keys = market.match(NAMESPACE, PROMPT).listing.chunk_keys
    assert [chunk.key for chunk in plan.chunks] == list(keys[local // 256 :])


def test_what_nobody_published_goes_on_with_vllms_own_cache(new_half, market):
    """And leaves nothing behind."""
    half = new_half()
    for number, params in enumerate(({}, market.params("alice"))):
        request = request_of(tokens(600, 5), params, f"r-{number}")
        half.arrived(request)
        assert admitted(half, request) == (0, 0)
        end(half, request)
    assert half._requests == {}


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (lambda _: {}, "names no account"),
        (lambda market: market.params("poor"), "poor"),
        (lambda _: wish(declined="never"), "wants no reuse"),
        (lambda _: wish(account="alice", max_price_nano=1), "max_price_nano"),
        (lambda _: wish(nonsense=1), "malformed"),
    ],
)
def test_who_may_not_reuse_it_has_it_from_no_cache(new_half, market, params, reason):
    """Blocks that vLLM found before the database answered are not taken either."""
    half = new_half()
    request = request_of(PROMPT, params(market))
    half.arrived(request)
    assert admitted(half, request) == (0, 0)
    _, answer = end(half, request)
    assert reason in answer["declined"]
    assert (answer["reused_tokens"], answer["charge_nano"]) == (0, 0)
    assert market.ledger.account("alice").debits_posted == 0


def wish(**fields):
    return {"kv_transfer_params": {"kvmarket": fields}}


def test_nothing_is_decided_while_the_lookup_is_under_way(new_half, market, monkeypatch):
    """vLLM's cached blocks do not matter: it asks again until the database has answered."""
    half = new_half()
    catalogue = half._market.catalogue
    found: Future = Future()
    monkeypatch.setattr(catalogue, "match_later", lambda *_: found)
    request = request_of(PROMPT, market.params("alice"))
    half.arrived(request)
    for _ in range(3):
        assert asked(half, request) is None
        half.take_instructions()
    assert half._engine.purchases.held() == []
    found.set_result(market.match(NAMESPACE, PROMPT))
    assert admitted(half, request) == (CACHED, MATCHED - CACHED)


@pytest.mark.parametrize("error", [CatalogueError("locked"), ValueError("a bug")])
def test_a_lookup_that_fails_is_a_request_that_is_computed(new_half, market, monkeypatch, error):
    """In full: what could not be looked up may have been published."""
    half = new_half()
    failed: Future = Future()
    failed.set_exception(error)
    monkeypatch.setattr(half._market.catalogue, "match_later", lambda *_: failed)
    for number, params in enumerate(({}, market.params("alice"))):
        request = request_of(PROMPT, params, f"r-{number}")
        half.arrived(request)
        assert admitted(half, request) == (0, 0)
        _, answer = end(half, request)
        assert answer.get("charge_nano", 0) == 0
    assert answer["declined"] == NOT_LOOKED_UP
    assert half._requests == {}


def test_an_aborted_request_leaves_nothing(new_half, market, monkeypatch):
    """Neither a lookup nor a reservation, and the future need not be worked on any more."""
    half = new_half()
    waiting: Future = Future()
    monkeypatch.setattr(half._market.catalogue, "match_later", lambda *_: waiting)
    request = request_of(PROMPT, market.params("alice"))
    half.arrived(request)
    assert asked(half, request) is None
    request.status = RequestStatus.FINISHED_ABORTED
    assert half.finished(request, [[]]) == (False, None)
    assert waiting.cancelled()
    assert half._requests == {}
    assert half._engine.purchases.held() == []


def test_publishing_finds_what_is_published(new_half, market):
    """The part that is there is loaded, and the document is begun once the database has said so."""
    half = new_half()
    longer = [*DOCUMENT[:520], *tokens(200, 3)]
    request = request_of(longer, wish(publish={"terms": {"title": "longer"}}))
    half.arrived(request)
    assert admitted(half, request) == (CACHED, 520 - CACHED)
    assert half._requests[request.request_id].reuse.limit == 520
    assert market.catalogue.listings("publishing")[0].terms.title == "longer"


@pytest.mark.parametrize(("near", "prompt"), [(True, PROMPT), (False, [*DOCUMENT, 7, 8])])
def test_what_the_machine_knows_is_not_looked_up(new_half, market, near, prompt):
    """Not one extra step: a database at hand, or a prompt with the whole document."""
    half = new_half(near=near)
    request = request_of(prompt, market.params("alice"))
    half.arrived(request)
    assert half._requests[request.request_id].purchase is not None
    matched = 600 if prompt[:600] == DOCUMENT else MATCHED
    assert admitted(half, request) == (CACHED, matched - CACHED)


def test_the_samples_of_one_request_share_one_charge(new_half, market):
    """Each is looked up, and joins the purchase of the first."""
    half = new_half()
    samples = [request_of(PROMPT, market.params("alice")) for _ in range(3)]
    for number, request in enumerate(samples):
        request.request_id = f"{number}_cmpl"
        request.arrival_time = samples[0].arrival_time
        half.arrived(request)
    for request in samples:
        assert admitted(half, request) == (CACHED, MATCHED - CACHED)
    assert len(half._engine.purchases.held()) == 1


def test_a_document_that_another_process_pins_is_held(new_half, market, monkeypatch):
    """The next step asks whether it still is, and must not let go of it."""
    half = new_half()
    prompt = [*DOCUMENT, 7, 8]
    held = []
    monkeypatch.setattr(half.pins, "pin", lambda name, *_: held.append(name) or "")
    name = market.match(NAMESPACE, prompt).listing.document_id
    market.catalogue.set_pinned(name, pinned=True)
    request = request_of(prompt, market.params("alice"))
    half.arrived(request)
    admitted(half, request)
    half._requests[request.request_id].reuse.reused = 600
    end(half, request)
    assert held == [name]
    assert half._market.catalogue.index.is_pinned(name)
