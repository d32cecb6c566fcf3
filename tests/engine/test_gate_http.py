"""The gate on the wire: streams, bodies, paths, many clients at once."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from anthropic import Anthropic

from tests.support.engines import words
from tests.support.serving import DOCUMENT, MODEL, PRICE_NANO, sold

pytest_plugins = ("tests.support.gate_server",)


def events_of(response):
    """The events of a stream, as (event, data)."""
    events = []
    for block in response.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in fields:
            events.append((fields.get("event"), fields["data"]))
    return events


# Streams


def test_a_stream_ends_with_its_receipt_where_clients_do_not_see_it(server, chat, client, alice):
    """Chat: the openai client sees the chunks alone; the wire has one more event."""
    document, tokens = chat
    ask = {
        "model": MODEL,
        "max_tokens": 6,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Whose ships?"}],
    }
    body = {"kvmarket": {"document": document}}
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(**ask, extra_body=body, stream=True, stream_options=options)
    )
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(tokens)
    raw = server.post("/v1/chat/completions", ask | body | {"stream": True}, alice)
    events = events_of(raw)
    assert [data for event, data in events if event is None][-1] == "[DONE]"
    event, data = events[-1]
    (receipt,) = json.loads(data)["receipts"]
    assert event == "kvmarket"
    assert receipt["tokens_reused"] == len(tokens)
    assert receipt["request_id"] == json.loads(events[0][1])["id"]


@pytest.mark.parametrize("route", ["completions", "messages", "responses"])
def test_other_streams_end_with_a_receipt_too(server, documents, client, alice, route):
    """And their own clients do not mind."""
    document, (name, tokens) = documents
    if route == "completions":
        body = {"prompt": "When?", "max_tokens": 4, "kvmarket": {"document": document}}
        reused = 600
        stream = client.completions.create(
            model=MODEL,
            prompt="When?",
            max_tokens=4,
            stream=True,
            extra_body={"kvmarket": body["kvmarket"]},
        )
        assert all(chunk.object == "text_completion" for chunk in stream)
    else:
        reused = len(tokens)
        extra = {"kvmarket": {"document": name}}
        if route == "messages":
            messages = [{"role": "user", "content": "Which ships?"}]
            body = {"messages": messages, "max_tokens": 4, **extra}
            with (
                Anthropic(base_url=server.base, api_key=alice, max_retries=0) as anthropic,
                anthropic.messages.stream(
                    model=MODEL, max_tokens=4, messages=messages, extra_body=extra
                ) as stream,
            ):
                assert stream.get_final_message().usage.cache_read_input_tokens == reused
        else:
            body = {"input": "When?", "max_output_tokens": 4, **extra}
            stream = client.responses.create(
                model=MODEL, input="When?", max_output_tokens=4, stream=True, extra_body=extra
            )
            assert [event.type for event in stream if event.type.startswith("response.")]
    raw = server.post(f"/v1/{route}", {"model": MODEL, **body, "stream": True}, alice)
    event, data = events_of(raw)[-1]
    assert event == "kvmarket"
    assert [each["tokens_reused"] for each in json.loads(data)["receipts"]] == [reused]


def test_a_stream_is_not_held_back(server, alice):
    """Its first chunk is there long before its last."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {alice}"}
    with httpx.stream(
        "POST", f"{server.base}/v1/completions", json=body, headers=headers, timeout=120
    ) as response:
        arrivals = [time.perf_counter() for _ in response.iter_raw()]
    assert len(arrivals) > 100
    assert arrivals[-1] - arrivals[0] > 10 * (arrivals[1] - arrivals[0])


# Bodies and paths


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"\xff\xfe{}", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-encoding": "gzip"}, 415),
        (b'{"prompt": "' + b"a" * (4 << 20) + b'"}', {}, 413),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(server, alice, content, headers, status):
    """With a clear 4xx, and the server goes on."""
    given = {"content-type": "application/json", "authorization": f"Bearer {alice}"} | headers
    reply = httpx.post(f"{server.base}/v1/completions", content=content, headers=given)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


def test_a_body_without_an_end_is_cut_off(server):
    """Sent in chunks, of no said length: refused when it is too long, not kept."""

    def endless():
        for _ in range(128):
            yield b" " * (1 << 16)

    headers = {"content-type": "application/json"}
    try:
        reply = httpx.post(f"{server.base}/v1/completions", content=endless(), headers=headers)
    except httpx.WriteError:
        return  # it hung up before all was sent
    assert reply.status_code == 413


def raw(server, text, *, leaves=True):
    """Send bytes as they are, and close this direction; the answer's first line."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(text)
        if leaves:
            connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").readline().decode()


def test_a_body_that_lies_about_its_length_generates_nothing(server):
    """Shorter than said, longer than said, said twice, or in two ways."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    size = len(body)
    for lengths in (
        b"Content-Length: %d\r\n" % (size + 100),
        b"Content-Length: %d\r\n" % (size - 5),
        b"Content-Length: %d\r\nContent-Length: 1\r\n" % size,
        b"Content-Length: -1\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
    ):
        assert " 200 " not in raw(server, head + lengths + b"\r\n" + body), lengths
    server.complete([5, 6, 7])


@pytest.mark.parametrize(
    "path",
    [
        "//v1/completions",
        "/v1//completions",
        "/v1%2Fcompletions",
        "/v1/completions/",
        "/x/../v1/completions",
    ],
)
def test_no_spelling_of_a_path_leads_around_the_gate(server, path):
    """Either no route takes it, or the gate sees it: a wrong key never generates."""
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer kvm_wrong\r\nContent-Length: {len(body)}\r\n\r\n"
    status = raw(server, head.encode() + body, leaves=False).split()[1]
    assert status in ("307", "401", "404")


def test_other_methods_on_a_gated_path_generate_nothing(server):
    """HEAD, OPTIONS, PUT and GET: 405."""
    for method in ("HEAD", "OPTIONS", "PUT", "GET"):
        reply = httpx.request(method, f"{server.base}/v1/completions")
        assert reply.status_code == 405


def test_curl_buys(server, document, alice):
    """As the documentation has it."""
    body = {"model": MODEL, "prompt": "When?", "max_tokens": 1, "kvmarket": {"document": document}}
    command = [
        "curl",
        "-sS",
        f"{server.base}/v1/completions",
        "-H",
        f"Authorization: Bearer {alice}",
    ]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert sold(json.loads(done.stdout))["reused_tokens"] == 600


def test_two_accounts_at_once_pay_what_they_used(server, document, alice, bob):
    """Many requests over few connections; the money adds up to the token."""
    before = {name: server.spent(name) for name in ("alice", "bob")}
    spent = {"alice": 0, "bob": 0}

    def ask(index):
        name, key = (("alice", alice), ("bob", bob))[index % 2]
        answer = server.complete(DOCUMENT + words(7300 + index, 9), key, max_tokens=2)
        return name, sold(answer)["charge_nano"]

    with ThreadPoolExecutor(8) as pool:
        for name, charge in pool.map(ask, range(40)):
            spent[name] += charge
    assert {name: server.spent(name) - before[name] for name in spent} == spent
    assert spent == {"alice": 20 * 600 * PRICE_NANO, "bob": 20 * 600 * PRICE_NANO}
