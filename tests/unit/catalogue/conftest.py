"""A catalogue in a new database, whose integrity is checked when its test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_kvmarket.catalogue import Catalogue


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "market.sqlite"


@pytest.fixture
def place(path: Path) -> Path | str:
    """Where the catalogue is: tests of the servers have PostgreSQL's URL here."""
    return path


@pytest.fixture
def catalogue(place: Path | str) -> Iterator[Catalogue]:
    with Catalogue.open(place) as catalogue:
        yield catalogue
        assert catalogue.check_integrity() == []
        assert catalogue.last_error is None
