"""The market's routes, with a stand-in for the engine, in a new home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.api_server import running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SimpleNamespace]:
    with running(tmp_path) as opened:
        yield opened
