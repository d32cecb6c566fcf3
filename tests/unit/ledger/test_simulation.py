"""Seeded simulations: engines, a fake clock, and a database that fails, lies and crashes.

Everything is decided by the seed that a failure shows: run that one again to see the same.
"""

from __future__ import annotations

import itertools
import random

import pytest

from tests.support.ledger_books import SimulatedDatabase, batch, receipt
from vllm_kvmarket.core.errors import LedgerError
from vllm_kvmarket.ledger import Outcome, expire, pending, plain, post, renew, void
from vllm_kvmarket.ledger import group_commit as writing
from vllm_kvmarket.ledger.group_commit import Writer, malformed, unavailable

FUNDS = 10_000
BAD = "malformed"


class Crash(BaseException):
    """The process is gone: nothing behind this line happens."""


class Disk(SimulatedDatabase):
    """A database that is away, breaks, or crashes with the process."""

    away_for = 0

    def write(self, group):
        if self.away_for:
            self.away_for -= 1
            raise unavailable(OSError("still away"))
        fault = self.chance.random() < self.faults and self.chance.choice(
            ["away", "crash before", "crash after", "answer lost"]
        )
        if fault == "away":
            self.away_for = self.chance.randint(0, 6)
            raise unavailable(OSError("away"))
        if any(each.code == BAD for one in group for each in one.operations):
            raise malformed(ValueError(BAD))
        changed, answers, receipts = self.apply(group)
        if fault == "crash before":
            raise Crash
        self.keep(changed, receipts)
        if fault == "crash after":
            raise Crash
        if fault == "answer lost":
            raise unavailable(OSError("the connection broke during COMMIT"))
        return answers


class Request:
    """One request's money: reserve, perhaps renew, then settle or void, each until answered."""

    def __init__(self, key, chance):
        self.key = key
        self.most = chance.randint(1, 40)
        self.charge = chance.randint(0, self.most)
        self.plan = [
            "reserve",
            *["renew"] * chance.randint(0, 2),
            chance.choice(["settle", "void"]),
        ]
        self.renewals = itertools.count()
        self.renewal = ""
        self.done = []  # what was acknowledged
        self.refused = False

    def operations(self):
        """The next operations, and their receipt; the same again until they are answered."""
        held = f"{self.key}:reserve"
        if self.plan[0] == "reserve":
            names = {"debit": "alice", "credit": "provider", "code": "reuse"}
            return [pending(id=held, amount_nano=self.most, timeout_s=60, **names)], None
        if self.plan[0] == "renew":
            self.renewal = self.renewal or f"{held}:renew:{next(self.renewals)}"
            return [renew(id=self.renewal, pending_id=held, timeout_s=60)], None
        if self.plan[0] == "void":
            return [void(id=f"{self.key}:void", pending_id=held)], None
        moved = post(id=f"{self.key}:settle", pending_id=held, amount_nano=self.charge)
        names = {"debit": "provider", "credit": "pat", "code": "royalty"}
        royalty = plain(id=f"{self.key}:royalty", amount_nano=self.charge // 2, **names)
        kept = receipt(
            f"kvr_{self.key}", self.charge, moved.id, royalty.id, royalty=self.charge // 2
        )
        if self.charge < 2:  # no royalty is due
            kept = receipt(f"kvr_{self.key}", self.charge, moved.id)
            return [moved], kept
        return [moved, royalty], kept

    def answered(self, results):
        if all(result.outcome.good for result in results):
            self.done += [operation.id for operation in self.operations()[0]]
            self.plan.pop(0)
            self.renewal = ""
        else:
            self.refused = True
            self.plan.clear()


class Simulation:
    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.disk = Disk(self.chance)
        self.now_s = 1_000.0
        self.requests, self.alive, self.flying = [], [], []
        self.crashes, self.open = 0, True
        names = {"debit": "world", "credit": "alice", "code": "deposit"}
        self.disk.write([batch([plain(id="d", amount_nano=FUNDS, **names)])])
        self.start()

    def start(self):
        """A new process: it knows nothing but what the disk has."""
        self.writer = Writer(self.disk, monotonic=lambda: self.now_s, start=False)
        self.flying = []

    def submit(self, request):
        operations, kept = request.operations()
        give_up_at_s = self.chance.choice([0.0, self.now_s + 2, float("inf")])
        one = batch(operations, self.now_s, receipt=kept, give_up_at_s=give_up_at_s)
        assert self.writer.enqueue(one) is None
        self.flying.append((request, one.future))

    def arrive(self):
        request = Request(f"r{len(self.requests)}", self.chance)
        self.requests.append(request)
        self.alive.append(request)

    def step(self):
        if self.open and self.chance.random() < 0.3:
            self.arrive()
        flying = {id(request) for request, _ in self.flying}
        for request in self.alive:
            if request.plan and id(request) not in flying and self.chance.random() < 0.5:
                self.submit(request)
        if self.open and self.chance.random() < 0.05:
            names = {"debit": "alice", "credit": "provider", "amount_nano": 1}
            one = batch([plain(id=f"bad{self.now_s}", code=BAD, **names)], self.now_s)
            assert self.writer.enqueue(one) is None
            self.flying.append((None, one.future))
        self.now_s += self.chance.choice([0.0, 0.1, 1.0, 5.0])
        if self.flying:
            try:
                self.writer.step()
            except Crash:
                self.crash()
        self.land()

    def crash(self):
        """The engine and its requests are gone, or its clients come again with the same ids."""
        self.crashes += 1
        acknowledged = {id for request in self.requests for id in request.done}
        assert acknowledged <= set(self.disk.books.transfers)
        self.alive = [each for each in self.alive if self.chance.random() < 0.7]
        self.start()

    def land(self):
        for request, future in list(self.flying):
            if future.done():
                self.flying.remove((request, future))
                if request is None:
                    assert isinstance(future.exception(), LedgerError)
                elif not future.exception():  # else the same again
                    request.answered(future.result())

    def finish(self):
        """The database recovers; who is alive comes to an end; what is left expires."""
        self.disk.faults = 0.0
        self.disk.away_for = 0
        self.open = False
        while self.flying or any(request.plan for request in self.alive):
            self.step()
        self.now_s += 200
        holds = self.disk.books.open_holds()
        overdue = [expire(id=f"{held}:expire", pending_id=held) for held in holds]
        if overdue:
            (results,) = self.disk.write([batch(overdue, self.now_s, linked=False)])
            assert {each.outcome for each in results} == {Outcome.OK}


@pytest.mark.parametrize("seed", range(60))
def test_every_request_is_charged_once_whatever_fails(seed, monkeypatch):
    """Over outages, lost answers, malformed batches and crashes: what was acknowledged is there,
    who settled pays exactly once with one receipt, nobody else pays, no funds stay locked.
    """
    monkeypatch.setattr(writing, "MAX_GROUP", 5)
    simulation = Simulation(seed)
    simulation.disk.faults = 0.15
    for _ in range(250):
        simulation.step()
    simulation.finish()
    books, receipts = simulation.disk.books, simulation.disk.receipts
    assert books.problems(receipts.values()) == []
    paid = 0
    for request in simulation.requests:
        settled = books.transfer(f"{request.key}:settle")
        if f"{request.key}:settle" in request.done:
            assert settled is not None
        assert set(request.done) <= set(books.transfers)
        assert (settled is not None) == (f"kvr_{request.key}" in receipts)
        royalty = books.transfer(f"{request.key}:royalty")
        assert (settled is not None and request.charge > 1) == (royalty is not None)
        if settled is not None:
            assert settled.amount_nano == request.charge
            paid += request.charge
    alice = books.account("alice")
    assert (alice.balance_nano, alice.debits_pending) == (FUNDS - paid, 0)
    assert simulation.crashes > 0
    assert len(receipts) > 5


def test_a_writer_that_forgot_what_it_took_would_be_caught(monkeypatch):
    """The simulation notices a ledger that acknowledges before the database has it."""
    honest = Disk.write

    def lying(self, group):
        try:
            return honest(self, group)
        except LedgerError:
            return [self.apply([one])[1][0] for one in group]

    monkeypatch.setattr(Disk, "write", lying)
    with pytest.raises(AssertionError):
        test_every_request_is_charged_once_whatever_fails(0, monkeypatch)


def test_the_order_of_submission_outlives_outages_and_malformed_batches(monkeypatch):
    """A void behind its reservation finds it, although the group was split and the database away
    for one half of it.
    """
    simulation = Simulation(1)
    honest, calls = Disk.write, itertools.count()

    def away_once(self, group):
        if next(calls) == 1:  # the first half, after the whole group was refused
            raise unavailable(OSError("away"))
        return honest(self, group)

    monkeypatch.setattr(Disk, "write", away_once)
    names = {"debit": "alice", "credit": "provider", "amount_nano": 1}
    held = batch([pending(id="h", timeout_s=60, code="reuse", **names)], 1.0)
    bad = batch([plain(id="bad", code=BAD, **names)], 1.0)
    ended = batch([void(id="v", pending_id="h")], 1.0)
    for each in (held, bad, ended):
        assert simulation.writer.enqueue(each) is None
    while not held.future.done():
        simulation.writer.step()
    assert held.future.result(0)[0].outcome is Outcome.OK
    assert isinstance(bad.future.exception(0), LedgerError)
    assert ended.future.result(0)[0].outcome is Outcome.OK
