"""A market in a new home, whose catalogue is checked when its test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_kvmarket.market.market import Market


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def market(home: Path) -> Iterator[Market]:
    with Market.open(home) as market:
        yield market
        assert market.catalogue.check_integrity() == []
