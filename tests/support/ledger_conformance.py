"""A ledger's behaviour, on any database: test modules import this and bring a `place`.

Fixtures that they define: `place`, a path or URL of a new, empty database; `by_hand`, which
executes SQL there and raises what `refusals` lists when the schema refuses it; `held_up`, a context
in which another process holds the write lock, so that batches gather.
"""

from __future__ import annotations

import math
import random
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from tests.support.ledger_books import NANO, funded_ledger, hold, receipt
from vllm_kvmarket import LedgerError, NotFoundError
from vllm_kvmarket.catalogue import Listing, Match, Segment
from vllm_kvmarket.core.errors import KeyConflictError, KeyUsedUpError, LedgerUnavailableError
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.pricing import Tariff
from vllm_kvmarket.ledger import GRACE_S, Ledger, Outcome, ReceiptLine, Result, plain, post, void
from vllm_kvmarket.market.purchase import Purchase, PurchaseState, ReuseItem, Usage


@pytest.fixture
def ledger(place):
    with funded_ledger(place) as opened:
        yield opened


def test_a_reservation_is_posted_in_part_with_its_receipt(ledger):
    """The rest is released; the receipt is there with the transfer."""
    assert ledger.submit([hold("h", 500)]).result()[0].outcome is Outcome.OK
    assert ledger.account("alice").available_nano == NANO - 500
    batch = [
        post(id="p", pending_id="h", amount_nano=300),
        plain(id="r", debit="provider", credit="pat", amount_nano=150, code="royalty"),
    ]
    for _ in range(2):
        sold = receipt("kvr_1", 300, "p", "r", royalty=150)
        results = ledger.submit(batch, receipt=sold).result()
        assert all(result.outcome.good for result in results)
    assert ledger.account("alice").available_nano == NANO - 300
    assert ledger.account("pat").balance_nano == 150
    assert [each.id for each in ledger.receipts(account="alice")] == ["kvr_1"]
    assert ledger.receipt("kvr_1").charge_nano == 300
    assert [transfer.id for transfer in ledger.transfers(limit=2)] == ["r", "p"]
    assert ledger.check_integrity() == []


def test_a_refused_batch_leaves_no_receipt(ledger):
    """All of it or none."""
    results = ledger.submit(
        [post(id="p", pending_id="none", amount_nano=1)], receipt=receipt("kvr_2", 1, "p")
    ).result()
    assert results[0].outcome is Outcome.PENDING_NOT_FOUND
    with pytest.raises(NotFoundError, match="kvr_2"):
        ledger.receipt("kvr_2")


def test_accounts_have_one_kind_and_a_well_formed_id(ledger):
    """The message says what to do."""
    assert ledger.create_account("alice", "buyer").balance_nano == NANO
    with pytest.raises(LedgerError, match="exists as a buyer"):
        ledger.create_account("alice", "publisher")
    with pytest.raises(LedgerError, match="1 to 128"):
        ledger.create_account("a b", "buyer")
    with pytest.raises(LedgerError, match="none of buyer"):
        ledger.create_account("x", "bank")
    with pytest.raises(NotFoundError, match="kvmarket account create"):
        ledger.account("nobody")
    with pytest.raises(LedgerError, match="above 0"):
        ledger.deposit("alice", 0, "d2")
    with pytest.raises(LedgerError, match="exists and may not go negative"):
        ledger.create_account("alice", "buyer", may_go_negative=True)


def test_a_deposit_is_made_once_for_its_id(ledger):
    """A retry changes nothing, another amount under the same id is refused."""
    ledger.deposit("alice", NANO, "d1")
    assert ledger.account("alice").balance_nano == NANO
    with pytest.raises(LedgerError, match="amount_nano"):
        ledger.deposit("alice", 2 * NANO, "d1")


def test_a_retry_leaves_one_receipt(ledger):
    """Also under another receipt id: what took effect before is not receipted again."""
    ledger.submit([hold("h", 5)]).result()
    batch = [post(id="p", pending_id="h", amount_nano=3)]
    for id in ("kvr_1", "kvr_1", "kvr_2"):
        assert ledger.submit(batch, receipt=receipt(id, 3, "p")).result()[0].outcome.good
    assert [each.id for each in ledger.receipts()] == ["kvr_1"]
    other = [post(id="p2", pending_id="none", amount_nano=3), hold("h2", 1)]
    results = ledger.submit(other, linked=False, receipt=receipt("kvr_3", 1, "h2")).result()
    assert [each.outcome for each in results] == [Outcome.PENDING_NOT_FOUND, Outcome.OK]
    assert [each.id for each in ledger.receipts()] == ["kvr_1"]
    assert ledger.check_integrity() == []


def test_a_free_reuse_is_a_post_of_nothing(ledger):
    """A charge of 0 has its transfer and its receipt, and the hold is released."""
    ledger.submit([hold("h", 5)]).result()
    batch = [post(id="p", pending_id="h", amount_nano=0)]
    assert ledger.submit(batch, receipt=receipt("kvr_1", 0, "p")).result()[0].outcome is Outcome.OK
    assert ledger.account("alice").available_nano == NANO
    assert ledger.transfer("p").kind == "post"
    assert ledger.receipt("kvr_1").charge_nano == 0
    assert ledger.check_integrity() == []


def test_totals_are_equal(ledger):
    """Each debit of one account is a credit of another."""
    ledger.submit([hold("h", 5), post(id="p", pending_id="h", amount_nano=3)]).result()
    assert ledger.totals() == {"USD": (NANO + 3, NANO + 3)}


def test_a_closed_ledger_says_so(place):
    """Reading, too, ends with a plain word."""
    ledger = Ledger.open(place)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.accounts()
    with pytest.raises(LedgerError, match="closed"):
        ledger.create_account("alice", "buyer")


def test_holds_expire_by_the_clock(place):
    """A crashed engine does not lock funds for good."""
    now = [1000.0]
    with Ledger.open(place, clock=lambda: now[0]) as ledger:
        ledger.create_account("alice", "buyer")
        ledger.deposit("alice", 100, "d")
        ledger.submit([hold("h", 60, timeout_s=10)]).result()
        assert ledger.expire_pending() == 0
        now[0] += 9 + GRACE_S
        assert ledger.expire_pending() == 0
        now[0] += 1
        assert ledger.expire_pending() == 1
        assert ledger.expire_pending() == 0
        assert ledger.account("alice").available_nano == 100
        assert ledger.check_integrity() == []


def test_closing_writes_what_is_queued_and_then_refuses(place):
    """Nothing that was submitted is lost."""
    ledger = Ledger.open(place)
    ledger.create_account("alice", "buyer")
    ledger.deposit("alice", NANO, "d")
    futures = [ledger.submit([hold(f"h{i}", 1)]) for i in range(200)]
    ledger.close()
    assert all(future.result()[0].outcome is Outcome.OK for future in futures)
    with pytest.raises(LedgerError, match="closed"):
        ledger.submit([void(id="v", pending_id="h1")]).result()
    with Ledger.open(place) as again:
        assert again.account("alice").debits_pending == 200


def test_lists_go_on_behind_an_item(ledger):
    """Newest first, of one account or of all; what is newer changes nothing."""
    for number in range(3):
        hold_id, post_id = f"h{number}", f"p{number}"
        ledger.submit([hold(hold_id, 10)]).result()
        sold = receipt(f"kvr_{number}", 10, post_id)
        ledger.submit([post(id=post_id, pending_id=hold_id, amount_nano=10)], receipt=sold).result()
    for account in ("alice", None):
        whole = ledger.transfers(account)
        for place, each in enumerate(whole):
            assert ledger.transfers(account, 2, each.id) == whole[place + 1 : place + 3]
    assert [each.id for each in ledger.receipts("alice", before="kvr_2")] == ["kvr_1", "kvr_0"]
    assert [each.id for each in ledger.receipts(limit=1, before="kvr_1")] == ["kvr_0"]
    assert ledger.receipts(before="kvr_0") == ledger.transfers("bob", before="p0") == []


def test_many_threads_submit_at_once(ledger):
    """Batches of many threads apply one after another; no nano-unit is spent twice."""

    def spend(number):
        (result,) = ledger.submit([hold(f"h{number}", NANO // 50)]).result(timeout=30)
        return result.outcome

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(spend, range(80)))
    assert outcomes.count(Outcome.OK) == 50
    assert outcomes.count(Outcome.EXCEEDS_CREDITS) == 30
    assert ledger.account("alice").available_nano == 0
    assert ledger.check_integrity() == []


def test_no_future_is_left_without_an_answer_by_close(place):
    """A batch submitted while another thread closes is written or refused."""
    for round_number in range(20):
        ledger = Ledger.open(place)
        with ThreadPoolExecutor(4) as pool:
            batches = [[hold(f"{round_number}-{number}", 0)] for number in range(200)]
            submitted = [pool.submit(ledger.submit, batch) for batch in batches]
            ledger.close()
            answers = [each.result().exception(timeout=10) for each in submitted]
        assert {type(answer) for answer in answers} <= {type(None), LedgerUnavailableError}


@pytest.mark.parametrize("malformed", ["", "a b", "a/b", "\u00e9", "a\n", "a" * 129])
def test_a_malformed_account_id_is_refused(ledger, malformed):
    """Account ids go into URLs, logs and file names: 1 to 128 of a few characters."""
    with pytest.raises(LedgerError, match="is not 1 to 128"):
        ledger.create_account(malformed, "buyer")
    ledger.create_account("Acme:eu-1_x.y@z" + "a" * 113, "publisher")


def test_unknown_accounts_and_transfers_are_named(ledger):
    """Only accounts can be paid; a missing account is named."""
    with pytest.raises(NotFoundError, match="nobody"):
        ledger.deposit("nobody", 1, "d2")
    paid = plain(id="t", debit="alice", credit="nobody", amount_nano=1, code="x")
    (result,) = ledger.submit([paid]).result()
    assert (result.outcome, result.detail) == (Outcome.UNKNOWN_ACCOUNT, "nobody")
    with pytest.raises(LedgerError, match="transfer t: unknown account nobody"):
        ledger.transact(paid)
    with pytest.raises(NotFoundError, match="'t'"):
        ledger.transfer("t")


def test_receipts_are_found_by_what_they_say(ledger):
    """By account, request and document, newest first, as many as asked for."""
    for number in range(3):
        kept = msgspec.structs.replace(receipt(f"kvr_{number}", 1, f"h{number}"), request_id="q")
        ledger.submit([hold(f"h{number}", 1)], receipt=kept).result()
    found = [each.id for each in ledger.receipts(account="alice", request_id="q", limit=2)]
    assert found == ["kvr_2", "kvr_1"]
    assert len(ledger.receipts(document_id="kvd_x")) == 3
    assert ledger.receipts(account="pat") == []
    assert [each.id for each in ledger.transfers(account="alice")] == ["h2", "h1", "h0", "d1"]
    assert ledger.transfers(account="pat") == []


def test_the_audit_reads_receipts(ledger):
    """A receipt that says another amount than was charged is a problem; a free one is none."""
    free = msgspec.structs.replace(receipt("kvr_free", 0, ""), transfer_ids=())
    ledger.submit([hold("h1", 5)], receipt=free).result()
    assert ledger.check_integrity() == []
    ledger.submit([hold("h2", 5)], receipt=receipt("kvr_wrong", 6, "h2")).result()
    ledger.submit([hold("h3", 5)], receipt=receipt("kvr_lost", 5, "none")).result()
    ledger.submit([hold("h4", 5)], receipt=receipt("kvr_again", 5, "h1")).result()
    ledger.submit([hold("h5", 5)], receipt=receipt("kvr_twice", 5, "h1")).result()
    stolen = msgspec.structs.replace(receipt("kvr_stolen", 5, "h5"), account="pat")
    ledger.submit([hold("h6", 5)], receipt=stolen).result()
    assert sorted(ledger.check_integrity()) == [
        "receipt kvr_again: is not the one that transfer h1 was booked with",
        "receipt kvr_lost: transfer none is missing",
        "receipt kvr_stolen: is not the one that transfer h5 was booked with",
        "receipt kvr_stolen: is pat's, paid by alice",
        "receipt kvr_twice: is for transfer h1, as kvr_again is",
        "receipt kvr_twice: is not the one that transfer h1 was booked with",
        "receipt kvr_wrong: says 6, charged otherwise",
    ]


def test_a_living_engine_renews_its_holds(place):
    """A renewed hold outlives its timeout and can be posted; other holds expire."""
    now = [1000.0]
    with funded_ledger(place, clock=lambda: now[0]) as ledger:
        ledger.submit([hold("h", 60, timeout_s=10)]).result()
        ledger.submit([hold("g", 60, timeout_s=10)]).result()
        assert ledger.due_at_s("h") == 1010
        now[0] += 5
        (renewed, missing) = ledger.renew(["h", "none"], 10).result()
        assert (renewed.outcome, missing.outcome) == (Outcome.OK, Outcome.PENDING_NOT_FOUND)
        assert ledger.due_at_s("h") == 1015
        now[0] += 5 + GRACE_S
        assert ledger.expire_pending() == 1
        assert ledger.due_at_s("g") is None
        assert ledger.renew(["g"], 10).result()[0].outcome is Outcome.EXPIRED
        posted = ledger.submit([post(id="p", pending_id="h", amount_nano=60)]).result()
        assert posted[0].outcome is Outcome.OK
        assert ledger.renew(["h"], 10).result()[0].outcome is Outcome.ALREADY_POSTED
        assert ledger.account("alice").available_nano == NANO - 60
        assert ledger.check_integrity() == []


def test_many_holds_expire_at_once(place):
    """More than fit into one batch, those of others among them; what is not due stays."""
    now = [1000.0]
    with funded_ledger(place, clock=lambda: now[0]) as ledger:
        holds = [hold(f"h{number}", 1, timeout_s=10) for number in range(1100)]
        ledger.submit([*holds, hold("later", 1, timeout_s=11)]).result()
        ledger.submit([void(id="v", pending_id="h7")]).result()
        now[0] += 10 + GRACE_S
        with Ledger.open(place, clock=lambda: now[0]) as other, ThreadPoolExecutor(2) as pool:
            counts = [pool.submit(each.expire_pending) for each in (ledger, other)]
            assert sum(each.result() for each in counts) == 1099
        assert ledger.account("alice").debits_pending == 1
        assert ledger.check_integrity() == []


def test_what_was_sold_is_booked_after_an_outage_longer_than_the_hold(place, held_up):
    """Another engine releases the hold first; the settlement is booked, and the debt is shown."""
    now = [1000.0]
    with funded_ledger(place, clock=lambda: now[0]) as ledger:
        ledger.submit([hold("h", NANO, timeout_s=10)]).result()
        now[0] += 10 + GRACE_S
        with Ledger.open(place, clock=lambda: now[0]) as other:
            assert other.expire_pending() == 1
        ledger.transact(plain(id="t", debit="alice", credit="pat", amount_nano=NANO - 5, code="x"))
        sold = [
            post(id="p", pending_id="h", amount_nano=60),
            plain(id="r", debit="provider", credit="pat", amount_nano=30, code="royalty"),
        ]
        kept = receipt("kvr_1", 60, "p", "r", royalty=30)
        for expected in (Outcome.OK, Outcome.EXISTS):
            results = ledger.submit(sold, receipt=kept, patience_s=math.inf).result()
            assert [each.outcome for each in results] == [expected] * 2
        alice = ledger.account("alice")
        assert (alice.available_nano, alice.debt_nano) == (-55, 55)
        assert ledger.account("provider").balance_nano == 30
        assert ledger.transfer("p").kind == "late"
        ledger.deposit("alice", 100, "d2")
        assert ledger.account("alice").debt_nano == 0
        assert ledger.check_integrity() == []


def test_times_are_the_databases(ledger):
    """They never go back, in the order of effect; a receipt has the time of its booking."""
    for number in range(5):
        ledger.submit([hold(f"h{number}", 1)], receipt=receipt(f"kvr_{number}", 1, f"h{number}"))
    ledger.submit([hold("last", 1)]).result()
    times = [each.created_at_s for each in ledger.transfers_after(0, 99)]
    assert times == sorted(times)
    assert abs(times[-1] - time.time()) < 5
    assert ledger.receipt("kvr_4").created_at_s == ledger.transfer("h4").created_at_s


def test_a_reservation_waits_a_second_and_leaves_no_hold(place, held_up):
    """Behind a database that does not answer, too: its caller hears in time, and when the
    reservation took effect after all, it is released.
    """
    with funded_ledger(place, reservation_patience_s=0.3) as ledger:
        with held_up():
            began_s = time.monotonic()
            reserved = ledger.submit([hold("h", 60)])
            with pytest.raises(LedgerUnavailableError, match="did not answer"):
                reserved.result(timeout=30)
            assert time.monotonic() - began_s < 2
        ledger.transact(plain(id="t", debit="alice", credit="pat", amount_nano=NANO, code="x"))
        assert ledger.account("alice").debits_pending == 0
        assert ledger.check_integrity() == []


def test_a_royalty_waits_in_suspense_until_its_publisher_has_an_account(ledger):
    """The sale is booked, the royalty is shown in suspense, and paid once."""
    ledger.submit([hold("h", 100)]).result()
    sold = [
        post(id="p", pending_id="h", amount_nano=100),
        plain(
            id="r",
            debit="provider",
            credit="newcomer",
            amount_nano=50,
            code="royalty",
            user_data="kvd_x",
        ),
    ]
    kept = msgspec.structs.replace(
        receipt("kvr_1", 100, "p", "r", royalty=50), publisher="newcomer"
    )
    assert all(each.outcome.good for each in ledger.submit(sold, receipt=kept).result())
    assert ledger.account("suspense").balance_nano == 50
    assert ledger.pay_suspended("pat") == 0
    assert ledger.create_account("newcomer", "publisher").balance_nano == 50
    assert ledger.pay_suspended("newcomer") == 0
    assert ledger.account("newcomer").balance_nano == 50
    assert ledger.account("suspense").balance_nano == 0
    assert ledger.check_integrity() == []


def test_a_receipt_is_found_by_each_of_its_documents(ledger):
    """A sale over several listings has a line for each; they are its digest's, too."""
    line = ReceiptLine(
        document_id="kvd_first",
        title="",
        publisher="pat",
        start=0,
        end=16,
        cache_read_nano_per_mtok=0,
        royalty_ppm=0,
        charge_nano=1,
        royalty_nano=0,
    )
    second = msgspec.structs.replace(line, document_id="kvd_x", start=16, end=32, charge_nano=2)
    kept = msgspec.structs.replace(receipt("kvr_1", 3, "p"), lines=(line, second))
    ledger.submit([hold("h", 3)]).result()
    ledger.submit([post(id="p", pending_id="h", amount_nano=3)], receipt=kept).result()
    for document_id in ("kvd_first", "kvd_x"):
        (found,) = ledger.receipts(document_id=document_id)
        assert [each.document_id for each in found.lines] == ["kvd_first", "kvd_x"]
    assert ledger.check_integrity() == []


def test_an_idempotency_key_covers_one_purchase(place, monkeypatch):
    """The same key and body give the same purchase key, four times, on any engine of the ledger."""
    with funded_ledger(place) as ledger, Ledger.open(place) as other:
        first = ledger.use_key("alice", "k", b"body")
        assert other.use_key("alice", "k", b"body") == first
        assert ledger.use_key("bob", "k", b"body") != first
        with pytest.raises(KeyConflictError):
            other.use_key("alice", "k", b"another")
        assert [ledger.use_key("alice", "k", b"body") for _ in range(2)] == [first] * 2
        with pytest.raises(KeyUsedUpError):
            other.use_key("alice", "k", b"body")
        monkeypatch.setattr("vllm_kvmarket.ledger.ledger.KEY_LIFE_S", 0.0)
        assert ledger.use_key("alice", "k", b"another") != first


def test_money_stays_in_its_currency(place):
    """Accounts have a currency, and a transfer has one; a ledger opens in its own."""
    with funded_ledger(place) as ledger:
        erik = ledger.create_account("erik", "publisher", currency="EUR")
        assert (erik.currency, ledger.account("alice").currency) == ("EUR", "USD")
        with pytest.raises(LedgerError, match="different currencies USD, EUR"):
            ledger.deposit("erik", 1, "d2")
        with pytest.raises(LedgerError, match="exists in EUR"):
            ledger.create_account("erik", "publisher")
        with pytest.raises(LedgerError, match="is not a code like USD"):
            ledger.create_account("x", "buyer", currency="usd")
    with pytest.raises(LedgerError, match="'provider' exists in USD"):
        Ledger.open(place, currency="EUR")


def test_a_queue_that_grows_without_end_is_refused(place, held_up, monkeypatch):
    """While the database is away, what waits is bounded; what was taken is written."""
    monkeypatch.setattr("vllm_kvmarket.ledger.group_commit.MAX_QUEUED", 20)
    with funded_ledger(place) as ledger:
        with held_up():
            futures = [ledger.submit([hold(f"h{number}", 1)]) for number in range(60)]
            refused_errors = [future.exception(0) for future in futures if future.done()]
            assert len(refused_errors) >= 20
            assert all("behind" in str(error) for error in refused_errors)
        taken = [future for future in futures if future.exception(30) is None]
        assert len(taken) == 60 - len(refused_errors) >= 20
        assert ledger.account("alice").debits_pending == len(taken)


def test_transfers_are_numbered_in_the_order_of_effect(ledger):
    """From 1, without gaps: what was refused or came again has no number."""
    ledger.submit([hold("h1", 1)]).result()
    ledger.submit([hold("h2", 2 * NANO)]).result()
    ledger.submit([hold("h1", 1), hold("h3", 1)]).result()
    assert [ledger.sequence_of(id) for id in ("d1", "h1", "h3")] == [1, 2, 3]
    assert [each.id for each in ledger.transfers_after(0, 2)] == ["d1", "h1"]
    assert [each.id for each in ledger.transfers_after(2, 9)] == ["h3"]
    assert ledger.transfers_after(3, 9) == []
    with pytest.raises(NotFoundError, match="'h2'"):
        ledger.sequence_of("h2")


def test_periods_are_what_a_look_at_everything_finds(place):
    """Movements, balances brought forward and receipts, for any bounds; also what came since."""
    now, chance = [1_000_000.0], random.Random(5)
    with funded_ledger(place, clock=lambda: now[0]) as ledger:
        for number in range(60):
            now[0] += chance.choice([0.0, 0.5, 40.0, 900.0, 9000.0])
            sold = receipt(f"kvr_{number}", 2, f"p{number}", f"r{number}", royalty=1)
            sold = msgspec.structs.replace(sold, document_id=f"kvd_{number % 3}")
            ledger.submit(
                [
                    hold(f"h{number}", 3),
                    post(id=f"p{number}", pending_id=f"h{number}", amount_nano=2),
                    plain(
                        id=f"r{number}",
                        debit="provider",
                        credit="pat",
                        amount_nano=1,
                        code="royalty",
                        user_data=sold.document_id,
                    ),
                ],
                receipt=sold,
            ).result()
            if number % 12 != 11:
                continue
            moved = [each for each in ledger.transfers()[::-1] if each.kind != "pending"]
            kept = ledger.receipts()[::-1]
            times = [chance.choice(moved).created_at_s for _ in range(8)]
            bounds = [None, *times, *(time_s + 0.25 for time_s in times), 0.0, now[0] + 5]
            for _ in range(40):
                from_s, to_s = chance.choice(bounds), chance.choice(bounds)
                inside = [
                    each
                    for each in (*moved, *kept)
                    if (from_s is None or each.created_at_s >= from_s)
                    and (to_s is None or each.created_at_s < to_s)
                ]
                account = chance.choice(["alice", "pat", "provider", "world", "nobody"])
                mine = [each for each in moved if account in (each.debit, each.credit)]
                expected = [each for each in mine if each in inside]
                assert ledger.moves(account, from_s, to_s) == expected
                if from_s is not None:
                    before = [each for each in mine if each.created_at_s < from_s]
                    total = sum(
                        each.amount_nano if each.credit == account else -each.amount_nano
                        for each in before
                    )
                    assert ledger.moved_before(account, from_s) == total
                booked = [each for each in kept if each in inside]
                assert ledger.receipts_booked(from_s, to_s) == booked
                assert ledger.receipts_booked(from_s, to_s, "nobody", ["kvd_1", "kvd_2"]) == [
                    each for each in booked if each.document_id != "kvd_0"
                ]
        assert ledger.account("pat").balance_nano == ledger.moved_before("pat", now[0] + 1)


def test_purchases_go_ahead_of_their_holds_up_to_a_tenth(place, held_up):
    """Each engine for what it last knew. Where another took the funds meanwhile, what was sold is
    the account's debt: booked once, shown, and at most a tenth for each engine.
    """
    with funded_ledger(place) as ledger, Ledger.open(place) as other, Ledger.open(place) as third:
        assert other.submit_ahead(hold("unknown", 1)) is None, "it knows nothing of alice yet"
        for number, each in enumerate((ledger, other)):
            each.submit([hold(f"known{number}", 1)]).result()
            each.submit([void(id=f"v{number}", pending_id=f"known{number}")]).result()
        third.transact(
            plain(id="all", debit="alice", credit="world", amount_nano=NANO, code="payout")
        )
        purchases = []
        with held_up():
            for name, each in (("a", ledger), ("b", other)):
                ahead = [_buying(each, f"{name}{n}", NANO // 20) for n in range(3)]
                assert [one.state().value for one in ahead] == ["reserved", "reserved", "reserving"]
                assert not any(one.has_hold for one in ahead)
                purchases += ahead
        for purchase in purchases:
            purchase.wait(30)
        settled = [one for one in purchases if one.state() is PurchaseState.RESERVED]
        assert len(settled) == 4
        for purchase in settled:
            purchase.settle(Usage(100, 100, 100, 0, 0, 1, 1))
            assert max(purchase.settled.result(30)) == Result(Outcome.OK)
            assert ledger.receipt(purchase.receipt_id).charge_nano == NANO // 20
        alice = ledger.account("alice")
        assert alice.debt_nano == 4 * (NANO // 20) == 2 * (NANO // 10)
        assert alice.debits_pending == 0
        assert _buying(ledger, "c", 1).state() is not PurchaseState.RESERVED
        for each in (ledger, other):
            each.submit([]).result()
        assert ledger.check_integrity() == []


def test_a_purchase_that_ends_before_its_hold_is_durable_is_paid_and_leaves_no_hold(place, held_up):
    """The settlement overtakes the ledger's answer; a void behind it takes the hold back."""
    with funded_ledger(place) as ledger:
        ledger.submit([hold("known", 1)]).result()
        with held_up():
            purchase = _buying(ledger, "k", 1000)
            purchase.settle(Usage(100, 100, 100, 0, 0, 1, 1))
        assert purchase.settled.result(30)[0].outcome is Outcome.OK
        ledger.submit([]).result()
        alice = ledger.account("alice")
        assert (alice.debits_posted, alice.debits_pending, alice.debt_nano) == (1000, 1, 0)
        assert ledger.check_integrity() == []


def test_nothing_goes_ahead_while_the_ledger_is_away(place, held_up):
    """What was known is forgotten with the first reservation that gets no answer."""
    with funded_ledger(place, reservation_patience_s=0.1) as ledger:
        ledger.submit([hold("known", 1)]).result()
        with held_up():
            assert _buying(ledger, "k", 1000).state() is PurchaseState.RESERVED
            time.sleep(0.5)
            assert _buying(ledger, "l", 1000).state() is not PurchaseState.RESERVED
        assert _buying(ledger, "m", 0).state() is not PurchaseState.RESERVED


def test_nothing_goes_ahead_in_another_currency(place):
    """The provider could not be paid: such an account gets nothing, however much it has."""
    with funded_ledger(place) as ledger:
        ledger.create_account("monde", "world", may_go_negative=True, currency="EUR")
        ledger.create_account("erik", "buyer", currency="EUR")
        funds = plain(id="d2", debit="monde", credit="erik", amount_nano=NANO, code="deposit")
        ledger.transact(funds)
        for key in ("a", "b", "c"):
            purchase = _buying(ledger, key, 1000, "erik")
            assert purchase.state() is not PurchaseState.RESERVED
            purchase.wait(30)
            assert purchase.state() is PurchaseState.REFUSED


def _buying(ledger, key, amount_nano, account="alice"):
    """The purchase of 100 tokens of a document of the provider's own."""
    listing = Listing(
        document_id="kvd_x",
        namespace=b"n" * 32,
        token_count=100,
        terms=ListingTerms(publisher="provider"),
        created_at_s=1.0,
    )
    tariff = Tariff(input_nano_per_mtok=10**15, cache_read_nano_per_mtok=amount_nano * 10_000)
    item = ReuseItem(Match((Segment(listing, 0, 100),), 100, ()), tariff, "m", "r")
    return Purchase(ledger, item, key=key, account=account, timeout_s=60, may_go_ahead=True)
