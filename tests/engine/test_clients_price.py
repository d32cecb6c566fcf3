"""A buyer's price limit holds when the engine reserves, not only when it was quoted."""

from __future__ import annotations

import pytest

from tests.support.asking import PRICE_NANO, Bill, Requests, sold
from tests.support.engines import words
from vllm_kvmarket.market.timed_requests import empty_prefix_cache


@pytest.mark.parametrize(("limit_nano", "reused"), [(600 * PRICE_NANO, 600), (1, 0)])
def test_no_more_is_reserved_than_the_request_allows(llm, market, limit_nano, reused):
    """At the limit it is bought; above it everything is computed, for nothing, and the answer says
    why.
    """
    tokens = words(9700, 600)
    market.publish(llm, token_ids=tokens, title="priced")
    empty_prefix_cache(llm)
    bill = Bill(market)
    params = market.params("alice")
    params["kv_transfer_params"]["kvmarket"]["max_price_nano"] = limit_nano
    requests = Requests(llm)
    requests.start(f"priced-{limit_nano}", tokens + words(9701 + limit_nano, 9), params)
    (answers,) = requests.finish().values()
    reply = sold(answers[0])
    assert reply["reused_tokens"] == reused
    assert ("max_price_nano" in reply.get("declined", "")) is (reused == 0)
    assert bill.tokens() == reused
