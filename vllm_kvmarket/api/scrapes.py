"""Scrapes of /metrics: they wake an idle engine, and show amounts of money to admins only."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI

from vllm_kvmarket.api.bodies import App, Message, Receive, Scope, Send
from vllm_kvmarket.connector.metric_definitions import METRICS, PREFIX

# A busy engine reports its metrics with every step; a scrape does not wait for the step's end.
PATIENCE_S = 0.2
_MONEY = tuple(f"{PREFIX}{name}".encode() for name in METRICS if name.endswith("_nano"))


def install(app: FastAPI) -> None:
    """Have scrapes wake the engine; mutates the app. For attach_router()."""
    app.add_middleware(Scrapes)


class Scrapes:
    """ASGI middleware that wakes the engine before a scrape.

    Metrics of a connector come with engine steps, and an engine without requests makes no steps.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let every request through; one for /metrics a moment later."""
        path = scope.get("path", "").rstrip("/")
        # The provider's page shows metrics too.
        if scope["type"] == "http" and path.endswith(("/metrics", "/kvmarket/provider")):
            state = scope["app"].state
            if getattr(state, "kvmarket_service", None) is not None:
                await self._wake(state.engine_client)
        await self._app(scope, receive, send)

    async def _wake(self, engine: Any) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(_ask(engine))
        await asyncio.wait({self._asking}, timeout=PATIENCE_S)


async def _ask(engine: Any) -> None:
    # The first question wakes the engine, which then makes a step and reports its metrics. The
    # answer to the second question comes after that step.
    for _ in range(2):
        try:
            await engine.is_paused()
        except Exception:  # noqa: BLE001  # a dead engine's last metrics are still shown
            return


def without_money(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """A scrape whose answer leaves out the metrics that are amounts of money."""
    # The answer must be plain text to be filtered.
    kept = [each for each in scope["headers"] if each[0].lower() != b"accept-encoding"]
    start: list[Message] = []
    content = bytearray()

    async def send_filtered(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.append(message)
            return
        content.extend(message.get("body", b""))
        if message.get("more_body", False):
            return
        lines = bytes(content).splitlines(keepends=True)
        shown = b"".join(line for line in lines if not _is_money(line))
        size = [(b"content-length", str(len(shown)).encode())]
        headers = [each for each in start[0]["headers"] if each[0].lower() != b"content-length"]
        await send({**start[0], "headers": headers + size})
        await send({**message, "body": shown})

    return {**scope, "headers": kept}, send_filtered


def _is_money(line: bytes) -> bool:
    name = line.split(b" ", 3)[2] if line.startswith((b"# HELP ", b"# TYPE ")) else line
    return name.startswith(_MONEY)
