"""A real engine that keeps no document in memory: it matches all of them in the database."""

from __future__ import annotations

import pytest

from tests.support.engines import NANO, running, words
from vllm_kvmarket import Market
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

QUESTION = words(999, 11)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A market whose processes keep no chunk in memory, with a funded buyer and one without."""
    home = tmp_path_factory.mktemp("beyond")
    settings = {"home": str(home), "catalogue_chunks_in_memory": 0}
    with Market.open(config=settings) as opened:
        opened.create_account("alice")
        opened.deposit("alice", NANO, "deposit")
        opened.create_account("dave")
        yield opened


def test_documents_beyond_memory_are_reused_to_the_token_and_charged_once(tiny, shop):
    """One engine for all of it: starting it is what this costs."""
    with running(tiny(1), shop, num_gpu_blocks_override=44, max_num_seqs=8) as llm:
        document = words(71, 700)
        listing = shop.publish(llm, token_ids=document, publisher="pat")
        assert shop.catalogue.index.tree.chunk_count == 0
        assert shop.catalogue.match(listing.namespace, document) is None
        prompt = document + QUESTION
        empty_prefix_cache(llm)
        full = ask(llm, prompt, shop.params("dave"), rest_s=1)
        assert full.market["declined"]
        assert full.market["reused_tokens"] == 0
        # The paged cache has what dave computed now, which is his own; of the document he reuses
        # nothing.
        again = ask(llm, prompt, shop.params("dave"), rest_s=0)
        own = 5 * 128
        assert (again.market["reused_tokens"], again.market["charge_nano"]) == (0, 0)
        assert again.market["computed_tokens"] == len(prompt) - own

        empty_prefix_cache(llm)
        spent = shop.ledger.account("alice").debits_posted
        reuse = ask(llm, prompt, shop.params("alice"), rest_s=0)
        assert reuse.token_ids == full.token_ids == again.token_ids
        assert reuse.logprob_difference(full) < 1e-3
        assert reuse.market["reused_tokens"] == reuse.market["loaded_tokens"] == 700
        assert reuse.market["computed_tokens"] == len(QUESTION)
        assert reuse.market["charge_nano"] == 700 * 500
        assert shop.receipt(reuse.market["receipt_id"]).tokens_reused == 700
        assert shop.ledger.account("alice").debits_posted - spent == 700 * 500

        unknown = ask(llm, words(72, 300), shop.params("alice"), rest_s=0)
        assert unknown.market["reused_tokens"] == 0
        assert unknown.market["computed_tokens"] == 300
        assert unknown.market["charge_nano"] == 0

        # A longer document loads what is published of it, and stores only what is new.
        longer = shop.publish(llm, token_ids=document + words(73, 400))
        assert longer.token_count == 1100
        empty_prefix_cache(llm)
        inside = ask(llm, document[:500] + QUESTION, shop.params("alice"), rest_s=0)
        assert inside.market["reused_tokens"] == 500
        assert inside.market["document_id"] == listing.document_id

        shop.delist(listing.document_id)
        shop.delist(longer.document_id)
        after = ask(llm, prompt, shop.params("alice"), rest_s=1)
        assert after.market.get("charge_nano", 0) == 0
        assert shop.ledger.check_integrity() == []
        assert shop.catalogue.check_integrity() == []
