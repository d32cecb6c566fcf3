"""Seeded simulations of two engines on one ledger: clocks that jump, partitions, outages longer
than a hold, and kill -9 between any two steps. The seed that a failure shows decides everything.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from concurrent.futures import Future
from functools import partial

import pytest

from tests.support.ledger_books import SimulatedDatabase, receipt
from vllm_kvmarket.ledger import (
    GRACE_S,
    OWED,
    expire,
    pending,
    plain,
    post,
    renew,
    void,
)
from vllm_kvmarket.ledger.clock import MOST_CORRECTION, Reading, advance
from vllm_kvmarket.ledger.group_commit import Writer, unavailable
from vllm_kvmarket.ledger.known_funds import KnownFunds
from vllm_kvmarket.ledger.outbox import Outbox, batch_of
from vllm_kvmarket.ledger.storage import Batch

FUNDS = 500  # some settlements come late and without funds
TIMEOUT_S = 60
FOREVER = float("inf")


class Killed(BaseException):
    """kill -9: nothing behind this line happens."""


class Database(SimulatedDatabase):
    """Books that outlive every engine, with the ledger's clock over a machine's clocks that lie."""

    def __init__(self, chance):
        super().__init__(chance)
        self.true_s = 5_000.0
        self.wall_offset_s, self.boot_id, self.booted_at_s = 0.0, "boot-0", 0.0
        self.mark = None
        self.kept_since_s = {}  # when each hold was made or renewed, in true time
        self.expired_early = []
        self.largest_debt = 0

    def reading(self):
        uptime_s = self.true_s - self.booted_at_s
        return Reading(self.true_s + self.wall_offset_s, uptime_s, self.boot_id)

    def write(self, group):
        fault = self.chance.random() < self.faults and self.chance.choice(
            ["before", "after", "answer lost"]
        )
        mark = advance(self.mark, self.reading())
        changed, answers, receipts = self.apply(group, mark.at_s)
        if fault == "before":
            raise Killed
        self.keep(changed, receipts)
        for transfer in changed.new_transfers:
            self.note(transfer)
        self.mark = mark
        self.largest_debt = max(self.largest_debt, self.books.account("alice").debt_nano)
        if fault == "after":
            raise Killed
        if fault == "answer lost":
            raise unavailable(OSError("the connection broke during COMMIT"))
        return answers

    def note(self, transfer):
        if transfer.kind in ("pending", "renew"):
            self.kept_since_s[transfer.pending_id or transfer.id] = self.true_s, self.boot_id
        if transfer.kind == "expire":
            since_s, boot_id = self.kept_since_s[transfer.pending_id]
            lived_s = self.true_s - since_s
            least_s = (TIMEOUT_S + GRACE_S) / (1 + MOST_CORRECTION)
            # At a new boot the wall clock is believed: no engine lives that made the hold.
            if lived_s < least_s and boot_id == self.boot_id:
                self.expired_early.append((transfer.pending_id, lived_s))

    def overdue(self):
        now_s = advance(self.mark, self.reading()).at_s
        return [id for id, due_s in self.books.open_holds().items() if due_s + GRACE_S <= now_s]


class Engine:
    """A process with its writer and its outbox; unreachable while `cut_off_until_s`."""

    def __init__(self, database, folder):
        self.database = database
        self.cut_off_until_s = 0.0
        self.outbox = Outbox(folder)
        self.writer = Writer(
            self, outbox=self.outbox, monotonic=lambda: database.true_s, start=False
        )
        self.requests = []
        self.sweeps = itertools.count()
        self.funds = KnownFunds(lambda: database.true_s)

    def write(self, group):
        if self.database.true_s < self.cut_off_until_s:
            raise unavailable(OSError("no route"))
        answers = self.database.write(group)
        self.funds.learn([self.database.books.account("alice")])
        return answers

    def submit(self, operations, kept=None, patience_s=1.0, *, linked=True, undo=False):
        future = Future()
        give_up_at_s = self.database.true_s + patience_s
        one = Batch(tuple(operations), linked, kept, future, None, give_up_at_s, undo)
        assert self.writer.enqueue(one) is None
        return future

    def book_abandoned(self, killed=lambda: False):
        for entries in self.outbox.abandoned():
            for entry in entries:
                self.writer.enqueue(batch_of(entry), sync=False)
            if killed():
                raise Killed

    def sweep(self):
        overdue = self.database.overdue()
        if overdue:
            operations = [expire(id=f"{held}:expire", pending_id=held) for held in overdue]
            self.submit(operations, linked=False)


class Request:
    """One answer: reserved, perhaps renewed, then sold or not."""

    def __init__(self, key, chance):
        self.key, self.held = key, f"{key}:reserve"
        self.most = chance.randint(2, 150)
        self.charge = chance.randint(2, self.most)
        self.state, self.future = "new", None
        self.renewals = itertools.count()


class Simulation:
    def __init__(self, seed, folder):
        self.chance = random.Random(seed)
        self.folder = folder
        self.database = Database(self.chance)
        self.engines = [self.engine(), self.engine()]
        self.sold, self.numbers, self.kills, self.ahead = {}, itertools.count(), 0, 0
        names = {"debit": "world", "credit": "alice", "code": "deposit"}
        self.engines[0].submit([plain(id="d", amount_nano=FUNDS, **names)])
        self.engines[0].writer.step()

    def engine(self):
        return Engine(self.database, self.folder)

    def step(self, engine):
        chance = self.chance
        if chance.random() < 0.4:
            engine.requests.append(Request(f"r{next(self.numbers)}", chance))
        for request in engine.requests:
            self.go_on(engine, request)
        if chance.random() < 0.1:
            # Funds go elsewhere, and come back: a late settlement may find none.
            funds = self.database.books.account("alice").available_nano
            names = {"debit": "alice", "credit": "pat"}
            if funds <= 0:
                funds, names = FUNDS, {"debit": "world", "credit": "alice"}
            id = f"cash{next(self.numbers)}"
            engine.submit([plain(id=id, amount_nano=funds, code="cash", **names)])
        if chance.random() < 0.2:
            engine.sweep()
        if chance.random() < 0.2:
            engine.book_abandoned(lambda: chance.random() < 0.2)
        engine.writer.watch()
        if engine.writer.queue_depth:
            engine.writer.step()

    def go_on(self, engine, request):
        """Handle a request as an engine does: serve only what is reserved."""
        chance = self.chance
        if request.state == "new":
            names = {"debit": "alice", "credit": "provider", "code": "reuse"}
            held = pending(id=request.held, amount_nano=request.most, timeout_s=TIMEOUT_S, **names)
            ahead = engine.funds.take("alice", request.most, "USD")
            request.future = engine.submit([held], undo=True)
            request.state = "serving" if ahead else "reserving"
            if ahead:
                self.ahead += 1
                request.future.add_done_callback(partial(engine.funds.end, "alice", request.most))
        elif request.state == "reserving" and request.future.done():
            good = not request.future.exception() and request.future.result()[0].outcome.good
            request.state = "serving" if good else "over"
        elif request.state == "serving" and chance.random() < 0.3:
            kind = chance.choice(["renew", "sell", "sell", "void"])
            if kind == "renew":
                id = f"{request.held}:renew:{next(request.renewals)}"
                engine.submit([renew(id=id, pending_id=request.held, timeout_s=TIMEOUT_S)])
                return
            request.state = "over"
            if kind == "void":
                ended = void(id=f"{request.key}:void", pending_id=request.held)
                engine.submit([ended], patience_s=FOREVER)
                return
            future, id = request.future, f"{request.key}:settle"
            good = future.done() and not future.exception() and future.result()[0].outcome.good
            moved = post(id=id, pending_id=request.held, amount_nano=request.charge)
            if not good:  # it went ahead
                names = {"debit": "alice", "credit": "provider", "code": OWED}
                moved = plain(id=id, amount_nano=request.charge, **names)
            names = {"debit": "provider", "credit": "pat", "code": "royalty"}
            if chance.random() < 0.1:
                names["credit"] = "no-account"
            owed = request.charge // 2
            royalty = plain(id=f"{request.key}:royalty", amount_nano=owed, **names)
            kept = receipt(f"kvr_{request.key}", request.charge, moved.id, royalty.id, royalty=owed)
            engine.submit([moved, royalty], kept, FOREVER)
            if not good:
                ended = void(id=f"{request.key}:void", pending_id=request.held)
                engine.submit([ended], patience_s=FOREVER)
            self.sold[request.key] = request.charge  # the answer's last byte is out

    def kill(self, engine):
        """The process is gone, its requests with it; the kernel lets go of its lock."""
        self.kills += 1
        if engine.outbox._descriptor is not None:
            os.close(engine.outbox._descriptor)
        self.engines[self.engines.index(engine)] = self.engine()

    def disturb(self):
        chance, database = self.chance, self.database
        database.true_s += chance.choice([0.0, 0.1, 1.0, 5.0, 20.0])
        if chance.random() < 0.05:
            database.wall_offset_s = chance.choice([0.0, 900.0, -900.0, 86_400.0, -86_400.0])
        if chance.random() < 0.05:
            engine = chance.choice(self.engines)
            engine.cut_off_until_s = database.true_s + chance.choice([2.0, 30.0, 400.0])
        if chance.random() < 0.02:
            for engine in self.engines:  # away for longer than any hold
                engine.cut_off_until_s = database.true_s + 300.0
        if chance.random() < 0.05:
            self.kill(chance.choice(self.engines))
        if chance.random() < 0.01:
            for engine in list(self.engines):
                self.kill(engine)
            database.boot_id, database.booted_at_s = f"boot-{self.kills}", database.true_s

    def run(self, steps):
        self.database.faults = 0.05
        for _ in range(steps):
            self.disturb()
            engine = self.chance.choice(self.engines)
            try:
                self.step(engine)
            except Killed:
                self.kill(engine)
        self.database.faults = 0.0

    def finish(self):
        """Everything is killed; one new engine books what is left, and time goes on."""
        for engine in list(self.engines):
            self.kill(engine)
        last = self.engines[0]
        for _ in range(60):
            last.book_abandoned()
            last.sweep()
            last.writer.watch()
            while last.writer.queue_depth:
                last.writer.step()
            self.database.true_s += 10


@pytest.fixture(autouse=True)
def _only_kills(monkeypatch):
    """No power cut: what is written survives a kill without a sync. Files are emptied at once."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr("vllm_kvmarket.ledger.outbox.MOST_IDLE_BYTES", 0)


@pytest.mark.parametrize("seed", range(80))
def test_everything_sold_is_paid_once_and_no_hold_outlives_its_grace(seed, tmp_path):
    """Late settlements are paid from the funds, or become a debt; the receipts agree with it."""
    simulation = Simulation(seed, tmp_path / "outbox")
    simulation.run(400)
    simulation.finish()
    books, receipts = simulation.database.books, simulation.database.receipts
    assert books.problems(receipts.values()) == []
    assert simulation.database.expired_early == []
    for key, charge in simulation.sold.items():
        settled = books.transfer(f"{key}:settle")
        assert settled is not None, "something sold stays unpaid"
        assert settled.amount_nano == charge
        assert books.transfer(f"{key}:royalty") is not None
    assert set(receipts) == {f"kvr_{key}" for key in simulation.sold}
    alice = books.account("alice")
    cash = [each for each in books.transfers.values() if each.code in ("cash", "deposit")]
    moved = sum(each.amount_nano * (1 if each.credit == "alice" else -1) for each in cash)
    assert alice.balance_nano == moved - sum(simulation.sold.values())
    assert (alice.debits_pending, books.open_holds()) == (0, {})
    assert not (simulation.folder / "refused.txt").exists()
    assert len(simulation.sold) > 2
    assert simulation.kills > 5


def test_the_simulation_has_late_settlements_and_debts(tmp_path):
    """Over the seeds, all that is to be survived does happen."""
    kinds, debts, suspended, ahead, owed = set(), 0, 0, 0, 0
    for seed in range(40):
        simulation = Simulation(seed, tmp_path / str(seed))
        simulation.run(400)
        simulation.finish()
        books = simulation.database.books
        kinds |= {each.kind for each in books.transfers.values()}
        debts += simulation.database.largest_debt
        ahead += simulation.ahead
        owed += sum(each.code == OWED for each in books.transfers.values())
        suspended += books.account("suspense").balance_nano
    assert kinds == {"plain", "pending", "renew", "post", "void", "expire", "late"}
    assert debts > 0
    assert ahead > owed > 0
    assert suspended > 0


def test_an_outbox_that_is_lost_would_be_caught(tmp_path):
    """Without it, a killed engine's sales stay unpaid."""

    class Forgetful(Simulation):
        def kill(self, engine):
            super().kill(engine)
            shutil.rmtree(self.folder, ignore_errors=True)

    unpaid = 0
    for seed in range(6):
        simulation = Forgetful(seed, tmp_path / str(seed))
        simulation.run(400)
        simulation.finish()
        books = simulation.database.books
        unpaid += sum(books.transfer(f"{key}:settle") is None for key in simulation.sold)
    assert unpaid > 0
