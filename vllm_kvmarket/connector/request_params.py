"""A request's parameters for the market, read from its kv_transfer_params.

Malformed or unsigned parameters never fail a request: they are declined with a reason, and the
request is computed in full.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from vllm_kvmarket.auth.operator_tokens import ACCOUNT_PATTERN, Credentials
from vllm_kvmarket.core.listing_terms import ListingTerms

FIELD = "kvmarket"


Nano = Annotated[int, msgspec.Meta(ge=0)]
AccountId = Annotated[str, msgspec.Meta(pattern=f"^{ACCOUNT_PATTERN}$")]
# Why a request does not buy: its sender wants it so, or the gate could not know its retries.
Reason = Literal["never", "max_price", "ledger_unavailable"]
PurchaseKey = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
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
    """`kv_transfer_params["kvmarket"]` of one request.

    `token` signs all the other fields; see Credentials.sign_params. Where requests are trusted, as
    offline, it may be missing, and so may `request_id` and `expires_at_s`.
    """

    # Who pays.
    account: AccountId | None = None
    # The document that is bought, to its end and nothing behind it; None: the longest match.
    document: str | None = None
    # Whether the request ends with a Refusal, uncomputed, when its reuse cannot be reserved.
    must_reserve: bool = False
    # Requests with one key are one purchase, on every engine: a client's retries.
    purchase_key: PurchaseKey | None = None
    # The most that its reuse may be reserved at: the price may have changed since it was quoted.
    # Where one HTTP request has several prompts, it is a list with the limit of each.
    max_price_nano: Nano | tuple[Nano, ...] | None = None
    # The dearest listing that the account has agreed to buy from.
    max_cache_read_nano_per_mtok: Nano | None = None
    # Why the request does not buy.
    declined: Reason | None = None
    # The operator's work.
    publish: PublishParams | None = None
    preload: bool = False
    audit: AuditParams | None = None
    request_id: str | None = None
    expires_at_s: float | None = None
    token: Token = ""

    @property
    def is_operators(self) -> bool:
        """Whether this is the operator's work, and no purchase."""
        return self.publish is not None or self.preload or self.audit is not None

    def limit_nano(self, prompt_number: int) -> int | None:
        """The most that the reuse of one of the HTTP request's prompts may cost."""
        limit = self.max_price_nano
        if not isinstance(limit, tuple):
            return limit
        return limit[prompt_number] if prompt_number < len(limit) else 0


class Refusal(msgspec.Struct, frozen=True):
    """Why the market ended a request that had to be reserved, before any of it was computed.

    The engine ends the request with vLLM's finish reason "abort" and no token. Its answer's
    `kv_transfer_params["kvmarket"]` is `{"error": {"code", "message", "status"}}`: these fields.
    `status` is the HTTP status that the gate answers with: 402 (no account, no funds, too dear),
    404 (no such document on offer), 409 (the prompt's tokens are not the document's, or the
    parameters are not valid), 503 (the ledger is away).
    """

    code: str
    message: str
    status: int


class Declined(msgspec.Struct, frozen=True):
    """Why a request's parameters are not followed: for people, and as the metrics count it."""

    message: str
    reason: str
    must_reserve: bool = False


NO_PARAMS = RequestParams()
WHY_DECLINED: dict[Reason, str] = {
    "never": "the request wants no reuse",
    "max_price": "reuse costs more than the request's max_price_nano",
    "ledger_unavailable": "the ledger, which knows a request's retries, is away",
}


def read_params(
    kv_transfer_params: dict[str, Any] | None,
    credentials: Credentials,
    trusted: bool,
    request_id: str | None = None,
) -> RequestParams | Declined:
    """The request's parameters, or why they are declined. Under `trusted` no token is needed.

    `request_id` is vLLM's, in which the one that was signed must be found.
    """
    raw = (kv_transfer_params or {}).get(FIELD)
    if raw is None:
        return NO_PARAMS
    must_reserve = isinstance(raw, dict) and raw.get("must_reserve") is True
    try:
        params = msgspec.convert(raw, RequestParams)
    except msgspec.ValidationError as error:
        message = f"kv_transfer_params.{FIELD} is malformed: {error}"
        return Declined(message, "malformed", must_reserve)
    if params.declined is not None:
        return Declined(WHY_DECLINED[params.declined], params.declined, must_reserve)
    if trusted or (params.account is None and not params.is_operators):
        return params
    if not credentials.allows_params(raw):
        needs = (
            "publishing, preloading and auditing need the operator's token"
            if params.is_operators
            else f"no valid token for account {params.account!r}"
        )
        return Declined(needs, "invalid_token", must_reserve)
    if request_id is not None and (params.request_id or "") not in request_id:
        return Declined("the token is another request's", "invalid_token", must_reserve)
    return params
