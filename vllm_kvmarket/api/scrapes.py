"""What an idle engine has counted comes along with a scrape of /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

# An engine that is busy tells its figures with every step; a scrape does not wait for one to end.
PATIENCE_S = 0.2


def install(app: FastAPI) -> None:
    """Have scrapes wake the engine; mutates the app. For attach_router()."""
    app.add_middleware(Scrapes)


class Scrapes:
    """ASGI middleware. vLLM hands a connector's figures on with engine steps, and an engine without
    requests makes none, unless something wakes it.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let every request through; one for /metrics a moment later."""
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics"):
            state = scope["app"].state
            if getattr(state, "kvmarket_service", None) is not None:
                await self._wake(state.engine_client)
        await self._app(scope, receive, send)

    async def _wake(self, engine: Any) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(_ask(engine))
        await asyncio.wait({self._asking}, timeout=PATIENCE_S)


async def _ask(engine: Any) -> None:
    # The first question wakes the engine, which then makes the step that has figures to tell. It
    # answers the second one behind that step.
    for _ in range(2):
        try:
            await engine.is_paused()
        except Exception:  # noqa: BLE001  # a dead engine's last figures are still worth telling
            return
