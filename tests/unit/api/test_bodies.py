"""Bodies are bounded in bytes, values and levels, on every route, before anything else is done."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.api_server import as_, running
from vllm_kvmarket.api.bodies import (
    CONVERSATIONS,
    MOST_DEPTH,
    MOST_ITEMS,
    MOST_VALUES,
    parse_object,
)
from vllm_kvmarket.api.errors import ApiError

SCOPE = {"headers": [(b"content-type", b"application/json")]}


def parse(text, most_items=MOST_ITEMS):
    return asyncio.run(parse_object(SCOPE, text.encode(), most_items))


def nested(depth):
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (nested(MOST_DEPTH + 1), 400),
        ('{"a":' + "[" * 500 + "]" * 500 + "}", 400),
        (nested(5000), 400),
        (json.dumps({"prompt": [0] * (MOST_ITEMS + 1)}), 413),
        (json.dumps({"prompt": [[0] * 1000] * 101}), 413),
        (json.dumps({"a": ['\\\\"'] * (MOST_ITEMS + 1)}), 413),
        (json.dumps({str(number): 0 for number in range(MOST_ITEMS + 1)}), 413),
        (json.dumps({"stop": [0] * (MOST_VALUES + 1)}), 413),
        (json.dumps({"prompt": ["x"] * (MOST_VALUES + 1)}), 413),
        (json.dumps({"prompt": [*[0] * MOST_VALUES, "x"]}), 413),
        (json.dumps({"prompt": [-1] * (MOST_VALUES + 1)}), 413),
        (json.dumps({"token_ids": [2**32] * (MOST_VALUES + 1)}), 413),
        (json.dumps({"prompt": [True] * (MOST_VALUES + 1)}), 413),
        (json.dumps({"a": {str(number): {} for number in range(MOST_VALUES)}}), 413),
        (json.dumps({"messages": [{"b": 1}] * (CONVERSATIONS["messages"] + 1)}), 413),
        (json.dumps({"messages": [{"b": [1] * CONVERSATIONS["messages"]}]}), 413),
        (json.dumps({"input": ["x"] * (CONVERSATIONS["input"] + 1)}), 413),
        ('{"seed": ' + "9" * 4000 + "}", 400),
    ],
)
def test_a_body_of_too_many_values_or_levels_is_refused(text, status):
    """vLLM would go through them all on the event loop."""
    with pytest.raises(ApiError) as refused:
        parse(text)
    assert refused.value.status == status


@pytest.mark.parametrize(
    "text",
    [
        nested(MOST_DEPTH),
        json.dumps({"prompt": [0] * (MOST_ITEMS - 1)}),
        json.dumps({"prompt": [[7] * 1000] * 90, "stop": ["x"] * 4000}),
        json.dumps({"a": ",[{" * MOST_ITEMS}),
        json.dumps({"a": [[], {}] * 1000}),
        json.dumps({"a": ['\\\\"{'] * (MOST_VALUES - 1)}),
        json.dumps({"messages": [{"b": "{" * 200}] * (CONVERSATIONS["messages"] - 1)}),
        json.dumps({"text": "9" * 4000}),
    ],
)
def test_a_text_may_contain_what_separates_values(text):
    """Only values are counted, not characters."""
    assert parse(text) == json.loads(text)


@pytest.mark.parametrize(
    "path", ["/tokenize", "/detokenize", "/nothing/here", "/v1/kvmarket/quotes"]
)
@pytest.mark.parametrize("announced", [True, False])
def test_no_route_takes_a_longer_body(tmp_path, path, announced):
    """Also one that only works, that is not there, or that needs no key; announced or not."""
    with running(tmp_path, max_body_bytes=4096) as server:

        @server.app.post("/tokenize")
        @server.app.post("/detokenize")
        async def work() -> int:
            return 1

        def parts():
            yield b" " * 4096
            yield b" " * 10

        content = b" " * 4106 if announced else parts()
        headers = {"content-type": "application/json"} | as_(server, "bea")
        reply = server.client.post(path, content=content, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_long")
        assert server.client.post("/nothing/here", json={}).status_code == 404
