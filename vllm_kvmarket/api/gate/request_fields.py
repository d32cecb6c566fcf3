"""Fields of a request that the market reads, removes, or writes.

A client may write `kvmarket`. Only the server writes what the engine acts on: `kv_transfer_params`
and `cache_salt`.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import msgspec

from vllm_kvmarket.api.auth import Caller
from vllm_kvmarket.api.errors import invalid
from vllm_kvmarket.auth.operator_tokens import Credentials, account_subject
from vllm_kvmarket.connector import request_params
from vllm_kvmarket.connector.request_params import FIELD, Reason, RequestParams

# Everything by which a request could speak to a connector.
_CONNECTOR_FIELDS = ("kv_transfer_params", "ec_transfer_params")


class MarketField(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The request field `kvmarket`.

    `document` goes in front of the prompt. `reuse`: "prefer" computes what cannot be reused,
    "require" refuses it, "never" computes always. `max_price_nano` is the most that this request's
    reuse may cost.
    """

    document: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    reuse: Literal["prefer", "require", "never"] = "prefer"
    max_price_nano: Annotated[int, msgspec.Meta(ge=0)] | None = None

    @property
    def is_binding(self) -> bool:
        """Whether the request shall fail if it cannot reuse."""
        return self.document is not None or self.reuse == "require"

    @property
    def declines(self) -> Reason:
        """The reason, if this field is why nothing is reused."""
        return "never" if self.reuse == "never" else "max_price"

    @property
    def needs_quote(self) -> bool:
        """Whether the prompt must be matched before it goes on."""
        return self.reuse == "require" or (
            self.reuse == "prefer" and self.max_price_nano is not None
        )


def take_market_field(body: dict[str, Any]) -> MarketField:
    """Take the field out of a body; mutates it. Raises ApiError."""
    value = body.pop(FIELD, None)
    if value is None:
        return MarketField()
    try:
        field = msgspec.convert(value, MarketField)
    except msgspec.ValidationError as error:
        raise invalid(f"{FIELD}: {error}", FIELD) from None
    if field.document is not None and field.reuse == "never":
        raise invalid('a document is reused: leave "reuse": "never" out, or send its text', FIELD)
    return field


def remove_server_fields(body: dict[str, Any]) -> None:
    """Remove from a body what only the server may write; mutates it."""
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


def sender_of(caller: Caller, credentials: Credentials, body: dict[str, Any]) -> Caller:
    """The caller, or, without a key, the holder of the operator's token in a body's parameters.

    Parameters without a valid token are ignored, and all are beside a key.
    """
    given = body.get("kv_transfer_params")
    raw = given.get(FIELD) if isinstance(given, dict) else None
    if caller.account is not None or not isinstance(raw, dict) or not raw.get("token"):
        return caller
    params = request_params.read({FIELD: raw}, credentials, trusted=False)
    if not isinstance(params, RequestParams):
        return caller
    if params.is_operators:
        return Caller(operation=raw)
    return Caller(account=params.account)


def engine_params(
    caller: Caller,
    credentials: Credentials,
    *,
    reuse: bool,
    declined: Reason | None = None,
    max_price_nano: int | None = None,
) -> dict[str, Any] | None:
    """The parameters for the connector; None, so that everything is computed.

    `declined` says why nothing is reused if the sender does not want it.
    """
    if caller.operation is not None:
        return {FIELD: caller.operation}
    if declined is not None:
        return {FIELD: {"declined": declined}}
    if caller.account is None or not reuse:
        return None
    token = credentials.token(account_subject(caller.account))
    params: dict[str, Any] = {"account": caller.account, "token": token}
    if max_price_nano is not None:
        params["max_price_nano"] = max_price_nano
    return {FIELD: params}


def cache_salt(caller: Caller, credentials: Credentials) -> str:
    """Keeps a caller's unpublished prefixes from all others; it cannot be guessed."""
    if caller.is_anonymous:
        # Two anonymous requests may come from two people.
        return secrets.token_hex(32)
    subject = "operator" if caller.account is None else f"account:{caller.account}"
    return credentials.token(f"salt:{subject}")
