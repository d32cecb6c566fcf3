"""A purchase and a write charge against a real ledger: booked once, or said loudly why not."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future

import msgspec
import pytest

from vllm_kvmarket.catalogue import Listing, Match, Segment
from vllm_kvmarket.core.errors import LedgerPostponedError
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.pricing import Tariff
from vllm_kvmarket.ledger import GRACE_S, PROVIDER, Ledger, plain, void
from vllm_kvmarket.market.purchase import (
    Purchase,
    PurchaseState,
    ReuseItem,
    Settlement,
    StorageItem,
    Usage,
    is_booked,
)

NANO = 1_000_000_000
TIMEOUT_S = 900
USAGE = Usage(600, 600, 600, 0, 0, 10, 5)


class Clock:
    """A clock that the test sets."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path, clock):
    with Ledger.open(tmp_path / "market.sqlite", clock=clock) as opened:
        opened.create_account("alice", "buyer")
        opened.create_account("pat", "publisher")
        opened.deposit("alice", NANO, "d1")
        opened.deposit("pat", NANO, "d2")
        yield opened
    with Ledger.open(tmp_path / "market.sqlite") as again:
        assert again.check_integrity() == []


def buy(ledger, key="k", account="alice", publisher="pat", tariff=None):
    listing = Listing(
        document_id="kvd_x",
        namespace=b"n" * 32,
        token_count=600,
        terms=ListingTerms(publisher=publisher),
        created_at_s=1.0,
    )
    item = ReuseItem(Match((Segment(listing, 0, 600),), 600, ()), tariff or Tariff(), "m", "r")
    purchase = Purchase(ledger, item, key=key, account=account, timeout_s=TIMEOUT_S)
    written(ledger)
    return purchase


def store(ledger, publisher="pat", amount_nano=7000, key="w"):
    item = StorageItem(publisher, "kvd_x", amount_nano)
    charge = Purchase(ledger, item, key=key, account=publisher, timeout_s=TIMEOUT_S)
    written(ledger)
    return charge


def written(ledger):
    """Wait until everything submitted so far has been written."""
    ledger.submit([]).result()


def balance(ledger, account):
    written(ledger)
    found = ledger.account(account)
    assert found.debits_pending == 0
    return found.balance_nano


def test_a_settlement_is_booked_once_with_its_receipt(ledger, caplog):
    """A second one returns the same receipt and moves nothing; nor does a void behind it."""
    purchase = buy(ledger)
    assert purchase.state() is PurchaseState.RESERVED
    receipt = purchase.settle(USAGE)
    assert purchase.settle(USAGE) is receipt
    purchase.void()
    assert balance(ledger, "alice") == NANO - 300_000
    assert balance(ledger, "pat") == NANO + 150_000
    stored = ledger.receipt(purchase.receipt_id)
    assert stored == msgspec.structs.replace(receipt, created_at_s=stored.created_at_s)
    assert caplog.records == []


def test_a_publisher_with_another_currency_makes_no_sale_free(ledger):
    """Its royalty waits in suspense, as one without an account."""
    ledger.create_account("paul", "publisher", currency="EUR")
    buy(ledger, publisher="paul").settle(USAGE)
    assert balance(ledger, "alice") == NANO - 300_000
    assert balance(ledger, "suspense") == 150_000


def test_a_settlement_after_the_holds_end_is_booked(ledger, clock, caplog):
    """The ledger was away for longer than the hold: what was sold is paid all the same."""
    purchase = buy(ledger)
    assert purchase.state() is PurchaseState.RESERVED
    clock.now_s += TIMEOUT_S + GRACE_S
    assert ledger.expire_pending() == 1
    purchase.settle(USAGE)
    assert balance(ledger, "alice") == NANO - 300_000
    assert ledger.receipt(purchase.receipt_id).charge_nano == 300_000
    assert caplog.records == []


def test_what_the_ledger_does_not_settle_is_logged_and_not_charged(ledger, caplog):
    """The hold was released by somebody else: no receipt, no royalty, a line for the operator
    with the reason itself.
    """
    purchase = buy(ledger)
    assert purchase.state() is PurchaseState.RESERVED
    ledger.transact(void(id="v", pending_id=purchase.reservation_id))
    with caplog.at_level(logging.ERROR):
        purchase.settle(USAGE)
        assert balance(ledger, "alice") == balance(ledger, "pat") == NANO
    assert ledger.receipts() == []
    (record,) = caplog.records
    assert purchase.receipt_id in record.message
    assert "alice is not charged: already voided" in record.message


def test_a_settlement_that_cannot_be_written_is_logged(ledger, caplog):
    """Here the ledger was closed under it; the answer is out, and the log says so."""
    purchase = buy(ledger)
    assert purchase.state() is PurchaseState.RESERVED
    ledger.close()
    purchase.settle(USAGE)
    (record,) = caplog.records
    assert "not charged: the ledger is closed" in record.message


def test_renewal_keeps_a_purchase_beyond_its_first_timeout(ledger, clock, caplog):
    """An engine at work on one answer for an hour is paid for it."""
    purchase = buy(ledger)
    for _ in range(12):
        clock.now_s += TIMEOUT_S / 3
        (result,) = ledger.renew([purchase.reservation_id], TIMEOUT_S).result()
        assert result.outcome.good
        assert ledger.expire_pending() == 0
    assert purchase.state() is PurchaseState.RESERVED
    purchase.settle(USAGE)
    assert balance(ledger, "alice") == NANO - 300_000
    assert caplog.records == []


def test_a_void_behind_a_reservation_under_way_releases_it(ledger):
    """A request that is gone before the ledger has answered locks nothing."""
    purchase = buy(ledger)
    purchase.void()
    purchase.void()
    assert purchase.state() is PurchaseState.VOIDED
    assert balance(ledger, "alice") == NANO


@pytest.mark.parametrize(
    ("account", "reason"),
    [("poor", "has not enough funds"), ("nobody", "no account 'nobody'"), ("provider", "refused")],
)
def test_a_refused_reservation_says_why_and_leaves_nothing(ledger, account, reason):
    """The missing amount; and any other refusal in the ledger's words."""
    ledger.create_account("poor", "buyer")
    purchase = buy(ledger, account=account)
    assert purchase.state() is PurchaseState.REFUSED
    assert reason in purchase.refusal
    purchase.void()
    written(ledger)
    assert len(ledger.transfers()) == 2, "the two deposits"


def test_what_was_earned_waits_for_the_database_as_long_as_it_takes(ledger, monkeypatch):
    """Reservations are given up after a while, so that requests go on; charges never are."""
    patience = {}
    submit = ledger.submit

    def noting(operations, **options):
        for operation in operations:
            patience[operation.kind] = options.get("patience_s")
        return submit(operations, **options)

    monkeypatch.setattr(ledger, "submit", noting)
    buy(ledger, "k1").void()
    purchase = buy(ledger, "k2")
    assert purchase.state() is PurchaseState.RESERVED
    purchase.settle(USAGE)
    assert patience == {"pending": None, "void": math.inf, "post": math.inf, "plain": math.inf}
    charge = store(ledger)
    assert charge.state() is PurchaseState.RESERVED
    charge.settle()
    assert patience["post"] == math.inf
    written(ledger)


def test_storing_is_paid_once(ledger, caplog):
    """Reserved, posted whole; a void behind it changes nothing."""
    charge = store(ledger)
    assert charge.state() is PurchaseState.RESERVED
    assert charge.refusal == ""
    charge.settle()
    charge.settle()
    charge.void()
    assert balance(ledger, "pat") == NANO - 7000
    assert caplog.records == []


def test_storing_that_the_ledger_does_not_settle_is_logged(ledger, caplog):
    """The document is listed all the same; the operator knows that it was not paid for."""
    charge = store(ledger)
    assert charge.state() is PurchaseState.RESERVED
    ledger.transact(void(id="v", pending_id=charge.reservation_id))
    charge.settle()
    assert balance(ledger, "pat") == NANO
    (record,) = caplog.records
    assert "storing kvd_x was not booked, pat is not charged: already voided" in record.message


@pytest.mark.parametrize(
    ("publisher", "amount_nano", "reason"),
    [
        ("pat", 2 * NANO, "'pat' cannot pay 2000000000"),
        ("nobody", 1, "'nobody' cannot pay 1"),
        ("provider", 1, "the ledger refused: same account"),
    ],
)
def test_a_publisher_who_cannot_pay_is_told_the_true_reason(ledger, publisher, amount_nano, reason):
    """Only an account without funds is asked to make a deposit."""
    charge = store(ledger, publisher, amount_nano)
    assert charge.state() is PurchaseState.REFUSED
    refusal = charge.refusal
    assert reason in refusal
    assert ("deposit" in refusal) == ("cannot pay" in refusal)


def held(ledger, account="alice"):
    written(ledger)
    return ledger.account(account).debits_pending


def answered(purchase):
    """Wait until the ledger has said whether the purchase is reserved."""
    deadline = time.monotonic() + 10
    while purchase.state() is PurchaseState.RESERVING:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return purchase.state()


def test_a_key_that_was_paid_is_not_charged_again(ledger, caplog):
    """On any engine: the second purchase is paid already, names the receipt, and moves nothing."""
    first = buy(ledger)
    assert answered(first) is PurchaseState.RESERVED
    first.settle(USAGE)
    again = buy(ledger)
    assert answered(again) is PurchaseState.PAID
    assert again.receipt_id == first.receipt_id
    again.void()
    assert balance(ledger, "alice") == NANO - 300_000
    assert len(ledger.receipts()) == 1
    assert caplog.records == []


def test_two_requests_of_one_key_pay_what_the_first_to_end_has_used(ledger, caplog):
    """They run at the same time, perhaps on two engines, and share the hold."""
    one, other = buy(ledger), buy(ledger)
    assert answered(one) is answered(other) is PurchaseState.RESERVED
    assert held(ledger) == 300_000
    one.settle(Usage(600, 400, 400, 0, 0, 210, 5))
    other.settle(USAGE)
    assert balance(ledger, "alice") == NANO - 200_000
    assert caplog.records == []
    assert is_booked(one.settled)
    assert is_booked(other.settled) is None


@pytest.mark.parametrize("end", ["void", "expire"])
def test_a_key_whose_hold_is_gone_is_reserved_and_paid_anew(ledger, clock, end):
    """Nobody reuses for nothing by leaving before the answer."""
    first = buy(ledger)
    assert answered(first) is PurchaseState.RESERVED
    if end == "void":
        first.void()
    else:
        clock.now_s += 2 * TIMEOUT_S
        assert ledger.expire_pending() == 1
    again = buy(ledger)
    assert answered(again) is PurchaseState.RESERVED
    assert held(ledger) == 300_000
    receipt = again.settle(USAGE)
    assert balance(ledger, "alice") == NANO - 300_000
    stored = ledger.receipt(receipt.id)
    assert stored == msgspec.structs.replace(receipt, created_at_s=stored.created_at_s)


@pytest.mark.parametrize("late_first", [True, False])
def test_a_key_is_paid_once_also_where_its_first_hold_ended_before_the_settlement(
    ledger, clock, caplog, late_first
):
    """An engine was cut off; the retry ran elsewhere on another hold; then both settle."""
    cut_off = buy(ledger)
    assert answered(cut_off) is PurchaseState.RESERVED
    clock.now_s += 2 * TIMEOUT_S
    assert ledger.expire_pending() == 1
    retry = buy(ledger)
    assert answered(retry) is PurchaseState.RESERVED
    for purchase in (cut_off, retry) if late_first else (retry, cut_off):
        purchase.settle(USAGE)
        written(ledger)
    assert balance(ledger, "alice") == NANO - 300_000, "nothing is reserved any more, either"
    assert len(ledger.receipts()) == 1
    assert caplog.records == []


def test_each_listing_is_paid_for_its_own_tokens(ledger):
    """One charge and one receipt, a line for each listing, a royalty for each publisher."""
    ledger.create_account("sam", "publisher")
    terms = (
        ListingTerms(publisher="pat", title="first", cache_read_nano_per_mtok=1_000_000_000),
        ListingTerms(publisher="sam", title="longer", cache_read_nano_per_mtok=4_000_000_000),
        ListingTerms(publisher=PROVIDER, title="ours", royalty_ppm=1_000_000),
    )
    ends = (256, 600, 700)
    segments = tuple(
        Segment(
            Listing(
                document_id=f"kvd_{number}",
                namespace=b"n" * 32,
                token_count=end,
                terms=each,
                created_at_s=1.0,
            ),
            start,
            end,
        )
        for number, (each, start, end) in enumerate(zip(terms, (0, *ends), ends, strict=False))
    )
    item = ReuseItem(Match(segments, 700, ()), Tariff(), "m", "r")
    assert item.most_nano == 256 * 1000 + 344 * 4000 + 100 * 500
    purchase = Purchase(ledger, item, key="k", account="alice", timeout_s=TIMEOUT_S)
    assert answered(purchase) is PurchaseState.RESERVED
    receipt = purchase.settle(Usage(700, 650, 650, 0, 50, 60, 5))
    charges = [256 * 1000, 344 * 4000, 50 * 500]
    assert [line.charge_nano for line in receipt.lines] == charges
    assert [(line.start, line.end) for line in receipt.lines] == [(0, 256), (256, 600), (600, 650)]
    assert [line.royalty_nano for line in receipt.lines] == [charges[0] // 2, charges[1] // 2, 0]
    assert receipt.charge_nano == sum(charges)
    assert receipt.title == "ours"
    assert balance(ledger, "alice") == NANO - sum(charges)
    assert balance(ledger, "pat") == NANO + charges[0] // 2
    assert balance(ledger, "sam") == charges[1] // 2
    assert [ledger.transfer(each).amount_nano for each in receipt.transfer_ids] == [
        sum(charges), charges[0] // 2, charges[1] // 2,
    ]  # fmt: skip


def test_a_settlement_that_is_refused_releases_its_hold(ledger, monkeypatch, caplog):
    """Here by a royalty to nobody: the buyer's funds are not locked for what is not charged."""
    purchase = buy(ledger, publisher="nobody at all")
    assert answered(purchase) is PurchaseState.RESERVED
    settlement = purchase.item.settlement(purchase, USAGE)
    wrong = plain(id="x", debit=PROVIDER, credit=PROVIDER, amount_nano=1, code="royalty")
    monkeypatch.setattr(
        ReuseItem,
        "settlement",
        lambda *_: Settlement(settlement.charge_nano, (wrong,), settlement.receipt),
    )
    purchase.settle(USAGE)
    purchase.settled.result()
    assert held(ledger) == 0
    assert balance(ledger, "alice") == NANO
    assert len(caplog.records) == 1


def test_a_settlement_in_the_outbox_is_not_refused(ledger, monkeypatch, caplog):
    """The database is away while the engine ends: a warning, and its hold is not released."""
    purchase = buy(ledger)
    assert answered(purchase) is PurchaseState.RESERVED
    postponed: Future = Future()
    postponed.set_exception(LedgerPostponedError("it is booked when the database is back"))
    submitted = []
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "submit", lambda *each, **_: submitted.append(each) or postponed)
        purchase.settle(USAGE)
    assert is_booked(purchase.settled) is None
    assert len(submitted) == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    ledger.submit([void(id="v", pending_id=purchase.reservation_id)]).result()
