"""A market and a scheduler half on it, closed after the test."""

from __future__ import annotations

import pytest

from tests.support.scheduler_half import half_of, opened_market


@pytest.fixture
def market(tmp_path):
    with opened_market(tmp_path) as opened:
        yield opened


@pytest.fixture
def half(market, monkeypatch):
    made = half_of(market, monkeypatch)
    yield made
    made.close()
