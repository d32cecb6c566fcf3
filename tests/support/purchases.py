"""A purchase of a match, reserved as an engine reserves it."""

from __future__ import annotations

from vllm_kvmarket import Market
from vllm_kvmarket.catalogue import Match
from vllm_kvmarket.market.purchase import Purchase, ReuseItem


def reserve(
    market: Market, *, key: str, request_id: str, account: str, match: Match, model: str
) -> Purchase:
    """Start to reserve what reusing the whole match costs."""
    item = ReuseItem(match, market.config.tariff, model, request_id)
    return market.reserve(item, key=key, account=account)
