"""Processes that share a ledger, and die: what holds on whatever database.

Like ledger_conformance, for test modules that bring a `place`.
"""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.ledger_books import NANO
from vllm_kvmarket.ledger import Outcome, plain

# Keeps eight batches in flight, so that commits carry several; prints what is acknowledged.
WRITER = """
import sys
from collections import deque
from vllm_kvmarket.ledger import Ledger, pending, plain, post

def write(place, name, debit, numbers, acknowledge):
    ledger = Ledger.open(place)
    names = {"debit": debit, "credit": "provider", "code": "x"}
    flying = deque()

    def land():
        number, future = flying.popleft()
        acknowledge(number, future.result()[0].outcome.name)

    for number in numbers:
        held = pending(id=f"{name}-{number}", amount_nano=3, timeout_s=900, **names)
        moved = post(id=f"{name}-{number}-p", pending_id=held.id, amount_nano=1)
        royalty = plain(
            id=f"{name}-{number}-r", debit="provider", credit="pat", amount_nano=1, code="share"
        )
        flying.append((number, ledger.submit([held, moved, royalty])))
        if len(flying) == 8:
            land()
    while flying:
        land()
    ledger.close()
"""

ONE = (
    WRITER
    + """
place, name, debit, count = sys.argv[1:]
write(place, name, debit, range(int(count)), lambda *answer: print(*answer, flush=True))
"""
)

# Forks a hundred writers, one after another, and kills each when it has acknowledged a few more:
# what they write overlaps, so that the next one finds what the last one left half done.
HUNDRED = (
    WRITER
    + """
import itertools, json, os, random, signal
place, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
acknowledged, killed = set(), 0
for _ in range(100):
    reading, writing = os.pipe()
    first = max(0, max(acknowledged, default=0) - 6)
    child = os.fork()
    if not child:
        os.close(reading)
        say = lambda number, outcome: os.write(writing, f"{number} {outcome}\\n".encode())
        write(place, "k", "alice", itertools.count(first), say)
    os.close(writing)
    with os.fdopen(reading) as answers:
        for _, line in zip(range(chance.randint(0, 24)), answers):
            number, outcome = line.split()
            assert outcome in ("OK", "EXISTS"), line
            acknowledged.add(int(number))
        os.kill(child, signal.SIGKILL)
        killed += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
print(json.dumps({"acknowledged": sorted(acknowledged), "killed": killed}))
"""
)


def writer(place, name, count, debit="alice"):
    command = [sys.executable, "-c", ONE, str(place), name, debit, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once(ledger, place):
    """Every transfer of both is there, once; a third process' deposit comes between."""
    writers = [writer(place, name, 150) for name in "ab"]
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


def test_two_processes_race_for_the_last_funds(ledger, place):
    """Neither sees a balance that the other has spent already."""
    ledger.create_account("bob", "buyer")
    ledger.deposit("bob", 202, "d-bob")  # a reservation of 3 comes first: 200 rounds of 1 fit
    writers = [writer(place, name, 150, "bob") for name in "ab"]
    answers = [word for each in writers for word in each.communicate(timeout=60)[0].split()[1::2]]
    assert sorted(answers) == ["EXCEEDS_CREDITS"] * 100 + ["OK"] * 200
    assert ledger.account("bob").balance_nano == 2
    assert ledger.check_integrity() == []


def test_a_retry_from_another_process_changes_nothing(ledger, place):
    """Ids are the database's, not the process's."""
    for expected in ("OK", "EXISTS"):
        answers = writer(place, "same", 20).communicate(timeout=60)[0].split()
        assert answers[1::2] == [expected] * 20
    assert ledger.account("alice").balance_nano == NANO - 20


def test_what_was_acknowledged_survives_a_hundred_kills(ledger, place):
    """kill -9 at any moment: nothing acknowledged is lost, nothing is applied twice or in part."""
    command = [sys.executable, "-c", HUNDRED, str(place), "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    report = json.loads(done.stdout)
    assert report["killed"] == 100
    there = {transfer.id for transfer in ledger.transfers() if transfer.code == "x"}
    posts = {id for id in there if id.endswith("-p")}
    assert posts >= {f"k-{number}-p" for number in report["acknowledged"]}
    assert len(posts) > 300
    assert there == posts | {id.removesuffix("-p") for id in posts}  # batches are whole
    assert ledger.account("pat").balance_nano == len(posts)
    assert ledger.account("alice").available_nano == NANO - len(posts)
    assert ledger.check_integrity() == []


FORKED = """
import os, sys
from vllm_kvmarket import LedgerError
from vllm_kvmarket.ledger import Ledger, plain
place = sys.argv[1]
ledger = Ledger.open(place)
facts = {"debit": "alice", "credit": "provider", "amount_nano": 1, "code": "x"}
child = os.fork()
if not child:
    refusals = []
    for use in (lambda: ledger.submit([plain(id="c", **facts)]).result(), ledger.accounts):
        try:
            use()
        except LedgerError as error:
            refusals.append(str(error))
    Ledger.open(place).transact(plain(id="own", **facts))
    os._exit(0 if all("fork" in each for each in refusals) and len(refusals) == 2 else 1)
status = os.waitpid(child, 0)[1]
ledger.transact(plain(id="p", **facts))
ledger.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_is_told_to_open_its_own(ledger, place):
    """It would wait for ever for a writer thread that it does not have."""
    subprocess.run([sys.executable, "-c", FORKED, str(place)], check=True, timeout=60)
    assert {each.id for each in ledger.transfers() if each.code == "x"} == {"own", "p"}
    assert ledger.check_integrity() == []


def test_another_processs_changes_are_seen_at_once(ledger, place):
    """A writer that remembers its last group looks anew when somebody else has written."""
    facts = {"debit": "alice", "credit": "provider", "code": "x"}
    ledger.transact(plain(id="t1", amount_nano=1, **facts))
    writer(place, "w", 3).communicate(timeout=60)
    rest = ledger.account("alice").available_nano
    assert rest == NANO - 4
    too_much = ledger.submit([plain(id="t2", amount_nano=rest + 1, **facts)]).result()
    assert too_much[0].outcome is Outcome.EXCEEDS_CREDITS
    ledger.transact(plain(id="t3", amount_nano=rest, **facts))
    assert ledger.check_integrity() == []
