"""Tests of a ledger's database: kept rows, refused changes. Imported like ledger_conformance."""

from __future__ import annotations

import math

import msgspec
import pytest

from tests.support import ledger_model
from tests.support.ledger_books import NANO, StoredBooks, hold, receipt
from vllm_kvmarket import LedgerError
from vllm_kvmarket.ledger import Ledger, Outcome, plain, post, void
from vllm_kvmarket.ledger.model import TURN_NANO


def insert(values):
    return f"INSERT INTO transfer VALUES ({values})"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE transfer SET amount_nano = 1",
        "DELETE FROM transfer",
        "UPDATE receipt SET charge_nano = 1",
        "DELETE FROM receipt",
        "DELETE FROM account WHERE id = 'alice'",
        "UPDATE account SET debits_pending = 5000000000 WHERE id = 'alice'",
        "UPDATE account SET kind = 'bank'",
        "UPDATE account SET kind = 'provider' WHERE id = 'alice'",
        "UPDATE account SET currency = 'EUR' WHERE id = 'alice'",
        "UPDATE account SET debits_posted = 5000000000 WHERE id = 'alice'",
        "UPDATE account SET credits_pending = -1",
        "INSERT INTO hold VALUES ('nothing', 1)",
        # sequence, id, kind, debit, credit, amount, hold, timeout, code, data, digest, time
        insert("9, 'x', 'plain', 'alice', 'nobody', 1, NULL, 0, '', '', '', 0"),
        insert("9, 'x', 'plain', 'alice', 'alice', 1, NULL, 0, '', '', '', 0"),
        insert("9, 'x', 'plain', 'alice', 'pat', -1, NULL, 0, '', '', '', 0"),
        insert("9, 'x', 'plain', 'alice', 'pat', 1, NULL, 5, '', '', '', 0"),
        insert("9, 'x', 'plain', 'alice', 'erik', 1, NULL, 0, '', '', '', 0"),
        insert("9, 'x', 'pending', 'alice', 'pat', 1, NULL, 0, '', '', '', 0"),
        insert("9, '', 'plain', 'alice', 'pat', 1, NULL, 0, '', '', '', 0"),
        insert("9, 'd1', 'plain', 'alice', 'pat', 1, NULL, 0, '', '', '', 0"),
        insert("1, 'x', 'plain', 'alice', 'pat', 1, NULL, 0, '', '', '', 0"),
        insert("9, 'x', 'post', 'alice', 'provider', 1, NULL, 0, '', '', '', 0"),
        insert("9, 'x', 'post', 'alice', 'provider', 2, 'h', 0, '', '', '', 0"),
        insert("9, 'x', 'post', 'alice', 'pat', 1, 'h', 0, '', '', '', 0"),
        insert("9, 'x', 'void', 'alice', 'provider', 1, 'h', 0, '', '', '', 0"),
        insert("9, 'x', 'renew', 'alice', 'provider', 1, 'h', 5, '', '', '', 0"),
        insert("9, 'x', 'post', 'alice', 'provider', 1, 'd1', 0, '', '', '', 0"),
        insert("9, 'x', 'post', 'alice', 'provider', 1, 'g', 0, '', '', '', 0"),
        insert("9, 'x', 'renew', 'alice', 'provider', 0, 'g', 5, '', '', '', 0"),
        insert("9, 'x', 'late', 'alice', 'provider', 1, 'g', 0, '', '', '', 0"),
        insert("9, 'x', 'late', 'alice', 'provider', 1, 'h', 0, '', '', '', 0"),
    ],
)
def test_the_schema_refuses_what_the_rules_refuse(ledger, by_hand, refusals, statement):
    """Also for SQL written by hand."""
    ledger.create_account("erik", "publisher", currency="EUR")
    batch = [hold("h", 1), hold("g", 1), void(id="v", pending_id="g")]
    ledger.submit(batch, receipt=receipt("kvr_1", 1, "h")).result()
    before = ledger.accounts(), ledger.transfers(), ledger.receipts()
    with pytest.raises(refusals):
        by_hand(statement)
    assert (ledger.accounts(), ledger.transfers(), ledger.receipts()) == before
    assert ledger.check_integrity() == []


def test_tampering_with_a_balance_or_a_hold_is_found(ledger, by_hand):
    """check_integrity recomputes every balance and hold from the transfers."""
    ledger.submit([hold("h", 1)]).result()
    due_at_s = ledger.due_at_s("h")
    by_hand("UPDATE account SET credits_posted = credits_posted + 7 WHERE id = 'pat'")
    by_hand("UPDATE hold SET due_at_s = 1")
    assert sorted(ledger.check_integrity()) == [
        "account pat: credits_posted is 7, transfers say 0",
        f"debits {NANO} and credits {NANO + 7} in USD differ",
        f"hold h: is due at 1.0, transfers say {due_at_s}",
    ]


MALFORMED = [
    # what no rule names, but the database refuses: the batch, and its receipt
    ([None], None),
    ([hold("\ud800", 1)], None),
    ([hold("x", 1), hold("\ud800", 1)], None),
    ([hold("x", 1)], msgspec.structs.replace(receipt("kvr_x", 1, "x"), account="nobody")),
]


@pytest.mark.parametrize(("operations", "bad_receipt"), MALFORMED)
def test_a_malformed_batch_harms_no_other(ledger, held_up, operations, bad_receipt):
    """Batches share a commit, not their fate; the writer goes on after a failure."""
    with held_up():
        before = [ledger.submit([hold(f"before{number}", 1)]) for number in range(3)]
        bad = ledger.submit(operations, receipt=bad_receipt, patience_s=math.inf)
        after = [ledger.submit([hold(f"after{number}", 1)]) for number in range(3)]
    with pytest.raises(LedgerError, match="could not be written, nothing of this batch"):
        bad.result(timeout=30)
    for future in before + after:
        assert future.result(timeout=30)[0].outcome is Outcome.OK
    assert ledger.account("alice").debits_pending == 6
    assert ledger.receipts() == []
    assert ledger.check_integrity() == []


@pytest.mark.parametrize("id", ["a\0b", "i" * 600, ""])
def test_an_id_that_cannot_be_kept_is_refused_by_the_rules(ledger, id):
    """Alike on every database, wherever it stands."""
    paid = {"debit": "alice", "credit": "pat", "amount_nano": 1, "code": "x"}
    (result,) = ledger.submit([plain(id=id, **paid)]).result()
    assert (result.outcome, result.detail) == (Outcome.INVALID_FIELD, "id")
    if id:
        (result,) = ledger.submit([void(id="v", pending_id=id)]).result()
        assert (result.outcome, result.detail) == (Outcome.INVALID_FIELD, "pending_id")
        (result,) = ledger.submit([plain(id="t", **{**paid, "credit": id})]).result()
        assert result.outcome is Outcome.UNKNOWN_ACCOUNT
    assert ledger.account("alice").available_nano == NANO


def test_text_of_any_script_is_kept(ledger):
    """Texts come back as written: quotes, control characters, emoji."""
    odd = "\u4e2d\u6587 \U0001f4b0 \x01\n\t'\"\\ {}"
    facts = {"debit": "alice", "credit": "pat", "amount_nano": 2, "user_data": odd}
    kept = msgspec.structs.replace(receipt("kvr_\u00e9", 2, odd), title=odd + "\0")
    paid = plain(id=odd, code="x", **facts)
    assert ledger.submit([paid], receipt=kept).result()[0].outcome is Outcome.OK
    assert ledger.submit([paid], receipt=kept).result()[0].outcome is Outcome.EXISTS
    assert ledger.transfer(odd).user_data == odd
    stored = ledger.receipt("kvr_\u00e9")
    assert stored == msgspec.structs.replace(kept, created_at_s=stored.created_at_s)
    assert ledger.check_integrity() == []


def test_times_and_amounts_come_back_to_the_last_bit(place):
    """Money is whole nano-units up to 2**63 - 1, and a time is the float that the clock gave."""
    now = [1764000000.1234567]
    with Ledger.open(place, clock=lambda: now[0]) as ledger:
        ledger.create_account("alice", "buyer")
        ledger.deposit("alice", 2**63 - 1, "d")
        ledger.submit([hold("h", 2**63 - 1, timeout_s=2**53 - 1)]).result()
        assert ledger.account("alice").debits_pending == 2**63 - 1
        assert ledger.transfer("h").created_at_s == now[0]
        assert ledger.due_at_s("h") == now[0] + 2**53 - 1
        assert ledger.check_integrity() == []


def test_a_caller_cannot_take_a_submitted_batch_back(ledger, held_up):
    """A cancelled wait (asyncio cancels futures) neither undoes the batch nor stops the writer."""
    with held_up():
        futures = [ledger.submit([hold(f"h{number}", 1)]) for number in range(3)]
        assert not any(future.cancel() for future in futures)
    for future in futures:
        assert future.result(timeout=30)[0].outcome is Outcome.OK
    ledger.deposit("alice", 1, "d2")


def test_any_history_agrees_with_a_naive_model(new_place):
    """Outcomes, balances, holds and the audit, over batches, retries, renewals and waiting."""
    ledger_model.run(lambda *accounts: StoredBooks(new_place(), *accounts), histories=12)


def test_an_account_turns_over_more_than_64_bits(ledger):
    """What bounds it is what it has; both sums are shown less what they have in common."""
    for number in range(6):
        for name, debit, credit in (
            ("in", "world", "alice"),
            ("sold", "alice", "provider"),
            ("out", "provider", "world"),
        ):
            moved = {"debit": debit, "credit": credit, "amount_nano": TURN_NANO, "code": "x"}
            ledger.transact(plain(id=f"{name}{number}", **moved))
        ledger.transact(hold(f"h{number}", NANO), void(id=f"v{number}", pending_id=f"h{number}"))
    assert (ledger.account("alice").balance_nano, ledger.account("provider").balance_nano) == (
        NANO,
        0,
    )
    assert ledger.account("world").balance_nano == -NANO
    assert max(each.credits_posted for each in ledger.accounts()) <= TURN_NANO
    assert ledger.check_integrity() == []


def test_a_retry_of_what_would_be_refused_now_has_taken_effect(ledger):
    """Ids are looked up before anything is refused, among others that are new."""
    assert ledger.submit([hold("all", NANO)]).result()[0].outcome is Outcome.OK
    spent = ledger.submit([hold("all", NANO), hold("more", 1)], linked=False).result()
    assert [each.outcome for each in spent] == [Outcome.EXISTS, Outcome.EXCEEDS_CREDITS]
    ended = post(id="p", pending_id="all", amount_nano=NANO)
    for outcome in (Outcome.OK, Outcome.EXISTS):
        assert ledger.submit([ended]).result()[0].outcome is outcome
    again = [
        hold("all", NANO),
        plain(id="d2", debit="world", credit="pat", amount_nano=1, code="x"),
    ]
    assert [each.outcome for each in ledger.submit(again).result()] == [Outcome.EXISTS, Outcome.OK]
    assert ledger.account("pat").balance_nano == 1
    assert ledger.check_integrity() == []
