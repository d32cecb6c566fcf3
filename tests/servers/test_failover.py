"""PostgreSQL with a synchronous standby: the primary dies, the standby takes over, and no sale or
listing that was confirmed is lost.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.support.catalogue_documents import LENGTH, matched, store, tokens
from vllm_kvmarket import Market
from vllm_kvmarket.core.errors import KVMarketError, LedgerUnavailableError
from vllm_kvmarket.ledger import PROVIDER, Outcome, pending, plain, post

psycopg = pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
from tests.support.postgres import PostgreSQL, needed_binaries  # noqa: E402  # needs psycopg

PRICE_NANO, ROYALTY_NANO, FUNDS_NANO = 3, 1, 10**9
GIVE_UP_S = 60


@pytest.fixture
def pair():
    """A primary that confirms what its standby has, and the standby."""
    with ExitStack() as stack:
        primary = PostgreSQL(needed_binaries())
        stack.callback(primary.close)
        # Somebody has set it so; kvmarket's transactions are durable all the same.
        primary.start("-c", "synchronous_commit=off")
        standby = PostgreSQL(needed_binaries(), primary)
        stack.callback(standby.close)
        standby.start()
        primary.wait_for_standby()
        yield primary, standby


@pytest.fixture
def config(pair, tmp_path):
    """Both servers, the one that cannot be written to first."""
    primary, standby = pair
    primary.create_database("market")
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in (standby, primary))
    (tmp_path / "bucket").mkdir()
    url = f"postgresql://market@{hosts}/market"
    return {"database_url": url, "object_store_url": (tmp_path / "bucket").as_uri()}


class Machine:
    """Sells and publishes without end; what was confirmed to it."""

    def __init__(self, market: Market, number: int) -> None:
        self.market = market
        self.sales: list[str] = []
        self.documents: list[str] = []
        self.seed = 1000 * number
        self._name = f"machine{number}"

    def sell(self, ended: threading.Event) -> None:
        """Sales one after another; what happened to one that fails is unknown: the same again."""
        while not ended.is_set():
            key = f"{self._name}-{len(self.sales)}"
            names = {"debit": "alice", "credit": PROVIDER, "code": "x"}
            hold = pending(id=f"{key}:hold", amount_nano=PRICE_NANO, timeout_s=900, **names)
            settled = post(id=f"{key}:settle", pending_id=hold.id, amount_nano=PRICE_NANO)
            royalty = plain(
                id=f"{key}:royalty", debit=PROVIDER, credit="pat", amount_nano=ROYALTY_NANO,
                code="x",
            )  # fmt: skip
            sale = [hold, settled, royalty]
            results = again(
                lambda sale=sale: self.market.ledger.submit(sale).result(GIVE_UP_S),
                LedgerUnavailableError,
            )
            assert {each.outcome for each in results} <= {Outcome.OK, Outcome.EXISTS}, results
            self.sales.append(key)

    def publish(self, ended: threading.Event) -> None:
        """Documents one after another."""
        while not ended.is_set():
            self.seed += 1
            listing = again(lambda: store(self.market, self.seed), KVMarketError)
            assert listing.state == "live"
            self.documents.append(listing.document_id)
            time.sleep(0.02)


def again(step: Callable[[], object], away: type[KVMarketError]):
    """Do what may be done twice until it is confirmed."""
    deadline = time.monotonic() + GIVE_UP_S
    while True:
        try:
            return step()
        except away:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GIVE_UP_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def grown(machines: list[Machine], sales: int, documents: int) -> Callable[[], bool]:
    """Whether each machine has got so many confirmed since now."""
    before = [(len(each.sales), len(each.documents)) for each in machines]
    return lambda: all(
        len(each.sales) >= old_sales + sales and len(each.documents) >= old_documents + documents
        for each, (old_sales, old_documents) in zip(machines, before, strict=True)
    )


def test_nothing_confirmed_is_lost_and_nothing_is_sold_twice(pair, config, tmp_path):
    """Two machines sell and publish through the change, which they follow by themselves."""
    primary, standby = pair
    ended = threading.Event()
    with ExitStack() as stack:
        markets = [stack.enter_context(Market.open(tmp_path / name, config)) for name in "ab"]
        for account, kind in (("alice", "buyer"), ("pat", "publisher")):
            markets[0].create_account(account, kind)
        markets[0].deposit("alice", FUNDS_NANO, "payment")
        for market in markets:
            market.catalogue.watch(market.config.refresh_interval_s)
        machines = [Machine(market, number) for number, market in enumerate(markets)]
        pool = stack.enter_context(ThreadPoolExecutor(4))
        stack.callback(ended.set)
        running = [
            pool.submit(work, ended) for each in machines for work in (each.sell, each.publish)
        ]
        until(grown(machines, 20, 3))
        primary.stop(signal.SIGKILL)
        standby.promote()
        until(grown(machines, 20, 3))
        ended.set()
        for each in running:
            each.result(GIVE_UP_S)
        for machine, other in zip(machines, markets[::-1], strict=True):
            document = tokens(LENGTH, machine.seed)
            until(lambda: matched(other.catalogue, document) == LENGTH)  # noqa: B023

    with Market.open(tmp_path / "later", config) as market:
        sales = [key for machine in machines for key in machine.sales]
        booked = Counter(each.id for each in market.ledger.transfers())
        for key in sales:
            assert booked[f"{key}:settle"] == booked[f"{key}:royalty"] == 1
        alice = market.ledger.account("alice")
        assert (alice.debits_posted, alice.debits_pending) == (PRICE_NANO * len(sales), 0)
        assert market.ledger.account("pat").balance_nano == ROYALTY_NANO * len(sales)
        assert market.ledger.check_integrity() == []
        live = {each.document_id for each in market.catalogue.listings("live")}
        assert live == {name for machine in machines for name in machine.documents}
        assert market.catalogue.check_integrity() == []


def test_a_server_that_cannot_be_written_to_is_not_used(pair, config, tmp_path):
    """A standby alone is an error at the start, not at the first sale."""
    _, standby = pair
    with Market.open(tmp_path / "first", config):
        pass
    alone = config | {"database_url": standby.url("market")}
    with pytest.raises(KVMarketError, match="read-only"):
        Market.open(tmp_path / "second", alone)
