"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from vllm_kvmarket.core import errors

# Longer bodies are parsed beside the event loop.
QUICK_BODY_BYTES = 1 << 16
TYPES = {
    401: "authentication_error",
    402: "payment_required",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
RETRY = {"retry-after": "5"}
JSON_TYPES = ("application/json", "+json")

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is refused, with the answer's status; `code` is a word for programs."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


def not_found(message: str) -> ApiError:
    """What is not there, or not to be seen with this key."""
    return ApiError(404, "not_found", message)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that makes no sense."""
    return ApiError(400, code, message, param=param)


def answer_of(error: ApiError) -> JSONResponse:
    """An error as a response."""
    kind = TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return JSONResponse({"error": told}, status_code=error.status, headers=error.headers)


_OURS: Sequence[tuple[type[errors.KVMarketError], int, str]] = (
    (errors.NotFoundError, 404, "not_found"),
    (errors.NotPublishableError, 400, "not_publishable"),
    (errors.LedgerRefusedError, 409, "refused_by_ledger"),
    (errors.CatalogueRefusedError, 409, "refused_by_catalogue"),
    (errors.RefusedError, 409, "refused"),
)
# Their messages name files, hosts and databases: they are for operators only.
_OUTAGES = (errors.UnavailableError, errors.StoreError)


def translate(error: Exception) -> ApiError | None:
    """An exception as what the client is told; None for one that is not on purpose."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, "refused", str(error.detail), headers=error.headers)
    if isinstance(error, _OUTAGES):
        logger.error("kvmarket: %s", error)
        return ApiError(
            503, "market_unavailable", "the market cannot be used now; try again", headers=RETRY
        )
    for kind, status, code in _OURS:
        if isinstance(error, kind):
            return ApiError(status, code, str(error))
    if isinstance(error, errors.KVMarketError):
        logger.error("kvmarket: %s", error)
        return ApiError(500, "internal_error", "the server could not do this; see its log")
    return None


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first of what is wrong, without the value: it may be megabytes or a secret."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "this field is required"
    elif first["type"] == "extra_forbidden":
        message = "there is no such field"
    return invalid(f"{param}: {message}" if param else message, param)


class MarketRoute(APIRoute):
    """A route that reads a bounded body once, and tells its errors as above."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, wrapped."""
        handle = super().get_route_handler()
        has_body = self.body_field is not None

        async def bounded(request: Request) -> Response:
            try:
                if has_body:
                    await _read(request)
                return await handle(request)
            except Exception as error:
                told = translate(error)
                if told is None:
                    raise
                return answer_of(told)

        return bounded


async def _read(request: Request) -> None:
    """Read and parse the body, up to the limit; mutates the request, which then has both."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind.endswith(JSON_TYPES):
        raise ApiError(415, "not_json", "send JSON, with content-type: application/json")
    limit = request.app.state.kvmarket_service.market.config.max_body_bytes
    too_long = ApiError(
        413,
        "body_too_long",
        f"the body is longer than {limit} bytes",
        headers={"connection": "close"},
    )
    body = await bounded_body(request, limit, too_long)
    try:
        if len(body) > QUICK_BODY_BYTES:
            parsed = await run_in_threadpool(msgspec.json.decode, body)
        else:
            parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}", code="not_json") from None
    if not isinstance(parsed, dict):
        raise invalid("the body must be a JSON object", code="not_json")
    # Where Starlette keeps them once they were read.
    request._body = bytes(body)
    request._json = parsed


async def bounded_body(request: Request, limit: int, too_long: ApiError) -> bytearray:
    """Read a body of up to `limit` bytes. Raises `too_long`, at once where its length is said."""
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said[:20]) > limit:
        raise too_long
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_long
    return body
