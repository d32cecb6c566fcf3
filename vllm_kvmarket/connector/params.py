"""What a request asks of the market, read from its kv_transfer_params.

A malformed or unsigned wish never fails a request: it is declined with a reason, and the request is
computed in full.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from vllm_kvmarket.credentials import ACCOUNT_PATTERN, OPERATOR, Credentials, account_subject

FIELD = "kvmarket"


AccountId = Annotated[str, msgspec.Meta(pattern=f"^{ACCOUNT_PATTERN}$")]
Token = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{0,64}$")]


class PublishParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The listing that a publishing request asks for."""

    title: str = ""
    publisher: AccountId = "publisher"
    rendered_as: Literal["text", "chat"] = "text"
    cache_read_nano_per_mtok: int | None = None
    royalty_ppm: int | None = None
    expires_at_s: float | None = None
    charge: bool = True


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
    token: Token = ""


class Declined(msgspec.Struct, frozen=True):
    """Why a request's wish is not heard."""

    reason: str


NOTHING = RequestParams()


def read(
    kv_transfer_params: dict[str, Any] | None, credentials: Credentials, trusted: bool
) -> RequestParams | Declined:
    """The request's wish, or why it is declined. Under `trusted` no token is needed."""
    raw = (kv_transfer_params or {}).get(FIELD)
    if raw is None:
        return NOTHING
    try:
        params = msgspec.convert(raw, RequestParams)
    except msgspec.ValidationError as error:
        return Declined(f"kv_transfer_params.{FIELD} is malformed: {error}")
    operator = params.publish is not None or params.preload or params.audit is not None
    if trusted:
        return params
    if operator and not credentials.allows(OPERATOR, params.token):
        return Declined("publishing, preloading and auditing need the operator's token")
    if (
        not operator
        and params.account is not None
        and not credentials.allows(account_subject(params.account), params.token)
    ):
        return Declined(f"no valid token for account {params.account!r}")
    return params
