"""Clients of all kinds through the gate: theirs that leave, and those that mean harm."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time

import httpx
import pytest
from openai import AsyncOpenAI, AuthenticationError, OpenAI

from tests.support.engines import words
from tests.support.serving import DOCUMENT, MODEL, PRICE_NANO, cached

pytest_plugins = ("tests.support.gate_server", "tests.support.clients_server")

WHOLE = 600 * PRICE_NANO
GENERATING = (
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/responses", {"input": "a"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
    ("/invocations", {"prompt": "a"}),
)


def wait_for(shop, name, nano):
    """Until so much has been booked to an account, and nothing is held."""
    deadline = time.monotonic() + 30
    while shop.spent(name) != nano:
        assert time.monotonic() < deadline, (shop.spent(name), nano)
        time.sleep(0.05)


@pytest.mark.parametrize(("path", "body"), GENERATING)
def test_a_revoked_key_is_refused_on_every_route(shop, path, body):
    """Also in the middle of a client's life, and on both headers."""
    secret, key_id = shop.keys.create("ann", ["buyer"])
    ask = {"model": MODEL, **body, "max_tokens": 1}
    if path == "/v1/responses":
        ask["max_output_tokens"] = ask.pop("max_tokens")
    assert shop.post(path, ask, secret).status_code == 200
    shop.keys.revoke(key_id)
    time.sleep(1)
    assert shop.post(path, ask, secret).status_code == 401
    assert shop.post(path, ask, headers={"x-api-key": secret}).status_code == 401


def test_a_client_without_a_key_is_told_how_to_send_one(shop, tokens_on_offer):
    """The openai package asks for what is paid, with an empty bearer and with no header."""
    extra = {"kvmarket": {"document": tokens_on_offer}}
    with (
        OpenAI(base_url=f"{shop.base}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(AuthenticationError, match="Bearer kvm_") as refused,
    ):
        client.completions.create(model=MODEL, prompt="a", extra_body=extra)
    assert refused.value.response.headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": "Bearer"}, {"authorization": ""}, {"x-api-key": ""}):
        reply = shop.post(
            "/v1/completions", {"model": MODEL, "prompt": "a", **extra}, None, headers
        )
        assert reply.status_code == 401


def test_an_asynchronous_client_leaves_its_stream_and_pays_once(shop, ann, tokens_on_offer):
    """The openai package, its stream closed after the first chunk; the next request goes on."""
    before = shop.spent("ann")

    async def leave():
        async with AsyncOpenAI(base_url=f"{shop.base}/v1", api_key=ann, max_retries=0) as client:
            stream = await client.completions.create(
                model=MODEL,
                prompt=words(9800, 9),
                max_tokens=3000,
                stream=True,
                extra_body={"kvmarket": {"document": tokens_on_offer}, "ignore_eos": True},
            )
            await anext(aiter(stream))
            await stream.close()

    asyncio.run(leave())
    wait_for(shop, "ann", before + WHOLE)
    receipt = shop.market.receipts("ann")[0]
    assert receipt.tokens_output < 3000
    shop.complete(DOCUMENT + words(9801, 9), ann)
    wait_for(shop, "ann", before + 2 * WHOLE)


def head_of(path, key, size, *more, method="POST"):
    """A request's head, as bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: a", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += [f"Content-Length: {size}"] if size is not None else []
    return ("\r\n".join([*lines, *more]) + "\r\n\r\n").encode()


def send(shop, data, *, ends=False):
    """Send bytes as they are, and read until the server hangs up; all that it answered."""
    with socket.create_connection(("127.0.0.1", shop.port), timeout=60) as connection:
        connection.sendall(data)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read().decode("latin-1")


def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(shop, ann, tokens_on_offer):
    """Half a body, then nothing: no request, no charge, no hold."""
    before = shop.spent("ann")
    body = json.dumps({"model": MODEL, "prompt": DOCUMENT, "max_tokens": 1}).encode()
    for sent in (b"", body[:1], body[:-1]):
        with socket.create_connection(("127.0.0.1", shop.port), timeout=10) as connection:
            connection.sendall(head_of("/v1/completions", ann, len(body)) + sent)
    time.sleep(0.5)
    assert shop.spent("ann") == before


def test_a_request_hidden_behind_a_body_has_no_key(shop, ann, tokens_on_offer):
    """Smuggled behind a paid request on its connection: it is a separate request, without the
    account of the one in front of it.
    """
    before = shop.spent("ann")
    body = json.dumps({"model": MODEL, "prompt": [*DOCUMENT, 5], "max_tokens": 1}).encode()
    hidden = head_of("/v1/completions", None, len(body), "Connection: close") + body
    reply = send(shop, head_of("/v1/completions", ann, len(body)) + body + hidden)
    # HTTP/1.1 allows it: two requests, two answers, one of them paid.
    assert reply.count("HTTP/1.1 200") == 2
    charges = [part.split(",")[0] for part in reply.split('"charge_nano":')[1:]]
    assert charges == [str(WHOLE), "0"]
    wait_for(shop, "ann", before + WHOLE)


@pytest.mark.parametrize(
    "line",
    [
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding : chunked",
        "Content-Length: 4",
        "X-Request-Id: a\r\nX-Request-Id: b",
        "X-Request-Id: a\r\n b",
        "Content-Type: text/plain",
        "Content-Encoding: gzip",
        "X-Api-Key: kvm_other",
    ],
)
def test_headers_that_two_servers_could_read_differently_are_refused(shop, ann, line):
    """Lengths in two ways, folded and doubled headers, two keys: no answer is generated."""
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    reply = send(shop, head_of("/v1/completions", ann, len(body), line) + body, ends=True)
    # The server may hang up before its refusal is sent, since this client has.
    assert not reply or reply.split(" ")[1] in ("400", "401", "415"), reply


@pytest.mark.parametrize(
    "path",
    [
        "//v1/completions",
        "/v1/%63ompletions",
        "/v1/completions?x=/v1/models",
        "/v1/completions;a",
        "/V1/completions",
        "/v1/completions%00",
        "/v1/completions%2F",
        "/v1/models/../completions",
        "http://a/v1/completions",
        "/v1/completions#/v1/models",
    ],
)
def test_no_spelling_gets_published_tokens_for_nothing(shop, path, tokens_on_offer):
    """Without a key, whatever route is reached: nothing is reused."""
    body = json.dumps({"model": MODEL, "prompt": [*DOCUMENT, 7], "max_tokens": 1}).encode()
    reply = send(shop, head_of(path, None, len(body), "Connection: close") + body)
    status = reply.split(" ")[1]
    assert status in ("200", "307", "400", "404"), reply
    if status == "200":
        assert cached(json.loads(reply.partition("\r\n\r\n")[2])) == 0
    for method in ("HEAD", "OPTIONS"):
        head = head_of(path, None, None, "Connection: close", method=method)
        assert send(shop, head).split(" ")[1] in ("307", "400", "404", "405")


def test_curl_streams_sends_big_bodies_and_shows_refusals(shop, ann, tokens_on_offer, tmp_path):
    """A stream; a body that curl announces first (Expect: 100-continue); a 413 that curl sees."""
    body = {"model": MODEL, "prompt": DOCUMENT + words(9802, 9), "max_tokens": 2, "stream": True}

    def curl(content):
        (tmp_path / "body.json").write_text(content)
        command = ["curl", "-sS", "-N", f"{shop.base}/v1/completions", "-w", "\n%{http_code}"]
        command += ["-H", f"Authorization: Bearer {ann}", "-H", "Content-Type: application/json"]
        command += ["-H", "Expect: 100-continue", "--data-binary", f"@{tmp_path / 'body.json'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout

    reply = curl(json.dumps(body))
    assert reply.endswith("200") and "data: [DONE]" in reply and "event: kvmarket" in reply
    assert curl(json.dumps(body | {"prompt": "a" * (5 << 20)})).endswith("413")
    assert curl("not json").endswith("400")


def test_httpx_with_one_connection_after_each_refusal(shop, ann):
    """A refused request leaves the connection good for the next one."""
    with httpx.Client(base_url=shop.base, headers={"authorization": f"Bearer {ann}"}) as client:
        for content in (b"{", b"[]", b"\x00", b""):
            headers = {"content-type": "application/json"}
            reply = client.post("/v1/completions", content=content, headers=headers)
            assert reply.status_code == 400
            good = {"model": MODEL, "prompt": "a", "max_tokens": 1}
            assert client.post("/v1/completions", json=good, timeout=60).status_code == 200
