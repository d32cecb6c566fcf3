"""No body that is accepted, and none that is refused, keeps the API server's event loop for long.

vLLM's own app with its own checks of bodies runs behind the gate, without an engine: bodies that
are right end where the engine would be asked. What is measured is processor time, so that a busy
machine changes little, in units of a piece of work that takes about ALLOWED times less than 50 ms.
"""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace

import msgspec
import pytest

from tests.support.api_server import WordEngine
from vllm_kvmarket.api import bodies
from vllm_kvmarket.api.gate import answer_bounds
from vllm_kvmarket.api.server import MarketEndpoints, open_service
from vllm_kvmarket.core.config import load

# The reference takes about 8 ms on a quiet core of the machine on which the bounds were found.
ALLOWED = 6.0
BODY = 4 * 1024 * 1024 - 4096  # as long as a body may be
MANY = 99_000
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
WIDE = {f"k{number}": number for number in range(MANY)}


def text_part(kind="text"):
    return {"type": kind, "text": "x"}


# Where it goes, and the body.
CASES = {
    "text": (CHAT, {"messages": [{"role": "user", "content": "word " * (BODY // 5)}]}),
    "line breaks": (COMPLETIONS, {"prompt": "\n" * (BODY // 2)}),
    "long model": (COMPLETIONS, {"model": "m" * BODY, "prompt": "x"}),
    "ids": (COMPLETIONS, {"prompt": [123_456] * MANY}),
    "ids and a text": (COMPLETIONS, {"prompt": [1] * MANY + ["x"]}),
    "negative ids": (COMPLETIONS, {"prompt": [-1] * MANY}),
    "truth values": (COMPLETIONS, {"prompt": [True] * MANY}),
    "prompts": (COMPLETIONS, {"prompt": [[1] * 90] * 1000}),
    "samples": (COMPLETIONS, {"prompt": "x", "n": 16_384}),
    "nearly long numbers": (COMPLETIONS, {"prompt": ("1" * 99 + "a") * (BODY // 100)}),
    "many short prompts": (COMPLETIONS, {"prompt": [[1]] * (BODY // 5)}),
    "long numbers": (COMPLETIONS, {"prompt": "x", "allowed_token_ids": [10**4000] * 1000}),
    "wrong stops": (CHAT, {"messages": [USER], "stop_token_ids": ["x"] * MANY}),
    "some wrong stops": (CHAT, {"messages": [USER], "stop_token_ids": ["x"] * 900}),
    "wide": (CHAT, {"messages": [USER], **WIDE}),
    "wide message": (CHAT, {"messages": [{**USER, **WIDE}]}),
    "wrong bias": (CHAT, {"messages": [USER], "logit_bias": dict.fromkeys(WIDE, "x")}),
    "wrong arguments": (COMPLETIONS, {"prompt": "x", "vllm_xargs": {key: {} for key in WIDE}}),
    "bias": (CHAT, {"messages": [USER], "logit_bias": {str(each): 1 for each in range(4_900)}}),
    "stops": (COMPLETIONS, {"prompt": "x", "stop": [f"stop {each}" for each in range(4_900)]}),
    "allowed ids": (COMPLETIONS, {"prompt": "x", "allowed_token_ids": list(range(4_900))}),
    "wide schema": (CHAT, {"messages": [USER], "tools": [TOOL | {"function": WIDE}]}),
    "messages": (CHAT, {"messages": [USER] * 999}),
    "calls": (CHAT, {"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}] * 999}),
    "wrong messages": (CHAT, {"messages": [{"a": 1}] * 999}),
    "no messages": (CHAT, {"messages": [1] * 999}),
    "wrong roles": (CHAT, {"messages": [{"role": 1, "content": 1}] * 999}),
    "few wrong messages": (CHAT, {"messages": [{"role": 1, "content": 1}] * 40}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [text_part()] * 990}]}),
    "texts as parts": (CHAT, {"messages": [{"role": "user", "content": ["x"] * 990}]}),
    "tools": (CHAT, {"messages": [USER], "tools": [TOOL] * 700}),
    "wrong tools": (CHAT, {"messages": [USER], "tools": [{"a": 1}] * 2000}),
    "items": (RESPONSES, {"input": [USER] * 399}),
    "wrong items": (RESPONSES, {"input": [{"a": 1}] * 399}),
    "few wrong items": (RESPONSES, {"input": [{"a": 1}] * 4}),
    "item parts": (
        RESPONSES,
        {"input": [{"role": "user", "content": [text_part("input_text")]}] * 199},
    ),
    "wrong item parts": (RESPONSES, {"input": [{"role": "user", "content": [{"a": 1}] * 398}]}),
    "Anthropic's": ("/v1/messages", {"messages": [USER] * 999, "max_tokens": 1}),
    "Anthropic's, wrong": ("/v1/messages", {"messages": [{"a": 1}] * 999, "max_tokens": 1}),
    "tokens": ("/inference/v1/generate", {"token_ids": ["x"] * MANY, "sampling_params": {}}),
    "tokenize": ("/tokenize", {"prompt": "a " * (BODY // 2)}),
    "detokenize": ("/detokenize", {"tokens": ["x"] * MANY}),
    "detokenize, right": ("/detokenize", {"tokens": [1] * 90_000}),
    "quote": ("/v1/kvmarket/quotes", {"token_ids": [1] * MANY}),
    "wrong quote": ("/v1/kvmarket/quotes", {"token_ids": [2**40] * MANY}),
    "publish": ("/v1/kvmarket/documents", {"text": "word " * (BODY // 5)}),
}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """vLLM's app with our plugin; and a key."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vllm.plugins.load_endpoint_plugins", lambda _: [MarketEndpoints()])
        built = build_app(args, ("generate",))
    home = tmp_path_factory.mktemp("loop") / "home"
    front = WordEngine(home)
    service = open_service(load({"home": str(home)}), front, "m")
    built.state.kvmarket_service = service
    service.market.create_account("bea")
    built.state.key = service.keys.create("bea", ["buyer", "publisher"])[0]
    yield built
    front.close()
    service.market.close()
    service.keys.close()


@pytest.fixture
def longest(monkeypatch):
    """The longest processor times: of a callback on the loop, and of a decoding in a thread.

    The interpreter's lock is held while JSON is decoded or encoded, wherever that is done.
    """
    found = SimpleNamespace(s=0.0)

    def timed(step):
        def run(*args, **kwargs):
            started = time.thread_time()
            try:
                return step(*args, **kwargs)
            finally:
                found.s = max(found.s, time.thread_time() - started)

        return run

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed(asyncio.events.Handle._run))
    json_ = SimpleNamespace(decode=timed(msgspec.json.decode), encode=timed(msgspec.json.encode))
    ours = SimpleNamespace(json=json_, DecodeError=msgspec.DecodeError)
    monkeypatch.setattr(bodies, "msgspec", ours)
    return found


def reference_s():
    """Processor time of reading a list of numbers, the quickest of some times."""
    text = json.dumps([12_345] * 200_000)
    seconds = []
    for _ in range(5):
        started = time.thread_time()
        json.loads(text)
        seconds.append(time.thread_time() - started)
    return min(seconds)


async def ask(app, path, content):
    """Send a body; the answer's status, or None where the engine would have been asked."""
    sent = []
    parts = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive():
        message = next(parts, None)
        return message if message is not None else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "authorization": f"Bearer {app.state.key}",
    }
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "app": app,
        "state": {},
    }
    try:
        await asyncio.create_task(app(scope, receive, send))
    except AttributeError:  # there is no engine
        return None
    return next(each["status"] for each in sent if "status" in each)


@pytest.mark.parametrize("name", CASES)
def test_no_body_keeps_the_event_loop(app, longest, name):
    """Neither by being read, nor by being checked, nor by its errors."""
    path, body = CASES[name]
    content = json.dumps({"model": "m", **body}, separators=(",", ":")).encode()
    took = []
    for _ in range(3):  # the first time, something may be loaded
        longest.s = 0.0
        status = asyncio.run(ask(app, path, content))
        took.append(longest.s)
    reference = reference_s()
    shown = f"{min(took) * 1000:.1f} ms, reference {reference * 1000:.1f} ms"
    print(f"event loop: {shown}, answer {status or 'by the engine'}: {name}")
    assert min(took) < ALLOWED * reference, shown


def quickest(step):
    """Processor time of a step, the least of three."""
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        step()
        seconds.append(time.thread_time() - started)
    return min(seconds)


def test_what_comes_with_answers_keeps_it_no_longer(tiny):
    """As many log-probabilities, and as many stop strings, as one request may ask for."""
    import torch
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import check_stop_strings
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

    tokenizer = AutoTokenizer.from_pretrained(tiny(1))
    asking = SimpleNamespace(sampling_params=SamplingParams(prompt_logprobs=1))
    tokens = answer_bounds.MOST_LOGPROBS // 2
    ids = torch.arange(2 * tokens).reshape(tokens, 2) % len(tokenizer)
    logprobs = LogprobsTensors(ids, torch.rand(tokens, 2), torch.ones(tokens, dtype=torch.int))

    def write_logprobs():
        processor = LogprobsProcessor.from_new_request(tokenizer, asking)
        processor._update_prompt_logprobs(logprobs)
        assert len(processor.prompt_logprobs) == tokens + 1

    answers = answer_bounds.MOST_ANSWERS
    stops = [f"stop {number}" for number in range(answer_bounds.MOST_STOPS // answers)]
    text = "some words of an answer " * 400

    def look_for_stops():
        for _ in range(answers):
            assert check_stop_strings(text, 6, stops, False) is None

    for name, step in (("log-probabilities", write_logprobs), ("stop strings", look_for_stops)):
        took, reference = quickest(step), reference_s()
        shown = f"{took * 1000:.1f} ms, reference {reference * 1000:.1f} ms"
        print(f"event loop: {shown}: {name}")
        assert took < ALLOWED * reference, shown
