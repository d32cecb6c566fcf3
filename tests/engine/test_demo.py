"""The demo's figures are what they are called; on a real engine."""

from __future__ import annotations

from functools import partial

from tests.support.engines import words
from vllm_kvmarket.cli import demo
from vllm_kvmarket.market.timed_requests import ask


def test_every_question_is_prefilled_reused_and_found_in_vllms_cache(llm, market, monkeypatch):
    """The time of a prefill is that of computing all tokens, for each question."""
    monkeypatch.setattr(demo, "ask", partial(ask, rest_s=0))
    tokens = words(91, 600)
    listing = market.publish(llm, token_ids=tokens, title="demo", publisher="pat")
    sales, hits = demo.sell(llm, market, listing.document_id)
    assert [sale.prefill.cached_tokens for sale in sales] == [0] * len(demo.BUYERS)
    assert [sale.reuse.cached_tokens for sale in sales] == [600] * len(demo.BUYERS)
    assert all(hit.cached_tokens > 0 for hit in hits)
