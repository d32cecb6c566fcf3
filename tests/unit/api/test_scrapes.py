"""A scrape wakes an engine that has nothing to do, and waits for no engine that is busy."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_kvmarket.api import scrapes


class Engine:
    """Counts questions; does not answer while `busy`."""

    def __init__(self, busy: bool = False, error: Exception | None = None) -> None:
        self.questions = 0
        self.busy = busy
        self.error = error

    async def is_paused(self) -> bool:
        self.questions += 1
        if self.error is not None:
            raise self.error
        if self.busy:
            await asyncio.sleep(3600)
        return False


def served(engine: Engine, *, has_market: bool = True) -> TestClient:
    app = FastAPI()
    app.state.engine_client = engine
    app.state.kvmarket_service = SimpleNamespace() if has_market else None

    @app.get("/metrics")
    async def metrics() -> int:
        return engine.questions

    @app.get("/other")
    async def other() -> int:
        return engine.questions

    scrapes.install(app)
    return TestClient(app)


def test_a_scrape_is_answered_behind_the_engines_figures():
    """The second answer of the engine comes behind the step that the first question made it do."""
    with served(Engine()) as client:
        assert client.get("/other").json() == 0
        assert client.get("/metrics").json() == 2
        assert client.get("/metrics").json() == 4
        assert client.get("/other").json() == 4


def test_a_busy_engine_holds_no_scrape_up(monkeypatch):
    """And it is asked once, however often one scrapes meanwhile."""
    monkeypatch.setattr(scrapes, "PATIENCE_S", 0.01)
    with served(Engine(busy=True)) as client:
        assert [client.get("/metrics").json() for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("has_market", [True, False])
def test_a_dead_engine_and_one_on_no_market_are_left_alone(has_market):
    """Its last answer can be read; vLLM's own server is as it was."""
    with served(Engine(error=RuntimeError("dead")), has_market=has_market) as client:
        assert client.get("/metrics").json() == int(has_market)
