"""What a request asks of the market, read from its kv_transfer_params.

Malformed or unsigned parameters never fail a request: they are declined with a reason, and the
request is computed in full.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from vllm_kvmarket.auth.operator_tokens import (
    ACCOUNT_PATTERN,
    OPERATOR,
    Credentials,
    account_subject,
)
from vllm_kvmarket.core.listing_terms import ListingTerms

FIELD = "kvmarket"


AccountId = Annotated[str, msgspec.Meta(pattern=f"^{ACCOUNT_PATTERN}$")]
# Why the sender of a request does not want reuse.
Reason = Literal["never", "max_price"]
Token = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{0,64}$")]


class PublishParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The listing that a publishing request asks for."""

    terms: ListingTerms = ListingTerms()
    charge: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(ACCOUNT_PATTERN, self.terms.publisher):
            raise ValueError(f"{self.terms.publisher!r} is no account's id")


class AuditParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which chunks of the prompt, a document or the beginning of one, are to be compared."""

    document_id: str
    chunks: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]


class RequestParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kv_transfer_params["kvmarket"]` of one request."""

    account: AccountId | None = None
    publish: PublishParams | None = None
    preload: bool = False
    audit: AuditParams | None = None
    declined: Reason | None = None
    token: Token = ""
    # The most that its reuse may be reserved at: the price may have changed since it was quoted.
    max_price_nano: Annotated[int, msgspec.Meta(ge=0)] | None = None

    @property
    def is_operators(self) -> bool:
        """Whether this is the operator's work, and no purchase."""
        return self.publish is not None or self.preload or self.audit is not None


class Declined(msgspec.Struct, frozen=True):
    """Why a request's parameters are not followed: for people, and as the metrics count it."""

    message: str
    reason: str


NO_PARAMS = RequestParams()
DECLINED_BY_CALLER: dict[Reason, str] = {
    "never": "the request wants no reuse",
    "max_price": "reuse costs more than the request's max_price_nano",
}


def read_params(
    kv_transfer_params: dict[str, Any] | None, credentials: Credentials, trusted: bool
) -> RequestParams | Declined:
    """The request's parameters, or why they are declined. Under `trusted` no token is needed."""
    raw = (kv_transfer_params or {}).get(FIELD)
    if raw is None:
        return NO_PARAMS
    try:
        params = msgspec.convert(raw, RequestParams)
    except msgspec.ValidationError as error:
        return Declined(f"kv_transfer_params.{FIELD} is malformed: {error}", "malformed")
    if params.declined is not None:
        return Declined(DECLINED_BY_CALLER[params.declined], params.declined)
    if trusted:
        return params
    if params.is_operators and not credentials.allows(OPERATOR, params.token):
        return Declined(
            "publishing, preloading and auditing need the operator's token", "invalid_token"
        )
    if (
        not params.is_operators
        and params.account is not None
        and not credentials.allows(account_subject(params.account), params.token)
    ):
        return Declined(f"no valid token for account {params.account!r}", "invalid_token")
    return params
