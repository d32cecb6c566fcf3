"""A market and a scheduler half on it, closed after the test."""

from __future__ import annotations

import pytest


@pytest.fixture
def market(tmp_path):
    # Here, because modules beside this one also run without vLLM.
    from tests.support.scheduler_half import opened_market

    with opened_market(tmp_path) as opened:
        yield opened


@pytest.fixture
def half(market, monkeypatch):
    from tests.support.scheduler_half import half_of

    made = half_of(market, monkeypatch)
    yield made
    made.close()
