"""Requests that are quoted or not, and the limit that the engine gets from a quote."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from tests.support.catalogue_documents import store_and_list, tokens
from tests.unit.api.gate.test_middleware import (  # noqa: F401  # fixtures
    alice,
    app,
    client,
    keys,
    market,
    reached,
    signed,
)


def ask(client, headers, model, **wish):  # noqa: F811
    body = {"model": model, "prompt": [*tokens(300), 1], "kvmarket": wish}
    return client.post("/v1/completions", json=body, headers=headers)


def test_the_engine_is_told_the_most_that_it_may_reserve(client, alice, market):  # noqa: F811
    """A price may have changed since the gate looked; without a limit there is none."""
    store_and_list(market, tokens(300))
    most = 300 * 500
    for wish in ({"reuse": "require"}, {}):
        reply = reached(ask(client, alice, "m", max_price_nano=most, **wish))
        assert reply["kv_transfer_params"]["kvmarket"]["max_price_nano"] == most
    reply = reached(ask(client, alice, "m"))
    assert "max_price_nano" not in reply["kv_transfer_params"]["kvmarket"]


def test_each_prompt_has_its_own_part_of_the_limit(client, alice, market):  # noqa: F811
    """Its quote, and an equal part of what is left: together never more than the limit."""
    store_and_list(market, tokens(300))
    price = 300 * 500
    body = {"prompt": [[*tokens(300), 1], [5, 6], [*tokens(300), 2]]}
    for wish, most in (
        ({"max_price_nano": 2 * price + 31}, [price + 10, 10, price + 10]),
        ({"max_price_nano": 2 * price - 1}, [price + (price - 1) // 3, (price - 1) // 3] * 2),
    ):
        reply = client.post("/v1/completions", json=body | {"kvmarket": wish}, headers=alice)
        got = signed(market, reached(reply))["max_price_nano"]
        assert sum(got) <= wish["max_price_nano"]
        assert got[:2] == most[:2]
    assert got[2] < price, "the limit buys one of them"


def test_a_limit_buys_the_part_that_it_pays_for(client, alice, market):  # noqa: F811
    """Quote and engine agree: what stands before a dear addition is sold, by the first in turn."""
    document = tokens(600)
    store_and_list(market, document[:300])
    store_and_list(market, document, cache_read_nano_per_mtok=10**9)
    body = {"prompt": [*document, 1], "kvmarket": {"reuse": "require", "max_price_nano": 300 * 500}}
    got = signed(market, reached(client.post("/v1/completions", json=body, headers=alice)))
    assert got["max_price_nano"] == 300 * 500
    body["kvmarket"]["max_price_nano"] -= 1
    refused = client.post("/v1/completions", json=body, headers=alice)
    assert refused.status_code == 402
    assert refused.json()["quote"]["charge_nano"] == 300 * 500 + 300 * 1000


@pytest.mark.parametrize("wish", [{"reuse": "require"}, {"document": "kvd_any"}])
def test_nothing_is_promised_of_an_adapter(app, client, alice, market, wish):  # noqa: F811
    """Its KV is another than the model's: what is on offer of that is no offer for it."""
    app.state.openai_serving_models = SimpleNamespace(lora_requests={"legal": object()})
    store_and_list(market, tokens(300))
    reply = ask(client, alice, "legal", **wish)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "adapter_not_quoted")
    # Its limit is the engine's to keep, which knows what it matches.
    got = reached(ask(client, alice, "legal", max_price_nano=1))
    assert got["kv_transfer_params"]["kvmarket"]["max_price_nano"] == 1


def test_nothing_is_promised_of_an_engine_that_reuses_nothing(app, client, alice, market):  # noqa: F811
    """Its self-test has not passed: who requires reuse is told at once, nobody else is refused."""
    store_and_list(market, tokens(300))
    app.state.kvmarket_service.frontend.is_exact = False
    reply = ask(client, alice, "m", reuse="require")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_match")
    reached(ask(client, alice, "m", max_price_nano=1))


def test_prompts_are_matched_beside_the_event_loop(client, alice, market, monkeypatch):  # noqa: F811
    """A match may wait for a database on another machine."""
    name = store_and_list(market, tokens(300)).document_id
    threads = []
    index = market.catalogue.index
    match = index.match_later
    monkeypatch.setattr(
        index,
        "match_later",
        lambda *asked: threads.append(threading.current_thread()) or match(*asked),
    )
    assert ask(client, alice, "m", reuse="require").status_code == 200
    assert ask(client, alice, "m", document=name).status_code == 200
    assert threads
    assert all(thread.name.startswith("asyncio_") for thread in threads)
