"""The ledger when several processes use it, and when processes and disks fail."""

from __future__ import annotations

import signal
import subprocess
import sys

import apsw
import pytest
from ledger_books import NANO, funded_ledger, hold

from vllm_kvmarket import LedgerError, database
from vllm_kvmarket.ledger import Ledger, Outcome, plain


@pytest.fixture
def path(tmp_path):
    return tmp_path / "market.sqlite"


@pytest.fixture
def ledger(path):
    with funded_ledger(path) as opened:
        yield opened


# Keeps eight batches in flight, so that commits carry several; prints what is acknowledged.
WRITER = """
import sys
from collections import deque
from pathlib import Path
from vllm_kvmarket.ledger import Ledger, Outcome, pending, plain, post
ledger = Ledger.open(Path(sys.argv[1]))
name, debit, count = sys.argv[2], sys.argv[3], int(sys.argv[4])
names = {"debit": debit, "credit": "provider", "code": "x"}
flying = deque()
for number in range(count + 8):
    if number < count:
        held = pending(id=f"{name}-{number}", amount_nano=3, timeout_s=900, **names)
        moved = post(id=f"{name}-{number}-p", pending_id=held.id, amount_nano=1)
        royalty = plain(
            id=f"{name}-{number}-r", debit="provider", credit="pat", amount_nano=1, code="royalty"
        )
        flying.append((number, ledger.submit([held, moved, royalty])))
    if number >= 8 and flying:
        first, future = flying.popleft()
        print(first, future.result()[0].outcome.name, flush=True)
ledger.close()
"""


def writer(path, name, count, debit="alice"):
    command = [sys.executable, "-c", WRITER, str(path), name, debit, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once(ledger, path):
    """Every transfer of both is there, once; a third process' deposit comes between."""
    writers = [writer(path, name, 150) for name in "ab"]
    ledger.deposit("alice", 5, "d2")
    for process in writers:
        answers = process.communicate(timeout=60)[0].split()
        assert process.returncode == 0
        assert answers[1::2] == ["OK"] * 150
    assert ledger.account("alice").balance_nano == NANO + 5 - 300
    assert ledger.account("alice").debits_pending == 0
    assert ledger.account("pat").balance_nano == 300
    assert ledger.account("provider").balance_nano == 0
    assert ledger.check_integrity() == []


def test_two_processes_race_for_the_last_funds(ledger, path):
    """Neither sees a balance that the other has spent already."""
    ledger.create_account("bob", "buyer")
    ledger.deposit("bob", 202, "d-bob")  # a reservation of 3 comes first: 200 rounds of 1 fit
    writers = [writer(path, name, 150, "bob") for name in "ab"]
    answers = [word for each in writers for word in each.communicate(timeout=60)[0].split()[1::2]]
    assert sorted(answers) == ["EXCEEDS_CREDITS"] * 100 + ["OK"] * 200
    assert ledger.account("bob").balance_nano == 2
    assert ledger.check_integrity() == []


def test_a_retry_from_another_process_changes_nothing(ledger, path):
    """Ids are the file's, not the process's."""
    for expected in ("OK", "EXISTS"):
        answers = writer(path, "same", 20).communicate(timeout=60)[0].split()
        assert answers[1::2] == [expected] * 20
    assert ledger.account("alice").balance_nano == NANO - 20


@pytest.mark.parametrize("acknowledged", [0, 1, 7, 25, 40])
def test_what_was_acknowledged_survives_kill_9(ledger, path, acknowledged):
    """Nothing acknowledged is lost, nothing is applied twice or in part, a rerun completes it."""
    process = writer(path, "k", 500)
    seen = -1
    for line in process.stdout:
        seen = int(line.split()[0])
        if seen >= acknowledged:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    there = {transfer.id for transfer in ledger.transfers() if transfer.code == "x"}
    assert there >= {f"k-{number}-p" for number in range(seen + 1)}
    assert ledger.account("pat").balance_nano == len(there) // 2
    assert ledger.check_integrity() == []
    writer(path, "k", 60).communicate(timeout=60)
    assert ledger.account("pat").balance_nano == max(60, len(there) // 2)
    assert ledger.account("alice").available_nano == NANO - max(60, len(there) // 2)
    assert ledger.check_integrity() == []


FORKED = """
import os, sys
from pathlib import Path
from vllm_kvmarket import LedgerError
from vllm_kvmarket.ledger import Ledger, plain
path = Path(sys.argv[1])
ledger = Ledger.open(path)
facts = {"debit": "alice", "credit": "provider", "amount_nano": 1, "code": "x"}
child = os.fork()
if not child:
    refusals = []
    for use in (lambda: ledger.submit([plain(id="c", **facts)]).result(), ledger.accounts):
        try:
            use()
        except LedgerError as error:
            refusals.append(str(error))
    Ledger.open(path).transact(plain(id="own", **facts))
    os._exit(0 if all("fork" in each for each in refusals) and len(refusals) == 2 else 1)
status = os.waitpid(child, 0)[1]
ledger.transact(plain(id="p", **facts))
ledger.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_is_told_to_open_its_own(ledger, path):
    """It would wait for ever for a writer thread that it does not have."""
    subprocess.run([sys.executable, "-c", FORKED, str(path)], check=True, timeout=60)
    assert {each.id for each in ledger.transfers() if each.code == "x"} == {"own", "p"}
    assert ledger.check_integrity() == []


def test_a_locked_database_is_told_and_got_over(path, monkeypatch):
    """Who waits too long for another process' transaction gets LedgerError, and may try again."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    with funded_ledger(path) as ledger:
        other = apsw.Connection(str(path))
        other.execute("BEGIN IMMEDIATE")
        futures = [ledger.submit([hold(f"h{number}", 1)]) for number in range(3)]
        for future in futures:
            with pytest.raises(LedgerError, match=r"could not be written.*locked"):
                future.result(timeout=30)
        with pytest.raises(LedgerError, match="cannot be used"):
            ledger.create_account("bob", "buyer")
        other.execute("ROLLBACK")
        other.close()
        again = ledger.submit([hold("h0", 1)]).result(timeout=30)
        assert again[0].outcome is Outcome.OK
        assert ledger.check_integrity() == []


def test_a_full_disk_is_told_and_got_over(path, monkeypatch):
    """No part of a batch that found no room is there; the writer goes on when there is room."""
    opened = []

    def connect(path, honest=database.connect):
        opened.append(honest(path))
        return opened[-1]

    monkeypatch.setattr(database, "connect", connect)
    with funded_ledger(path) as ledger:
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
            ledger.submit(bulky).result(timeout=30)
        assert ledger.account("alice").balance_nano == NANO
        assert len(ledger.transfers()) == 1
        for connection in opened:
            connection.pragma("max_page_count", 10_000)
        assert ledger.submit(bulky).result(timeout=30)[-1].outcome is Outcome.OK
        assert ledger.account("alice").balance_nano == NANO - 20
        assert ledger.check_integrity() == []


def test_a_database_that_is_none_is_told(path):
    """Whatever lies under that name, the answer is one of ours."""
    path.write_text("no database at all, and long enough to be looked at" * 100)
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger.open(path)
