"""The gate before a small app: what reaches a route, and what does not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient

from tests.support.catalogue_documents import store_and_list, tokens
from tests.support.gate_app import make_app
from vllm_kvmarket import Market
from vllm_kvmarket.api.auth import Queue
from vllm_kvmarket.api.gate.route_kinds import ROUTES, Kind
from vllm_kvmarket.auth.api_keys import KeyLimits, Keys
from vllm_kvmarket.core.errors import LedgerUnavailableError
from vllm_kvmarket.core.pricing import Tariff
from vllm_kvmarket.market.market import DATABASE_FILE

GENERATING = sorted(path for (path, _), kind in ROUTES.items() if kind.generates)
TARIFF = Tariff().terms().cache_read_nano_per_mtok
SALTED = {path for (path, _), kind in ROUTES.items() if kind is Kind.SALTED}


@pytest.fixture
def market(tmp_path):
    with Market.open(tmp_path / "home") as opened:
        opened.create_account("alice")
        opened.deposit("alice", 10**9, "first")
        yield opened


@pytest.fixture
def keys(market):
    opened = Keys(market.home / DATABASE_FILE)
    yield opened
    opened.close()


@pytest.fixture
def app(market, keys):
    return make_app(market, keys)


@pytest.fixture
def client(app):
    with TestClient(app) as opened:
        yield opened


@pytest.fixture
def alice(keys):
    return {"authorization": f"Bearer {keys.create('alice')[0]}"}


def reached(response):
    assert response.status_code == 200, response.text
    return response.json()["body"]


def signed(market, got):
    """The parameters that the engine believes, without what signs them and the request's id."""
    params = got["kv_transfer_params"]["kvmarket"]
    assert market.credentials.allows_params(params)
    hidden = ("token", "expires_at_s", "request_id")
    return {name: value for name, value in params.items() if name not in hidden}


@pytest.mark.parametrize("path", GENERATING)
def test_every_generating_route_is_told_the_account_by_the_server_alone(
    client, market, alice, path
):
    """The client's own value is removed; the salt is the account's."""
    theirs = {"kvmarket": {"account": "bob"}, "prompt_token_ids": [1]}
    body = {"kv_transfer_params": theirs, "cache_salt": "x", "ec_transfer_params": {"a": 1}}
    body |= {"prompt": "a", "vllm_xargs": {"kv_transfer_params": "x", "mine": 1}}
    body |= {"sampling_params": {"extra_args": {"kv_transfer_params": {"kvmarket": {}}}}}
    got = reached(client.post(path, json=body, headers=alice))
    if path in SALTED:
        assert "kv_transfer_params" not in got
    else:
        assert signed(market, got) == {"account": "alice", "max_cache_read_nano_per_mtok": TARIFF}
    assert got["cache_salt"] == market.credentials.sign("salt", "account:alice\0x")
    assert "ec_transfer_params" not in got
    assert got["vllm_xargs"] == {"mine": 1}
    assert got["sampling_params"] == {"extra_args": {}}
    assert got["prompt"] == "a"


@pytest.mark.parametrize("path", GENERATING)
def test_without_a_key_no_route_is_told_an_account(client, path):
    """And each request has its own salt, too long to meet another's."""
    body = {"kv_transfer_params": {"kvmarket": {"account": "alice"}}, "cache_salt": "x"}
    salts = set()
    for _ in range(3):
        got = reached(client.post(path, json=body))
        assert "kv_transfer_params" not in got
        salts.add(got["cache_salt"])
    assert len(salts) == 3
    assert min(map(len, salts)) == 64


def test_parameters_signed_by_the_operator_are_heard(client, market, alice):
    """An account's token buys; the operator's publishes; neither beside a key, nor a false one."""
    account = {"kvmarket": market.credentials.sign_params({"account": "bob"})}
    got = reached(client.post("/v1/completions", json={"kv_transfer_params": account}))
    assert signed(market, got)["account"] == "bob"
    # What this gate signed for one request may stand in a log: it is worthless there.
    leaked = got["kv_transfer_params"]
    got = reached(client.post("/v1/completions", json={"kv_transfer_params": leaked}))
    assert "kv_transfer_params" not in got
    operator = {"kvmarket": market.credentials.sign_params({"preload": True})}
    got = reached(client.post("/v1/completions", json={"kv_transfer_params": operator}))
    assert got["kv_transfer_params"] == operator
    got = reached(
        client.post("/v1/completions", json={"kv_transfer_params": account}, headers=alice)
    )
    assert got["kv_transfer_params"]["kvmarket"]["account"] == "alice"
    false = {"kvmarket": {**account["kvmarket"], "account": "alice"}}
    got = reached(client.post("/v1/completions", json={"kv_transfer_params": false}))
    assert "kv_transfer_params" not in got


def test_a_server_may_refuse_clients_without_a_key(tmp_path, keys):
    """On all routes that work, and on none that only reads."""
    with Market.open(tmp_path / "home", {"anonymous": "refuse"}) as market:
        client = TestClient(make_app(market, keys))
        for (path, method), kind in ROUTES.items():
            status = client.request(method, path, json={}).status_code
            assert status == (200 if kind in (Kind.OPEN, Kind.METRICS) else 401), path


def test_a_route_that_is_not_known_is_for_admins_only(app, client, keys, alice):
    """A new generating route of vLLM cannot slip by."""
    admin = {"x-api-key": keys.create("root", ["admin"])[0]}
    assert client.post("/v9/dream", json={}).status_code == 401
    assert client.post("/v9/dream", json={}, headers=alice).status_code == 403
    assert app.state.reached == []
    assert client.post("/v9/dream", json={}, headers=admin).status_code == 200


def test_a_market_that_is_not_open_lets_nothing_through(app, client):
    """The engine is on one, but the server could not open it."""
    app.state.kvmarket_service = None
    transfer = SimpleNamespace(kv_connector="kvmarket", kv_connector_extra_config={})
    app.state.vllm_config = SimpleNamespace(kv_transfer_config=transfer)
    assert client.post("/v1/completions", json={}).status_code == 503
    assert client.get("/health").status_code == 200
    app.state.vllm_config = SimpleNamespace(kv_transfer_config=None)
    assert client.post("/v1/completions", json={}).status_code == 200


def test_keys_that_cannot_be_read_let_nobody_in(app, client, keys, alice):
    """503: one may have been revoked meanwhile."""
    keys.close()
    app.state.kvmarket_service.keys = keys
    assert client.post("/v1/completions", json={}, headers=alice).status_code == 503
    assert app.state.reached == []


def ask(client, headers, prompt, **wish):
    body = {"prompt": prompt, "kvmarket": wish or None}
    return client.post("/v1/completions", json=body, headers=headers)


def test_what_is_wanted_of_reuse_is_read_from_one_field(client, alice):
    """And does not reach the route."""
    for wish, buys in (({"reuse": "never"}, False), ({"reuse": "prefer"}, True), ({}, True)):
        got = reached(ask(client, alice, [1], **wish))
        assert "kvmarket" not in got
        if buys:
            assert got["kv_transfer_params"]["kvmarket"]["account"] == "alice"
        else:
            assert got["kv_transfer_params"] == {"kvmarket": {"declined": "never"}}


def test_a_document_is_put_in_front_of_tokens(client, alice, market):
    """Of a prompt, of several, and of what takes nothing but tokens; not on all routes."""
    document = tokens(300)
    name = store_and_list(market, document).document_id
    assert reached(ask(client, alice, [1, 2], document=name))["prompt"] == [*document, 1, 2]
    got = reached(ask(client, alice, [[1], [2, 3]], document=name))
    assert got["prompt"] == [[*document, 1], [*document, 2, 3]]
    body = {"token_ids": [1], "kvmarket": {"document": name}}
    got = reached(client.post("/inference/v1/generate", json=body, headers=alice))
    assert got["token_ids"] == [*document, 1]
    for path in SALTED:
        assert client.post(path, json=body, headers=alice).status_code == 400
    for wrong in (None, [], [None], [1, "a"], {"a": 1}):
        assert ask(client, alice, wrong, document=name).status_code == 400


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", {"echo": True}),
        ("/v1/completions", {"suffix": "b"}),
        ("/v1/completions", {"prompt_logprobs": 0}),
        ("/v1/completions", {"truncate_prompt_tokens": 100}),
        ("/v1/completions", {"truncation_side": "left"}),
        ("/v1/completions", {"a_field_of_a_later_vllm": 1}),
        ("/inference/v1/generate", {"features": {"mm_hashes": {}}}),
        ("/inference/v1/generate", {"sampling_params": {"skip_reading_prefix_cache": True}}),
        ("/inference/v1/generate", {"sampling_params": {"prompt_logprobs": 0}}),
    ],
)
def test_only_known_fields_go_with_a_document(client, alice, market, path, field):
    """Others may show the document's text, or lead around paying for it."""
    name = store_and_list(market, tokens(300)).document_id
    body = {"prompt": [1]} if path == "/v1/completions" else {"token_ids": [1]}
    body |= {"kvmarket": {"document": name}, "max_tokens": 5, "stream": False, "user": None}
    if path != "/v1/completions":
        body |= {"sampling_params": {"max_tokens": 5, "n": 2}}
    reached(client.post(path, json=body, headers=alice))
    reply = client.post(path, json=body | field, headers=alice)
    (name_of_field,) = field.get("sampling_params", field)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, name_of_field)


@pytest.mark.parametrize("path", GENERATING)
def test_clients_neither_reorder_the_queue_nor_choose_an_engine(client, alice, keys, path):
    """Priority, rank and SageMaker's headers are an admin's; a client's are dropped."""
    headers = {
        "X-Vllm-Priority": "-9",
        "X-data-parallel-rank": "0",
        "X-Amzn-SageMaker-Adapter-Identifier": "other",
    }
    body = {"prompt": "a", "priority": -9}
    for key in (alice, {}):
        got = client.post(path, json=body, headers=headers | key).json()
        assert "priority" not in got["body"]
        assert not {name.lower() for name in headers} & set(dict(got["headers"]))
    admin = {"x-api-key": keys.create("root", ["admin"])[0]}
    got = client.post(path, json=body, headers=headers | admin).json()
    assert got["body"]["priority"] == -9
    assert {name.lower() for name in headers} <= set(dict(got["headers"]))


def test_beam_search_is_for_admins(app, client, alice, keys):
    """Each beam and token is a full prefill that nobody pays for."""
    body = {"prompt": "a", "use_beam_search": True, "n": 4}
    assert client.post("/v1/completions", json=body).status_code == 403
    assert client.post("/v1/completions", json=body, headers=alice).status_code == 403
    assert app.state.reached == []
    admin = {"x-api-key": keys.create("root", ["admin"])[0]}
    assert client.post("/v1/completions", json=body, headers=admin).status_code == 200


def test_a_clients_own_salt_divides_its_accounts_prefixes(client, alice, keys):
    """A reseller's users share nothing; and no salt leads to another account's prefixes."""
    bob = {"x-api-key": keys.create("bob")[0]}
    salts = {
        (who, salt): reached(
            client.post("/v1/completions", json={"cache_salt": salt}, headers=headers)
        )["cache_salt"]
        for who, headers in (("alice", alice), ("bob", bob))
        for salt in ("", "user 1", "user 2")
    }
    assert len(set(salts.values())) == 6
    again = client.post("/v1/completions", json={"cache_salt": "user 1"}, headers=alice)
    assert reached(again)["cache_salt"] == salts["alice", "user 1"]


def test_ids_of_media_belong_to_the_account(client, alice, keys):
    """vLLM's cache of images is found by them: another account's id names another image."""
    bob = {"x-api-key": keys.create("bob")[0]}

    def ids(headers):
        part = {"type": "image_url", "image_url": None, "uuid": "cat"}
        body = {"messages": [{"role": "user", "content": [part]}]}
        got = reached(client.post("/v1/chat/completions", json=body, headers=headers))
        sent = {"token_ids": [1], "features": {"mm_hashes": {"image": ["cat"]}}}
        made = reached(client.post("/inference/v1/generate", json=sent, headers=headers))
        return {
            got["messages"][0]["content"][0]["uuid"],
            *made["features"]["mm_hashes"]["image"],
        }

    assert len(ids(alice)) == 1 and "cat" not in ids(alice)
    assert ids(alice) == ids(alice) and not ids(alice) & ids(bob)
    assert not ids({}) & ids({})


def test_a_document_that_is_not_on_offer_is_not_placed(client, alice, market):
    """From the moment on that it is taken off the market."""
    name = store_and_list(market, tokens(300)).document_id
    reached(ask(client, alice, [1], document=name))
    market.delist(name)
    reply = ask(client, alice, [1], document=name)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "document_not_on_offer")


def test_reuse_has_a_limit(client, alice, market):
    """Above it: computed, or 402 with the quote where reuse is required."""
    prompt = [*tokens(300), 1]
    name = store_and_list(market, prompt[:-1]).document_id
    price = 300 * 500
    for most, buys in ((price, True), (price - 1, False)):
        got = reached(ask(client, alice, prompt, max_price_nano=most))["kv_transfer_params"]
        assert (got == {"kvmarket": {"declined": "max_price"}}) is not buys
        assert ("account" in got["kvmarket"]) is buys
    reached(ask(client, alice, prompt, reuse="require", max_price_nano=price))
    reply = ask(client, alice, prompt, reuse="require", max_price_nano=price - 1)
    assert reply.status_code == 402
    assert reply.json()["quote"] == {
        "document_id": name,
        "prompt_tokens": 301,
        "matched_tokens": 300,
        "charge_nano": price,
        "without_reuse_nano": 10 * price,
        "available_nano": 10**9,
    }
    assert ask(client, alice, [1, 2], reuse="require").status_code == 404


def test_a_server_may_refuse_clients_that_cannot_pay(tmp_path, keys):
    """402; what matches nothing costs nothing, and is computed."""
    with Market.open(tmp_path / "home", {"unfunded": "refuse"}) as market:
        prompt = [*tokens(300), 1]
        store_and_list(market, prompt[:-1])
        client = TestClient(make_app(market, keys))
        poor = {"authorization": f"Bearer {keys.create('poor')[0]}"}
        reply = ask(client, poor, prompt)
        assert (reply.status_code, reply.json()["error"]["code"]) == (402, "insufficient_funds")
        reached(ask(client, poor, [1, 2]))
        reached(ask(client, poor, prompt, reuse="never"))


def test_a_request_is_computed_while_the_ledger_is_away(client, alice, market, monkeypatch):
    """With "prefer" the engine keeps the limit; what must be reused is refused."""

    def away(*_):
        raise LedgerUnavailableError("no database")

    prompt = [*tokens(300), 1]
    store_and_list(market, prompt[:-1])
    monkeypatch.setattr(market.ledger, "account", away)
    got = reached(ask(client, alice, prompt, max_price_nano=10**9))
    assert got["kv_transfer_params"]["kvmarket"]["max_price_nano"] == 10**9
    assert ask(client, alice, prompt, reuse="require").status_code == 503
    # Nobody could add up what several prompts cost: each may cost its part of the limit.
    got = reached(ask(client, alice, [prompt, prompt], max_price_nano=10**9))
    assert got["kv_transfer_params"]["kvmarket"]["max_price_nano"] == [10**9 // 2] * 2


METRICS = """# HELP vllm:kvmarket_charged_nano_total Charges.
# TYPE vllm:kvmarket_charged_nano_total counter
vllm:kvmarket_charged_nano_total{what="reuse"} 5.0
# HELP vllm:kvmarket_reused_tokens_total Tokens.
vllm:kvmarket_reused_tokens_total 7.0
vllm:kvmarket_provider_balance_nano 9.0
"""


def test_amounts_of_money_leave_the_metrics(tmp_path, keys, alice):
    """Everybody sees the other metrics; an admin's key, or the configuration, shows all."""
    admin = {"x-api-key": keys.create("root", ["admin"])[0]}
    for shown in (False, True):
        with Market.open(tmp_path / "home", {"metrics_money": shown}) as market:
            app = make_app(market, keys)

            async def metrics(scope, receive, send):
                await PlainTextResponse(METRICS)(scope, receive, send)

            app.router.routes[:] = [r for r in app.routes if r.path != "/metrics"]
            app.mount("/metrics", metrics)
            client = TestClient(app)
            for headers in ({}, alice, {"accept-encoding": "gzip"}):
                reply = client.get("/metrics/", headers=headers).text
                assert ("charged_nano" in reply) is ("balance_nano" in reply) is shown
                assert "vllm:kvmarket_reused_tokens_total 7.0" in reply
            assert client.get("/metrics/", headers=admin).text == METRICS


@pytest.mark.parametrize(
    ("transfer", "has_market"),
    [
        ({"kv_connector": "kvmarket"}, True),
        ({"kv_connector": "KVMarketConnector"}, True),
        ({"kv_connector": "NixlConnector"}, False),
        (
            {
                "kv_connector": "MultiConnector",
                "kv_connector_extra_config": {
                    "connectors": [
                        {"kv_connector": "NixlConnector"},
                        {"kv_connector": "kvmarket", "kv_connector_extra_config": {"home": "/h"}},
                    ]
                },
            },
            True,
        ),
    ],
)
def test_a_market_is_found_wherever_it_is_configured(app, client, transfer, has_market):
    """Then nothing that generates is let through without it."""
    app.state.kvmarket_service = None
    filled = SimpleNamespace(**{"kv_connector_extra_config": None} | transfer)
    app.state.vllm_config = SimpleNamespace(kv_transfer_config=filled)
    status = client.post("/v1/completions", json={}).status_code
    assert status == (503 if has_market else 200)


def test_a_document_is_reserved_or_refused(client, alice, market):
    """The engine knows its id and the duty; a limit below its price is refused here already."""
    name = store_and_list(market, tokens(300)).document_id
    got = signed(market, reached(ask(client, alice, [1, 2], document=name)))
    assert got == {"account": "alice", "document": name, "must_reserve": True}
    for most, status in ((300 * 500, 200), (300 * 500 - 1, 402), (0, 402)):
        reply = ask(client, alice, [1, 2], document=name, max_price_nano=most)
        assert reply.status_code == status, reply.text
    assert reply.json()["quote"]["document_id"] == name
    got = signed(market, reached(ask(client, alice, [*tokens(300), 1], reuse="require")))
    assert got["must_reserve"] is True and "document" not in got


def test_a_document_is_quoted_without_what_lies_behind_it(client, alice, market):
    """A longer listing of somebody else takes no part in the sale."""
    document = tokens(300)
    name = store_and_list(market, document).document_id
    store_and_list(market, [*document, *tokens(200, 1)])
    prompt = [*tokens(200, 1), 1]
    reply = ask(client, alice, prompt, document=name, max_price_nano=300 * 500)
    assert reply.status_code == 200


def test_a_dear_addition_behind_a_keys_cap_is_not_in_its_offer(client, keys, market):
    """The engine buys the cheap part; the limit and the budget are compared with that."""
    cheap = tokens(300)
    store_and_list(market, cheap)
    store_and_list(market, [*cheap, *tokens(200, 1)], cache_read_nano_per_mtok=TARIFF + 1)
    limits = KeyLimits(max_cache_read_nano_per_mtok=TARIFF, day_budget_nano=300 * 500)
    key = keys.create("alice", limits=limits)[0]
    prompt = [*cheap, *tokens(200, 1), 1]
    reply = ask(client, {"x-api-key": key}, prompt, reuse="require")
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("limits", "wish", "expected"),
    [
        ({}, {}, TARIFF),
        ({"max_cache_read_nano_per_mtok": 7}, {}, 7),
        ({}, {"reuse": "prefer"}, TARIFF),
        ({}, {"max_price_nano": 10**9}, None),
        ({"max_cache_read_nano_per_mtok": 7}, {"max_price_nano": 10**30}, 7),
        ({"consents": False}, {}, "never"),
        ({"consents": False}, {"max_price_nano": 10**9}, "never"),
        ({"consents": False}, {"reuse": "prefer"}, TARIFF),
        ({"consents": False}, {"reuse": "prefer", "max_price_nano": 10**9}, None),
    ],
)
def test_reuse_is_bought_where_it_was_agreed_to(*, client, keys, market, limits, wish, expected):
    """By the request, or by its key in advance; up to the tariff, without a limit of one's own."""
    key = keys.create("alice", limits=KeyLimits(**limits))[0]
    got = reached(ask(client, {"x-api-key": key}, [*tokens(300), 1], **wish))
    if expected == "never":
        assert got["kv_transfer_params"] == {"kvmarket": {"declined": "never"}}
    else:
        assert signed(market, got).get("max_cache_read_nano_per_mtok") == expected


def test_a_keyed_request_buys_nothing_while_its_key_cannot_be_kept(
    client, alice, market, monkeypatch
):
    """Its retry would be charged again; it is computed, or refused where it must reuse."""
    prompt = [*tokens(300), 1]
    store_and_list(market, prompt[:-1])
    keyed = alice | {"idempotency-key": "k"}

    def away(*_):
        raise LedgerUnavailableError("no database")

    with monkeypatch.context() as patched:
        patched.setattr(market.ledger, "use_key", away)
        got = reached(ask(client, keyed, prompt))
        assert got["kv_transfer_params"] == {"kvmarket": {"declined": "ledger_unavailable"}}
        assert ask(client, keyed, prompt, reuse="require").status_code == 503
        assert "account" in signed(market, reached(ask(client, alice, prompt)))
    assert signed(market, reached(ask(client, keyed, prompt)))["purchase_key"]


def test_retries_are_one_purchase(client, alice, keys, market):
    """By the header, account and body; four answers at most, and no other body."""
    market.create_account("bob")
    bob = {"x-api-key": keys.create("bob")[0]}

    def send(headers, key, body):
        return client.post("/v1/completions", json=body, headers=headers | {"idempotency-key": key})

    def purchase(*asked):
        return signed(market, reached(send(*asked))).get("purchase_key")

    body = {"prompt": [1, 2]}
    first = purchase(alice, "k", body)
    assert first and purchase(alice, "k", body) == first
    assert len({first, purchase(bob, "k", body), purchase(alice, "other", body)}) == 3
    reply = send(alice, "k", {"prompt": [1, 3]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "idempotency_key_reused")
    codes = {send(alice, "k", body).json().get("error", {}).get("code") for _ in range(4)}
    assert codes == {None, "idempotency_key_used_up"}
    for wrong in ("a b", "a" * 256):
        assert send(alice, wrong, body).status_code == 400
    got = reached(client.post("/v1/completions", json=body, headers=alice | {"x-request-id": "k"}))
    assert "purchase_key" not in signed(market, got)
    assert send({}, "k", body).status_code == 200


def test_more_requests_than_the_gate_can_prepare_are_sent_away(app, client, alice):
    """At once, with the time to come again; what does not generate is served."""
    app.state.kvmarket_service.gate_queue = Queue(0, "the gate")
    reply = client.post("/v1/completions", json={"prompt": "a"}, headers=alice)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "server_busy")
    assert int(reply.headers["retry-after"]) > 0 and app.state.reached == []
    assert client.get("/health").status_code == 200


def test_a_request_has_one_id_that_its_receipts_have_too(client, alice):
    """The client's, or the server's; a bad one or two are refused."""
    given = client.post("/v1/completions", json={}, headers=alice | {"x-request-id": "mine"})
    assert dict(given.json()["headers"])["x-request-id"] == "mine"
    made = client.post("/v1/completions", json={}, headers=alice)
    assert len(dict(made.json()["headers"])["x-request-id"]) == 32
    for wrong in ("a b", "a" * 300):
        reply = client.post("/v1/completions", json={}, headers=alice | {"x-request-id": wrong})
        assert reply.status_code == 400


def test_responses_are_not_stored(client, alice):
    """Whoever knew an id could go on with another's conversation."""
    got = reached(client.post("/v1/responses", json={"input": "a", "store": True}, headers=alice))
    assert got["store"] is False
    for field in ({"previous_response_id": "resp_1"}, {"background": True}):
        reply = client.post("/v1/responses", json={"input": "a", **field}, headers=alice)
        assert reply.status_code == 400


def test_a_stream_has_one_more_event_at_its_end(client, alice):
    """For an account; what came before is as it was."""
    reply = client.post("/v1/completions", json={"stream": True}, headers=alice).text
    assert reply.startswith("data: {}\n\ndata: [DONE]\n\nevent: kvmarket\ndata: ")
    event = json.loads(reply.rsplit("data: ", 1)[1])
    assert (event["type"], event["receipts"]) == ("kvmarket", [])
    assert client.post("/v1/completions", json={"stream": True}).text == (
        "data: {}\n\ndata: [DONE]\n\n"
    )


def test_errors_have_the_shape_of_the_api_that_was_asked(client):
    """OpenAI's, and Anthropic's for messages."""
    headers = {"x-api-key": "kvm_wrong"}
    reply = client.post("/v1/chat/completions", json={}, headers=headers).json()
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    reply = client.post("/v1/messages", json={}, headers=headers).json()
    assert (reply["type"], reply["error"]["type"]) == ("error", "authentication_error")
