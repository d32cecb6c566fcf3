"""The ledger on a real PostgreSQL: what every database does, and what is PostgreSQL's own."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import pytest

from tests.support.ledger_books import NANO, fresh_number, funded_ledger, hold, receipt
from tests.support.ledger_conformance import *  # noqa: F403  # its tests run here, on this module's places
from tests.support.ledger_keeping import *  # noqa: F403
from tests.support.ledger_processes import *  # noqa: F403
from tests.support.ledger_processes import writer
from vllm_kvmarket import LedgerError
from vllm_kvmarket.ledger import Ledger, Outcome, plain, post
from vllm_kvmarket.ledger.model import digest_of, encode_receipt

psycopg = pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
from tests.support.postgres import running_postgres  # noqa: E402  # needs psycopg
from vllm_kvmarket.core import postgres_database  # noqa: E402  # needs psycopg
from vllm_kvmarket.ledger import postgres  # noqa: E402  # needs psycopg


@pytest.fixture(scope="module")
def server():
    yield from running_postgres()


@pytest.fixture
def own_server():
    """One that the test may stop."""
    yield from running_postgres()


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
            other.execute("LOCK TABLE kvmarket.transfer IN SHARE MODE")
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
    """Leaves are numbered while others write, over refusals: a prefix of the log never changes."""
    writers = [writer(place, name, 30) for name in "ab"]
    known = []
    while any(process.poll() is None for process in writers):
        found = [each.id for each in ledger.transfers_after(0, 1000)]
        assert found[: len(known)] == known
        known = found
        ledger.submit([hold(f"x{len(known)}", NANO + 1)]).result()
    for process in writers:
        assert process.communicate(timeout=60)[0].split()[1::2] == ["OK"] * 30
    log = ledger.transfers_after(0, 1000)
    assert [each.id for each in log][: len(known)] == known
    assert len(log) == len(ledger.transfers()) == 181
    assert [ledger.sequence_of(each.id) for each in log] == list(range(1, len(log) + 1))
    assert ledger.check_integrity() == []


def booking(number, credit="pat", debit="world"):
    """What a writer sends for a plain transfer of 5."""
    transfer = {
        "id": f"t{number}",
        "kind": "plain",
        "debit": debit,
        "credit": credit,
        "amount_nano": 5,
        "pending_id": "",
        "timeout_s": 0,
        "code": "x",
        "user_data": "",
        "receipt_digest": "",
        "created_at_s": 1.0,
    }
    rest = {"dues": {}, "receipts": [], "documents": [], "now_s": time.time()}
    return json.dumps({"transfers": [transfer], **rest})


def test_a_leaf_of_a_writer_who_was_slow_comes_last(ledger, place):
    """What is numbered stays where it is; a number is given once the transfer is committed."""
    before = len(ledger.transfers_after(0, 99))
    with psycopg.connect(place) as slow:
        slow.execute("SELECT kvmarket.book(%s)", (booking(1),))
        for number in range(3):
            ledger.submit([hold(f"h{number}", 1)]).result()
            found = [each.id for each in ledger.transfers_after(before, 99)]
            assert found == [f"h{each}" for each in range(number + 1)]
        slow.commit()
    ledger.submit([hold("h3", 1)]).result()
    found = [each.id for each in ledger.transfers_after(before, 99)]
    assert found == ["h0", "h1", "h2", "t1", "h3"]
    assert ledger.check_integrity() == []


def test_a_check_goes_on_over_what_was_booked_late(ledger, place):
    """A receipt that had its number early and was committed late is found with its charge."""
    _, checked = ledger.check_behind()
    late = msgspec.structs.replace(receipt("kvr_late", 5, "t1"), created_at_s=1.0)
    row = {key: getattr(late, key) for key in ("id", "request_id", "account", "document_id")}
    row |= {"charge_nano": 5, "body": encode_receipt(late).decode()}
    changes = json.loads(booking(1, credit="provider", debit="alice"))
    changes["transfers"][0] |= {"code": "owed", "receipt_digest": digest_of(late)}
    with psycopg.connect(place) as slow:
        slow.execute("SELECT kvmarket.book(%s)", (json.dumps(changes | {"receipts": [row]}),))
        for number in range(3):
            sold = [
                hold(f"h{number}", 5),
                post(id=f"p{number}", pending_id=f"h{number}", amount_nano=5),
            ]
            ledger.submit(sold, receipt=receipt(f"kvr_{number}", 5, f"p{number}")).result()
            problems, checked = ledger.check_behind(checked)
            assert problems == []
        slow.commit()
    problems, checked = ledger.check_behind(checked)
    assert (problems, checked.receipts, checked.size) == ([], 4, 8)
    assert ledger.check_behind() == ([], checked)


def test_a_check_counts_what_has_no_number_yet(ledger, place):
    """It is in the balances, which are compared with all transfers of one moment."""
    _, checked = ledger.check_behind()
    with psycopg.connect(place) as slow:
        slow.execute("SELECT kvmarket.book(%s)", (booking(1),))
        ledger.submit([hold("h", 1)]).result()
        slow.commit()
    rest = ledger._storage.everything(checked.size, checked.last_receipt)
    assert [each.id for each in rest.transfers] == ["t1", "h"]
    assert ledger.check_behind(checked)[0] == []


def test_a_period_is_found_in_one_round_trip(ledger, by_hand, monkeypatch):
    """Among many bookings whose times go back by half a minute, behind a deposit later than all."""
    by_hand(
        """SET session_replication_role = replica;
        INSERT INTO transfer SELECT 3 * n, 't' || n, 'plain', 'alice', 'pat', 1, NULL, 0, 'x', '',
            '', 1000000 + n - 30 * random() FROM generate_series(1000, 21000) AS n"""
    )
    booked = ledger.transfers("alice")[::-1]
    asked, execute = [], psycopg.Cursor.execute

    def count(self, query, *values, **options):
        asked.append(query)
        return execute(self, query, *values, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", count)
    for second in range(1_002_000, 1_021_000, 1900):
        asked.clear()
        expected = [each for each in booked if second <= each.created_at_s < second + 1]
        assert ledger.moves("alice", second, second + 1) == expected
        assert len(asked) <= 3, "the pool's check, where the period is, and what is there"
        before = sum(each.created_at_s < second for each in booked)
        assert ledger.moved_before("pat", second) == before


def test_credits_wait_for_nobody(ledger, place):
    """Another writer has credited the same accounts, and has not committed."""
    ledger.submit([hold("h", 9)]).result()
    with psycopg.connect(place) as other:
        other.execute("SELECT kvmarket.book(%s)", (booking(1, "provider"),))
        other.execute("SELECT kvmarket.book(%s)", (booking(2, "pat"),))
        other.execute("SELECT kvmarket.book(%s)", (booking(3, "alice"),))
        sold = [
            post(id="p", pending_id="h", amount_nano=9),
            plain(id="r", debit="provider", credit="pat", amount_nano=4, code="royalty"),
        ]
        kept = receipt("kvr_1", 9, "p", "r", royalty=4)
        results = ledger.submit(sold, receipt=kept).result(30)
        assert [each.outcome for each in results] == [Outcome.OK] * 2
        assert ledger.submit([hold("g", NANO - 9)]).result(30)[0].outcome is Outcome.OK
        assert ledger.submit([hold("f", 1)]).result(30)[0].outcome is Outcome.EXCEEDS_CREDITS
        other.commit()
    assert ledger.submit([hold("e", 5)]).result(30)[0].outcome is Outcome.OK
    assert ledger.account("provider").balance_nano == 10
    assert ledger.account("pat").balance_nano == 9
    assert ledger.account("alice").available_nano == 0
    assert ledger.check_integrity() == []


def test_royalties_beyond_the_groups_charges_need_the_providers_funds(ledger):
    """Where the provider has them they are paid, and no payout spends them at the same time."""
    royalty = {"debit": "provider", "credit": "pat", "code": "royalty"}
    (result,) = ledger.submit([plain(id="r0", amount_nano=1, **royalty)]).result()
    assert (result.outcome, result.detail) == (Outcome.EXCEEDS_CREDITS, "provider")
    ledger.deposit("provider", 10, "d2")
    assert ledger.submit([plain(id="r1", amount_nano=7, **royalty)]).result()[0].outcome.good
    assert ledger.submit([plain(id="r2", amount_nano=7, **royalty)]).result()[0].outcome is (
        Outcome.EXCEEDS_CREDITS
    )
    assert ledger.account("provider").balance_nano == 3
    assert ledger.check_integrity() == ["transfer r1: its receipt is missing"]


def test_a_transfer_that_two_writers_submit_at_once_takes_effect_once(ledger, place):
    """The second finds it when the first has committed; nobody sees a database's error."""
    with psycopg.connect(place) as other:
        other.execute("SELECT kvmarket.book(%s)", (booking(1),))
        same = plain(id="t1", debit="world", credit="pat", amount_nano=5, code="x")
        differs = plain(id="t1", debit="world", credit="pat", amount_nano=6, code="x")
        answers = [ledger.submit([each]) for each in (same, differs)]
        assert not answers[0].done()
        other.commit()
    outcomes = [answer.result(30)[0].outcome for answer in answers]
    assert outcomes == [Outcome.EXISTS, Outcome.EXISTS_WITH_DIFFERENT_FIELDS]
    assert ledger.account("pat").balance_nano == 5
    assert ledger.check_integrity() == []


# Stops itself between its two calls, with alice locked.
STOPS = """
import os, signal, sys
from vllm_kvmarket.ledger import Ledger, pending, postgres
postgres.WRITER_SETTINGS = postgres.WRITER_SETTINGS.replace("'2s'", "'600s'")
ledger, apply_group = Ledger.open(sys.argv[1]), postgres.apply_group
def stop(*given):
    print("stops", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    return apply_group(*given)
postgres.apply_group = stop
held = pending(id="s", debit="alice", credit="provider", amount_nano=1, timeout_s=900, code="hold")
print(ledger.submit([held], patience_s=60).result()[0].outcome.name, flush=True)
ledger.close()
"""


def test_a_stopped_client_delays_nobody_but_its_own_rows(ledger, place):
    """In one group with what waits for it, too; the order of what follows from it is kept."""
    ledger.create_account("bob", "buyer")
    ledger.deposit("bob", NANO, "d-bob")
    command = [sys.executable, "-c", STOPS, place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stopped:
        assert stopped.stdout.readline() == "stops\n"
        waits = [
            ledger.submit([hold("a", 5)], patience_s=math.inf),
            ledger.submit([post(id="ap", pending_id="a", amount_nano=5)], patience_s=math.inf),
        ]
        for number in range(20):
            held = msgspec.structs.replace(hold(f"b{number}", 3), debit="bob")
            assert ledger.submit([held]).result(30)[0].outcome is Outcome.OK
            moved = post(id=f"p{number}", pending_id=held.id, amount_nano=2)
            assert ledger.submit([moved]).result(30)[0].outcome is Outcome.OK
        ledger.deposit("alice", 1, "d2")
        assert not any(answer.done() for answer in waits)
        stopped.send_signal(signal.SIGCONT)
        assert stopped.stdout.readline() == "OK\n"
        assert [answer.result(30)[0].outcome for answer in waits] == [Outcome.OK] * 2
    assert ledger.account("bob").available_nano == NANO - 40
    assert ledger.account("alice").available_nano == NANO + 1 - 1 - 5
    assert ledger.check_integrity() == []


def test_balances_change_by_what_the_transfers_move(ledger, by_hand):
    """A client that sends balances of its own changes nothing by them."""
    ledger.submit([hold("h", 70), post(id="p", pending_id="h", amount_nano=30)]).result()
    ledger.submit([hold("g", 20)]).result()
    before = ledger.account("alice")
    by_hand(
        f"""SELECT book('{{"now_s": {time.time()}, "dues": {{"g": null}},
        "receipts": [], "documents": [],
        "accounts": [{{"id": "alice", "debits_pending": 0, "credits_pending": 0,
            "debits_posted": 0, "credits_posted": 7777, "late_nano": 0}}],
        "transfers": [{{"id": "q", "kind": "post", "debit": "alice", "credit": "provider",
            "amount_nano": 5, "pending_id": "g", "timeout_s": 0, "code": "hold", "user_data": "",
            "receipt_digest": "", "created_at_s": 1}}]}}')"""
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


def test_books_of_an_older_version_keep_balances_and_places_in_the_log(place, by_hand):
    """Where writers took turns: balances were in the accounts' rows, sequences had no gaps."""
    with postgres_database.connect(place) as db:
        postgres_database.migrate(
            db, replace(postgres.ROOM, migrations=postgres.ROOM.migrations[:2])
        )
    by_hand(
        """INSERT INTO account VALUES ('world', 'world', true, 'USD', 0, 0, 100, 0),
            ('alice', 'buyer', false, 'USD', 60, 0, 0, 100),
            ('provider', 'provider', false, 'USD', 0, 60, 0, 0);
        INSERT INTO transfer VALUES
            (1, 'd', 'plain', 'world', 'alice', 100, NULL, 0, 'deposit', '', '', 1),
            (2, 'h', 'pending', 'alice', 'provider', 60, NULL, 900, 'hold', '', '', 2);
        INSERT INTO hold VALUES ('h', 902); UPDATE turn SET transfers = 2, at_s = 2"""
    )
    with Ledger.open(place) as ledger:
        assert ledger.account("alice").available_nano == 40
        assert ledger.submit([hold("g", 41)]).result()[0].outcome is Outcome.EXCEEDS_CREDITS
        settled = [post(id="p", pending_id="h", amount_nano=50)]
        assert ledger.submit(settled).result()[0].outcome is Outcome.OK
        assert ledger.submit([hold("g", 50)]).result()[0].outcome is Outcome.OK
        assert [each.id for each in ledger.transfers_after(0, 9)] == ["d", "h", "p", "g"]
        assert ledger.account("alice").available_nano == 0
        assert ledger.check_integrity() == []


def test_many_processes_open_a_new_database_at_once(place):
    """One makes the tables, all find them."""
    with ThreadPoolExecutor(6) as pool:
        ledgers = list(pool.map(lambda _: Ledger.open(place), range(6)))
    for ledger in ledgers:
        assert [account.id for account in ledger.accounts()] == ["provider", "suspense", "world"]
        ledger.close()


def test_opening_waits_for_the_process_that_makes_the_tables(place):
    """For longer than a group waits for an account."""
    with psycopg.connect(place) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (postgres_database.SCHEMA_LOCK,))
        opening = pool.submit(Ledger.open, place)
        assert wait([opening], timeout=1.0).done == set()
        other.commit()
        opening.result(30).close()


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
        silent.execute("""SELECT kvmarket.look_up('{"spender_ids": ["alice"]}')""")
        facts = {"debit": "alice", "credit": "pat", "amount_nano": 1, "code": "x"}
        assert ledger.submit([plain(id="t", **facts)]).result(30)[0].outcome is Outcome.OK
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            silent.execute("SELECT 1")
