"""The gate itself: pure ASGI, innermost, so that it sees a request as the router does."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from typing import Any

from fastapi import FastAPI

from vllm_kvmarket.api.gate import bodies, quoting, wishes
from vllm_kvmarket.api.gate.bodies import Receive, Scope
from vllm_kvmarket.api.gate.placing import Documents
from vllm_kvmarket.api.gate.refusals import BEARER, Refusal, bad, no_key
from vllm_kvmarket.api.gate.rendering import prompts_of
from vllm_kvmarket.api.gate.routes import Kind, kind_of
from vllm_kvmarket.api.gate.streams import ReceiptSender, Send, ids_of
from vllm_kvmarket.api.keys import PREFIX, Principal, Scope as KeyScope
from vllm_kvmarket.connector import params
from vllm_kvmarket.connector.params import RequestParams
from vllm_kvmarket.credentials import account_subject
from vllm_kvmarket.errors import KVMarketError

CONNECTOR = "kvmarket"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")

logger = logging.getLogger("vllm.kvmarket")


def install(app: FastAPI) -> None:
    """Put the gate in front of an app's routes; mutates the app. For attach_router().

    The usage of every answer says how many tokens were reused, whatever the command line says.
    """
    app.state.args.enable_prompt_tokens_details = True
    app.add_middleware(Gate)


class Gate:
    """ASGI middleware. On a server without a market it lets everything through."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._documents: Documents | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, changed, or answer it."""
        if scope["type"] not in ("http", "websocket") or not _has_market(scope["app"].state):
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        try:
            passed = await self._pass(scope, receive, send)
        except bodies.Gone:
            return
        except Refusal as refusal:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": str(refusal)})
            else:
                await refusal.answer(path)(scope, receive, send)
            return
        except KVMarketError as error:
            logger.error("kvmarket: %s", error)
            refusal = Refusal(503, "market_unavailable", "the market cannot be used; try again")
            await refusal.answer(path)(scope, receive, send)
            return
        await self._app(*passed)

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
        principal = self._principal(service, scope)
        if kind is Kind.ADMIN:
            _need(principal, "admin")
            return scope, receive, send
        if principal is None and service.market.config.anonymous == "refuse":
            # A signed parameter in the body names an account too.
            if not kind.generates:
                raise no_key("this server answers with a key only: Authorization: Bearer kvm_...")
        if not kind.generates:
            return scope, receive, send
        if principal is not None:
            _need(principal, "buyer")
        return await self._generate(service, kind, principal, scope, receive, send)

    def _principal(self, service: Any, scope: Scope) -> Principal | None:
        """Whose key a request carries; a key that is not good is not nobody's. Raises Refusal."""
        given = bodies.header_values(scope, "authorization")
        given += bodies.header_values(scope, "x-api-key")
        ours = {value for each in given if (value := _bare(each)).startswith(PREFIX)}
        if not ours:
            return None
        if len(ours) > 1:
            raise bad("the request names several API keys; send one", code="several_api_keys")
        principal: Principal | None = service.keys.check(ours.pop())
        if principal is None:
            raise Refusal(
                401,
                "invalid_api_key",
                "this API key is unknown or was revoked",
                headers=dict(BEARER),
            )
        return principal

    async def _generate(
        self,
        service: Any,
        kind: Kind,
        principal: Principal | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> tuple[Scope, Receive, Send]:
        market = service.market
        request_id = bodies.single_header(scope, "x-request-id") or secrets.token_hex(16)
        if not _REQUEST_ID.fullmatch(request_id):
            raise bad("X-Request-Id: expected up to 256 visible characters")
        body = await bodies.read(scope, receive, market.config.max_body_bytes)
        wish = wishes.read(body.pop(wishes.FIELD, None))
        signed = None if principal else _signed(market, body)
        bodies.scrub(body)
        account = principal.account if principal else signed.account if signed else None
        if account is None and signed is None:
            if market.config.anonymous == "refuse":
                raise no_key("this server answers with a key only: Authorization: Bearer kvm_...")
            if wish.document is not None or wish.reuse == "require":
                raise no_key("reuse is paid on an account; send Authorization: Bearer kvm_...")
        if kind is Kind.RESPONSES:
            _restrict_responses(body, request_id)
        if kind is Kind.SALTED and (wish.document is not None or wish.reuse == "require"):
            raise bad("this route computes every prompt in full", wishes.FIELD)
        if wish.document is not None:
            await self._documents_of(service, scope).place(kind, body, wish.document)
        reuse = wish.reuse != "never"
        refuse_unfunded = market.config.unfunded == "refuse"
        if account is not None and reuse and (wish.needs_quote or refuse_unfunded):
            reuse = await self._is_worth_it(service, kind, body, account, wish, scope)
        if signed is not None:
            body["kv_transfer_params"] = {CONNECTOR: signed.raw}
        elif account is not None and reuse and kind is not Kind.SALTED:
            token = market.credentials.token(account_subject(account))
            body["kv_transfer_params"] = {CONNECTOR: {"account": account, "token": token}}
        body["cache_salt"] = _salt(market, account, signed)
        passed = await bodies.replace(scope, receive, body, {"x-request-id": request_id})
        if account is not None and reuse and body.get("stream"):
            prompt = body.get("prompt")
            several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
            ids = ids_of(_shape(kind, body), request_id, len(prompt) if several else 1)  # type: ignore[arg-type]
            return *passed, ReceiptSender(send, market, account, ids)
        return *passed, send

    async def _is_worth_it(
        self, service: Any, kind: Kind, body: dict[str, Any], account: str, wish: Any, scope: Scope
    ) -> bool:
        """Whether to reuse, at today's price and funds. Raises Refusal."""
        shape = _shape(kind, body)
        if shape is Kind.SALTED:
            return False
        prompts = await prompts_of(scope["app"], shape, body)
        market = service.market
        offered = await asyncio.to_thread(quoting.quote, market, service.tokens.namespace, prompts)
        offered = await quoting.with_funds(market, offered, account)
        return quoting.may_reuse(offered, wish, refuse_unfunded=market.config.unfunded == "refuse")

    def _documents_of(self, service: Any, scope: Scope) -> Documents:
        if service.tokens is None:
            raise Refusal(503, "market_unavailable", "this server has no engine")
        if self._documents is None:
            tokenizer = scope["app"].state.online_renderer.renderer.get_tokenizer()
            self._documents = Documents(service.market, service.tokens.namespace, tokenizer)
        return self._documents


class _Signed:
    """Parameters that were made with the home's secret: the operator's, or given out by it."""

    def __init__(self, raw: dict[str, Any], read: RequestParams) -> None:
        self.raw = raw
        self.account = read.account


def _signed(market: Any, body: dict[str, Any]) -> _Signed | None:
    given = body.get("kv_transfer_params")
    raw = given.get(CONNECTOR) if isinstance(given, dict) else None
    if not isinstance(raw, dict) or not raw.get("token"):
        return None
    read = params.read({CONNECTOR: raw}, market.credentials, trusted=False)
    if not isinstance(read, RequestParams):
        return None
    operates = read.publish is not None or read.preload or read.audit is not None
    return _Signed(raw, read) if operates or read.account is not None else None


def _salt(market: Any, account: str | None, signed: _Signed | None) -> str:
    """What keeps a caller's prefixes from all others'; nobody can tell it from the account."""
    if account is None and signed is None:
        # Two callers without a key may be two people.
        return secrets.token_hex(32)
    subject = "operator" if account is None else f"account:{account}"
    salt: str = market.credentials.token(f"salt:{subject}")
    return salt


def _has_market(state: Any) -> bool:
    """Whether the engine behind this server is on a market."""
    if getattr(state, "kvmarket_service", None) is not None:
        return True
    config = getattr(state, "vllm_config", None)
    transfer = getattr(config, "kv_transfer_config", None)
    return transfer is not None and transfer.kv_connector == CONNECTOR


def _bare(value: str) -> str:
    scheme, _, rest = value.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else value.strip()


def _need(principal: Principal | None, scope: KeyScope) -> None:
    if principal is None:
        raise no_key(f"this needs an API key with the scope {scope}")
    if not principal.may(scope):
        raise Refusal(403, "scope_missing", f"this key may not do that; it needs the scope {scope}")


def _shape(kind: Kind, body: dict[str, Any]) -> Kind:
    """What a body is, also on the route that takes several kinds."""
    if kind is not Kind.INVOCATIONS:
        return kind
    if "messages" in body:
        return Kind.CHAT
    return Kind.COMPLETIONS if "prompt" in body else Kind.SALTED


def _restrict_responses(body: dict[str, Any], request_id: str) -> None:
    """Responses are not stored: whoever knew an id could read and continue them; mutates."""
    if body.get("previous_response_id") or body.get("background"):
        raise bad("stored responses are not supported here; send the conversation instead")
    body["store"] = False
    body["request_id"] = f"resp_{request_id}"
