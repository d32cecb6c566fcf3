"""The ledger on a real PostgreSQL: what every database does, and what is PostgreSQL's own."""

from __future__ import annotations

import math
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.support.ledger_books import NANO, fresh_number, funded_ledger, hold, receipt
from tests.support.ledger_conformance import *  # noqa: F403  # its tests run here, on this module's places
from tests.support.ledger_keeping import *  # noqa: F403
from tests.support.ledger_processes import *  # noqa: F403
from tests.support.ledger_processes import writer
from vllm_kvmarket import LedgerError
from vllm_kvmarket.ledger import Ledger, Outcome, plain, post

psycopg = pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
from tests.support.postgres import PostgreSQL, needed_binaries  # noqa: E402  # needs psycopg


def running():
    server = PostgreSQL(needed_binaries())
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server():
    yield from running()


@pytest.fixture
def own_server():
    """One that the test may stop."""
    yield from running()


@pytest.fixture
def new_place(server):
    return lambda: server.create_database(f"market-{fresh_number()}")


@pytest.fixture
def place(new_place):
    return new_place()


@pytest.fixture
def refusals():
    return psycopg.IntegrityError


@pytest.fixture
def by_hand(place):
    def execute(statement):
        with psycopg.connect(place, options="-c search_path=kvmarket") as db:
            db.execute(statement)

    return execute


@pytest.fixture
def held_up(place):
    @contextmanager
    def hold_up():
        with psycopg.connect(place) as other:
            other.execute("SELECT FROM kvmarket.turn FOR UPDATE")
            yield

    return hold_up


@pytest.mark.parametrize("table", ["transfer", "receipt"])
def test_nothing_is_truncated(ledger, by_hand, table):
    """TRUNCATE deletes without asking about rows."""
    ledger.submit([hold("h", 1)], receipt=receipt("kvr_1", 1, "h")).result()
    with pytest.raises(psycopg.Error):
        by_hand(f"TRUNCATE {table} CASCADE")
    assert len(ledger.transfers()) == 2
    assert len(ledger.receipts()) == 1


def test_the_log_of_transfers_has_no_gaps(ledger, place):
    """Sequence numbers follow each other in the order of effect, over writers and refusals."""
    writers = [writer(place, name, 30) for name in "ab"]
    for number in range(30):
        ledger.submit([hold(f"x{number}", NANO)]).result()
    for process in writers:
        process.communicate(timeout=60)
    with psycopg.connect(place) as db:
        rows = db.execute("SELECT sequence FROM kvmarket.transfer ORDER BY sequence").fetchall()
        turn = db.execute("SELECT transfers FROM kvmarket.turn").fetchone()
    assert [sequence for (sequence,) in rows] == list(range(1, len(rows) + 1))
    assert turn == (len(rows),)


def test_balances_change_by_what_the_transfers_move(ledger, by_hand):
    """A client that sends balances of its own changes nothing by them."""
    ledger.submit([hold("h", 70), post(id="p", pending_id="h", amount_nano=30)]).result()
    ledger.submit([hold("g", 20)]).result()
    before = ledger.account("alice")
    by_hand(
        """SELECT keep('{"now_s": 1, "dues": {"g": null}, "receipts": [], "documents": [],
        "accounts": [{"id": "alice", "debits_pending": 0, "credits_pending": 0, "debits_posted": 0,
            "credits_posted": 7777, "late_nano": 0}],
        "transfers": [{"id": "q", "kind": "post", "debit": "alice", "credit": "provider",
            "amount_nano": 5, "pending_id": "g", "timeout_s": 0, "code": "hold", "user_data": "",
            "receipt_digest": "", "created_at_s": 1}]}')"""
    )
    after = ledger.account("alice")
    assert after.credits_posted == before.credits_posted
    assert (after.debits_pending, after.debits_posted) == (0, before.debits_posted + 5)
    assert ledger.account("provider").credits_pending == 0
    assert ledger.account("provider").balance_nano == 35


def test_a_role_that_may_make_nothing_uses_tables_that_are_there(server, place):
    """The owner makes them; engines need no more than to read and write rows."""
    with funded_ledger(place):
        pass
    clerk = f"clerk{fresh_number()}"
    with psycopg.connect(place) as db:
        db.execute(f"CREATE ROLE {clerk} LOGIN")
        db.execute(f"GRANT USAGE ON SCHEMA kvmarket TO {clerk}")
        rows = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA kvmarket"
        db.execute(f"GRANT {rows} TO {clerk}")
    with Ledger.open(place.replace("market@", f"{clerk}@")) as ledger:
        assert ledger.submit([hold("h", 1)]).result()[0].outcome is Outcome.OK
        assert ledger.check_integrity() == []


def test_functions_of_an_older_version_are_replaced(place, by_hand):
    """The tables stay as they are, and so does what is in them."""
    with funded_ledger(place) as ledger:
        balance = ledger.account("alice").balance_nano
    by_hand(
        "UPDATE schema_version SET version = 1; CREATE OR REPLACE FUNCTION keep(changes json) "
        "RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'an older one'; END $$"
    )
    with Ledger.open(place) as ledger:
        assert ledger.submit([hold("h", 1)]).result()[0].outcome is Outcome.OK
        assert ledger.account("alice").available_nano == balance - 1


def test_many_processes_open_a_new_database_at_once(place):
    """One makes the tables, all find them."""
    with ThreadPoolExecutor(6) as pool:
        ledgers = list(pool.map(lambda _: Ledger.open(place), range(6)))
    for ledger in ledgers:
        assert [account.id for account in ledger.accounts()] == ["provider", "suspense", "world"]
        ledger.close()


def test_a_socket_is_as_good_as_loopback(server, place):
    """A URL may name a folder with the server's socket."""
    name = place.rpartition("/")[2]
    with funded_ledger(server.local_url(name)) as ledger:
        assert ledger.account("alice").balance_nano == NANO


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://market:secret@127.0.0.1:{closed}/m", "m at 127.0.0.1 cannot be used"),
        ("postgresql://market:secret@127.0.0.1:{open}/nowhere", "nowhere.* does not exist"),
        ("postgresql://stranger:secret@127.0.0.1:{open}/postgres", "stranger.* does not exist"),
        ("postgresql://127.0.0.1:port/postgres", "port"),
    ],
)
def test_a_database_that_cannot_be_used_is_told(server, url, message):
    """In one line, without the password, with what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        place = url.format(closed=taken.getsockname()[1], open=server.port)
        with pytest.raises(LedgerError, match=message) as caught:
            Ledger.open(place)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "see whether PostgreSQL runs there" in str(caught.value)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["restart", "crash"])
def test_a_restart_under_load_loses_no_charge(own_server, how):
    """Settlements wait for the database and are made once; a caller with a short timeout gets an
    error and goes on; what was acknowledged before a crash is there after it.
    """
    place = own_server.create_database("market")
    stopped = threading.Event()
    with funded_ledger(place) as ledger, ThreadPoolExecutor(4) as pool:

        def serve(number):
            """Handle a request: reserve, or compute in full; then settle."""
            try:
                reserved = ledger.submit([hold(f"h{number}", 3)], patience_s=0.2).result(30)
            except LedgerError:
                return None
            assert reserved[0].outcome.good
            batch = [post(id=f"p{number}", pending_id=f"h{number}", amount_nano=2)]
            kept = receipt(f"kvr_{number}", 2, f"p{number}")
            return ledger.submit(batch, receipt=kept, patience_s=math.inf)

        def serve_all(first):
            served, number = [], first
            while not stopped.is_set():
                served.append((number, serve(number)))
                number += 4
            return served

        workers = [pool.submit(serve_all, first) for first in range(4)]
        time.sleep(0.3)
        own_server.stop(how)
        time.sleep(0.6)
        with pytest.raises(LedgerError, match="cannot be used"):
            ledger.accounts()
        own_server.start()
        time.sleep(1.0)
        stopped.set()
        served = [each for worker in workers for each in worker.result()]
        settled = [number for number, answer in served if answer is not None]
        for number, answer in served:
            assert answer is None or answer.result(30)[0].outcome.good, number
        assert 0 < len(settled) < len(served), "some were refused while the server was away"
        assert len(ledger.receipts()) == len(settled)
        assert ledger.account("alice").balance_nano == NANO - 2 * len(settled)
        assert ledger.check_integrity() == []


def test_closing_without_a_database_ends(own_server, monkeypatch):
    """A caller that still waits learns that the batch must be submitted again."""
    monkeypatch.setattr("vllm_kvmarket.ledger.group_commit.CLOSE_PATIENCE_S", 0.2)
    place = own_server.create_database("market")
    ledger = Ledger.open(place)
    own_server.stop()
    future = ledger.submit([hold("h", 1)], patience_s=math.inf)
    ledger.close()
    with pytest.raises(LedgerError, match="submit the same again"):
        future.result(timeout=1)


def test_a_stalled_writer_is_rolled_back(ledger, place, by_hand):
    """A machine that falls silent inside its transaction holds the others up for seconds only."""
    with psycopg.connect(place, autocommit=True) as silent:
        silent.execute("SET idle_in_transaction_session_timeout = '300ms'")
        silent.execute("BEGIN")
        silent.execute("SELECT kvmarket.find('{}')")
        facts = {"debit": "alice", "credit": "pat", "amount_nano": 1, "code": "x"}
        assert ledger.submit([plain(id="t", **facts)]).result(30)[0].outcome is Outcome.OK
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            silent.execute("SELECT 1")
