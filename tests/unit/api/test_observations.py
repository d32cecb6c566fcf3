"""What the gate remembers of answers: their prompts' tokens, and how long the first one took."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi.testclient import TestClient

from tests.support.gate_app import make_app
from vllm_kvmarket import Market
from vllm_kvmarket.api import observations
from vllm_kvmarket.api.observations import Observations
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.market.market import DATABASE_FILE


def answered(*bodies, status=200, kind=b"application/json", wait_s=0.0):
    """What is remembered of an answer that was sent in these pieces, and what was passed on."""
    held, passed = Observations(), []

    async def send(message):
        passed.append(message)

    async def answer():
        watched = held.watch(send)
        await watched(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", kind)],
            }
        )
        await asyncio.sleep(wait_s)
        for number, body in enumerate(bodies):
            more = number + 1 < len(bodies)
            await watched({"type": "http.response.body", "body": body, "more_body": more})
        watched.finish()

    asyncio.run(answer())
    assert b"".join(each.get("body", b"") for each in passed) == b"".join(bodies)
    return held.newest()


STREAM = b"text/event-stream; charset=utf-8"


def event(told, name=None):
    text = json.dumps(told)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"usage": {"prompt_tokens": 100, "prompt_tokens_details": None}}, (100, 0, 0)),
        ({"usage": {"prompt_tokens": 100, "details": {"cached_tokens": 96}}}, (100, 0, 96)),
        ({"usage": {"input_tokens": 4, "cache_read_input_tokens": 96}}, (100, 0, 96)),
        ({"usage": {"input_tokens": 100, "details": {"cached_tokens": 96}}}, (100, 0, 96)),
        (
            {
                "usage": {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 96}},
                "kv_transfer_params": {
                    "kvmarket": {"receipt": {"tokens_reused": 96, "tokens_computed": 4}}
                },
            },
            (100, 96, 96),
        ),
        ({"nothing": 1}, (None, 0, 0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("compact", [True, False])
def test_an_answer_says_its_tokens(told, expected, compact):
    """In OpenAI's words, Anthropic's and ours, however the JSON is spaced."""
    body = json.dumps(told, separators=(",", ":") if compact else None).encode()
    (seen,) = answered(body)
    assert (seen.prompt_tokens, seen.reused_tokens, seen.cached_tokens) == expected
    assert not seen.is_stream


def test_a_stream_is_timed_to_its_first_piece():
    """The headers do not count; the receipts behind the stream say what was reused."""
    (seen,) = answered(
        event({"choices": [{"text": "a"}]}),
        event({"choices": [{"text": "b"}]}),
        event({"receipts": [{"tokens_reused": 70, "tokens_computed": 30}]}, "kvmarket"),
        kind=STREAM,
        wait_s=0.05,
    )
    assert seen.is_stream and seen.first_s >= 0.05
    assert (seen.prompt_tokens, seen.reused_tokens) == (100, 70)


def test_generated_text_is_not_taken_for_figures():
    """What a model writes has its quotes escaped in JSON; it can claim nothing."""
    lie = 'well, {"prompt_tokens": 5, "tokens_reused":5} and \\"prompt_tokens": 6'
    (seen,) = answered(event({"choices": [{"text": lie}]}), b"data: [DONE]\n\n", kind=STREAM)
    assert (seen.prompt_tokens, seen.reused_tokens, seen.cached_tokens) == (None, 0, 0)


@pytest.mark.parametrize("status", [400, 402, 503])
def test_refusals_are_not_remembered(status):
    """They say nothing of the engine."""
    assert answered(b'{"error": {}}', status=status) == []


def test_only_the_end_of_a_long_answer_is_looked_through():
    """Where the usage stands; what is before costs nothing."""
    long = b'{"prompt_tokens": 1, "text": "' + b"x" * observations.TAIL_BYTES
    (seen,) = answered(long + b'", "usage": {"prompt_tokens": 77}}')
    assert seen.prompt_tokens == 77
    (unknown,) = answered(long + b'"}')
    assert unknown.prompt_tokens is None


def test_the_newest_are_remembered(monkeypatch):
    """Never more than so many."""
    monkeypatch.setattr(observations, "MOST_REQUESTS", 3)
    held = Observations()
    made = [observations.Observation(float(number), 0.1, True, number, 0, 0) for number in range(5)]
    for each in made:
        held.add(each)
    assert held.newest() == made[2:]


def test_the_gate_notes_what_it_lets_through(tmp_path):
    """Answers and streams of generating routes; no refusals, batches of prompts, other routes."""
    with Market.open(tmp_path) as market:
        keys = Keys.open(market.home / DATABASE_FILE)
        market.create_account("alice")
        headers = {"authorization": f"Bearer {keys.create('alice')[0]}"}
        app = make_app(market, keys)
        held = app.state.kvmarket_service.observations = Observations()
        with TestClient(app) as client:
            for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": ["a", "b"]}):
                assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
            wish = {"prompt": "a", "kvmarket": {"reuse": "nonsense"}}
            assert client.post("/v1/completions", json=wish, headers=headers).status_code == 400
            assert (
                client.post("/tokenize", json={"prompt": "a"}, headers=headers).status_code == 200
            )
            assert client.get("/v1/models").status_code == 200
        keys.close()
    assert [each.is_stream for each in held.newest()] == [False, True]
