"""Errors in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from vllm_kvmarket.core import errors

TYPES = {
    401: "authentication_error",
    402: "payment_required",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
RETRY = {"retry-after": "5"}
BEARER = {"www-authenticate": "Bearer"}

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is refused, with its HTTP status.

    `code` is a word for programs. `quote` says what reuse would cost, as JSON values.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        quote: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.quote = quote

    def answer(self, path: str = "") -> JSONResponse:
        """The error as a response, in the shape of the API that `path` belongs to."""
        kind = TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        error: dict[str, Any] = {"message": self.message, "type": kind}
        if path.startswith("/v1/messages"):
            if self.status >= 500:
                error["type"] = "api_error"
            body: dict[str, Any] = {"type": "error", "error": error}
        else:
            body = {"error": error | {"param": self.param, "code": self.code}}
        if self.quote is not None:
            body["quote"] = self.quote
        return JSONResponse(body, status_code=self.status, headers=self.headers)


def not_found(message: str) -> ApiError:
    """404: it does not exist, or this caller may not see it."""
    return ApiError(404, "not_found", message)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the request is malformed, or asks for something that is not supported."""
    return ApiError(400, code, message, param=param)


def missing_key(message: str) -> ApiError:
    """401: an anonymous request for something that needs an account."""
    return ApiError(401, "missing_api_key", message, headers=BEARER)


_OURS: Sequence[tuple[type[errors.KVMarketError], int, str]] = (
    (errors.NotFoundError, 404, "not_found"),
    (errors.NotPublishableError, 400, "not_publishable"),
    (errors.KeyConflictError, 409, "idempotency_key_reused"),
    (errors.KeyUsedUpError, 409, "idempotency_key_used_up"),
    (errors.LedgerRefusedError, 409, "refused_by_ledger"),
    (errors.CatalogueRefusedError, 409, "refused_by_catalogue"),
    (errors.RefusedError, 409, "refused"),
)
# Their messages name files, hosts and databases: they are for operators only.
_OUTAGES = (errors.UnavailableError, errors.StoreError)


def translate(error: Exception) -> ApiError | None:
    """An exception as the client sees it; None for a bug."""
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
    """The first problem, without the value, which may be megabytes long or a secret."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "this field is required"
    elif first["type"] == "extra_forbidden":
        message = "there is no such field"
    return invalid(f"{param}: {message}" if param else message, param)
