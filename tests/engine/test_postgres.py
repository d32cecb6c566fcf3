"""A market whose money is in PostgreSQL, which stops and comes back while requests are served."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from tests.support.engines import NANO, running, words
from tests.support.postgres import running_postgres
from vllm_kvmarket import Market
from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

DOCUMENT = words(6300, 600)


@pytest.fixture(scope="module")
def server():
    yield from running_postgres()


@pytest.fixture(scope="module")
def shop(server, tiny, tmp_path_factory):
    """A market on PostgreSQL, its engine, and what full prefill answers."""
    config = {"ledger_url": server.create_database("market")}
    with Market.open(tmp_path_factory.mktemp("postgres"), config) as market:
        market.create_account("alice")
        market.deposit("alice", 1000 * NANO, "d")
        with running(tiny(1), market) as llm:
            market.publish(llm, token_ids=DOCUMENT, title="on postgres")
            yield market, llm


def test_requests_go_on_while_the_ledger_is_away_and_no_charge_is_lost(server, shop):
    """What known funds cover amply is sold; when no reservation has been answered, all is computed.
    A settlement waits for the database's return.
    """
    market, llm = shop
    questions = [words(6310 + number, 9) for number in range(6)]
    expected = [ask(llm, DOCUMENT + question, rest_s=0).token_ids for question in questions]
    charged = 0

    def buy(number: int, max_tokens: int = 24) -> dict[str, object]:
        nonlocal charged
        empty_prefix_cache(llm)
        prompt = DOCUMENT + questions[number]
        answer = ask(llm, prompt, market.params("alice"), max_tokens=max_tokens, rest_s=0)
        assert answer.token_ids[:24] == expected[number]
        charged += answer.market["charge_nano"]
        return answer.market

    assert buy(0)["reused_tokens"] == 600

    # The server dies during an answer: reserved before, settled after its return.
    killer = threading.Timer(0.6, server.stop, [signal.SIGQUIT])
    killer.start()
    sold = buy(1, max_tokens=200)
    killer.join()
    assert sold["reused_tokens"] == 600

    # Its funds are known from just before, and cover this many times.
    assert buy(2)["reused_tokens"] == 600
    time.sleep(2 * MarketConfig().reservation_patience_s)
    computed = buy(3)
    assert (computed["reused_tokens"], computed["charge_nano"]) == (0, 0)
    assert "ledger" in str(computed["declined"])

    server.start()
    deadline = time.monotonic() + 30
    while buy(4)["reused_tokens"] != 600:
        assert time.monotonic() < deadline, "the ledger is back, but nothing is sold"
    assert buy(5)["reused_tokens"] == 600

    receipt = market.receipt(str(sold["receipt_id"]), timeout_s=30)
    assert receipt.charge_nano == 600 * 500
    deadline = time.monotonic() + 30
    # A sale that went ahead without a hold is booked when the ledger is back, too.
    while (alice := market.ledger.account("alice")).debits_pending or alice.debits_posted < charged:
        assert time.monotonic() < deadline, f"not all is settled or released: {alice}"
        time.sleep(0.1)
    assert alice.balance_nano == 1000 * NANO - charged
    assert market.ledger.check_integrity() == []
