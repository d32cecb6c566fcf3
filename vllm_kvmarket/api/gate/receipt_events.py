"""Receipts at the end of a stream, in one more event that clients of OpenAI's API do not see."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from vllm_kvmarket.api.bodies import Message, Send
from vllm_kvmarket.api.gate.route_kinds import Kind
from vllm_kvmarket.core.errors import KVMarketError
from vllm_kvmarket.ledger import Receipt
from vllm_kvmarket.market.market import Market

EVENT = "kvmarket"
# The engine answers a moment before the ledger's commit.
_WAITS_S = (0.0, 0.02, 0.05, 0.1)


def ids_of(kind: Kind, request_id: str, prompts: int) -> list[str]:
    """The ids that receipts have for a request that was sent as X-Request-Id."""
    if kind is Kind.COMPLETIONS:
        return [f"cmpl-{request_id}-{index}" for index in range(prompts)]
    if kind is Kind.RESPONSES:
        return [f"resp_{request_id}_0"]
    if kind is Kind.TOKENS:
        return [f"generate-tokens-{request_id}"]
    return [f"chatcmpl-{request_id}"]


class ReceiptSender:
    """Passes a response on as it comes, and adds an event with receipts at the end of a stream."""

    def __init__(self, send: Send, market: Market, account: str, ids: Sequence[str]) -> None:
        self._send = send
        self._market = market
        self._account = account
        self._ids = ids
        self._is_stream = False

    async def __call__(self, message: Message) -> None:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            self._is_stream = message["status"] == 200 and any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not self._is_stream or not ends:
            await self._send(message)
            return
        if message.get("body"):
            await self._send({**message, "more_body": True})
        event = await self._event()
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _event(self) -> bytes:
        data = {"type": EVENT, "request_ids": self._ids, "receipts": await self._receipts()}
        return b"event: kvmarket\ndata: " + msgspec.json.encode(data) + b"\n\n"

    async def _receipts(self) -> list[Receipt]:
        found: list[Receipt] = []
        for wait_s in _WAITS_S:
            await asyncio.sleep(wait_s)
            try:
                found = await asyncio.to_thread(self._look)
            except KVMarketError:
                return []  # /v1/kvmarket/receipts/{request id} has them later
            if found:
                break
        return found

    def _look(self) -> list[Receipt]:
        return [
            receipt
            for request_id in self._ids
            for receipt in self._market.ledger.receipts(
                account=self._account, request_id=request_id
            )
        ]
