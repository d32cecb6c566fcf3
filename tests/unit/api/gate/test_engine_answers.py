"""The engine's answers in the response of the same request: refusals, receipts, the end."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.page_visitor import sell
from tests.unit.api.gate.test_middleware import alice, app, client, keys, market  # noqa: F401  # fixtures
from vllm_kvmarket.api.gate import engine_answers


def sold(market, prompt, key):  # noqa: F811
    """The receipt of a purchase by alice, as the engine makes it."""
    engine = SimpleNamespace(namespace=NAMESPACE, prompt=lambda text, _: text)
    return sell(SimpleNamespace(market=market, engine=engine), prompt, "alice", key)


def test_a_streams_last_event_has_this_requests_receipts_only(app, client, alice, market):  # noqa: F811
    """Another request of the same account, with the same X-Request-Id, is not shown."""
    prompt = tokens(300)
    market.create_account("publisher", "publisher")
    store_and_list(market, prompt)
    earlier, own = (sold(market, prompt, key) for key in ("k1", "k2"))
    app.state.engine_client.answers = [{"receipt_id": None}, {"receipt_id": own.id}]
    headers = alice | {"x-request-id": "twice"}
    for _ in range(2):
        reply = client.post("/v1/completions", json={"stream": True}, headers=headers).text
        event = json.loads(reply.rsplit("data: ", 1)[1])
        assert [each["id"] for each in event["receipts"]] == [own.id] == event["receipt_ids"]
        assert earlier.id not in reply


@pytest.mark.parametrize("status", [402, 404, 409])
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_engine_is_the_response(app, client, alice, status, stream):  # noqa: F811
    """With its status, also of a stream: nothing was sent of it before."""
    error = {"status": status, "code": "insufficient_funds", "message": "make a deposit"}
    app.state.engine_client.answers = [{"error": error}]
    reply = client.post("/v1/completions", json={"stream": stream}, headers=alice)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, "insufficient_funds")
    assert reply.headers["content-type"] == "application/json"
    assert "kv_transfer_params" not in reply.text and "data:" not in reply.text
    app.state.engine_client.answers = []
    assert client.post("/v1/completions", json={}, headers=alice).status_code == 200


def test_an_engines_outputs_are_closed_with_their_reader(app):  # noqa: F811
    """A client that leaves ends the request in the engine, watched or not."""
    closed = []

    class Endless:
        async def generate(self):
            try:
                while True:
                    yield SimpleNamespace(kv_transfer_params=None)
            finally:
                closed.append(True)

    async def leave():
        engine = Endless()
        engine_answers.watch(engine)
        engine_answers._answers.set(engine_answers.Answers())
        outputs = engine.generate()
        await anext(outputs)
        await outputs.aclose()
        return list(closed)

    assert asyncio.run(leave()) == [True]
