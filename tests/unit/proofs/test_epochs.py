"""After a rollback of the database nothing is signed, until an operator records the loss."""

from __future__ import annotations

import shutil

import pytest

from tests.support.proof_market import open_shop, sell
from vllm_kvmarket.proofs import (
    ProofError,
    TransparencyLog,
    check_ledger,
    signed_receipt,
    verify,
    verify_with_proof,
)


def test_a_rolled_back_market_signs_nothing_until_an_epoch_is_opened(tmp_path):
    """Two receipts would name one leaf; the new epoch has another origin, and says what is lost."""
    home, copy = tmp_path / "home", tmp_path / "copy.sqlite"
    with open_shop(home) as market:
        kept = sell(market, "p1")
    shutil.copy(home / "market.sqlite", copy)
    with open_shop(home) as market:
        lost = signed_receipt(market, sell(market, "p2").id)
        log = TransparencyLog(market.ledger, home)
        old_origin, signed_size = log.origin, log.checkpoint().size
        with pytest.raises(ProofError, match="no epoch is needed"):
            log.open_epoch("by mistake")
    for name in ("market.sqlite-wal", "market.sqlite-shm"):
        (home / name).unlink(missing_ok=True)
    shutil.copy(copy, home / "market.sqlite")
    with open_shop(home) as market:
        other = sell(market, "p3")
        log = TransparencyLog(market.ledger, home)
        for receipt in (kept, other):
            with pytest.raises(ProofError, match="kvmarket log epoch"):
                signed_receipt(market, receipt.id)
        epoch = log.open_epoch("the disk failed")
        assert (epoch.number, epoch.signed_origin, epoch.signed_size) == (
            2,
            old_origin,
            signed_size,
        )
        assert epoch.signed_size - epoch.common_size == 3  # the hold, the charge, the royalty
        assert log.origin == f"{old_origin}/2"
        signed = signed_receipt(market, other.id)
        assert signed.payload.kvmarket.log == log.origin
        charge = signed.payload.kvmarket.transfers[0]
        assert charge.log_index in {each.log_index for each in lost.payload.kvmarket.transfers}
        keys = log.keys.public_keys()
        assert verify_with_proof(verify(signed.jws, keys), log.prove(charge.id), keys) == 0
        with pytest.raises(ProofError, match="none of the receipt's"):
            verify_with_proof(lost, log.prove(charge.id), keys)
        assert [each.reason for each in log.epochs()] == ["the disk failed"]
        assert check_ledger(market.ledger, home).ok


def test_a_leaf_is_signed_before_a_receipt_names_it(tmp_path):
    """So that a rollback behind the receipt is found out."""
    with open_shop(tmp_path / "home") as market:
        receipt = signed_receipt(market, sell(market, "p1").id)
        log = TransparencyLog(market.ledger, market.home)
        (signed,) = log.checkpoints()
        size = int(signed.note.splitlines()[1])
        assert size > max(each.log_index for each in receipt.payload.kvmarket.transfers)
        signed_receipt(market, receipt.payload.kvmarket.receipt.id)
        assert len(log.checkpoints()) == 1
