"""Requests' bodies: read once, bounded, parsed, and written anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from vllm_kvmarket.api.gate.refusals import Refusal, bad

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Scope = MutableMapping[str, Any]

# Longer bodies are parsed and written beside the event loop.
QUICK_BYTES = 1 << 16
# Everything by which a request could speak to a connector.
_CONNECTOR_FIELDS = ("kv_transfer_params", "ec_transfer_params")


class Gone(Exception):  # noqa: N818  # nothing went wrong here
    """The client left before its request was there."""


def header_values(scope: Scope, name: str) -> list[str]:
    """Every value that a header was given, in order."""
    wanted = name.encode()
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == wanted]


def single_header(scope: Scope, name: str) -> str:
    """A header's value, "" where there is none. Raises Refusal for several."""
    values = header_values(scope, name)
    if len(values) > 1:
        raise bad(f"the header {name} is there {len(values)} times; send it once")
    return values[0] if values else ""


async def read(scope: Scope, receive: Receive, limit: int) -> dict[str, Any]:
    """The body, a JSON object of at most `limit` bytes. Raises Refusal and Gone."""
    media = single_header(scope, "content-type").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Refusal(415, "not_json", "send JSON, with content-type: application/json")
    if single_header(scope, "content-encoding").lower() not in ("", "identity"):
        raise Refusal(415, "encoded_body", "compressed bodies are not read; send plain JSON")
    too_long = Refusal(
        413,
        "body_too_long",
        f"the body is longer than {limit} bytes",
        headers={"connection": "close"},
    )
    said = single_header(scope, "content-length")
    if said.isascii() and said.isdigit() and (len(said) > 18 or int(said) > limit):
        raise too_long
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        content += message.get("body", b"")
        if len(content) > limit:
            raise too_long
        if not message.get("more_body", False):
            break
    try:
        parsed = await _aside(len(content), msgspec.json.decode, content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad(f"the body is not valid JSON: {error}", code="not_json") from None
    if not isinstance(parsed, dict):
        raise bad("the body must be a JSON object", code="not_json")
    return parsed


async def _aside(size: int, do: Callable[[Any], Any], value: Any) -> Any:
    if size > QUICK_BYTES:
        return await asyncio.to_thread(do, value)
    return do(value)


def scrub(body: dict[str, Any]) -> None:
    """Take out of a body what only the server may say; mutates it."""
    for field in (*_CONNECTOR_FIELDS, "cache_salt"):
        body.pop(field, None)
    sampling = body.get("sampling_params")
    holders = [body.get("vllm_xargs")]
    if isinstance(sampling, dict):
        holders += [sampling.get("extra_args"), sampling.get("vllm_xargs")]
    for holder in holders:
        if isinstance(holder, dict):
            for field in _CONNECTOR_FIELDS:
                holder.pop(field, None)


async def replace(
    scope: Scope, receive: Receive, body: dict[str, Any], headers: dict[str, str]
) -> tuple[Scope, Receive]:
    """The request with another body and with `headers` set. Copies; mutates nothing.

    What comes behind the body, the client's leaving, is passed on.
    """
    text = await _aside(_size_guess(body), msgspec.json.encode, body)
    set_to = {**headers, "content-length": str(len(text))}
    names = {name.encode() for name in set_to} | {b"transfer-encoding"}
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in names]
    kept += [(name.encode(), value.encode("latin-1")) for name, value in set_to.items()]
    sent = False

    async def receive_new() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": text, "more_body": False}

    return {**scope, "headers": kept}, receive_new


def _size_guess(body: dict[str, Any]) -> int:
    """About how long the body's largest field is: strings and lists of tokens are what is long."""
    return max((len(value) for value in body.values() if isinstance(value, str | list)), default=0)
