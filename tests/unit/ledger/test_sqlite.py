"""The ledger on a real SQLite file: what every database does, and what is SQLite's own."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager

import apsw
import pytest

from tests.support.ledger_books import NANO, fresh_number, funded_ledger, hold, receipt
from tests.support.ledger_conformance import *  # noqa: F403  # its tests run here, on this module's places
from tests.support.ledger_keeping import *  # noqa: F403
from tests.support.ledger_processes import *  # noqa: F403
from vllm_kvmarket import ConfigError, LedgerError
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.ledger import Ledger, Outcome, plain, post


@pytest.fixture
def new_place(tmp_path):
    return lambda: tmp_path / f"market-{fresh_number()}.sqlite"


@pytest.fixture
def place(new_place):
    return new_place()


@pytest.fixture
def refusals():
    return apsw.ConstraintError


@pytest.fixture
def by_hand(place):
    def execute(statement):
        db = apsw.Connection(str(place))
        db.pragma("foreign_keys", True)
        try:
            db.execute(statement)
        finally:
            db.close()

    return execute


@pytest.fixture
def held_up(place):
    @contextmanager
    def hold_up():
        other = apsw.Connection(str(place))
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("COMMIT")
        other.close()

    return hold_up


COLUMNS = (
    "kind, debit, credit, 7, pending_id, timeout_s, code, user_data, receipt_digest, created_at_s"
)


@pytest.mark.parametrize(
    "statement",
    [
        f"INSERT OR REPLACE INTO transfer SELECT sequence, id, {COLUMNS} FROM transfer",
        f"INSERT OR REPLACE INTO transfer SELECT NULL, id, {COLUMNS} FROM transfer",
        f"INSERT OR REPLACE INTO transfer SELECT sequence, id || 'x', {COLUMNS} FROM transfer",
        "INSERT OR REPLACE INTO transfer SELECT 99, 'x', 'void', debit, credit, 0, pending_id, 0, "
        "'', '', '', 0 FROM transfer WHERE kind = 'post'",
        "REPLACE INTO receipt SELECT sequence, id, request_id, account, document_id, 7, body "
        "FROM receipt",
    ],
)
def test_nothing_is_replaced(ledger, by_hand, statement):
    """INSERT OR REPLACE deletes without asking the triggers that forbid deleting."""
    batch = [hold("h", 1), post(id="p", pending_id="h", amount_nano=1)]
    ledger.submit(batch, receipt=receipt("kvr_1", 1, "p")).result()
    before = ledger.transfers(), ledger.receipts()
    with pytest.raises(apsw.ConstraintError):
        by_hand(statement)
    assert (ledger.transfers(), ledger.receipts()) == before


def test_the_audit_names_transfers_out_of_nothing(ledger, place):
    """Whoever takes the schema's guards down and forges rows is found, not crashed on."""
    db = apsw.Connection(str(place))
    db.execute(
        "DROP TRIGGER transfer_fits; INSERT INTO transfer (id, kind, debit, credit, "
        "amount_nano, pending_id, timeout_s, code, user_data, receipt_digest, created_at_s) VALUES "
        "('p', 'post', 'ghost', 'alice', 1, 'gone', 0, '', '', '', 0)"
    )
    db.close()
    problems = ledger.check_integrity()
    assert "transfer p: account ghost is missing" in problems
    assert "transfer p: cannot resolve gone" in problems
    assert f"account alice: credits_posted is {NANO}, transfers say {NANO + 1}" in problems


def test_a_locked_database_is_told_and_got_over(place, monkeypatch):
    """A wait too long for another process' transaction is a LedgerError, and may be repeated."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 50)
    with funded_ledger(place) as ledger:
        other = apsw.Connection(str(place))
        other.execute("BEGIN IMMEDIATE")
        futures = [ledger.submit([hold(f"h{number}", 1)], patience_s=0) for number in range(3)]
        for future in futures:
            with pytest.raises(LedgerError, match="could not be written"):
                future.result(timeout=30)
        with pytest.raises(LedgerError, match="cannot be used"):
            ledger.create_account("bob", "buyer")
        other.execute("ROLLBACK")
        other.close()
        again = ledger.submit([hold("h0", 1)]).result(timeout=30)
        assert again[0].outcome is Outcome.OK
        assert ledger.check_integrity() == []


def test_a_full_disk_is_told_and_got_over(place, monkeypatch):
    """No part of a batch that found no room is there; the writer goes on when there is room."""
    opened = []

    def connect(place, honest=sqlite.connect):
        opened.append(honest(place))
        return opened[-1]

    monkeypatch.setattr(sqlite, "connect", connect)
    with funded_ledger(place) as ledger:
        pages = opened[0].pragma("page_count")
        for connection in opened:
            connection.pragma("max_page_count", pages + 4)
        bulky = [
            plain(
                id=f"t{number}",
                debit="alice",
                credit="provider",
                amount_nano=1,
                code="x",
                user_data="u" * 3000,
            )
            for number in range(20)
        ]
        with pytest.raises(LedgerError, match=r"could not be written.*full"):
            ledger.submit(bulky, patience_s=0).result(timeout=30)
        assert ledger.account("alice").balance_nano == NANO
        assert len(ledger.transfers()) == 1
        for connection in opened:
            connection.pragma("max_page_count", 10_000)
        assert ledger.submit(bulky).result(timeout=30)[-1].outcome is Outcome.OK
        assert ledger.account("alice").balance_nano == NANO - 20
        assert ledger.check_integrity() == []


def test_a_database_that_is_none_is_told(place):
    """Any other file under that name is one of our errors."""
    place.write_text("no database at all, and long enough to be looked at" * 100)
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger.open(place)


def test_a_lock_that_is_let_go_in_time_costs_nobody_anything(place, monkeypatch, held_up):
    """While callers have patience, the writer tries again; they are answered in order."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 10)
    with funded_ledger(place) as ledger:
        with held_up():
            impatient = ledger.submit([hold("h0", 1)], patience_s=0)
            patient = [ledger.submit([hold(f"h{n}", 1)], patience_s=math.inf) for n in (1, 2)]
            with pytest.raises(LedgerError, match="submit the same again"):
                impatient.result(timeout=30)
            assert not any(each.done() for each in patient)
        for each in patient:
            assert each.result(timeout=30)[0].outcome is Outcome.OK
        assert [each.id for each in ledger.transfers()] == ["h2", "h1", "d1"]


def test_books_of_a_newer_version_are_refused_and_left_alone(place):
    """Older code would spoil them: it says which version to install, and writes nothing."""
    Ledger.open(place).close()
    connection = apsw.Connection(str(place))
    connection.execute("UPDATE schema_version SET version = 99 WHERE room = 'ledger'")
    with pytest.raises(ConfigError, match=r"made by a newer kvmarket \(version 99"):
        Ledger.open(place)
    (kept,) = connection.execute("SELECT version FROM schema_version WHERE room = 'ledger'")
    assert kept == (99,)
    connection.close()


def test_due_holds_are_found_by_an_index(ledger, place):
    """Looking for them costs the same among millions of resolved ones."""
    db = apsw.Connection(str(place))
    plan = db.execute(
        "EXPLAIN QUERY PLAN SELECT pending_id FROM hold WHERE due_at_s <= 1 "
        "ORDER BY due_at_s LIMIT 5"
    ).fetchall()
    db.close()
    assert [row[-1] for row in plan] == ["SEARCH hold USING COVERING INDEX hold_due (due_at_s<?)"]


def test_a_url_of_postgresql_needs_its_driver(monkeypatch):
    """The error says how to install it; SQLite works without it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "vllm_kvmarket.ledger.postgres", raising=False)
    with pytest.raises(LedgerError, match=r"pip install vllm-kvmarket\[postgres\]"):
        Ledger.open("postgresql://localhost/market")


@pytest.mark.parametrize(
    ("trigger", "statement", "problem"),
    [
        ("receipt_stays", "DELETE FROM receipt", "transfer p: its receipt is missing"),
        (
            "receipt_is_final",
            'UPDATE receipt SET body = replace(body, \'"model":"m"\', \'"model":"n"\')',
            "receipt kvr_1: is not the one that transfer p was booked with",
        ),
        (
            "transfer_is_final",
            "UPDATE transfer SET amount_nano = 20 WHERE id = 'r'",
            "receipt kvr_1: owes pat 30, r is 20",
        ),
        (
            "transfer_is_final",
            "UPDATE transfer SET credit = 'alice' WHERE id = 'r'",
            "receipt kvr_1: owes pat, r pays alice",
        ),
        (
            "receipt_is_final",
            "UPDATE receipt SET body = replace(body, '\"r\"],', '\"d1\"],')",
            "transfer r: its receipt is missing",
        ),
    ],
)
def test_the_check_finds_forged_receipts_and_royalties(ledger, place, trigger, statement, problem):
    """Receipts, their charges, royalties and payees must agree, and none may be missing."""
    sold = [
        hold("h", 60),
        post(id="p", pending_id="h", amount_nano=60),
        plain(id="r", debit="provider", credit="pat", amount_nano=30, code="royalty"),
    ]
    ledger.submit(sold, receipt=receipt("kvr_1", 60, "p", "r", royalty=30)).result()
    assert ledger.check_integrity() == []
    db = apsw.Connection(str(place))
    db.execute(f"DROP TRIGGER {trigger}; {statement}")
    db.close()
    assert problem in ledger.check_integrity()
