"""Charging over HTTP: clients that leave, send a request again, or ask for several answers."""

from __future__ import annotations

import http.client
import json
import time
from urllib.parse import urlsplit

import pytest

from tests.support.asking import wait_until
from tests.support.engines import words
from vllm_kvmarket import Market


@pytest.fixture(scope="module")
def document(llm, market):
    tokens = words(5500, 600)
    market.publish(llm, token_ids=tokens, title="over http")
    time.sleep(1)  # the server sees it within a second
    return tokens


@pytest.fixture
def server(open_server):
    return open_server


class Connection:
    """One HTTP connection that can be dropped at any moment, as clients do."""

    def __init__(self, base: str, market: Market) -> None:
        self._market = market
        self._connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=120)

    def post(self, prompt, headers=None, params=None, **body) -> None:
        """Send a completion that alice pays, without waiting for its answer."""
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8, **body}
        body |= params or self._market.params("alice")
        self._connection.request(
            "POST",
            "/v1/completions",
            json.dumps(body),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def response(self) -> http.client.HTTPResponse:
        """Wait for the answer's beginning."""
        response = self._connection.getresponse()
        assert response.status == 200, response.read()
        return response

    def status(self) -> int:
        """Wait for the answer's status."""
        return self._connection.getresponse().status

    def answer(self) -> dict:
        """Wait for the whole answer."""
        return json.load(self.response())

    def drop(self) -> None:
        """Leave."""
        self._connection.close()


@pytest.fixture
def connect(server, market):
    opened = []

    def make() -> Connection:
        opened.append(Connection(server, market))
        return opened[-1]

    yield make
    for connection in opened:
        connection.drop()


def test_a_client_that_leaves_a_stream_pays_for_the_document(market, document, bill, connect):
    """It had the first tokens; the engine stops, and books what was reused."""
    client = connect()
    client.post(document + words(5501, 12), stream=True, max_tokens=3000, ignore_eos=True)
    response = client.response()
    assert response.readline().startswith(b"data:")
    assert market.ledger.account("alice").debits_pending == 600 * 500
    response.close()
    client.drop()
    wait_until(lambda: bill.tokens() > 0)
    assert bill.tokens() == 600
    (receipt,) = bill.receipts()
    assert 1 <= receipt.tokens_output < 3000


def test_a_client_that_leaves_before_its_whole_answer_pays_nothing(market, document, bill, connect):
    """Not streamed: nothing was sent yet. Its second try is paid."""
    prompt = document + words(5502, 12)
    client = connect()
    client.post(prompt, headers={"X-Request-Id": "impatient"}, max_tokens=3000, ignore_eos=True)
    wait_until(lambda: market.ledger.account("alice").debits_pending == 600 * 500)
    time.sleep(0.3)  # the answer is being written
    client.drop()
    assert bill.tokens() == 0
    client = connect()
    client.post(prompt, headers={"X-Request-Id": "impatient"})
    client.answer()
    assert bill.tokens() == 600
    (receipt,) = bill.receipts()
    assert "impatient" in receipt.request_id


def test_a_request_that_is_sent_again_with_its_idempotency_key_is_paid_once(
    market, document, bill, connect
):
    """One charge, and the same receipt in both answers; with another body it is refused."""
    prompt = document + words(5503, 12)
    params = market.params("alice")
    answers = []
    for _ in range(2):
        client = connect()
        client.post(prompt, {"Idempotency-Key": "from-the-client"}, params)
        answers.append(client.answer()["kv_transfer_params"]["kvmarket"])
    assert bill.tokens() == 600
    (receipt,) = bill.receipts()
    assert [answer["receipt_id"] for answer in answers] == [receipt.id] * 2
    client = connect()
    client.post([*prompt, 1], {"Idempotency-Key": "from-the-client"}, params)
    assert client.status() == 409


def test_a_request_id_means_nothing_for_money(document, bill, connect):
    """Two answers under one X-Request-Id are two purchases."""
    prompt = document + words(5505, 12)
    for _ in range(2):
        client = connect()
        client.post(prompt, {"X-Request-Id": "from-a-proxy"})
        client.answer()
    assert bill.tokens() == 2 * 600
    assert len(bill.receipts()) == 2


def test_several_choices_are_paid_once(document, bill, connect):
    """n=3, sent whole and streamed; `best_of` is no field of vLLM's that would change anything."""
    prompt = document + words(5504, 12)
    client = connect()
    client.post(prompt, n=3, temperature=1)
    answer = client.answer()
    assert len(answer["choices"]) == 3
    assert bill.tokens() == 600
    assert answer["kv_transfer_params"]["kvmarket"]["charge_nano"] == 600 * 500
    client = connect()
    client.post(prompt, n=2, temperature=1, stream=True, best_of=4)
    assert b"data: [DONE]" in client.response().read()
    wait_until(lambda: bill.tokens() > 600)
    assert bill.tokens() == 2 * 600
    assert len(bill.receipts()) == 2


def test_an_answer_that_comes_to_a_stop_string_is_paid(document, bill, connect):
    """Sent whole, though the engine saw an abort."""
    prompt = document + words(5505, 12)
    client = connect()
    client.post(prompt)
    text = client.answer()["choices"][0]["text"]
    assert bill.tokens() == 600
    client = connect()
    client.post(prompt, stop=text[3:6])
    assert client.answer()["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: bill.tokens() > 600)
    assert bill.tokens() == 2 * 600
