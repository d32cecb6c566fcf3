"""The gate: the innermost ASGI middleware, in front of every route."""

from __future__ import annotations

import asyncio
import re
import secrets
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api import quotes
from vllm_kvmarket.api.auth import ADMIN, BUYER, Caller
from vllm_kvmarket.api.bodies import (
    App,
    ClientGoneError,
    Receive,
    Scope,
    Send,
    beside_loop,
    parse_object,
    read_bounded,
    replay,
    single_header,
    with_body,
)
from vllm_kvmarket.api.errors import ApiError, invalid, missing_key, translate
from vllm_kvmarket.api.gate import body_checks
from vllm_kvmarket.api.gate.answer_bounds import check_answers, samples_of
from vllm_kvmarket.api.gate.engine_answers import MarketResponse
from vllm_kvmarket.api.gate.placement import Documents, prompts_of
from vllm_kvmarket.api.gate.request_fields import (
    GatedRequest,
    cache_salt,
    engine_params,
    remove_admin_fields,
    remove_server_fields,
    scope_media,
    sender_of,
    take_market_field,
    without_admin_headers,
)
from vllm_kvmarket.api.gate.route_kinds import Kind, kind_of
from vllm_kvmarket.api.pages.page import BASE, error_page
from vllm_kvmarket.api.scrapes import without_money
from vllm_kvmarket.api.service import CALLER, Service, market_settings
from vllm_kvmarket.connector.request_params import FIELD
from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.core.errors import KVMarketError, UnavailableError
from vllm_kvmarket.market.quote import Budget

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# vLLM answers /tokenize and its like with the tokens, which it writes on its event loop.
MOST_WORK_BYTES = 1 << 18
_PASSED = "kvmarket.passed_the_gate"


def install(app: FastAPI) -> None:
    """Put the gate in front of an app's routes; mutates the app.

    The usage of every answer then says how many tokens were reused.
    """
    app.state.args.enable_prompt_tokens_details = True
    app.add_middleware(Gate)


class Gate:
    """ASGI middleware. On a server without a market it lets everything through."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._documents: Documents | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, changed, or answer it."""
        gated = scope["type"] in ("http", "websocket") and not scope.get(_PASSED)
        if not gated or not _has_market(scope["app"].state):
            await self._app(scope, receive, send)
            return
        try:
            scope, receive, send = await self._admit(scope, receive, send)
        except ClientGoneError:
            return
        except (ApiError, KVMarketError) as error:
            await _refuse(error, scope, receive, send)
            return
        # A second gate, if an app has two, must not take our fields for the client's.
        passed = {**scope, _PASSED: True}
        if isinstance(send, MarketResponse):
            await send.follow(self._app, passed, receive)
        else:
            await self._app(passed, receive, send)

    async def _admit(
        self, scope: Scope, receive: Receive, send: Send
    ) -> tuple[Scope, Receive, Send]:
        """The request as the router gets it. Raises ApiError, KVMarketError, ClientGoneError."""
        service: Service | None = getattr(scope["app"].state, "kvmarket_service", None)
        config = MarketConfig() if service is None else service.market.config
        kind = kind_of(scope["app"].routes, scope)
        caller = Caller()
        is_open = kind is Kind.OPEN or (kind is Kind.METRICS and service is None)
        if not is_open:
            if service is None:
                raise ApiError(
                    503, "market_unavailable", "the market is not open; see the server's log"
                )
            if kind is not Kind.PAGES:  # visitors have sessions instead
                caller = await service.authenticate(scope)
            if kind is Kind.OURS or (kind is Kind.WORK and caller.is_anonymous):
                service.count(scope, caller)
            _check_scope(kind, caller)
        if scope["type"] == "websocket":
            return scope, receive, send
        if kind is Kind.METRICS and not (config.metrics_money or caller.is_admin):
            scope, send = without_money(scope, send)
        content = await read_bounded(scope, receive, _most_bytes(kind, caller, config))
        if service is None or not (kind.generates or kind is Kind.WORK):
            return {**scope, CALLER: caller}, replay(content, receive), send
        body = await parse_object(scope, content, service.most_items)
        if kind is Kind.WORK:
            await _check(scope, caller, body, content)
            text = await beside_loop(len(content), msgspec.json.encode, body)
            return *with_body(scope, receive, text, {}), send
        request_id = single_header(scope, "x-request-id") or secrets.token_hex(16)
        if not _REQUEST_ID.fullmatch(request_id):
            raise invalid("X-Request-Id: expected up to 256 visible characters")
        caller = sender_of(caller, service.market.credentials, body)
        caller.need_reader()
        if not (caller.is_admin or caller.operation is not None):
            remove_admin_fields(body)
            scope = without_admin_headers(scope)
        # Before anything is counted in a key's budget.
        await _check(scope, caller, body, content)
        _check_answers(service, caller, body)
        request = GatedRequest(
            app=scope["app"],
            kind=_shape(kind, body),
            caller=caller,
            body=body,
            content=content,
            request_id=request_id,
            idempotency_key=single_header(scope, "idempotency-key"),
        )
        with service.gate_queue.place():
            await self._prepare(service, request)
        if kind is Kind.RESPONSES:
            body["request_id"] = f"resp_{request_id}"
        text = await beside_loop(len(content), msgspec.json.encode, body)
        scope, receive = with_body(scope, receive, text, {"x-request-id": request_id})
        if (
            caller.account is not None
            and request.declined is None
            and request.kind is not Kind.SALTED
        ):
            send = MarketResponse(scope, receive, send, service, request)
        return scope, receive, send

    async def _prepare(self, service: Service, request: GatedRequest) -> None:
        """Replace what a client wrote of the server's fields by what the server says.

        Mutates the request. Raises ApiError, and KVMarketError if the ledger must be asked.
        """
        market, kind, caller, body = service.market, request.kind, request.caller, request.body
        samples = samples_of(body)
        field = request.field = take_market_field(body)
        salt = cache_salt(caller, market.credentials, remove_server_fields(body))
        await beside_loop(request.size, partial(scope_media, body), salt)
        if field.is_binding and caller.account is None:
            raise missing_key("reuse is paid on an account; send Authorization: Bearer kvm_...")
        if field.is_binding and kind is Kind.SALTED:
            raise invalid("this route computes every prompt in full", FIELD)
        if kind is Kind.RESPONSES:
            _restrict_responses(body)
        adapter = _adapter_of(request.app, body)
        if field.is_binding and adapter is not None:
            raise quotes.no_quote_for(adapter)
        if field.document is not None:
            await self._documents_of(service, request.app).place(request, field.document)
        if request.idempotency_key and caller.account is not None:
            request.purchase_key = await _purchase_key(service, request, caller.account)
            if request.purchase_key is None and kind is not Kind.SALTED:
                request.declined = "ledger_unavailable"
        elif samples > 1:
            # vLLM may compute each on another engine; the key makes them one purchase.
            request.purchase_key = secrets.token_hex(16)
        if kind is not Kind.SALTED and caller.operation is None and request.declined is None:
            if not field.wants_reuse(caller.limits):
                request.declined = "never"
            elif caller.account is not None and not await _is_affordable(
                service, request, is_adapter=adapter is not None
            ):
                request.declined = "max_price"
        params = engine_params(request, market.credentials, market.config.tariff)
        if params is not None:
            body["kv_transfer_params"] = {**body.get("kv_transfer_params", {}), **params}
        body["cache_salt"] = salt

    def _documents_of(self, service: Service, app: FastAPI) -> Documents:
        if self._documents is None:
            assert service.frontend is not None
            tokenizer = app.state.online_renderer.renderer.get_tokenizer()
            self._documents = Documents(service.market, service.frontend.namespace, tokenizer)
        return self._documents


async def _check(scope: Scope, caller: Caller, body: dict[str, Any], content: bytes) -> None:
    """Raises ApiError if vLLM would check a body for too long. Admins' bodies are not checked."""
    if caller.is_admin or caller.operation is not None:
        return
    await beside_loop(len(content), body_checks.check_forms, body)
    if await beside_loop(len(content), body_checks.needs_check, body):
        kind = body_checks.body_type(scope["app"], scope["path"], body)
        if kind is not None:
            await asyncio.to_thread(body_checks.check, kind, content)


def _check_answers(service: Service, caller: Caller, body: dict[str, Any]) -> None:
    """Raises ApiError if vLLM would write answers for too long. Admins' bodies are not checked."""
    if service.frontend is not None and not (caller.is_admin or caller.operation is not None):
        check_answers(body, service.frontend.context_tokens)


async def _purchase_key(service: Service, request: GatedRequest, account: str) -> str | None:
    """One key for a request and its retries, which are recognised by the Idempotency-Key.

    None while the ledger is away, unless the request must reuse: then nothing is sold, or a retry
    would be a second purchase. Raises ApiError for a malformed key, KeyConflictError if it came
    with another body, KeyUsedUpError after too many answers.
    """
    key = request.idempotency_key
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise invalid("Idempotency-Key: expected up to 255 visible characters", "idempotency-key")
    try:
        return await run_in_threadpool(service.market.ledger.use_key, account, key, request.content)
    except UnavailableError:
        if request.field.is_binding:
            raise
        return None


async def _is_affordable(service: Service, request: GatedRequest, *, is_adapter: bool) -> bool:
    """Whether a request may reuse at the present price; charges the budget of its key.

    Mutates the request. Raises ApiError if it must not be computed instead.
    """
    caller, field = request.caller, request.field
    has_budget = caller.limits.has_budget
    refuse_unfunded = service.market.config.unfunded == "refuse"
    is_limited = field.reuse == "require" or field.max_price_nano is not None
    request.limits_nano = _limits(field.max_price_nano, [0] * request.prompt_count)
    if is_adapter:
        return not has_budget  # only the engine can quote it, and keeps the other limits
    if not (is_limited or has_budget or refuse_unfunded):
        return True
    assert caller.account is not None
    prompts = await prompts_of(request)
    try:
        most_nano = await _most_nano(service, request)
        cap_nano = field.dearest_nano_per_mtok(caller.limits, service.market.config.tariff)
        offer, charges_nano = await quotes.offer_of(
            service, prompts, caller.account, request.document_tokens, Budget(cap_nano, most_nano)
        )
    except UnavailableError:
        if field.is_binding:
            raise
        # The engine keeps the limit, and computes what it cannot reserve.
        return not has_budget
    may_reuse = quotes.may_reuse(
        offer,
        required=field.is_binding,
        max_price_nano=field.max_price_nano,
        refuse_unfunded=refuse_unfunded,
    )
    if may_reuse and has_budget:
        may_reuse = await _spend(service, request, offer)
        request.limits_nano = charges_nano
    elif may_reuse:
        request.limits_nano = _limits(field.max_price_nano, charges_nano)
    return may_reuse


async def _most_nano(service: Service, request: GatedRequest) -> int | None:
    """The most that a request may cost, by its own limit and by the budgets of its key."""
    limits = [request.field.max_price_nano]
    if request.caller.limits.has_budget:
        left = service.keys.budget_left_nano
        purchase = request.repeatable_purchase
        limits.append(await run_in_threadpool(left, str(request.caller.key_id), purchase))
    return min((each for each in limits if each is not None), default=None)


def _limits(most_nano: int | None, charges_nano: list[int]) -> list[int] | None:
    """A limit for each prompt: its quoted charge, and an equal part of what is left of all."""
    if most_nano is None:
        return None
    left_nano = max(0, most_nano - sum(charges_nano))
    return [each + left_nano // len(charges_nano) for each in charges_nano]


async def _spend(service: Service, request: GatedRequest, offer: quotes.Offer) -> bool:
    """Charge the budget of the request's key with an offer.

    Mutates the request. Raises ApiError if it is too little and the request must reuse.
    """
    key_id = request.caller.key_id
    assert key_id is not None
    price_nano, purchase = offer.charge_nano, request.repeatable_purchase
    if price_nano and not await run_in_threadpool(service.keys.spend, key_id, price_nano, purchase):
        if request.field.is_binding:
            raise ApiError(
                402,
                "budget_exhausted",
                f"reuse costs {price_nano} nano-units, more than this key may still spend",
                quote=asdict(offer),
            )
        return False
    request.spent_nano = price_nano
    return True


async def _refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    refused = translate(error)
    assert refused is not None
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": refused.code})
        return
    path = scope["path"]
    is_page = path == BASE or path.startswith(f"{BASE}/")
    answer = error_page(refused, Request(scope)) if is_page else refused.answer(path)
    await answer(scope, receive, send)


def _has_market(state: Any) -> bool:
    """Whether the engine behind this server is on a market."""
    if getattr(state, "kvmarket_service", None) is not None:
        return True
    config = getattr(state, "vllm_config", None)
    return market_settings(getattr(config, "kv_transfer_config", None)) is not None


def _most_bytes(kind: Kind, caller: Caller, config: MarketConfig) -> int:
    if kind is Kind.WORK and not caller.is_admin:
        return min(config.max_body_bytes, MOST_WORK_BYTES)
    return config.max_body_bytes


def _check_scope(kind: Kind, caller: Caller) -> None:
    """Raises ApiError if the caller may not use routes of a kind."""
    if kind is Kind.ADMIN:
        caller.need(ADMIN)
    elif caller.account is not None and kind.generates:
        caller.need(BUYER)
    elif kind is Kind.WORK:
        caller.need_reader()


def _adapter_of(app: FastAPI, body: dict[str, Any]) -> str | None:
    """The adapter (LoRA) that a body's model names, None for the model itself."""
    loaded = getattr(getattr(app.state, "openai_serving_models", None), "lora_requests", None)
    model = body.get("model")
    return model if isinstance(model, str) and model in (loaded or {}) else None


def _shape(kind: Kind, body: dict[str, Any]) -> Kind:
    """The kind of a body, also on the route that takes several kinds."""
    if kind is not Kind.INVOCATIONS:
        return kind
    if "messages" in body:
        return Kind.CHAT
    return Kind.COMPLETIONS if "prompt" in body else Kind.SALTED


def _restrict_responses(body: dict[str, Any]) -> None:
    """Responses are not stored, as anyone who knew an id could read and continue them; mutates."""
    if body.get("previous_response_id") or body.get("background"):
        raise invalid("stored responses are not supported here; send the conversation instead")
    body["store"] = False
