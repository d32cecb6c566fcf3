"""The engine's answers about the market, for the response of the same request.

The engine's outputs are watched where they enter this process, since not every API of vLLM passes
their market part on. A refusal becomes the response; receipts become a stream's last event, which
clients of OpenAI's API do not see.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from vllm_kvmarket.api.bodies import App, Message, Receive, Scope, Send
from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.gate.request_fields import GatedRequest
from vllm_kvmarket.api.service import Service
from vllm_kvmarket.connector.request_params import FIELD
from vllm_kvmarket.core.errors import KVMarketError
from vllm_kvmarket.ledger import Receipt

# The engine answers a moment before the ledger's commit.
PATIENCE_S = 0.2


@dataclass(slots=True)
class Answers:
    """The market's parts of a request's outputs, and how many outputs may still be charged.

    An output counts as open until its last part says what was charged. It stays open when the
    client leaves, and when vLLM's front end ends it at a stop string: the engine charges both.
    """

    given: list[dict[str, Any]] = field(default_factory=list)
    open_count: int = 0


# Tasks that serve a request inherit it, and add to it.
_answers: ContextVar[Answers | None] = ContextVar("kvmarket_answers", default=None)


def watch(engine_client: Any) -> None:
    """Note the market's part of every output for the request that it belongs to; mutates."""
    generate = engine_client.generate

    def watched(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        outputs = generate(*args, **kwargs)
        answers = _answers.get()
        return outputs if answers is None else _noted(outputs, answers)

    engine_client.generate = watched


async def _noted(outputs: Any, answers: Answers) -> AsyncIterator[Any]:
    answers.open_count += 1
    is_open = True
    try:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                answer = (output.kv_transfer_params or {}).get(FIELD)
                if isinstance(answer, dict):
                    answers.given.append(answer)
                    if output.finished and is_open:
                        answers.open_count -= 1
                        is_open = False
                yield output
    except Exception:
        answers.open_count -= is_open  # an answer that failed is not charged
        raise


class MarketResponse:
    """Sends a response on as it comes, or a refusal by the engine in its place.

    A stream that was paid for ends with one more event. The response's start waits for its first
    part, as a refusal is known by then.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, service: Service, request: GatedRequest
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._service = service
        self._request = request
        self._answers = Answers()
        self._start: Message | None = None
        self._is_stream = False
        self._is_refused = False

    async def follow(self, app: App, scope: Scope, receive: Receive) -> None:
        """Serve the request, and give its key's budget back what was not charged."""
        _answers.set(self._answers)
        try:
            await app(scope, receive, self)
        finally:
            request, key_id = self._request, self._request.caller.key_id
            if request.spent_nano and key_id is not None:
                charges = {each["receipt_id"]: each.get("charge_nano", 0) for each in self._sold()}
                charged_nano = None if self._answers.open_count else sum(charges.values())
                answered = partial(
                    self._service.keys.answered,
                    key_id,
                    request.spent_nano,
                    charged_nano,
                    request.repeatable_purchase,
                )
                # Also if the client has left: then this task is cancelled.
                await asyncio.shield(asyncio.to_thread(answered))

    def _sold(self) -> list[dict[str, Any]]:
        return [each for each in self._answers.given if each.get("receipt_id")]

    async def __call__(self, message: Message) -> None:
        """ASGI's send."""
        if self._is_refused:
            return
        if message["type"] == "http.response.start":
            self._start = message
            self._is_stream = message["status"] == 200 and any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
            return
        if self._start is not None:
            refusal = self._refusal()
            if refusal is not None:
                self._is_refused = True
                await refusal.answer(self._scope["path"])(self._scope, self._receive, self._send)
                return
            await self._send(self._start)
            self._start = None
        if message.get("more_body", False) or not self._is_stream:
            await self._send(message)
            return
        if message.get("body"):
            await self._send({**message, "more_body": True})
        await self._send({**message, "body": await self._event(), "more_body": False})

    def _refusal(self) -> ApiError | None:
        error = next((each["error"] for each in self._answers.given if each.get("error")), None)
        if error is None:
            return None
        return ApiError(error["status"], error["code"], error["message"], param=FIELD)

    async def _event(self) -> bytes:
        """The stream's last event: receipts of this request only; empty if nothing was charged."""
        ids = list(dict.fromkeys(each["receipt_id"] for each in self._sold()))
        receipts = [found for each in ids if (found := await self._receipt(each)) is not None]
        data = {"type": FIELD, "receipt_ids": ids, "receipts": receipts}
        return b"event: kvmarket\ndata: " + msgspec.json.encode(data) + b"\n\n"

    async def _receipt(self, receipt_id: str) -> Receipt | None:
        try:
            return await asyncio.to_thread(self._service.market.receipt, receipt_id, PATIENCE_S)
        except KVMarketError:
            return None  # /v1/kvmarket/receipts/{receipt id} has it later
