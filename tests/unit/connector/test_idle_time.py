"""For how long the scheduler's thread waits for reservations: one moment a step, when idle."""

from __future__ import annotations

import time

import pytest

from tests.support.scheduler_half import CACHED, DOCUMENT, half_of, opened_market, request_of
from vllm_kvmarket.connector.idle_time import MOST_S, IdleTime
from vllm_kvmarket.market.purchase import Purchase, PurchaseState


class SlowPurchase:
    """The ledger does not answer; `waits` are how long somebody waited for it."""

    def __init__(self, state: PurchaseState = PurchaseState.RESERVING) -> None:
        self._state = state
        self.waits: list[float] = []

    def state(self) -> PurchaseState:
        return self._state

    def wait(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)
        time.sleep(timeout_s)


def test_many_reservations_share_one_moment_of_a_step():
    """Sixteen requests at once must not wait sixteen times."""
    idle = IdleTime()
    slow = [SlowPurchase() for _ in range(16)]
    for purchase in slow:
        idle.wait_for(purchase)
    assert [len(purchase.waits) for purchase in slow] == [1] + 15 * [0]
    assert slow[0].waits == [MOST_S]
    idle.step_ended([])
    idle.wait_for(slow[1])
    assert slow[1].waits == [MOST_S]


def test_nobody_waits_while_a_request_runs_or_when_the_answer_is_there():
    """A running request's next token is not delayed; an answer is taken at once."""
    idle = IdleTime()
    reserved, slow = SlowPurchase(PurchaseState.RESERVED), SlowPurchase()
    idle.wait_for(reserved)
    idle.step_ended(["a", "b"])
    idle.wait_for(slow)
    idle.request_ended("a")
    idle.wait_for(slow)
    assert reserved.waits == slow.waits == []
    idle.request_ended("b")
    idle.wait_for(slow)
    assert slow.waits == [MOST_S]


@pytest.fixture
def half(tmp_path, monkeypatch):
    with opened_market(tmp_path) as market:
        made = half_of(market, monkeypatch)
        yield made, market
        made.close()


def test_an_idle_engine_gives_no_step_away_for_a_reservation(half, monkeypatch):
    """Asked for the first time, a purchase is ready."""
    made, market = half
    monkeypatch.setattr("vllm_kvmarket.connector.idle_time.MOST_S", 10.0)
    made.take_instructions()
    first = request_of([*DOCUMENT, 7], market.params("alice"), "r-1")
    made.arrived(first)
    assert made.ready(first, CACHED) == (600 - CACHED, True)
    assert not made.take_instructions(["r-1"]).idle
    assert made.take_instructions().idle


def test_a_step_waits_once_also_where_requests_are_looked_at_twice(half, monkeypatch):
    """vLLM asks, and reading ahead asks again behind it: the second finds no time left."""
    made, market = half
    waits = []

    def wait(purchase, timeout_s):
        waits.append(timeout_s)
        time.sleep(timeout_s)

    monkeypatch.setattr(Purchase, "wait", wait)
    monkeypatch.setattr(Purchase, "state", lambda _: PurchaseState.RESERVING)
    request = request_of([*DOCUMENT, 7], market.params("alice"), "r-1")
    made.arrived(request)
    for step in (1, 2, 3):
        assert made.ready(request, 0) == (None, False)
        made.take_instructions()
        assert len(waits) == step
    monkeypatch.undo()
