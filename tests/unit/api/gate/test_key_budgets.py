"""The budgets of API keys: what requests, their retries and their refusals take from them."""

from __future__ import annotations

from tests.support.catalogue_documents import store_and_list, tokens
from tests.unit.api.gate.test_middleware import (  # noqa: F401  # fixtures
    app,
    ask,
    client,
    keys,
    market,
    reached,
    signed,
)
from vllm_kvmarket.auth.api_keys import KeyLimits

PRICE = 300 * 500  # of 300 tokens, on the tariff


def test_a_keys_budget_is_charged_with_what_was_sold(app, client, keys, market):  # noqa: F811
    """Before the request, with the quote; afterwards it gets back what was not charged."""
    prompt = [*tokens(300), 1]
    store_and_list(market, prompt[:-1])
    secret, key_id = keys.create("alice", limits=KeyLimits(total_budget_nano=2 * PRICE))
    key = {"x-api-key": secret}

    def left():
        return keys.budget_left_nano(key_id)

    part = {"receipt_id": "r", "charge_nano": PRICE - 10}
    app.state.engine_client.answers = [{}, part, part]
    got = signed(market, reached(ask(client, key, prompt)))
    assert got["max_price_nano"] == PRICE and left() == PRICE + 10
    app.state.engine_client.answers = [{"receipt_id": None, "charge_nano": 0}]
    reached(ask(client, key, prompt))
    assert left() == PRICE + 10
    app.state.engine_client.answers = [{"receipt_id": "s", "charge_nano": PRICE}]
    reached(ask(client, key, prompt))
    got = reached(ask(client, key, prompt))
    assert got["kv_transfer_params"] == {"kvmarket": {"declined": "max_price"}}
    reply = ask(client, key, prompt, reuse="require")
    assert (reply.status_code, reply.json()["error"]["code"]) == (402, "budget_exhausted")
    assert left() == 10


def test_a_retry_is_counted_once_in_its_keys_budget(app, client, keys, market):  # noqa: F811
    """The first attempt's answer is not known, as its client left; the second one says that it was
    paid before.
    """
    prompt = [*tokens(300), 1]
    store_and_list(market, prompt[:-1])
    secret, key_id = keys.create("alice", limits=KeyLimits(total_budget_nano=PRICE))
    body, headers = {"prompt": prompt}, {"x-api-key": secret, "idempotency-key": "k"}
    for answers in ([], [{"receipt_id": "r", "charge_nano": 0}]):
        app.state.engine_client.answers = answers
        got = signed(market, reached(client.post("/v1/completions", json=body, headers=headers)))
        assert got["max_price_nano"] == PRICE
        assert keys.budget_left_nano(key_id) == 0
    headers["idempotency-key"] = "other"
    got = reached(client.post("/v1/completions", json=body, headers=headers))
    assert got["kv_transfer_params"] == {"kvmarket": {"declined": "max_price"}}


def test_a_body_that_is_refused_takes_nothing_from_a_budget(client, keys, market):  # noqa: F811
    """It is refused before the engine is asked, which would say what was charged."""
    prompt = [*tokens(300), 1]
    store_and_list(market, prompt[:-1])
    secret, key_id = keys.create("alice", limits=KeyLimits(total_budget_nano=PRICE))
    form = {"structured_outputs": {"regex": "a{1,5000}"}}
    body = {"prompt": prompt, **form}
    reply = client.post("/v1/completions", json=body, headers={"x-api-key": secret})
    assert reply.json()["error"]["code"] == "form_too_long"
    assert keys.budget_left_nano(key_id) == PRICE


def test_a_small_budget_buys_what_it_can_pay(client, keys, market):  # noqa: F811
    """An addition, published later, does not end the sales of what stands before it."""
    document = tokens(600)
    store_and_list(market, document[:300])
    store_and_list(market, document)
    secret, key_id = keys.create("alice", limits=KeyLimits(day_budget_nano=PRICE + 1))
    got = signed(market, reached(ask(client, {"x-api-key": secret}, [*document, 1])))
    assert got["max_price_nano"] == PRICE
    assert keys.budget_left_nano(key_id) == 1
