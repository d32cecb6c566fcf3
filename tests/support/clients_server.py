"""Fixtures, as a plugin of pytest: one server for all modules that try it with clients."""

from __future__ import annotations

import pytest

from tests.support.engines import NANO
from tests.support.serving import DOCUMENT


@pytest.fixture(scope="session")
def shop(server):
    """The server that publishes over HTTP for nothing, and sells: the gate's tests use it too."""
    return server


@pytest.fixture(scope="session")
def admin(shop):
    """A key of the operator's."""
    return shop.keys.create("boss", ["admin"])[0]


@pytest.fixture(scope="session")
def pat(shop):
    """A publisher's key."""
    shop.market.create_account("pat", "publisher")
    return shop.keys.create("pat", ["publisher"])[0]


@pytest.fixture(scope="session")
def ann(shop):
    """A buyer's key."""
    return shop.key("ann", funds_nano=10 * NANO)


@pytest.fixture(scope="session")
def ben(shop):
    """Another buyer's."""
    return shop.key("ben", funds_nano=10 * NANO)


@pytest.fixture(scope="session")
def tokens_on_offer(shop):
    """A document of 600 tokens, published as text."""
    return shop.publish(DOCUMENT, "tokens")
