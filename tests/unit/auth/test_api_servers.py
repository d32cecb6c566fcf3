"""API server processes count each other, so that they share every rate limit."""

from __future__ import annotations

import contextlib

import pytest

from vllm_kvmarket.api.auth import Limiter, Rate
from vllm_kvmarket.auth import api_servers
from vllm_kvmarket.auth.api_servers import ApiServers


@pytest.fixture
def place(tmp_path):
    return tmp_path / "market.sqlite"


def test_servers_grant_together_what_one_would(place):
    """At once and in the long run; when one leaves, the other grants all of it."""
    now = [0.0]
    with contextlib.closing(ApiServers(place)) as first:
        second = ApiServers(place)
        first.look()
        assert (first.count, second.count) == (2, 2)
        limiters = [
            Limiter(Rate(burst=10, per_s=4), lambda: now[0], lambda each=each: each.count)
            for each in (first, second)
        ]
        granted = [sum(limiter.wait_s("a") == 0 for _ in range(20)) for limiter in limiters]
        assert granted == [5, 5]
        now[0] = 1.0
        granted = [sum(limiter.wait_s("a") == 0 for _ in range(20)) for limiter in limiters]
        assert granted == [2, 2]
        second.close()
        first.look()
        assert first.count == 1
        now[0] = 100.0
        assert sum(limiters[0].wait_s("a") == 0 for _ in range(20)) == 10


def test_a_server_that_died_is_forgotten(place, monkeypatch):
    """Its part of the limits is granted by the others."""
    with contextlib.closing(ApiServers(place)) as first, contextlib.closing(ApiServers(place)):
        first.look()
        assert first.count == 2
        monkeypatch.setattr(api_servers, "GONE_AFTER_S", -1)
        first.look()
        assert first.count == 1


def test_more_servers_than_the_burst_still_answer():
    """Each of them answers one request, and says when to come again."""
    limiter = Limiter(Rate(burst=2, per_s=1), lambda: 0.0, lambda: 8)
    assert [limiter.wait_s("a") for _ in range(2)] == [0, 8]
