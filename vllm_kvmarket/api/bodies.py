"""Bodies of requests: read once and bounded, parsed beside the event loop, and written anew."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from functools import partial
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from vllm_kvmarket.api.errors import ApiError, invalid, translate

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")

# Longer bodies are parsed and written in a thread.
QUICK_BYTES = 1 << 16
# Values in a body, most of them token ids.
MOST_ITEMS = 100_000
# Values that are no token ids.
MOST_VALUES = 5_000
# Messages, their parts and tool calls: vLLM tries each as some ten types, or some thirty.
CONVERSATIONS = {"messages": 1_000, "system": 1_000, "input": 400}
MOST_DEPTH = 64
MOST_TOKEN_ID = 2**32
_TOKEN_FIELDS = ("prompt", "token_ids", "tokens", "query")
# Python reads such a number for a while.
_LONG_NUMBER = b"0" * 100
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_DEEP = re.compile(rb"(?:\{s:|\[){%d}" % (MOST_DEPTH + 1))
FORM_TYPE = "application/x-www-form-urlencoded"
# In a form, one byte of text may be percent-encoded as three.
FORM_FACTOR = 3


class ClientGoneError(Exception):
    """The client left before its whole request had arrived."""


def header_values(scope: Scope, name: str) -> list[str]:
    """Every value of a header, in order."""
    wanted = name.encode()
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == wanted]


def single_header(scope: Scope, name: str) -> str:
    """A header's value, "" if it is missing. Raises ApiError if it is given twice."""
    values = header_values(scope, name)
    if len(values) > 1:
        raise invalid(f"the header {name} is there {len(values)} times; send it once")
    return values[0] if values else ""


def media_type(scope: Scope) -> str:
    """The content type without its parameters, in lower case. Raises ApiError."""
    return single_header(scope, "content-type").partition(";")[0].strip().lower()


async def read_bounded(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Read a body of at most `limit` bytes. Raises ApiError and ClientGoneError.

    A body whose header announces more is refused before it is read.
    """
    if media_type(scope) == FORM_TYPE:
        limit *= FORM_FACTOR
    length = single_header(scope, "content-length")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise _too_long(limit)
    if not length and not header_values(scope, "transfer-encoding"):
        return b""
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        content += message.get("body", b"")
        if len(content) > limit:
            raise _too_long(limit)
        if not message.get("more_body", False):
            return bytes(content)


def _too_long(limit: int) -> ApiError:
    message = f"the body is longer than {limit} bytes"
    return ApiError(413, "body_too_long", message, headers={"connection": "close"})


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body`, and then what really comes: the client's leaving."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def parse_object(scope: Scope, body: bytes, most_items: int = MOST_ITEMS) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError.

    It has at most `most_items` values, MOST_VALUES that are no token ids, MOST_DEPTH levels, and
    conversations of a bounded length: vLLM reads it all once more on the event loop.
    """
    kind = media_type(scope)
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "not_json", "send JSON, with content-type: application/json")
    if single_header(scope, "content-encoding").lower() not in ("", "identity"):
        raise ApiError(415, "encoded_body", "compressed bodies are not read; send plain JSON")
    try:
        parsed = await beside_loop(len(body), partial(_parse, most_items=most_items), body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}", code="not_json") from None
    if not isinstance(parsed, dict):
        raise invalid("the body must be a JSON object", code="not_json")
    return parsed


def _parse(body: bytes, most_items: int) -> Any:
    # Texts may contain these characters too, so only many of them make it worth to look closely.
    opened = body.count(b"{") + body.count(b"[")
    values = body.count(b",") + opened
    if values > most_items or body.count(b":") > MOST_VALUES or _has_long_number(body):
        _check_size(body, most_items)
    parsed = msgspec.json.decode(body)
    if opened > MOST_DEPTH:
        _check_depth(parsed)
    if values > min(CONVERSATIONS.values()) and isinstance(parsed, dict):
        _check_values(parsed)
    return parsed


def _check_size(body: bytes, most_items: int) -> None:
    """Raises ApiError if a JSON text has too many values, names or levels, or a long number.

    It looks at the bytes, because decoding many values stops all threads for as long as it takes.
    """
    text = body.replace(rb"\\", b"").replace(rb"\"", b"")
    too_many = ApiError(413, "body_too_long", f"the body has more than {most_items} values")
    if text.count(b'"') > 4 * most_items:  # two for each text, which is a key or a value
        raise too_many
    marks = b"s".join(text.split(b'"')[::2]).translate(None, b" \t\r\n")
    # Counting is quick. A regular expression stops all threads too: it comes when marks are few.
    values = marks.count(b",") + marks.count(b"[") + marks.count(b"{")
    if values - marks.count(b"[]") - marks.count(b"{}") > most_items:
        raise too_many
    if marks.count(b":") > MOST_VALUES:
        raise _too_many_values()
    if _DEEP.search(marks):
        raise _too_deep()
    if _has_long_number(marks):
        raise invalid("the body has a number of 100 digits or more", code="not_json")


def _has_long_number(text: bytes) -> bool:
    return _LONG_NUMBER in text.translate(_DIGITS_TO_ZERO)


def _check_values(body: dict[str, Any]) -> None:
    """Raises ApiError if too many values are no token ids, or parts of a conversation."""
    values = 0
    for name, value in body.items():
        inside, listed = count_values(name, value)
        most = CONVERSATIONS.get(name)
        if most is not None and listed > most:
            message = f"{name}: there are more than {most} messages, parts and tool calls"
            raise ApiError(413, "body_too_long", message, param=name)
        values += 1 + inside
    if values > MOST_VALUES:
        raise _too_many_values()


def count_values(name: str, value: Any) -> tuple[int, int]:
    """How many values are inside a field's value, and how many of these are in lists.

    Lists of token ids are one value each where a field may have them.
    """
    with_ids = name in _TOKEN_FIELDS
    inside = listed = 0
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            inside += len(each)
            waiting += each.values()
        elif isinstance(each, list) and not (with_ids and _are_token_ids(each)):
            inside += len(each)
            listed += len(each)
            waiting += each
    return inside, listed


def _too_many_values() -> ApiError:
    message = f"the body has more than {MOST_VALUES} values that are no token ids"
    return ApiError(413, "body_too_long", message)


def _are_token_ids(values: list[Any]) -> bool:
    if set(map(type, values)) != {int}:
        return False
    return min(values) >= 0 and max(values) < MOST_TOKEN_ID


def _check_depth(parsed: Any) -> None:
    """Raises ApiError if a value has too many levels."""
    level, depth = [parsed], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise _too_deep()
        inner: list[Any] = []
        for each in level:
            values = each.values() if isinstance(each, dict) else each
            inner += [value for value in values if isinstance(value, dict | list) and value]
        level = inner


def _too_deep() -> ApiError:
    return invalid(f"the body has more than {MOST_DEPTH} levels", code="body_too_deep")


async def beside_loop(size: int, step: Callable[[Any], Result], value: Any) -> Result:
    """Run a step that takes as long as `size` bytes take: in a thread if they are many."""
    if size > QUICK_BYTES:
        return await asyncio.to_thread(step, value)
    return step(value)


def with_body(
    scope: Scope, receive: Receive, text: bytes, headers: dict[str, str]
) -> tuple[Scope, Receive]:
    """The request with another body, and with `headers` set; mutates nothing."""
    changed = {**headers, "content-length": str(len(text))}
    names = {name.encode() for name in changed} | {b"transfer-encoding"}
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in names]
    kept += [(name.encode(), value.encode("latin-1")) for name, value in changed.items()]
    return {**scope, "headers": kept}, replay(text, receive)


class MarketRoute(APIRoute):
    """A route that parses its JSON body beside the event loop, and answers errors as JSON."""

    def refuse(self, error: ApiError, request: Request) -> Response:
        """The answer to a request that is refused."""
        return error.answer()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, wrapped."""
        handle = super().get_route_handler()
        has_body = self.body_field is not None

        async def wrapped(request: Request) -> Response:
            try:
                if has_body:
                    # Starlette keeps a parsed body here, where FastAPI then finds it.
                    service = getattr(request.app.state, "kvmarket_service", None)
                    most = MOST_ITEMS if service is None else service.most_items
                    request._json = await parse_object(request.scope, await request.body(), most)
                return await handle(request)
            except Exception as error:
                refused = translate(error)
                if refused is None:
                    raise
                return self.refuse(refused, request)

        return wrapped
