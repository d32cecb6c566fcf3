"""The ledger's rules against a naive model."""

from __future__ import annotations

from tests.support.ledger_books import MemoryBooks
from tests.support.ledger_model import run


def test_the_rules_agree_with_a_naive_model():
    """Any history of batches, retries and waiting gives the outcomes and balances of the model."""
    run(MemoryBooks, histories=80)
