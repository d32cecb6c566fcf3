"""A naive model of the ledger that keeps lists and adds them up anew each time, and the state
machine that compares books of any kind with it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vllm_kvmarket.ledger.model import (
    GRACE_S,
    INT64_MAX,
    Account,
    Operation,
    Outcome,
    expire,
    pending,
    plain,
    post,
    renew,
    void,
)

# world and the mints may go negative. Only `flood` uses mints and sink, so that an account at its
# limit does not stop the rest.
KINDS = {
    "world": "world",
    "mint-1": "world",
    "mint-2": "world",
    "alice": "buyer",
    "pat": "publisher",
    "provider": "provider",
    "sink": "buyer",
    "erik": "publisher",
}
CURRENCIES = {"erik": "EUR"}
UNBOUNDED = {"world", "mint-1", "mint-2"}
RESOLVED = {
    "post": Outcome.ALREADY_POSTED,
    "late": Outcome.ALREADY_POSTED,
    "void": Outcome.ALREADY_VOIDED,
}


@dataclass
class Hold:
    operation: Operation
    due_s: float
    resolved: str = ""


@dataclass
class Model:
    """Accepted operations, moves and holds: no running balances."""

    accepted: dict[str, Operation] = field(default_factory=dict)
    moved: list[tuple[str, str, int]] = field(default_factory=list)
    holds: dict[str, Hold] = field(default_factory=dict)
    late: list[tuple[str, int]] = field(default_factory=list)

    def held(self):
        holds = [hold.operation for hold in self.holds.values() if not hold.resolved]
        return [(each.debit, each.credit, each.amount_nano) for each in holds]

    def debits(self, moves, name):
        return sum(amount for debit, _, amount in moves if debit == name)

    def credits(self, moves, name):
        return sum(amount for _, credit, amount in moves if credit == name)

    def available(self, name):
        spent = self.debits(self.moved, name) + self.debits(self.held(), name)
        return self.credits(self.moved, name) - spent

    def batch(self, operations, now_s, linked):
        """The outcomes of a batch; linked, it mutates when all of it holds."""
        if not linked:
            return [self.one(operation, now_s) for operation in operations]
        trial, outcomes = deepcopy(self), []
        for operation in operations:
            outcomes.append(trial.one(operation, now_s))
            if outcomes[-1] > Outcome.EXISTS:
                failed = len(outcomes) - 1
                return [
                    outcomes[-1] if index == failed else Outcome.LINKED_FAILED
                    for index in range(len(operations))
                ]
        self.accepted, self.moved, self.holds = trial.accepted, trial.moved, trial.holds
        self.late = trial.late
        return outcomes

    def one(self, operation, now_s):
        if operation.amount_nano < 0 or operation.amount_nano > INT64_MAX:
            return Outcome.INVALID_AMOUNT
        before = self.accepted.get(operation.id)
        if before is not None:
            same = before == operation
            return Outcome.EXISTS if same else Outcome.EXISTS_WITH_DIFFERENT_FIELDS
        timed = operation.kind in ("pending", "renew")
        if not operation.id or (timed and operation.timeout_s == 0):
            return Outcome.INVALID_FIELD
        first = operation.kind in ("plain", "pending")
        outcome = self.move(operation, now_s) if first else self.resolve(operation, now_s)
        if outcome is Outcome.OK:
            self.accepted[operation.id] = operation
        return outcome

    def move(self, operation, now_s):
        debit, credit, amount = operation.debit, operation.credit, operation.amount_nano
        if debit == credit:
            return Outcome.SAME_ACCOUNT
        if debit not in KINDS or credit not in KINDS:
            return Outcome.UNKNOWN_ACCOUNT
        if CURRENCIES.get(debit) != CURRENCIES.get(credit):
            return Outcome.DIFFERENT_CURRENCIES
        if debit not in UNBOUNDED and self.available(debit) < amount:
            return Outcome.EXCEEDS_CREDITS
        everything = [*self.moved, *self.held(), (debit, credit, amount)]
        totals = self.debits(everything, debit), self.credits(everything, credit)
        if max(totals) > INT64_MAX:
            return Outcome.OVERFLOW
        if operation.kind == "plain":
            self.moved.append((debit, credit, amount))
        else:
            self.holds[operation.id] = Hold(operation, now_s + operation.timeout_s)
        return Outcome.OK

    def resolve(self, operation, now_s):
        hold = self.holds.get(operation.pending_id)
        if hold is None:
            return Outcome.PENDING_NOT_FOUND
        late = hold.resolved == "expire" and operation.kind == "post"
        if hold.resolved and not late:
            return RESOLVED.get(hold.resolved, Outcome.EXPIRED)
        if operation.kind == "expire" and now_s < hold.due_s + GRACE_S:
            return Outcome.NOT_DUE
        if operation.amount_nano > hold.operation.amount_nano:
            return Outcome.EXCEEDS_PENDING_AMOUNT
        if operation.kind == "renew":
            hold.due_s = max(hold.due_s, now_s + operation.timeout_s)
            return Outcome.OK
        hold.resolved = "late" if late else operation.kind
        self.late += [(hold.operation.debit, operation.amount_nano)] if late else []
        self.moved.append((hold.operation.debit, hold.operation.credit, operation.amount_nano))
        return Outcome.OK


# Few names and small amounts, so that ids collide, funds run out and holds are found.
hold_ids = st.integers(0, 11).map("h{}".format)
names = st.sampled_from(["world", "alice", "pat", "provider", "alice", "erik", "nobody"])
amounts = st.one_of(st.integers(0, 60), st.sampled_from([-1, INT64_MAX + 1, 2**80]))
timeouts = st.sampled_from([1, 10, 60])
operations = st.one_of(
    st.builds(
        plain,
        id=st.one_of(st.just(""), st.integers(0, 11).map("t{}".format)),
        debit=names,
        credit=names,
        amount_nano=amounts,
        code=st.just("x"),
    ),
    st.builds(
        pending,
        id=hold_ids,
        debit=names,
        credit=st.sampled_from(["provider", "pat"]),
        amount_nano=amounts,
        timeout_s=st.sampled_from([0, 1, 10, 60]),
        code=st.just("hold"),
    ),
    st.builds(
        post, id=st.integers(0, 11).map("p{}".format), pending_id=hold_ids, amount_nano=amounts
    ),
    st.builds(
        renew,
        id=st.integers(0, 11).map("n{}".format),
        pending_id=hold_ids,
        timeout_s=st.sampled_from([0, 1, 10, 60]),
    ),
    st.builds(void, id=st.integers(0, 11).map("v{}".format), pending_id=hold_ids),
    st.builds(expire, id=st.integers(0, 11).map("e{}".format), pending_id=hold_ids),
)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self, open_books):
        super().__init__()
        accounts = [
            Account(name, kind, name in UNBOUNDED, CURRENCIES.get(name, "USD"))
            for name, kind in KINDS.items()
        ]
        self.books, self.model = open_books(*accounts), Model()
        self.now_s, self.count = 1000.0, 0

    def fresh(self, name):
        self.count += 1
        return f"{name}-{self.count}"

    def submit(self, batch, *, linked=True):
        before = dict(self.books.accounts), dict(self.books.transfers)
        expected = self.model.batch(batch, self.now_s, linked)
        results = self.books.apply(batch, self.now_s, linked=linked)
        assert [result.outcome for result in results] == expected
        if Outcome.OK not in expected:
            assert (self.books.accounts, self.books.transfers) == before

    @initialize()
    def fund(self):
        self.deposit("alice", 100)

    @rule(name=st.sampled_from(["alice", "pat"]), amount=st.integers(1, 20))
    def deposit(self, name, amount):
        facts = {"debit": "world", "credit": name, "amount_nano": amount, "code": "deposit"}
        self.submit([plain(id=self.fresh("deposit"), **facts)])

    @rule(amount=st.integers(20, 60), timeout_s=timeouts)
    def reserve(self, amount, timeout_s):
        """A request's operations on arrival; often for more than is left."""
        facts = {"debit": "alice", "credit": "provider", "amount_nano": amount, "code": "hold"}
        self.submit([pending(id=self.fresh("hold"), timeout_s=timeout_s, **facts)])

    @precondition(lambda self: self.model.holds)
    @rule(data=st.data(), kinds=st.lists(st.sampled_from([post, void, expire, renew]), max_size=2))
    def resolve(self, data, kinds):
        """Resolve or renew one hold, open or not, up to twice in a batch."""
        id = data.draw(st.sampled_from(list(self.model.holds)))
        amount = {post: {"amount_nano": 1}, renew: {"timeout_s": 60}}
        self.submit(
            [kind(id=self.fresh("end"), pending_id=id, **amount.get(kind, {})) for kind in kinds]
        )

    @rule(batch=st.lists(operations, min_size=1, max_size=3), linked=st.booleans())
    def work(self, batch, linked):
        self.submit(batch, linked=linked)

    @precondition(lambda self: any(not hold.resolved for hold in self.model.holds.values()))
    @rule(data=st.data())
    def settle(self, data):
        """A post of an open hold, and the royalty out of it in the same batch."""
        open_holds = [id for id, hold in self.model.holds.items() if not hold.resolved]
        id = data.draw(st.sampled_from(open_holds))
        most = self.model.holds[id].operation.amount_nano
        amount = data.draw(st.sampled_from([0, most // 2, most, most + 1]))
        moved = post(id=f"settle-{id}", pending_id=id, amount_nano=amount)
        royalty = plain(
            id=f"royalty-{id}",
            debit="provider",
            credit="pat",
            amount_nano=amount // 2,
            code="share",
        )
        self.submit([moved, royalty])

    @rule(data=st.data())
    def retry(self, data):
        """An accepted operation is accepted again, at any later time, and does nothing."""
        operation = data.draw(st.sampled_from(list(self.model.accepted.values())))
        before = dict(self.books.accounts)
        assert self.books.apply([operation], self.now_s)[0].outcome is Outcome.EXISTS
        assert self.books.accounts == before

    @rule(
        mint=st.sampled_from(["mint-1", "mint-2"]),
        amount=st.sampled_from([INT64_MAX, INT64_MAX // 2 + 1, 1]),
        held=st.booleans(),
    )
    def flood(self, mint, amount, held):
        facts = {"debit": mint, "credit": "sink", "amount_nano": amount, "code": "x"}
        id = self.fresh("flood")
        self.submit([pending(id=id, timeout_s=60, **facts) if held else plain(id=id, **facts)])

    @rule(seconds=st.sampled_from([0.5, 1, 9, 60, 200]))
    def wait(self, seconds):
        self.now_s += seconds

    @invariant()
    def balances_follow_from_what_happened(self):
        model, held = self.model, self.model.held()
        for name, account in self.books.accounts.items():
            assert account.debits_posted == model.debits(model.moved, name)
            assert account.credits_posted == model.credits(model.moved, name)
            assert account.debits_pending == model.debits(held, name)
            assert account.credits_pending == model.credits(held, name)

    @invariant()
    def nothing_is_created_or_overspent(self):
        accounts = self.books.accounts.values()
        assert sum(account.balance_nano for account in accounts) == 0
        assert sum(each.debits_pending - each.credits_pending for each in accounts) == 0
        for account in accounts:
            late_nano = sum(amount for debit, amount in self.model.late if debit == account.id)
            assert account.late_nano == (0 if account.may_go_negative else late_nano)
            assert account.may_go_negative or account.available_nano >= -late_nano
            assert account.debits_pending + account.debits_posted <= INT64_MAX
            assert account.credits_pending + account.credits_posted <= INT64_MAX

    @invariant()
    def every_hold_stands_as_it_should(self):
        assert self.books.transfers.keys() == self.model.accepted.keys()
        holds = self.model.holds.items()
        assert self.books.open_holds() == {
            id: each.due_s for id, each in holds if not each.resolved
        }

    @invariant()
    def the_audit_finds_nothing(self):
        assert self.books.problems() == []

    def teardown(self):
        for id, hold in self.model.holds.items():
            resolution = self.books.resolution(id)
            assert (resolution.kind if resolution else "") == hold.resolved
        self.books.close()


def run(open_books, histories, steps=40):
    """Compare `histories` histories on books made by `open_books(*accounts)` with the model."""
    run_state_machine_as_test(
        lambda: LedgerMachine(open_books),
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
