"""The ledger's rules, as tables: one row an operation, the expected outcome last."""

from __future__ import annotations

import msgspec
import pytest

from tests.support.ledger_books import MemoryBooks
from vllm_kvmarket.ledger.model import (
    INT64_MAX,
    MAX_ID_LENGTH,
    MAX_PENDING_ID_LENGTH,
    OWED,
    Account,
    Operation,
    Outcome,
    Result,
    expire,
    pending,
    plain,
    post,
    renew,
    void,
)
from vllm_kvmarket.ledger.rules import apply


@pytest.fixture
def books():
    return MemoryBooks(
        Account("world", "world", may_go_negative=True),
        Account("provider", "provider"),
        Account("pat", "publisher"),
        Account("alice", "buyer", credits_posted=100),
        Account("rich", "buyer", credits_posted=INT64_MAX),
        Account("erik", "publisher", currency="EUR"),
    )


def hold(id, amount, debit="alice", timeout_s=60):
    return pending(
        id=id, debit=debit, credit="provider", amount_nano=amount, timeout_s=timeout_s, code="hold"
    )


def pay(id, amount, debit="alice", credit="provider"):
    return plain(id=id, debit=debit, credit=credit, amount_nano=amount, code="x")


TABLE = [
    # at second, operation, outcome, detail
    (0, pay("t1", 40), Outcome.OK, ""),
    (0, pay("t1", 40), Outcome.EXISTS, ""),
    (0, pay("t1", 41), Outcome.EXISTS_WITH_DIFFERENT_FIELDS, "amount_nano"),
    (0, pay("t1", 40, credit="pat"), Outcome.EXISTS_WITH_DIFFERENT_FIELDS, "credit"),
    (0, hold("h1", 50), Outcome.OK, ""),
    (0, hold("h2", 11), Outcome.EXCEEDS_CREDITS, "alice"),
    (0, pay("t2", 11), Outcome.EXCEEDS_CREDITS, "alice"),
    (0, hold("h3", 10), Outcome.OK, ""),
    (0, post(id="p1", pending_id="h1", amount_nano=51), Outcome.EXCEEDS_PENDING_AMOUNT, "50"),
    (0, post(id="p1", pending_id="h1", amount_nano=20), Outcome.OK, ""),
    (0, post(id="p1", pending_id="h1", amount_nano=20), Outcome.EXISTS, ""),
    (0, post(id="p2", pending_id="h1", amount_nano=20), Outcome.ALREADY_POSTED, "p1"),
    (0, void(id="v1", pending_id="h1"), Outcome.ALREADY_POSTED, "p1"),
    (0, void(id="v1", pending_id="h3"), Outcome.OK, ""),
    (0, void(id="v1", pending_id="h3"), Outcome.EXISTS, ""),
    (0, post(id="p3", pending_id="h3", amount_nano=1), Outcome.ALREADY_VOIDED, "v1"),
    (0, post(id="p4", pending_id="none", amount_nano=1), Outcome.PENDING_NOT_FOUND, "none"),
    (0, post(id="p4", pending_id="t1", amount_nano=1), Outcome.PENDING_NOT_FOUND, "t1"),
    (0, hold("h4", 30), Outcome.OK, ""),
    (119, expire(id="e1", pending_id="h4"), Outcome.NOT_DUE, "h4"),
    (120, expire(id="e1", pending_id="h4"), Outcome.OK, ""),
    (120, void(id="v5", pending_id="h4"), Outcome.EXPIRED, "e1"),
    (120, renew(id="n5", pending_id="h4", timeout_s=60), Outcome.EXPIRED, "e1"),
    (120, post(id="p5", pending_id="h4", amount_nano=31), Outcome.EXCEEDS_PENDING_AMOUNT, "30"),
    (120, post(id="p5", pending_id="h4", amount_nano=0), Outcome.OK, ""),
    (120, post(id="p5", pending_id="h4", amount_nano=0), Outcome.EXISTS, ""),
    (120, post(id="p5b", pending_id="h4", amount_nano=0), Outcome.ALREADY_POSTED, "p5"),
    (120, hold("h5", 0), Outcome.OK, ""),
    (120, post(id="p6", pending_id="h5", amount_nano=0), Outcome.OK, ""),
    (120, void(id="v6", pending_id="h5"), Outcome.ALREADY_POSTED, "p6"),
    (120, pay("", 1), Outcome.INVALID_FIELD, "id"),
    (120, hold("h6", 1, timeout_s=0), Outcome.INVALID_FIELD, "timeout_s"),
    (120, pay("t3", -1), Outcome.INVALID_AMOUNT, "-1"),
    (120, pay("t3", INT64_MAX + 1), Outcome.INVALID_AMOUNT, str(INT64_MAX + 1)),
    (120, pay("t3", 1, credit="alice"), Outcome.SAME_ACCOUNT, "alice"),
    (120, pay("t3", 1, credit="nobody"), Outcome.UNKNOWN_ACCOUNT, "nobody"),
    (120, pay("t3", 1, debit="nobody"), Outcome.UNKNOWN_ACCOUNT, "nobody"),
    (120, pay("t3", 1, credit="erik"), Outcome.DIFFERENT_CURRENCIES, "USD, EUR"),
    (120, pay("t3", INT64_MAX, debit="rich", credit="provider"), Outcome.OVERFLOW, "provider"),
    (120, pay("t4", 5000, debit="world", credit="pat"), Outcome.OK, ""),
]


def test_every_outcome_in_one_history(books):
    """Each row acts on what the rows before it left; money is conserved throughout."""
    for number, (now_s, operation, outcome, detail) in enumerate(TABLE):
        before = dict(books.accounts)
        (result,) = apply(books, [operation], now_s)
        assert result.outcome is outcome, f"row {number}: {result}"
        assert result.detail == detail, f"row {number}"
        if outcome is not Outcome.OK:
            assert books.accounts == before, f"row {number} was refused and changed something"
        debits = sum(a.debits_posted for a in books.accounts.values())
        credits = sum(a.credits_posted for a in books.accounts.values()) - 100 - INT64_MAX
        assert debits == credits
    alice = books.accounts["alice"]
    assert (alice.debits_posted, alice.debits_pending, alice.available_nano) == (60, 0, 40)
    reached = {outcome for _, _, outcome, _ in TABLE}
    assert reached == set(Outcome) - {Outcome.LINKED_FAILED}


def test_a_linked_batch_takes_effect_whole_or_not_at_all(books):
    """The refused one says why, the others that they were linked to it."""
    before = dict(books.accounts)
    results = apply(books, [pay("a", 60), pay("b", 60), pay("c", 1)], 0)
    assert [result.outcome for result in results] == [
        Outcome.LINKED_FAILED,
        Outcome.EXCEEDS_CREDITS,
        Outcome.LINKED_FAILED,
    ]
    assert books.accounts == before
    assert books.transfers == {}


def test_a_batch_sees_its_own_effects_in_order(books):
    """The provider pays a royalty out of what the same batch brought in."""
    apply(books, [hold("h", 80)], 0)
    batch = [
        post(id="p", pending_id="h", amount_nano=70),
        pay("r", 35, debit="provider", credit="pat"),
    ]
    assert [result.outcome for result in apply(books, batch, 1)] == [Outcome.OK, Outcome.OK]
    assert [result.outcome for result in apply(books, batch, 2)] == [Outcome.EXISTS] * 2
    assert books.accounts["pat"].balance_nano == 35
    assert books.accounts["provider"].balance_nano == 35
    assert books.accounts["alice"].available_nano == 30


HELD = hold("h", 40)
PAID = pay("t", 5)
POSTED = post(id="p", pending_id="h", amount_nano=3)
RENEWED = renew(id="n", pending_id="h", timeout_s=60)

RETRIES = [
    # the first time, changed for the second time, the field that is named
    (PAID, {}, None),
    (PAID, {"kind": "pending"}, "kind"),
    (PAID, {"debit": "provider"}, "debit"),
    (PAID, {"credit": "pat"}, "credit"),
    (PAID, {"amount_nano": 6}, "amount_nano"),
    (PAID, {"code": "y"}, "code"),
    (PAID, {"user_data": "y"}, "user_data"),
    (PAID, {"amount_nano": 6, "user_data": "y"}, "amount_nano"),
    (HELD, {}, None),
    (HELD, {"timeout_s": 61}, "timeout_s"),
    (HELD, {"kind": "plain"}, "kind"),
    (POSTED, {}, None),
    (POSTED, {"pending_id": "h2"}, "pending_id"),
    (POSTED, {"amount_nano": 4}, "amount_nano"),
    (POSTED, {"kind": "void"}, "kind"),
    (RENEWED, {}, None),
    (RENEWED, {"timeout_s": 61}, "timeout_s"),
    (RENEWED, {"pending_id": "h2"}, "pending_id"),
    (void(id="v", pending_id="h"), {}, None),
    (void(id="v", pending_id="h"), {"kind": "expire"}, "kind"),
    (void(id="v", pending_id="h"), {"pending_id": "h2"}, "pending_id"),
]


@pytest.mark.parametrize(("first", "changed", "field"), RETRIES)
def test_a_retry_is_the_same_or_names_the_field_that_differs(books, first, changed, field):
    """The same again does nothing, whenever it comes; anything else under the id is refused."""
    if first is not HELD:
        apply(books, [HELD], 0)
    assert apply(books, [first], 1)[0].outcome is Outcome.OK
    before = dict(books.accounts), dict(books.transfers)
    again = Operation(**{name: getattr(first, name) for name in Operation.__struct_fields__})
    (result,) = apply(books, [msgspec.structs.replace(again, **changed)], 10_000)
    if field is None:
        assert result == Result(Outcome.EXISTS)
    else:
        assert result == Result(Outcome.EXISTS_WITH_DIFFERENT_FIELDS, field)
    assert (books.accounts, books.transfers) == before


WRONG = [
    # what an operation of its kind cannot have, outcome, detail
    (PAID, {"id": ""}, Outcome.INVALID_FIELD, "id"),
    (PAID, {"id": "a\0"}, Outcome.INVALID_FIELD, "id"),
    (PAID, {"id": "i" * (MAX_ID_LENGTH + 1)}, Outcome.INVALID_FIELD, "id"),
    (PAID, {"code": "\0"}, Outcome.INVALID_FIELD, "code"),
    (PAID, {"user_data": "\0"}, Outcome.INVALID_FIELD, "user_data"),
    (HELD, {"id": "i" * (MAX_PENDING_ID_LENGTH + 1)}, Outcome.INVALID_FIELD, "id"),
    (PAID, {"timeout_s": 1}, Outcome.INVALID_FIELD, "timeout_s"),
    (PAID, {"pending_id": "h"}, Outcome.INVALID_FIELD, "pending_id"),
    (PAID, {"amount_nano": 5.0}, Outcome.INVALID_AMOUNT, "5.0"),
    (PAID, {"amount_nano": True}, Outcome.INVALID_AMOUNT, "True"),
    (HELD, {"id": "h2", "timeout_s": 0}, Outcome.INVALID_FIELD, "timeout_s"),
    (HELD, {"id": "h2", "timeout_s": -1}, Outcome.INVALID_FIELD, "timeout_s"),
    (HELD, {"id": "h2", "timeout_s": 2**63}, Outcome.INVALID_FIELD, "timeout_s"),
    (HELD, {"id": "h2", "timeout_s": 1.5}, Outcome.INVALID_FIELD, "timeout_s"),
    (HELD, {"id": "h2", "pending_id": "h"}, Outcome.INVALID_FIELD, "pending_id"),
    (POSTED, {"pending_id": ""}, Outcome.INVALID_FIELD, "pending_id"),
    (POSTED, {"timeout_s": 1}, Outcome.INVALID_FIELD, "timeout_s"),
    (POSTED, {"pending_id": "a\0"}, Outcome.INVALID_FIELD, "pending_id"),
    (RENEWED, {"timeout_s": 0}, Outcome.INVALID_FIELD, "timeout_s"),
    (RENEWED, {"amount_nano": 1}, Outcome.INVALID_FIELD, "amount_nano"),
    (RENEWED, {"pending_id": ""}, Outcome.INVALID_FIELD, "pending_id"),
    (void(id="v", pending_id="h"), {"amount_nano": 1}, Outcome.INVALID_FIELD, "amount_nano"),
    (expire(id="e", pending_id="h"), {"amount_nano": 1}, Outcome.INVALID_FIELD, "amount_nano"),
]


@pytest.mark.parametrize(("operation", "changed", "outcome", "detail"), WRONG)
def test_a_field_that_makes_no_sense_is_named(books, operation, changed, outcome, detail):
    """Also to a caller that builds operations by hand: a void moves nothing, money is whole."""
    apply(books, [HELD], 0)
    before = dict(books.accounts), dict(books.transfers)
    (result,) = apply(books, [msgspec.structs.replace(operation, **changed)], 1)
    assert result == Result(outcome, detail)
    assert (books.accounts, books.transfers) == before


RESOLUTIONS = [
    # at second, how a hold of 40 ends: alice's posted and pending debits, what she can spend
    (59, post(id="p", pending_id="h", amount_nano=40), (40, 0, 60)),
    (59, post(id="p", pending_id="h", amount_nano=1), (1, 0, 99)),
    (59, post(id="p", pending_id="h", amount_nano=0), (0, 0, 100)),
    (59, void(id="v", pending_id="h"), (0, 0, 100)),
    (61, void(id="v", pending_id="h"), (0, 0, 100)),  # who releases may be late
    (120, expire(id="e", pending_id="h"), (0, 0, 100)),
    (119, post(id="p", pending_id="h", amount_nano=7), (7, 0, 93)),  # in its grace
]


@pytest.mark.parametrize(("now_s", "operation", "expected"), RESOLUTIONS)
def test_what_is_not_posted_of_a_hold_is_released(books, now_s, operation, expected):
    """A hold ends once, moves what was posted, and both sides are free of the rest."""
    apply(books, [HELD], 0)
    assert books.accounts["alice"].available_nano == 60
    assert books.accounts["provider"].credits_pending == 40
    assert apply(books, [operation], now_s) == [Result(Outcome.OK)]
    alice, provider = books.accounts["alice"], books.accounts["provider"]
    assert (alice.debits_posted, alice.debits_pending, alice.available_nano) == expected
    assert (provider.credits_posted, provider.credits_pending) == (expected[0], 0)
    kept = books.transfers[operation.id]
    assert (kept.debit, kept.credit, kept.code) == ("alice", "provider", "hold")
    assert (kept.amount_nano, kept.created_at_s) == (operation.amount_nano, now_s)


LIMITS = [
    # what came before, the operation, outcome, detail
    ([], pay("t", INT64_MAX, debit="rich"), Outcome.OK, ""),
    ([], pay("t", INT64_MAX, debit="world", credit="pat"), Outcome.OK, ""),
    ([], hold("h", INT64_MAX, debit="rich"), Outcome.OK, ""),
    ([], pay("t", 1, debit="world", credit="rich"), Outcome.OVERFLOW, "rich"),
    ([hold("a", INT64_MAX, debit="rich")], hold("h", 1), Outcome.OVERFLOW, "provider"),
    ([hold("a", INT64_MAX, debit="rich")], pay("t", 1), Outcome.OVERFLOW, "provider"),
    (
        [pay("a", INT64_MAX, debit="world", credit="pat")],
        pay("t", 1, debit="world", credit="alice"),
        Outcome.OVERFLOW,
        "world",
    ),
    (
        [hold("a", INT64_MAX, debit="rich"), void(id="v", pending_id="a")],
        hold("h", 1),
        Outcome.OK,
        "",
    ),
    ([], pay("t", 2**63), Outcome.INVALID_AMOUNT, str(2**63)),
    ([], post(id="p", pending_id="h", amount_nano=-1), Outcome.INVALID_AMOUNT, "-1"),
]


@pytest.mark.parametrize(("history", "operation", "outcome", "detail"), LIMITS)
def test_no_balance_leaves_64_bits(books, history, operation, outcome, detail):
    """Up to the last nano-unit all is well; one more is refused and names the full account."""
    for earlier in history:
        assert apply(books, [earlier], 0)[0].outcome is Outcome.OK
    assert apply(books, [operation], 0) == [Result(outcome, detail)]
    for account in books.accounts.values():
        assert account.debits_posted + account.debits_pending <= INT64_MAX
        assert account.credits_posted + account.credits_pending <= INT64_MAX


@pytest.mark.parametrize("place", range(4))
def test_one_refusal_anywhere_undoes_its_batch(books, place):
    """Also what the batch itself had reserved and posted before it came to the refused one."""
    batch = [hold("h", 10), post(id="p", pending_id="h", amount_nano=4), pay("r", 1)]
    batch.insert(place, pay("bad", 1, credit="nobody"))
    before = dict(books.accounts)
    results = apply(books, batch, 0)
    linked = Result(Outcome.LINKED_FAILED, "bad was refused")
    expected = [linked] * 4
    expected[place] = Result(Outcome.UNKNOWN_ACCOUNT, "nobody")
    assert results == expected
    assert (books.accounts, books.transfers) == (before, {})


def test_operations_that_are_not_linked_stand_alone(books):
    """A refused operation says why, and stops nothing before or behind it."""
    batch = [pay("a", 60), pay("b", 60), pay("c", 1), pay("a", 60)]
    results = apply(books, batch, 0, linked=False)
    outcomes = [Outcome.OK, Outcome.EXCEEDS_CREDITS, Outcome.OK, Outcome.EXISTS]
    assert [result.outcome for result in results] == outcomes
    assert books.accounts["alice"].debits_posted == 61
    assert list(books.transfers) == ["a", "c"]


def test_one_id_twice_in_a_batch_is_one_transfer(books):
    """The second finds what the first is about to keep."""
    results = apply(books, [PAID, PAID], 0)
    assert [result.outcome for result in results] == [Outcome.OK, Outcome.EXISTS]
    assert books.accounts["alice"].debits_posted == 5
    assert apply(books, [], 0) == []


def test_a_hold_of_the_same_batch_is_resolved_once(books):
    """The rules see a resolution that is not kept yet."""
    twice = [HELD, POSTED, void(id="v", pending_id="h")]
    linked = Result(Outcome.LINKED_FAILED, "v was refused")
    assert apply(books, twice, 0) == [linked, linked, Result(Outcome.ALREADY_POSTED, "p")]
    assert books.transfers == {}


RENEWALS = [
    # at second, operation, outcome, detail, until when the hold stands afterwards
    (0, hold("h", 40, timeout_s=60), Outcome.OK, "", 60),
    (50, renew(id="n1", pending_id="h", timeout_s=60), Outcome.OK, "", 110),
    (50, renew(id="n1", pending_id="h", timeout_s=60), Outcome.EXISTS, "", 110),
    (169, expire(id="e", pending_id="h"), Outcome.NOT_DUE, "h", 110),
    (70, renew(id="n2", pending_id="h", timeout_s=5), Outcome.OK, "", 110),  # none gets shorter
    (70, renew(id="n3", pending_id="none", timeout_s=5), Outcome.PENDING_NOT_FOUND, "none", 110),
    (70, renew(id="n3", pending_id="n1", timeout_s=5), Outcome.PENDING_NOT_FOUND, "n1", 110),
    (169, renew(id="n4", pending_id="h", timeout_s=5), Outcome.OK, "", 174),  # in its grace
    (234, expire(id="e", pending_id="h"), Outcome.OK, "", None),
    (234, renew(id="n5", pending_id="h", timeout_s=60), Outcome.EXPIRED, "e", None),
    (200, hold("g", 40, timeout_s=60), Outcome.OK, "", 260),
    (259, renew(id="n6", pending_id="g", timeout_s=60), Outcome.OK, "", 319),
    (300, post(id="q", pending_id="g", amount_nano=7), Outcome.OK, "", None),
    (300, renew(id="n7", pending_id="g", timeout_s=60), Outcome.ALREADY_POSTED, "q", None),
]


def test_a_hold_is_renewed_while_it_stands(books):
    """A live engine keeps its hold; a renewal moves nothing; an ended hold cannot be renewed."""
    for number, (now_s, operation, outcome, detail, due_at_s) in enumerate(RENEWALS):
        before = dict(books.accounts)
        (result,) = apply(books, [operation], now_s)
        assert result == Result(outcome, detail), f"row {number}"
        if operation.kind == "renew":
            assert books.accounts == before, f"row {number}"
        assert books.dues["g" if "g" in books.dues else "h"] == due_at_s, f"row {number}"
    assert books.problems() != []  # the fixture's money comes from nowhere ...
    assert [each for each in books.problems() if "hold" in each or "transfer " in each] == []


def test_a_refused_batch_renews_nothing(books):
    """A renewal that is linked to something refused is undone with it."""
    apply(books, [HELD], 0)
    late = renew(id="n2", pending_id="h", timeout_s=90)
    results = apply(books, [RENEWED, late, pay("bad", 1, credit="nobody")], 10)
    assert [each.outcome for each in results][:2] == [Outcome.LINKED_FAILED] * 2
    assert books.dues == {"h": 60}
    assert [each.outcome for each in apply(books, [RENEWED, late, POSTED], 10)] == [Outcome.OK] * 3
    assert books.open_holds() == {}


def test_the_longest_hold_can_be_renewed_and_expired(books):
    """The ids of renewals and of the expiry append to the hold's."""
    longest = "h" * MAX_PENDING_ID_LENGTH
    batch = [
        hold(longest, 1),
        renew(id=f"{longest}:renew:{2**63}", pending_id=longest, timeout_s=9),
    ]
    assert [each.outcome for each in apply(books, batch, 0)] == [Outcome.OK] * 2
    batch = [expire(id=f"{longest}:expire", pending_id=longest)]
    assert apply(books, batch, 120) == [Result(Outcome.OK)]


def test_a_late_settlement_takes_the_funds_or_makes_a_debt(books):
    """A sale is paid although its hold has expired: once, and as a debt without funds."""
    apply(books, [hold("h", 60), hold("g", 40)], 0)
    apply(books, [expire(id=f"{id}:e", pending_id=id) for id in "hg"], 120)
    apply(books, [pay("elsewhere", 50, credit="pat")], 121)
    (result,) = apply(books, [post(id="p", pending_id="h", amount_nano=30)], 130)
    alice = books.accounts["alice"]
    assert (result.outcome, books.transfers["p"].kind) == (Outcome.OK, "late")
    assert (alice.balance_nano, alice.debt_nano, alice.late_nano) == (20, 0, 30)
    royalty = plain(
        id="r", debit="provider", credit="pat", amount_nano=20, code="royalty", user_data="kvd"
    )
    settled = [post(id="q", pending_id="g", amount_nano=40), royalty]
    assert [each.outcome for each in apply(books, settled, 131)] == [Outcome.OK, Outcome.OK]
    assert [each.outcome for each in apply(books, settled, 132)] == [Outcome.EXISTS] * 2
    alice = books.accounts["alice"]
    assert (alice.available_nano, alice.debt_nano, alice.late_nano) == (-20, 20, 70)
    assert books.accounts["provider"].balance_nano == 50
    assert apply(books, [hold("no", 1)], 133)[0].outcome is Outcome.EXCEEDS_CREDITS
    apply(books, [pay("d", 25, debit="world", credit="alice")], 134)
    assert (books.accounts["alice"].available_nano, books.accounts["alice"].debt_nano) == (5, 0)


def test_a_royalty_without_a_payee_waits_in_suspense(books):
    """The sale is booked all the same, and a retry finds it; other transfers are refused."""
    books.accounts["suspense"] = Account("suspense", "suspense")
    owed = plain(id="r", debit="alice", credit="nobody", amount_nano=5, code="royalty")
    assert apply(books, [owed], 0) == [Result(Outcome.OK)]
    assert apply(books, [owed], 1) == [Result(Outcome.EXISTS)]
    assert books.transfers["r"].credit == "suspense"
    assert books.accounts["suspense"].balance_nano == 5
    other = pay("t", 5, credit="nobody")
    assert apply(books, [other], 2) == [Result(Outcome.UNKNOWN_ACCOUNT, "nobody")]


def test_a_charge_that_is_owed_takes_the_funds_and_makes_a_debt_of_the_rest(books):
    """It is booked whatever the account has; only such a charge may do so, and only once."""
    owed = plain(id="o", debit="alice", credit="provider", amount_nano=130, code=OWED)
    assert apply(books, [owed], 0) == [Result(Outcome.OK)]
    assert apply(books, [owed], 1) == [Result(Outcome.EXISTS)]
    alice = books.accounts["alice"]
    assert (alice.balance_nano, alice.debt_nano, alice.late_nano) == (-30, 30, 130)
    assert apply(books, [pay("t", 1)], 2)[0].outcome is Outcome.EXCEEDS_CREDITS
    held = msgspec.structs.replace(hold("h", 1), code=OWED)
    assert apply(books, [held], 2)[0].outcome is Outcome.EXCEEDS_CREDITS
    posted = post(id="o", pending_id="h", amount_nano=130)
    assert apply(books, [posted], 3)[0].outcome is Outcome.EXISTS_WITH_DIFFERENT_FIELDS
