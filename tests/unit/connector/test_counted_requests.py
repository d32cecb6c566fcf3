"""The scheduler half's figures of whole requests, called as vLLM's scheduler calls it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from vllm.v1.request import RequestStatus

from tests.support.catalogue_documents import tokens
from tests.support.scheduler_half import (
    CACHED,
    DOCUMENT,
    half_of,
    local_tokens,
    request_of,
)
from vllm_kvmarket.connector.metrics import MarketStats


@pytest.fixture
def half(market, monkeypatch):
    """A scheduler half that believes tokens only."""
    made = half_of(market, monkeypatch, trust_requests=False)
    yield made
    made.close()


class Figures:
    """All that a half tells, step by step."""

    def __init__(self, half) -> None:
        self._half = half
        self._stats = MarketStats()

    def now(self) -> dict[str, int | float]:
        if (news := self._half.metrics.take()) is not None:
            assert not news.is_empty()
            self._stats.aggregate(news)
        return self._stats.reduce()

    def wait_for(self, name: str) -> dict[str, int | float]:
        deadline = time.monotonic() + 10
        while name not in self.now():
            assert time.monotonic() < deadline, self.now()
            time.sleep(0.01)
        return self.now()


def serve(half, prompt, params, status=RequestStatus.FINISHED_STOPPED, output=5):
    """One request from its arrival to its end, with the document's whole blocks in vLLM's cache."""
    request = request_of(prompt, params, f"r-{time.monotonic_ns()}", status, output)
    half.arrived(request)
    deadline = time.monotonic() + 10
    while True:
        external, _ = half.ready(request, local_tokens(half, request))
        if external is not None:
            break
        assert time.monotonic() < deadline
        half.take_instructions()
        time.sleep(0.001)
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 6)),))
    half.allocated(request, blocks, 0)
    half.take_instructions()
    return half.finished(request, [[1, 2, 3, 4, 5]])[1]


def test_a_bought_request_is_counted_and_its_money_when_it_is_booked(half, market):
    """Here vLLM found four whole blocks; what was not loaded was computed."""
    figures = Figures(half)
    answer = serve(half, [*DOCUMENT, 7, 8], market.params("alice"))["kvmarket"]
    assert (answer["reused_tokens"], answer["charge_nano"]) == (CACHED, CACHED * 500)
    counted = figures.wait_for("receipts")
    assert counted["matched_tokens"] == 600
    assert counted["reused_tokens"] == CACHED
    assert counted["loaded_tokens"] == 0
    assert counted["recomputed_tokens/other"] == 600 - CACHED
    assert counted["charged_nano/reuse"] == CACHED * 500
    receipt = market.receipt(answer["receipt_id"])
    assert counted["royalties_nano"] == receipt.royalty_nano
    assert counted["ledger_commit_seconds_count"] >= 2
    assert not any(name.startswith("declined") for name in counted)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (lambda _: {}, "no_account"),
        (lambda market: market.params("poor"), "no_funds"),
        (lambda market: market.params("nobody"), "unknown_account"),
        (lambda _: wish(account="alice", token="0" * 64), "invalid_token"),
        (lambda _: wish(publish={}), "invalid_token"),
        (lambda _: wish(nonsense=1), "malformed"),
        (lambda _: wish(declined="never"), "never"),
        (lambda _: wish(declined="max_price"), "max_price"),
        (lambda _: wish(declined="ledger_unavailable"), "ledger_unavailable"),
    ],
)
def test_declined_reuse_is_counted_once_by_its_reason(half, market, params, reason):
    """With the tokens that are computed for it; no money moves."""
    figures = Figures(half)
    answer = serve(half, [*DOCUMENT, 7, 8], params(market))["kvmarket"]
    assert answer["declined"]
    counted = figures.wait_for("matched_tokens")
    declined = {name: number for name, number in counted.items() if name.startswith("declined")}
    assert declined == {f"declined_requests/{reason}": 1}
    assert counted["recomputed_tokens/declined"] == counted["matched_tokens"] == 600
    assert not {"reused_tokens", "receipts", "charged_nano/reuse"} & set(counted)
    assert market.ledger.account("alice").debits_posted == 0


def wish(**fields):
    return {"kv_transfer_params": {"kvmarket": fields}}


def test_a_full_ledger_and_one_that_is_away_are_told_apart(half, market, monkeypatch):
    """Reuse is declined; the requests are answered."""
    from concurrent.futures import Future

    from vllm_kvmarket.core.errors import LedgerBusyError, LedgerUnavailableError

    figures = Figures(half)
    for error, reason in (
        (LedgerBusyError("100000 batches behind"), "ledger_busy"),
        (LedgerUnavailableError("no database"), "ledger_unavailable"),
    ):
        failed: Future[object] = Future()
        failed.set_exception(error)
        with monkeypatch.context() as patched:
            patched.setattr(half._market.ledger, "submit", lambda *_, failed=failed, **__: failed)
            serve(half, [*DOCUMENT, 7], market.params("alice"))
        assert figures.wait_for(f"declined_requests/{reason}")[f"declined_requests/{reason}"] == 1


def test_a_match_that_is_too_short_is_counted_for_buyers_only(half, market):
    """Everybody's chat begins with the same header."""
    figures = Figures(half)
    serve(half, [*DOCUMENT[:40], 1, 2, 3], {})
    assert not any(name.startswith("declined") for name in figures.now())
    serve(half, [*DOCUMENT[:40], 1, 2, 3], market.params("alice"))
    assert figures.now()["declined_requests/below_minimum"] == 1
    assert "matched_tokens" not in figures.now()


def test_a_request_that_ended_before_it_was_computed_was_not_recomputed(half, market):
    """Its client left while it waited."""
    figures = Figures(half)
    serve(half, [*DOCUMENT, 7, 8], {}, RequestStatus.FINISHED_ABORTED, output=0)
    assert figures.now()["matched_tokens"] == 600
    assert "recomputed_tokens/declined" not in figures.now()


def test_a_plain_request_has_nothing_to_tell(half, market):
    """No step of an engine carries anything for it, and an idle engine sleeps."""
    figures = Figures(half)
    figures.wait_for("provider_balance_nano")
    half.metrics.take()
    assert serve(half, tokens(600, seed=9), {}) is None
    assert not half.metrics.has_news
    assert half.metrics.take() is None


def test_the_operators_work_is_not_among_requests(half, market):
    """A preload matches, and nobody asked."""
    figures = Figures(half)
    signed = market.credentials.sign_params({"preload": True})
    answer = serve(half, [*DOCUMENT, 7], wish(**signed))["kvmarket"]
    assert answer["reused_tokens"] == CACHED
    assert "matched_tokens" not in figures.now()
