"""Fields of a request that the market reads, removes, or writes.

A client may write `kvmarket`. Only the server writes what the engine acts on: `kv_transfer_params`
and `cache_salt`.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI

from vllm_kvmarket.api.auth import Caller
from vllm_kvmarket.api.bodies import Scope
from vllm_kvmarket.api.errors import ApiError, invalid
from vllm_kvmarket.api.gate.route_kinds import Kind
from vllm_kvmarket.auth.api_keys import KeyLimits
from vllm_kvmarket.auth.operator_tokens import Credentials
from vllm_kvmarket.connector import request_params
from vllm_kvmarket.connector.request_params import FIELD, Reason, RequestParams
from vllm_kvmarket.core.pricing import Tariff

# Everything by which a request could speak to a connector.
_CONNECTOR_FIELDS = ("kv_transfer_params", "ec_transfer_params")
# They reorder vLLM's queue, choose an engine, or replace the model: for admins only.
_ADMIN_HEADERS = ("x-vllm-priority", "x-data-parallel-rank")
_ADMIN_HEADER_PREFIX = "x-amzn-sagemaker-"
# Fields of a body in which media stand with an id of the client's choice.
_MEDIA_HOLDERS = ("messages", "input", "content_parts")

# The fields that a request may have together with a document. Others could show the document's
# text, put something in front of it, or lead around its purchase.
# fmt: off
_SAMPLING = frozenset(
    (
        "n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
        "stop", "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "logprobs", "bad_words", "skip_special_tokens",
        "spaces_between_special_tokens", "include_stop_str_in_output", "structured_outputs",
        "response_format", "detokenize", "thinking_token_budget", "return_tokens_as_token_ids",
    )
)
# fmt: on
_COMMON = _SAMPLING | {"model", "stream", "stream_options", "user", "metadata"}
_BESIDE_DOCUMENT: dict[Kind, frozenset[str]] = {
    Kind.COMPLETIONS: _COMMON | {"prompt"},
    Kind.CHAT: _COMMON | {"messages", "max_completion_tokens", "top_logprobs"},
    Kind.MESSAGES: _COMMON | {"messages", "stop_sequences"},
    Kind.RESPONSES: _COMMON | {"input", "max_output_tokens", "store", "text", "top_logprobs"},
    Kind.TOKENS: _COMMON | {"token_ids", "sampling_params", "output_mode"},
}


class MarketField(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The request field `kvmarket`.

    `document` goes in front of the prompt and is bought. `reuse`: "prefer" computes what cannot be
    reused, "require" refuses it, "never" computes always; without it, the key has agreed to buy or
    not. `max_price_nano` is the most that this request's reuse may cost.
    """

    document: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    reuse: Literal["prefer", "require", "never"] | None = None
    max_price_nano: Annotated[int, msgspec.Meta(ge=0)] | None = None

    @property
    def is_binding(self) -> bool:
        """Whether the request fails if it cannot reuse."""
        return self.document is not None or self.reuse == "require"

    def wants_reuse(self, limits: KeyLimits) -> bool:
        """Whether the request buys: it asks to, or its key has agreed in advance."""
        if self.reuse is None and self.document is None:
            return limits.consents
        return self.reuse != "never"

    def dearest_nano_per_mtok(self, limits: KeyLimits, tariff: Tariff) -> int | None:
        """The price of the dearest listing that the request buys from; None for no limit.

        A key's own cap always holds. Without one the tariff is the limit, unless the request says
        what it wants to pay.
        """
        if limits.max_cache_read_nano_per_mtok is not None:
            return limits.max_cache_read_nano_per_mtok
        if self.document is not None or self.max_price_nano is not None:
            return None
        return tariff.terms().cache_read_nano_per_mtok


NO_FIELD = MarketField()


@dataclass(slots=True)
class GatedRequest:
    """A generating request. `body` is changed by the gate; `content` is as the client sent it."""

    app: FastAPI
    kind: Kind
    caller: Caller
    body: dict[str, Any]
    content: bytes
    request_id: str = ""
    idempotency_key: str = ""
    field: MarketField = NO_FIELD
    # The length of the document in front of each prompt.
    document_tokens: int | None = None
    # Why nothing is bought, where the gate knows that already.
    declined: Reason | None = None
    # The most that the reuse of each prompt may cost.
    limits_nano: list[int] | None = None
    # Charged to the key's budget for this request, before the engine's answer.
    spent_nano: int = 0
    # The same for all retries of a request.
    purchase_key: str | None = None

    @property
    def repeatable_purchase(self) -> str | None:
        """The purchase that a retry may come to, for the budget of the sender's key."""
        return self.purchase_key if self.idempotency_key else None

    @property
    def prompt_count(self) -> int:
        """How many prompts the engine gets, each as a request of its own."""
        prompts = self.body.get("prompt")
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], list | str):
            return len(prompts)
        return 1

    @property
    def size(self) -> int:
        """About how many bytes the body has."""
        return len(self.content)


def take_market_field(body: dict[str, Any]) -> MarketField:
    """Take the field out of a body; mutates it. Raises ApiError."""
    value = body.pop(FIELD, None)
    if value is None:
        return NO_FIELD
    try:
        field = msgspec.convert(value, MarketField)
    except msgspec.ValidationError as error:
        raise invalid(f"{FIELD}: {error}", FIELD) from None
    if field.document is not None and field.reuse == "never":
        raise invalid('a document is reused: leave "reuse": "never" out, or send its text', FIELD)
    return field


def remove_server_fields(body: dict[str, Any]) -> str:
    """Remove from a body what only the server may write; mutates it. Returns the client's salt."""
    for field in _CONNECTOR_FIELDS:
        body.pop(field, None)
    salt = body.pop("cache_salt", None)
    sampling = body.get("sampling_params")
    holders = [body.get("vllm_xargs")]
    if isinstance(sampling, dict):
        holders += [sampling.get("extra_args"), sampling.get("vllm_xargs")]
    for holder in holders:
        if isinstance(holder, dict):
            for field in _CONNECTOR_FIELDS:
                holder.pop(field, None)
    return salt if isinstance(salt, str) else ""


def remove_admin_fields(body: dict[str, Any]) -> None:
    """Remove from a client's body what only admins may send; mutates it. Raises ApiError."""
    body.pop("priority", None)
    # vLLM makes a full prefill for each beam and token, and forgets who pays for them.
    if body.get("use_beam_search"):
        raise ApiError(
            403,
            "scope_missing",
            "beam search needs a key with the scope admin",
            param="use_beam_search",
        )


def without_admin_headers(scope: Scope) -> Scope:
    """A request without the headers that only admins may send; mutates nothing."""
    kept = [
        (name, value)
        for name, value in scope["headers"]
        if (text := name.decode("latin-1").lower()) not in _ADMIN_HEADERS
        and not text.startswith(_ADMIN_HEADER_PREFIX)
    ]
    return {**scope, "headers": kept}


def check_beside_document(kind: Kind, body: dict[str, Any]) -> None:
    """Raises ApiError if a body has a field that is not allowed together with a document."""
    allowed = _BESIDE_DOCUMENT.get(kind)
    if allowed is None:
        raise invalid("a document cannot be put in front of this route's prompt", FIELD)
    sampling = body.get("sampling_params")
    nested = sampling.items() if isinstance(sampling, dict) else ()
    fields = [(name, value, allowed) for name, value in body.items()]
    fields += [(name, value, _SAMPLING) for name, value in nested]
    for name, value, known in fields:
        # Not by truth: prompt_logprobs may be 0, and shows the prompt.
        is_empty = value is None or value is False or value in ("", [], {})
        if name not in known and not is_empty:
            raise invalid(f"{name} is not possible together with a document", name)


def scope_media(body: dict[str, Any], salt: str) -> None:
    """Bind the ids of images and other media to a salt; mutates.

    vLLM keeps media in a cache by these ids, which would show one account the media of another.
    """
    prefix = hashlib.sha256(salt.encode()).hexdigest()[:32]
    for field in _MEDIA_HOLDERS:
        _scope_ids(body.get(field), prefix)
    features = body.get("features")
    hashes = features.get("mm_hashes") if isinstance(features, dict) else None
    for of_kind in hashes.values() if isinstance(hashes, dict) else ():
        if isinstance(of_kind, list):
            of_kind[:] = [f"{prefix}:{each}" for each in of_kind]


def _scope_ids(value: Any, prefix: str) -> None:
    if isinstance(value, list):
        for each in value:
            if isinstance(each, dict | list):
                _scope_ids(each, prefix)
    elif isinstance(value, dict):
        if isinstance(value.get("uuid"), str):
            value["uuid"] = f"{prefix}:{value['uuid']}"
        for each in value.values():
            if isinstance(each, dict | list):
                _scope_ids(each, prefix)


def sender_of(caller: Caller, credentials: Credentials, body: dict[str, Any]) -> Caller:
    """The caller, or, without a key, the holder of the operator's token in a body's parameters.

    Parameters without a valid token are ignored, and all are beside a key. Tokens that this gate
    has made for one request are ignored too: somebody may have read them in a log.
    """
    given = body.get("kv_transfer_params")
    raw = given.get(FIELD) if isinstance(given, dict) else None
    if caller.account is not None or not isinstance(raw, dict) or not raw.get("token"):
        return caller
    params = request_params.read_params({FIELD: raw}, credentials, trusted=False)
    if not isinstance(params, RequestParams) or params.request_id is not None:
        return caller
    if params.is_operators:
        return Caller(operation=raw)
    return Caller(account=params.account)


def engine_params(
    request: GatedRequest, credentials: Credentials, tariff: Tariff
) -> dict[str, Any] | None:
    """The parameters for the connector; None, so that everything is computed.

    They are signed for this request and sixty seconds.
    """
    caller, field = request.caller, request.field
    if caller.operation is not None:
        return {FIELD: caller.operation}
    if request.declined is not None:
        return {FIELD: {"declined": request.declined}}
    if caller.account is None or request.kind is Kind.SALTED:
        return None
    limits = request.limits_nano
    params = {
        "account": caller.account,
        "document": field.document,
        "must_reserve": field.is_binding or None,
        "purchase_key": request.purchase_key,
        "max_price_nano": limits[0] if limits and len(limits) == 1 else limits,
        "max_cache_read_nano_per_mtok": field.dearest_nano_per_mtok(caller.limits, tariff),
        "request_id": request.request_id,
    }
    given = {name: value for name, value in params.items() if value is not None}
    return {FIELD: credentials.sign_params(given)}


def cache_salt(caller: Caller, credentials: Credentials, client_salt: str = "") -> str:
    """Keeps a caller's unpublished prefixes from all others; it cannot be guessed.

    A client may divide its own prefixes further by its own salt.
    """
    if caller.is_anonymous:
        # Two anonymous requests may come from two people.
        return secrets.token_hex(32)
    subject = "operator" if caller.account is None else f"account:{caller.account}"
    more = f"\0{client_salt}" if client_salt else ""
    return credentials.sign("salt", f"{subject}{more}")
