"""What the gate answers in the place of a route."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi.responses import JSONResponse

from vllm_kvmarket.api.errors import TYPES

BEARER = {"www-authenticate": "Bearer"}


class Refusal(Exception):  # noqa: N818  # an answer, not a fault of ours
    """A request that is not let through; `quote` says what reuse would cost."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        quote: Quote | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers
        self.quote = quote

    def answer(self, path: str) -> JSONResponse:
        """The answer, in the shape of the API whose route was asked."""
        kind = TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "api_error"
        told: dict[str, Any] = {"message": str(self), "type": kind}
        body: dict[str, Any]
        if path.startswith("/v1/messages"):
            body = {"type": "error", "error": told}
        else:
            body = {"error": told | {"param": self.param, "code": self.code}}
        if self.quote is not None:
            body["quote"] = msgspec.to_builtins(self.quote)
        return JSONResponse(body, status_code=self.status, headers=self.headers)


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """What reuse of a prompt would cost now: nano-units of the settlement currency.

    `matched_tokens` are those that would be reused; `without_reuse_nano` is the price of computing
    them instead. `available_nano` is None for a caller without an account.
    """

    document_id: str | None
    prompt_tokens: int
    matched_tokens: int
    charge_nano: int
    without_reuse_nano: int
    available_nano: int | None = None


def no_key(message: str) -> Refusal:
    """Nobody in particular asks for what needs an account."""
    return Refusal(401, "missing_api_key", message, headers=dict(BEARER))


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A request that makes no sense, or none that is supported."""
    return Refusal(400, code, message, param=param)
