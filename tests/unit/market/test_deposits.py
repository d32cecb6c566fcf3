"""Deposits: made once, also when nobody knows whether the first attempt was."""

from __future__ import annotations

import re

import apsw
import pytest

from vllm_kvmarket.core.errors import LedgerUnavailableError
from vllm_kvmarket.market.market import Market


def test_a_deposit_of_unknown_outcome_names_the_id_to_repeat_it_with(tmp_path, monkeypatch):
    """Another id would bring the money in twice."""
    monkeypatch.setattr("vllm_kvmarket.ledger.ledger.PATIENCE_S", 0.1)
    with Market.open(tmp_path) as market:
        market.create_account("alice")
        blocker = apsw.Connection(str(tmp_path / "market.sqlite"))
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailableError, match="so that it is made once") as failed:
            market.deposit("alice", 5, "invoice 7")
        blocker.execute("ROLLBACK")
        blocker.close()
        (name,) = re.findall(r"the id '(.+?)'", str(failed.value))
        market.deposit("alice", 5, name)
        market.deposit("alice", 5, name)
        assert market.ledger.account("alice").balance_nano == 5
