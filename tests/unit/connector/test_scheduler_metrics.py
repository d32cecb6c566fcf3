"""The scheduler half's figures, on a real ledger, catalogue and store."""

from __future__ import annotations

import time

import pytest

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.purchases import reserve
from vllm_kvmarket.connector.housekeeping import Housekeeping
from vllm_kvmarket.connector.metric_definitions import METRICS
from vllm_kvmarket.connector.scheduler_metrics import SchedulerMetrics
from vllm_kvmarket.core.pricing import NANO
from vllm_kvmarket.ledger import PROVIDER, plain
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import PurchaseState, StorageItem, Usage

DOCUMENT = tokens(600)
USAGE = Usage(600, 600, 600, 0, 0, 10, 5)


@pytest.fixture
def market(tmp_path):
    with Market.open(tmp_path) as opened:
        opened.create_account("pat", "publisher")
        opened.create_account("alice")
        opened.deposit("alice", NANO, "d1")
        store_and_list(opened, DOCUMENT, publisher="pat")
        yield opened


@pytest.fixture
def meter(market):
    return SchedulerMetrics(market)


def written(market: Market) -> None:
    """Wait until the ledger has written, and the meter knows it."""
    for _ in range(2):
        market.ledger.submit([]).result()


def reported(meter: SchedulerMetrics) -> dict[str, int | float]:
    stats = meter.take()
    if stats is None:
        return {}
    for key in (*stats.data["counts"], *stats.data["gauges"], *stats.data["durations"]):
        name, _, label = key.partition("/")
        assert label in (METRICS[name].values or ("",)), key
    return stats.reduce()


def buy(market: Market, key: str = "k"):
    purchase = reserve(
        market,
        key=key,
        request_id="r",
        account="alice",
        match=market.match(NAMESPACE, DOCUMENT),
        model="m",
    )
    while purchase.state() is PurchaseState.RESERVING:
        time.sleep(0.001)
    assert purchase.state() is PurchaseState.RESERVED
    return purchase


def test_money_is_counted_once_and_when_the_ledger_has_booked_it(market, meter):
    """The same settlement of a second process was booked before: not counted again."""
    purchase, twin = buy(market), buy(market)
    for number, each in enumerate((purchase, twin)):
        receipt = each.settle(USAGE)
        meter.bought(each)
        written(market)
        figures = reported(meter)
        assert figures.get("charged_nano/reuse") == (None if number else receipt.charge_nano)
        assert figures.get("royalties_nano") == (None if number else receipt.royalty_nano)
        assert figures.get("receipts") == (None if number else 1)
        assert "charges_refused" not in figures
    assert receipt.charge_nano == market.ledger.account("alice").debits_posted > 0
    assert receipt.royalty_nano == market.ledger.account("pat").credits_posted > 0


def test_what_the_ledger_refuses_is_no_charge(market, meter):
    """A hold that was voided meanwhile: delivered, not paid, and counted as that alone."""
    purchase = buy(market)
    buy(market).void()
    purchase.settle(USAGE)
    meter.bought(purchase)
    written(market)
    figures = reported(meter)
    assert figures["charges_refused"] == 1
    assert not {"charged_nano/reuse", "receipts", "royalties_nano"} & set(figures)


def test_what_publishers_pay_is_counted_apart(market, meter):
    """Storing has a separate price, and no receipt of a reuse."""
    market.deposit("pat", NANO, "d2")
    charge = market.reserve(StorageItem("pat", "kvd_x", 7), key="w", account="pat")
    written(market)
    charge.settle()
    meter.bought(charge)
    written(market)
    figures = reported(meter)
    assert figures["charged_nano/publish"] == 7
    assert "receipts" not in figures


@pytest.mark.parametrize(
    ("reused", "failed", "declined", "output", "missed"),
    [
        (600, 0, "", 5, {}),
        (599, 0, "", 1, {"other": 1}),
        (256, 344, "", 5, {"failed": 344}),
        (200, 344, "", 5, {"failed": 344, "other": 56}),
        (0, 0, "no funds", 5, {"declined": 600}),
        (0, 0, "no funds", 0, {}),
    ],
)
def test_every_matched_token_was_reused_or_computed(
    market, meter, *, reused, failed, declined, output, missed
):
    """But for a request that ended before it was computed."""
    usage = Usage(600, reused, reused, 0, min(failed, 600 - reused), 610 - reused, output)
    meter.used(usage, declined=bool(declined))
    figures = reported(meter)
    assert figures["matched_tokens"] == 600
    assert figures.get("reused_tokens", 0) == figures.get("loaded_tokens", 0) == reused
    name = "recomputed_tokens/"
    assert {
        key.removeprefix(name): amount
        for key, amount in figures.items()
        if key.startswith(name) and amount
    } == missed
    if output:
        assert reused + sum(missed.values()) == 600


def test_gauges_say_what_is_there(market, meter):
    """Documents, chunks and bytes, the provider's money and what is reserved; then silence."""
    meter.look()
    figures = reported(meter)
    assert (figures["documents"], figures["chunks"]) == (1, 3)
    assert figures["stored_bytes/chunks"] == market.store.disk.bytes_used() > 0
    assert figures["stored_bytes/quarantine"] == 0
    assert figures["provider_balance_nano"] == figures["reserved_nano"] == 0
    meter.look()
    assert set(reported(meter)) <= {"ledger_queue_batches"}
    buy(market)
    meter.look()
    assert reported(meter)["reserved_nano"] == 600 * 500
    market.ledger.transact(
        plain(id="t", debit="alice", credit=PROVIDER, amount_nano=5, code="test")
    )
    meter.look()
    assert reported(meter)["provider_balance_nano"] == 5


def test_what_is_set_aside_is_told_apart(market, meter):
    """A damaged file is no chunk any more, and still takes its room."""
    key = next(market.store.disk.keys())
    size = market.store.disk.path(key).stat().st_size
    before = market.store.disk.bytes_used()
    assert market.store.disk.quarantine(key, 0, 1, "for a test") is False  # it is whole
    path = market.store.disk.path(key)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert market.store.disk.quarantine(key, 0, 1, "for a test")
    meter.look()
    figures = reported(meter)
    assert figures["stored_bytes/quarantine"] == size
    assert figures["stored_bytes/chunks"] == before - size


def test_commits_are_timed_and_looking_is_none(market, meter):
    """The ledger's writer is measured; an engine at rest writes nothing."""
    reported(meter)
    buy(market)
    assert reported(meter)["ledger_commit_seconds_count"] >= 1
    written(market)
    reported(meter)
    for _ in range(3):
        assert market.ledger.expire_pending() == 0
        meter.look()
    assert "ledger_commit_seconds_count" not in reported(meter)


def test_the_queue_is_told_while_the_writer_is_held_up(market, meter, monkeypatch):
    """And that it is empty again."""
    import threading

    gate = threading.Event()
    write = market.ledger._storage.write

    def slow(group):
        gate.wait(10)
        return write(group)

    monkeypatch.setattr(market.ledger._storage, "write", slow)
    futures = [market.ledger.submit([]) for _ in range(6)]
    time.sleep(0.05)  # the writer has taken the first ones
    meter.declined("no_funds")
    waiting = reported(meter)["ledger_queue_batches"]
    assert 1 <= waiting <= 6
    gate.set()
    for future in futures:
        future.result()
    meter.look()
    assert reported(meter)["ledger_queue_batches"] == 0


def test_housekeeping_takes_the_gauges_at_once(market, meter):
    """Its first round is at an engine's start."""
    keeping = Housekeeping(market, meter, interval_s=60)
    keeping.start()
    try:
        deadline = time.monotonic() + 10
        while not meter.has_news:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        keeping.close()
    assert reported(meter)["documents"] == 1
