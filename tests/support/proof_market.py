"""A market with sales for the tests of proofs and statements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.purchases import reserve
from vllm_kvmarket.core.pricing import NANO
from vllm_kvmarket.ledger import Receipt
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import Usage

DOCUMENT = tokens(600)


def open_shop(home: Path, config: dict[str, Any] | None = None) -> Market:
    """Open a market with one document of pat's, and alice with money."""
    market = Market.open(home, config)
    market.create_account("pat", "publisher")
    market.create_account("alice")
    market.deposit("alice", NANO, "d1")
    store_and_list(market, DOCUMENT, publisher="pat", title="The Licence")
    return market


def sell(market: Market, key: str, token_count: int = 600, account: str = "alice") -> Receipt:
    """Let an account reuse the document once; the receipt, durable."""
    match = market.match(NAMESPACE, DOCUMENT)
    purchase = reserve(
        market, key=key, request_id=f"request {key}", account=account, match=match, model="tiny"
    )
    purchase._reservation.result()
    assert purchase.state().value == "reserved"
    receipt = purchase.settle(Usage(600, token_count, token_count, 0, 0, 10, 5))
    return market.receipt(receipt.id)
