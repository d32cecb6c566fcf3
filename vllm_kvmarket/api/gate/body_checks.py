"""Bodies that vLLM would check for too long on its event loop, found beside it.

For one wrong message vLLM makes up to 230 errors and describes each of them, and it compiles what
limits an answer's form. So bodies with very many errors, and long forms, are refused here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from vllm_kvmarket.api.bodies import CONVERSATIONS, count_values
from vllm_kvmarket.api.errors import ApiError, invalid

# vLLM describes this many in some 10 ms; one wrong item of a conversation has up to 230.
MOST_ERRORS = 1_000
# Fewer values, and fewer in what is not plain, cannot have so many.
QUICK_VALUES = 200
QUICK_ODD_VALUES = 12
# JSON schemas, regular expressions and grammars: in bytes, and in repetitions that they write out.
MOST_FORM_BYTES = 1 << 15
MOST_REPETITIONS = 1_000
_FORM_FIELDS = ("structured_outputs", "response_format", "text", "output_config", "output_format")
_REPEATED = re.compile(rb"\{(\d{1,9})(?:,(\d{0,9}))?\}")
_ROLES = frozenset(("system", "developer", "user", "assistant"))
_SHORT_TEXT = 256


def body_type(app: FastAPI, path: str, body: dict[str, Any]) -> Any:
    """The type that vLLM parses a request's body as; None if it is not known."""
    if path == "/invocations":
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path == path and "POST" in route.methods:
            fields = route.dependant.body_params
            return fields[0].field_info.annotation if fields else None
    return None


def needs_check(body: dict[str, Any]) -> bool:
    """Whether a body may have many errors. Most conversations are plain, and are not checked."""
    values = odd = 0
    for name, value in body.items():
        if name in CONVERSATIONS and isinstance(value, list):
            odd += sum(1 + count_values("", item)[0] for item in value if not _is_plain(item))
        else:
            values += count_values(name, value)[0]
    return odd > QUICK_ODD_VALUES or values > QUICK_VALUES


def check(kind: Any, text: bytes) -> None:
    """Raises ApiError if vLLM would find very many errors in a body; takes one item at a time.

    So no other thread waits for longer than one item takes.
    """
    adapter = _adapter(kind)
    body = msgspec.json.decode(text)
    lists = {name: body[name] for name in CONVERSATIONS if isinstance(body.get(name), list)}
    found = _errors(adapter, {**body, **{name: [] for name in lists}})
    plain = {name: value for name, value in body.items() if _is_short(value)}
    for name, items in lists.items():
        for item in items:
            if found > MOST_ERRORS:
                break
            if not _is_plain(item):
                found += _errors(adapter, {**plain, name: [item]})
    if found > MOST_ERRORS:
        raise invalid(
            f"the body has more than {MOST_ERRORS} errors; send one message or field to read which"
        )


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _errors(adapter: TypeAdapter[Any], value: Any) -> int:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        return error.error_count()
    except Exception:  # noqa: BLE001  # vLLM answers to it
        return 1
    return 0


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) < _SHORT_TEXT)


def _is_plain(item: Any) -> bool:
    """Whether it is a message of text and nothing else, which has no errors."""
    return (
        isinstance(item, dict)
        and len(item) == 2
        and item.get("role") in _ROLES
        and isinstance(item.get("content"), str)
    )


def check_forms(body: dict[str, Any]) -> None:
    """Raises ApiError if what limits the answer's form takes long to compile."""
    sampling = body.get("sampling_params")
    holders = [body, sampling] if isinstance(sampling, dict) else [body]
    for holder in holders:
        for field in (*_FORM_FIELDS, "tools"):
            if holder.get(field) is None:
                continue
            text = msgspec.json.encode(holder[field])
            if field != "tools" and len(text) > MOST_FORM_BYTES:
                message = f"{field}: at most {MOST_FORM_BYTES} bytes of schema or grammar"
                raise ApiError(413, "form_too_long", message, param=field)
            repeated = sum(int(most or least) for least, most in _REPEATED.findall(text))
            if repeated > MOST_REPETITIONS:
                message = f"{field}: at most {MOST_REPETITIONS} repetitions in all"
                raise ApiError(413, "form_too_long", message, param=field)
