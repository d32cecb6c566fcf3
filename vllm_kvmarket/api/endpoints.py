"""The market's routes as vLLM's API server takes them in: an endpoint plugin."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from vllm_kvmarket.api import gate, scrapes
from vllm_kvmarket.api.app import build_router, close_with_server, name_of, open_service
from vllm_kvmarket.api.pages import build_pages
from vllm_kvmarket.api.service import Service
from vllm_kvmarket.core.config import load


class MarketEndpoints:
    """An endpoint plugin in vLLM's sense."""

    name = "kvmarket"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the gate in front of all that generate."""
        app.include_router(build_router())
        app.include_router(build_pages())
        gate.install(app)
        scrapes.install(app)
        close_with_server(app)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Open the market where the engine is on one; without one, the routes say so.

        Raises KVMarketError: a server that could not sell does not start.
        """
        state.kvmarket_service = None
        if engine_client is None:
            return
        transfer = engine_client.vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == self.name:
            state.kvmarket_service = await asyncio.to_thread(_open, engine_client, state)


def _open(engine_client: Any, state: Any) -> Service:
    # vLLM, which only a server needs; unit tests of the routes do without.
    from vllm_kvmarket.connector.frontend import Frontend

    vllm_config = engine_client.vllm_config
    config = load(vllm_config.kv_transfer_config.kv_connector_extra_config)
    home = Path(config.home).expanduser()
    frontend = Frontend(engine_client, getattr(state, "online_renderer", None), home)
    return open_service(config, frontend, name_of(vllm_config.model_config.served_model_name))
