"""When a purchase may go ahead of its hold."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from vllm_kvmarket.ledger import Account, Outcome, Result
from vllm_kvmarket.ledger.known_funds import KnownFunds


def account(currency="USD"):
    return Account("alice", "buyer", currency=currency, credits_posted=1000)


def answered(outcome):
    """The ledger's answer; None: it gave none."""
    answer: Future[list[Result]] = Future()
    if outcome is None:
        answer.set_exception(OSError("no database"))
    else:
        answer.set_result([Result(outcome)])
    return answer


@pytest.mark.parametrize("outcome", [None, *Outcome])
def test_an_account_is_forgotten_with_an_answer_that_is_not_about_its_funds(outcome):
    """It would be refused again; with one that is, the next purchase goes ahead."""
    funds = KnownFunds()
    funds.learn([account()])
    assert funds.take("alice", 100, "USD")
    assert not funds.take("alice", 1, "USD"), "more than a tenth would wait"
    funds.end("alice", 100, answered(outcome))
    is_about_funds = outcome in (Outcome.OK, Outcome.EXISTS, Outcome.EXCEEDS_CREDITS)
    assert funds.take("alice", 100, "USD") is is_about_funds


def test_funds_in_another_currency_cover_nothing():
    """However large they are."""
    funds = KnownFunds()
    funds.learn([account("EUR")])
    assert not funds.take("alice", 1, "USD")
    assert funds.take("alice", 1, "EUR")
