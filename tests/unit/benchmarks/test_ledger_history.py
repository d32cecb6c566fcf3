"""A past that is written past the rules is one that the rules could have left."""

from __future__ import annotations

import pytest

from benchmarks import ledger_history
from vllm_kvmarket.ledger import Ledger

SALES = 1_500


@pytest.mark.parametrize("number", [0, 7, ledger_history.BUYERS + 3, 3_333_000])
def test_rows_by_template_are_those_of_the_sale(number):
    """Which the ledger's own code makes."""
    sold = ledger_history.sale(number)
    assert ledger_history.Template().rows(number) == ledger_history.rows_of(sold)


def test_the_books_are_right(tmp_path):
    """From the start, and from the balances that the last day is checked from."""
    place = tmp_path / "market.sqlite"
    with Ledger.open(place) as ledger:
        ledger_history.open_accounts(ledger)
    ledger_history.fill_sqlite(place, SALES)
    with Ledger.open(place) as ledger:
        assert ledger.check_integrity() == []
        found = ledger_history.measure_checks(ledger, SALES, whole=True)
        assert found["day_transfers"] == 3 * SALES
        moved = ledger.account("buyer0001")
        assert moved.debits_posted == 2 * ledger_history.CHARGE_NANO
        assert ledger.receipts(account="buyer0001", limit=9) == [
            ledger_history.sale(number).receipt for number in (1_001, 1)
        ]
