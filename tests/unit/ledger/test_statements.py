"""Statements and payouts: what an account sees of its money."""

import csv
import io
import math
import threading
import time

import apsw
import msgspec
import pytest

from tests.support.ledger_books import funded_ledger, hold, receipt
from tests.support.proof_market import open_shop, sell
from vllm_kvmarket.core.errors import LedgerError, NotFoundError
from vllm_kvmarket.core.pricing import NANO, format_nano
from vllm_kvmarket.ledger import PROVIDER, Ledger, ReceiptLine, plain, post
from vllm_kvmarket.ledger.statements import as_csv, payout, statement


@pytest.fixture
def market(tmp_path):
    with open_shop(tmp_path / "home") as market:
        yield market


@pytest.fixture
def clock():
    return [1_000.0]


@pytest.fixture
def ledger(tmp_path, clock):
    """Pat earned 10 at 1000, 20 at 2000 and 30 at 3000."""
    with Ledger.open(tmp_path / "ledger.sqlite", clock=lambda: clock[0]) as ledger:
        ledger.create_account("pat", "publisher")
        for number in (1, 2, 3):
            clock[0] = 1000.0 * number
            ledger.deposit("pat", 10 * number, f"d{number}")
        yield ledger


def test_a_publisher_sees_its_sales_and_royalties(market):
    """Each royalty with the sale that it is a share of."""
    sales = [sell(market, "p1"), sell(market, "p2", 256)]
    made = statement(market.ledger, "pat")
    assert [line.kind for line in made.lines] == ["royalty", "royalty"]
    assert [line.amount_nano for line in made.lines] == [sale.royalty_nano for sale in sales]
    assert [line.sale_nano for line in made.lines] == [sale.charge_nano for sale in sales]
    assert [line.receipt_id for line in made.lines] == [sale.id for sale in sales]
    assert (made.sales, made.tokens_sold) == (2, 856)
    assert made.sold_nano == sum(sale.charge_nano for sale in sales)
    assert made.totals_nano == {"royalty": market.ledger.account("pat").balance_nano}
    assert "alice" not in str(made), "who bought it is the market's to know"


def test_a_buyer_sees_deposits_and_purchases(market):
    """A reservation without a charge is not listed."""
    receipt = sell(market, "p1", 256)
    payout(market.ledger, "alice", "refund 7", 5)
    made = statement(market.ledger, "alice")
    assert [line.kind for line in made.lines] == ["deposit", "purchase", "payout"]
    assert [line.amount_nano for line in made.lines] == [NANO, -receipt.charge_nano, -5]
    assert made.lines[1].title == "The Licence"
    assert made.lines[2].reference == "refund 7"
    assert made.closing_nano == market.ledger.account("alice").balance_nano
    assert made.sales == 0


def test_the_provider_sees_every_sale_and_the_royalties_that_it_paid(market):
    """Its lines add up to its balance."""
    receipt = sell(market, "p1")
    made = statement(market.ledger, PROVIDER)
    assert made.totals_nano == {"sale": receipt.charge_nano, "royalty": -receipt.royalty_nano}
    assert (made.sales, made.sold_nano) == (1, receipt.charge_nano)


def test_sales_that_brought_nothing_are_told(market):
    """Without a royalty there is no transfer to the publisher; the sale is on its statement."""
    receipt = sell(market, "p1", 0)
    assert receipt.royalty_nano == 0
    listing = market.catalogue.listings()[0]
    made = statement(market.ledger, "pat", documents=[listing.document_id])
    assert [(line.kind, line.amount_nano, line.receipt_id) for line in made.lines] == [
        ("sale", 0, receipt.id)
    ]
    assert made.sales == 1


@pytest.mark.parametrize(
    ("from_s", "to_s", "brought_forward", "amounts"),
    [
        (None, None, 0, [10, 20, 30]),
        (1000.0, None, 0, [10, 20, 30]),
        (1000.1, None, 10, [20, 30]),
        (2000.0, 3000.0, 10, [20]),
        (2000.0, 3000.1, 10, [20, 30]),
        (None, 1000.0, 0, []),
        (5000.0, None, 60, []),
    ],
)
def test_the_balance_is_brought_forward(ledger, from_s, to_s, brought_forward, amounts):
    """A period has its beginning and not its end, so that periods add up."""
    made = statement(ledger, "pat", from_s, to_s)
    assert made.brought_forward_nano == brought_forward
    assert [line.amount_nano for line in made.lines] == amounts
    assert made.closing_nano == brought_forward + sum(amounts)
    if made.lines:
        assert made.lines[-1].balance_nano == made.closing_nano
    if to_s is not None:
        assert statement(ledger, "pat", to_s).brought_forward_nano == made.closing_nano


def test_a_statement_of_a_second_reads_a_second(tmp_path):
    """Ten times as many transfers in the hours before: hardly more work of the database."""
    now, work = [0.0], []
    with Ledger.open(tmp_path / "ledger.sqlite", clock=lambda: now[0]) as ledger:
        ledger.create_account("pat", "publisher")

        def steps(count):
            """Fill an hour, go on to the next, and make a statement of its first second."""
            for number in range(count):
                now[0] += 3600 / count
                name = f"{now[0]}:{number}"
                paid = ledger.submit(
                    [plain(id=name, debit="world", credit="pat", amount_nano=1, code="x")]
                )
            paid.result()
            now[0] += 3600
            ledger.deposit("pat", 5, f"d{now[0]}")
            statement(ledger, "pat", now[0])
            work.clear()
            with ledger._storage._reading() as db:
                db.trace_v2(
                    apsw.SQLITE_TRACE_PROFILE,
                    lambda event: work.append(event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]),
                )
                made = statement(ledger, "pat", now[0], now[0] + 1)
                db.trace_v2(0)
            assert [line.amount_nano for line in made.lines] == [5]
            assert made.closing_nano == ledger.account("pat").balance_nano
            return sum(work)

        few = steps(300)
        assert steps(3000) < 2 * few


def test_an_unknown_account_has_no_statement(ledger):
    """A mistyped name is not an empty statement."""
    with pytest.raises(NotFoundError):
        statement(ledger, "bob")


def test_a_statement_is_written_as_csv(ledger):
    """In currency units, brought forward first and closing last; formulas are disarmed."""
    ledger.transact(
        plain(
            id='=HYPERLINK("x")', debit="world", credit="pat", amount_nano=NANO // 2, code="deposit"
        )
    )
    made = statement(ledger, "pat", 1500.0)
    rows = list(csv.DictReader(io.StringIO(as_csv(made), newline="")))
    assert [row["kind"] for row in rows] == ["brought forward", *["deposit"] * 3, "closing"]
    assert rows[0]["balance"] == format_nano(10)
    assert rows[-1]["balance"] == format_nano(made.closing_nano) == "0.50000006"
    assert rows[1]["at"] == "1970-01-01T00:33:20.000+00:00"
    assert (rows[3]["amount"], rows[3]["currency"]) == ("0.50", "USD")
    assert rows[3]["transfer_id"] == '\'=HYPERLINK("x")'


def test_a_payout_moves_the_balance_out_once(ledger):
    """The same reference again changes nothing, whatever has come in since."""
    transfer, is_new = payout(ledger, "pat", "bank 1")
    assert (transfer.amount_nano, transfer.user_data, is_new) == (60, "bank 1", True)
    assert (transfer.debit, transfer.credit) == ("pat", "world")
    assert payout(ledger, "pat", "bank 1") == (transfer, False), "with nothing left"
    ledger.deposit("pat", 5, "d4")
    assert payout(ledger, "pat", "bank 1") == (transfer, False)
    assert payout(ledger, "pat", "bank 1", 60) == (transfer, False)
    assert ledger.account("pat").balance_nano == 5
    assert payout(ledger, "pat", "bank 2", 3)[0].amount_nano == 3
    with pytest.raises(LedgerError, match="was used for"):
        payout(ledger, "pat", "bank 2", 2)
    assert ledger.account("pat").balance_nano == 2
    assert ledger.check_integrity() == []


@pytest.mark.parametrize(
    ("account", "reference", "amount", "reason"),
    [
        ("pat", "r", 61, "exceeds credits .*0.00000006 is available"),
        ("pat", "r", 0, "nothing to pay out"),
        ("pat", " ", 1, "needs a reference"),
        ("world", "r", 1, "world outside"),
        ("provider", "r", None, "nothing to pay out"),
        ("pat", "r\0", 1, "invalid field"),
    ],
)
def test_a_payout_that_cannot_be_is_refused(ledger, account, reference, amount, reason):
    """Nothing is moved."""
    with pytest.raises(LedgerError, match=reason):
        payout(ledger, account, reference, amount)
    assert ledger.account("pat").balance_nano == 60


def test_what_is_reserved_is_not_paid_out(market):
    """A hold on the account is not available."""
    from vllm_kvmarket.ledger import pending

    market.ledger.transact(
        pending(
            id="h", debit="alice", credit=PROVIDER, amount_nano=NANO - 7, timeout_s=60, code="reuse"
        )
    )
    assert payout(market.ledger, "alice", "r")[0].amount_nano == 7


def test_two_payouts_at_once_are_one(ledger):
    """Under one reference, from many threads: one transfer, and everyone gets it."""
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(payout(ledger, "pat", "bank 1")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({transfer.id for transfer, _ in answers}) == 1
    assert [is_new for _, is_new in answers].count(True) == 1
    assert len(answers) == 8
    assert ledger.account("pat").balance_nano == 0


def test_payouts_of_two_accounts_are_never_one(ledger):
    """Account ids and references may contain colons."""
    for account in ("a", "a:b"):
        ledger.create_account(account, "publisher")
        ledger.deposit(account, 10, f"deposit:{account}")
    first, made = payout(ledger, "a", "b:7", 10)
    assert made
    second, made = payout(ledger, "a:b", "7", 10)
    assert made
    assert first.id != second.id
    assert ledger.account("a:b").balance_nano == 0


def test_a_period_that_is_over_never_changes(tmp_path):
    """A settlement that waited for the database counts when it is booked, not when it was sent."""
    place = tmp_path / "market.sqlite"
    with funded_ledger(place) as ledger:
        ledger.submit([hold("h", 100)]).result()
        blocker = apsw.Connection(str(place))
        blocker.execute("BEGIN IMMEDIATE")
        settled = ledger.submit(
            [post(id="p", pending_id="h", amount_nano=60)],
            receipt=receipt("kvr_1", 60, "p"),
            patience_s=math.inf,
        )
        end_s = time.time()
        closed = statement(ledger, "alice", None, end_s)
        time.sleep(0.05)
        blocker.execute("ROLLBACK")
        blocker.close()
        settled.result()
        assert statement(ledger, "alice", None, end_s) == closed
        after = statement(ledger, "alice", end_s)
        assert [line.amount_nano for line in after.lines] == [-60]
        assert after.brought_forward_nano == closed.closing_nano


def test_a_sale_over_two_listings_is_on_both_publishers_statements(tmp_path):
    """Each with its own line: its tokens, its charge and its royalty."""
    with funded_ledger(tmp_path / "market.sqlite") as ledger:
        ledger.create_account("quinn", "publisher")
        first = ReceiptLine(
            document_id="kvd_x",
            title="First",
            publisher="pat",
            start=0,
            end=64,
            cache_read_nano_per_mtok=0,
            royalty_ppm=500_000,
            charge_nano=60,
            royalty_nano=30,
        )
        second = msgspec.structs.replace(
            first,
            document_id="kvd_y",
            title="Second",
            publisher="quinn",
            start=64,
            end=80,
            charge_nano=40,
            royalty_nano=20,
        )
        kept = receipt("kvr_1", 100, "p", "r1", "r2", royalty=50)
        kept = msgspec.structs.replace(kept, tokens_reused=80, lines=(first, second))
        names = {"debit": PROVIDER, "code": "royalty"}
        ledger.transact(hold("h", 100))
        batch = [
            post(id="p", pending_id="h", amount_nano=100),
            plain(id="r1", credit="pat", amount_nano=30, user_data="kvd_x", **names),
            plain(id="r2", credit="quinn", amount_nano=20, user_data="kvd_y", **names),
        ]
        assert all(each.outcome.good for each in ledger.submit(batch, receipt=kept).result())
        for publisher, line, royalty in (("pat", first, 30), ("quinn", second, 20)):
            made = statement(ledger, publisher)
            (shown,) = made.lines
            assert (shown.title, shown.amount_nano) == (line.title, royalty)
            assert (shown.tokens_reused, shown.sale_nano) == (
                line.end - line.start,
                line.charge_nano,
            )
            assert (made.sales, made.sold_nano) == (1, line.charge_nano)
        assert statement(ledger, PROVIDER).sold_nano == 100
        assert ledger.check_integrity() == []
