"""The gate itself: pure ASGI, innermost, so that it sees a request as the router does."""

from __future__ import annotations

import logging
import re
import secrets
from typing import Any

from fastapi import FastAPI

from vllm_kvmarket.api.gate import bodies, quoting, wishes
from vllm_kvmarket.api.gate.bodies import Receive, Scope
from vllm_kvmarket.api.gate.callers import (
    CONNECTOR,
    WITHOUT_KEY,
    Caller,
    caller_of,
    need,
    principal_of,
)
from vllm_kvmarket.api.gate.placing import Documents
from vllm_kvmarket.api.gate.refusals import Refusal, bad, no_key
from vllm_kvmarket.api.gate.rendering import prompts_of
from vllm_kvmarket.api.gate.routes import Kind, kind_of
from vllm_kvmarket.api.gate.streams import ReceiptSender, Send, ids_of
from vllm_kvmarket.core.errors import KVMarketError

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")

_PASSED = "kvmarket.passed_the_gate"
_WATCHER = "kvmarket.watcher"

logger = logging.getLogger("vllm.kvmarket")


def install(app: FastAPI) -> None:
    """Put the gate in front of an app's routes; mutates the app. For attach_router().

    The usage of every answer says how many tokens were reused, whatever the command line says.
    """
    app.state.args.enable_prompt_tokens_details = True
    app.add_middleware(Gate)


class Gate:
    """ASGI middleware. On a server whose engine is on no market it lets everything through."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._documents: Documents | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, changed, or answer it."""
        gated = scope["type"] in ("http", "websocket") and not scope.get(_PASSED)
        if not gated or not _has_market(scope["app"].state):
            await self._app(scope, receive, send)
            return
        try:
            passed = await self._pass(scope, receive, send)
        except bodies.Gone:
            return
        except Refusal as refusal:
            await _refuse(refusal, scope, receive, send)
            return
        except KVMarketError as error:
            logger.error("kvmarket: %s", error)
            closed = Refusal(503, "market_unavailable", "the market cannot be used; try again")
            await _refuse(closed, scope, receive, send)
            return
        scope, receive, send = passed
        # Should the gate be there twice, the second one must not take this for what a client said.
        try:
            await self._app({**scope, _PASSED: True}, receive, send)
        finally:
            if _WATCHER in scope:
                scope[_WATCHER].finish()

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send
    ) -> tuple[Scope, Receive, Send]:
        """What goes on to the router. Raises Refusal."""
        kind = kind_of(scope["app"].routes, scope)
        if kind in (Kind.OPEN, Kind.OURS):
            return scope, receive, send
        service = getattr(scope["app"].state, "kvmarket_service", None)
        if service is None:
            raise Refusal(503, "market_unavailable", "the market is not open; see the server's log")
        principal = principal_of(service.keys, scope)
        if kind is Kind.ADMIN:
            need(principal, "admin")
        elif principal is not None and kind.generates:
            need(principal, "buyer")
        elif principal is None and kind is Kind.WORK:
            _let_in(Caller(), service)
        if not kind.generates:
            return scope, receive, send
        request_id = bodies.single_header(scope, "x-request-id") or secrets.token_hex(16)
        if not _REQUEST_ID.fullmatch(request_id):
            raise bad("X-Request-Id: expected up to 256 visible characters")
        body = await bodies.read(scope, receive, service.market.config.max_body_bytes)
        caller = caller_of(principal, service.market.credentials, body)
        _let_in(caller, service)
        reuse = await self._prepare(service, _shape(kind, body), caller, body, scope["app"])
        if kind is Kind.RESPONSES:
            body["request_id"] = f"resp_{request_id}"
        passed = await bodies.replace(scope, receive, body, {"x-request-id": request_id})
        observations = getattr(service, "observations", None)
        if observations is not None and _prompt_count(body) == 1:
            send = observations.watch(send)
            passed[0][_WATCHER] = send
        if reuse and caller.account is not None and body.get("stream"):
            ids = ids_of(_shape(kind, body), request_id, _prompt_count(body))
            send = ReceiptSender(send, service.market, caller.account, ids)
        return *passed, send

    async def _prepare(
        self, service: Any, kind: Kind, caller: Caller, body: dict[str, Any], app: Any
    ) -> bool:
        """Write into a body what the server says of it, in the place of what its sender did;
        mutates it. Whether what is on offer of it is to be reused. Raises Refusal.
        """
        market = service.market
        wish = wishes.read(body.pop(wishes.FIELD, None))
        bodies.scrub(body)
        wants = wish.document is not None or wish.reuse == "require"
        if wants and caller.account is None:
            raise no_key("reuse is paid on an account; send Authorization: Bearer kvm_...")
        if wants and kind is Kind.SALTED:
            raise bad("this route computes every prompt in full", wishes.FIELD)
        if kind is Kind.RESPONSES:
            _restrict_responses(body)
        adapter = quoting.adapter_of(app, body)
        if wants and adapter is not None:
            raise quoting.no_quote_for(adapter)
        if wish.document is not None:
            await self._documents_of(service, app).place(app, kind, body, wish.document)
        reuse = wish.reuse != "never" and kind is not Kind.SALTED
        quoted = wish.needs_quote or market.config.unfunded == "refuse"
        if reuse and quoted and adapter is None and caller.account is not None:
            prompts = await prompts_of(app, kind, body)
            offered = await quoting.quote_soon(market, service.tokens.namespace, prompts)
            offered = await quoting.with_funds(market, offered, caller.account)
            reuse = quoting.may_reuse(
                offered, wish, refuse_unfunded=market.config.unfunded == "refuse"
            )
        declined = None if reuse or kind is Kind.SALTED else wish.reason
        told = caller.connector_params(
            market.credentials,
            reuse=reuse,
            declined=declined,
            max_price_nano=wish.max_price_nano,
        )
        if told is not None:
            body["kv_transfer_params"] = {**body.get("kv_transfer_params", {}), **told}
        body["cache_salt"] = caller.salt(market.credentials)
        return reuse

    def _documents_of(self, service: Any, app: Any) -> Documents:
        if self._documents is None:
            tokenizer = app.state.online_renderer.renderer.get_tokenizer()
            self._documents = Documents(service.market, service.tokens.namespace, tokenizer)
        return self._documents


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.code})
    else:
        await refusal.answer(scope["path"])(scope, receive, send)


def _has_market(state: Any) -> bool:
    """Whether the engine behind this server is on a market."""
    if getattr(state, "kvmarket_service", None) is not None:
        return True
    config = getattr(state, "vllm_config", None)
    transfer = getattr(config, "kv_transfer_config", None)
    return transfer is not None and transfer.kv_connector == CONNECTOR


def _let_in(caller: Caller, service: Any) -> None:
    if caller.is_anonymous and service.market.config.anonymous == "refuse":
        raise no_key(WITHOUT_KEY)


def _shape(kind: Kind, body: dict[str, Any]) -> Kind:
    """What a body is, also on the route that takes several kinds."""
    if kind is not Kind.INVOCATIONS:
        return kind
    if "messages" in body:
        return Kind.CHAT
    return Kind.COMPLETIONS if "prompt" in body else Kind.SALTED


def _prompt_count(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1  # type: ignore[arg-type]


def _restrict_responses(body: dict[str, Any]) -> None:
    """Responses are not stored: whoever knew an id could read and continue them; mutates."""
    if body.get("previous_response_id") or body.get("background"):
        raise bad("stored responses are not supported here; send the conversation instead")
    body["store"] = False
