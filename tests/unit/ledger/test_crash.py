"""The ledger on SQLite when the power goes, at any write or sync of any file."""

from __future__ import annotations

import random
from contextlib import suppress

import apsw
import pytest

from tests.support.crashing_files import CrashingFiles, PowerLossError
from tests.support.ledger_books import FOREVER, NANO, StoredBooks, batch, receipt
from vllm_kvmarket import LedgerError
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.ledger import Account, Outcome, pending, plain, post
from vllm_kvmarket.ledger.sqlite import SqliteStorage

ACCOUNTS = (
    Account("world", "world", may_go_negative=True),
    Account("provider", "provider"),
    Account("pat", "publisher"),
    Account("alice", "buyer"),
)
GROUPS = 12


def group(number):
    """Three requests, reserved and settled in one commit."""
    batches = []
    for key in (f"{number}-{letter}" for letter in "abc"):
        names = {"debit": "alice", "credit": "provider", "code": "reuse"}
        held = pending(id=f"{key}:reserve", amount_nano=5, timeout_s=60, **names)
        moved = post(id=f"{key}:settle", pending_id=held.id, amount_nano=3)
        names = {"debit": "provider", "credit": "pat", "code": "royalty"}
        royalty = plain(id=f"{key}:royalty", amount_nano=1, **names)
        kept = receipt(f"kvr_{key}", 3, moved.id, royalty.id, royalty=1)
        batches.append(batch([held, moved, royalty], 10.0, receipt=kept))
    return batches


def write_until_the_power_goes(path, files, monkeypatch, synchronous, pages):
    """Write groups of batches; how many were acknowledged."""
    # SQLite shares its WAL index by memory that no Python file system can model, unless one
    # connection has the file to itself. So one does: it writes, and it opens accounts.
    shared = []

    def connect(_):
        if not shared:
            shared.append(apsw.Connection(str(path), vfs=files.name))
            shared[0].pragma("locking_mode", "exclusive")
            shared[0].pragma("journal_mode", "wal")
            shared[0].pragma("synchronous", synchronous)
            shared[0].pragma("foreign_keys", True)
        return shared[0]

    acknowledged = -1
    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "connect", connect)
        try:
            storage = SqliteStorage(path)
            storage._writing.pragma("wal_autocheckpoint", pages)
            for account in ACCOUNTS:
                storage.open_account(account)
            names = {"debit": "world", "credit": "alice", "code": "deposit"}
            storage.write([batch([plain(id="d", amount_nano=NANO, **names)], 1.0)])
            acknowledged = 0
            for number in range(GROUPS):
                storage.write(group(number))
                acknowledged += 1
        except (LedgerError, PowerLossError, apsw.Error):
            pass
        finally:
            files.crash_at = 0  # closing writes nothing any more
            for connection in shared:
                with suppress(PowerLossError, apsw.Error):
                    connection.close(force=True)
    return acknowledged


def restarted(tmp_path, files):
    """The folder as a restart finds it."""
    folder = tmp_path / f"after-{files.name}"
    folder.mkdir()
    for name, content in files.survivors().items():
        (folder / name.rpartition("/")[2]).write_bytes(content)
    return folder / "market.sqlite"


def check(place, acknowledged):
    """Nothing acknowledged is lost, nothing is there in part, and work goes on."""
    books = StoredBooks(place, *ACCOUNTS)
    try:
        assert books.problems() == []
        there = books.transfers
        for number in range(GROUPS):
            ids = {each.id for one in group(number) for each in one.operations}
            assert number >= acknowledged or ids <= set(there), "an acknowledged group is lost"
            assert ids <= set(there) or not ids & set(there)
        receipts = {each.id for each in books.storage.receipts({}, None)}
        assert receipts == {f"kvr_{id.removesuffix(':settle')}" for id in there if "settle" in id}
        if acknowledged >= 0:
            for number in range(GROUPS):  # the same again: what is missing takes effect, once
                for results in books.storage.write(group(number)):
                    assert {each.outcome for each in results} <= {Outcome.OK, Outcome.EXISTS}
            assert books.accounts["alice"].available_nano == NANO - 9 * GROUPS
            assert books.problems() == []
    finally:
        books.close()


def life(tmp_path, monkeypatch, seed, crash_at, *, synchronous="full", pages=8):
    """Write until the power goes, restart, check; how many calls to files there were."""
    files = CrashingFiles(random.Random(seed), crash_at)
    place = tmp_path / files.name / "market.sqlite"
    place.parent.mkdir()
    acknowledged = write_until_the_power_goes(place, files, monkeypatch, synchronous, pages)
    steps = files.steps
    check(restarted(tmp_path, files), acknowledged)
    return steps


def test_the_power_may_go_at_any_moment(tmp_path, monkeypatch):
    """Crashes all over a ledger's life, each with what was unsynced lost at random."""
    steps = life(tmp_path, monkeypatch, 0, FOREVER)
    assert steps > 150
    chance = random.Random(11)
    for crash_at in sorted(chance.sample(range(steps), 30)):
        life(tmp_path, monkeypatch, crash_at, crash_at, pages=chance.choice([8, 40, 4000]))


def test_a_commit_that_is_not_synced_would_be_caught(tmp_path, monkeypatch):
    """The files do lose what nobody synced: with synchronous=NORMAL, acknowledged groups go."""
    with pytest.raises(AssertionError, match="an acknowledged group is lost"):
        life(tmp_path, monkeypatch, 5, 250, synchronous="normal", pages=4000)
