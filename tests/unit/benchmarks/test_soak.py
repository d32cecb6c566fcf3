"""The soak's own checks, on stories in which something did go wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.soak_parts import growth, money, oracle, settling
from benchmarks.soak_parts.plan import Asked, Story
from vllm_kvmarket.core.pricing import NANO
from vllm_kvmarket.ledger import Receipt, ReceiptLine


def a_request(**changed):
    facts = {"id": "one", "shape": "whole", "account": "alice", "route": "completions"}
    facts |= {"prompt": [1] * 300, "max_tokens": 8, "outcome": "answered", "cached": 250}
    sold = {"charge_nano": 125_000, "receipt_id": "kvr_1", "matched_tokens": 250}
    return Asked(**{**facts, "sold": sold, **changed})


def a_receipt(**changed):
    facts = {"id": "kvr_1", "request_id": "cmpl-one-0", "account": "alice", "document_id": "kvd_1"}
    facts |= {"title": "", "publisher": "acme", "tokens_matched": 250, "tokens_reused": 250}
    facts |= {"tokens_loaded": 250, "tokens_from_paged_cache": 0, "tokens_failed": 0}
    facts |= {"tokens_computed": 50, "tokens_output": 8, "royalty_ppm": 500_000}
    facts |= {"input_nano_per_mtok": 5 * NANO, "cache_read_nano_per_mtok": NANO // 2}
    facts |= {"charge_nano": 125_000, "royalty_nano": 62_500, "recompute_nano": 1_250_000}
    line = {name: facts[name] for name in ReceiptLine.__struct_fields__ if name in facts}
    changed_line = {name: changed[name] for name in line if name in changed}
    reused = changed.get("tokens_reused", 250)
    lines = (ReceiptLine(**{**line, **changed_line}, start=0, end=reused),)
    facts |= {
        "lines": lines,
        "reservation_id": "r",
        "transfer_ids": ("t",),
        "created_at_s": 0.0,
        "model": "m",
    }
    return Receipt(**{**facts, "namespace": "", **changed})


def judged(asked, *receipts):
    """The problems found with a request and its receipts."""
    story = Story(prices={"kvd_1": {NANO // 2}})
    for receipt in receipts:
        money.check_receipt(receipt, asked, story)
    money.check_request(asked, list(receipts), story)
    return story.problems


def test_a_request_that_was_charged_as_it_says_is_right():
    """The story in which nothing went wrong."""
    assert judged(a_request(), a_receipt()) == []
    own_block = a_request(sold={}, cached=128)
    assert judged(own_block) == []


@pytest.mark.parametrize(
    ("asked", "receipts"),
    [
        (a_request(), [a_receipt(), a_receipt(id="kvr_2")]),
        (a_request(), []),
        (a_request(sold={}, cached=250), []),
        (a_request(sold={}), [a_receipt()]),
        (a_request(outcome="refused"), [a_receipt()]),
        (a_request(outcome="left"), [a_receipt(tokens_output=3)]),
        (a_request(account="dave"), [a_receipt(account="dave")]),
        (a_request(account="bob"), [a_receipt()]),
        (a_request(reuse="never"), [a_receipt()]),
        (a_request(max_price_nano=100_000), [a_receipt()]),
        (a_request(), [a_receipt(cache_read_nano_per_mtok=NANO)]),
        (a_request(), [a_receipt(tokens_reused=240)]),
        (a_request(cached=240), [a_receipt()]),
        (a_request(account=None, sold={}, cached=256), []),
        (a_request(), [a_receipt(lines=())]),
    ],
    ids=[
        *("doubled", "lost", "had for nothing", "not named", "refused and charged"),
        *("left and charged", "without funds", "somebody else's", "never", "above its limit"),
        *("price never offered", "amount", "usage", "nobody's", "no lines"),
    ],
)
def test_a_wrong_charge_is_found(asked, receipts):
    """Each way in which a charge can be wrong."""
    assert judged(asked, *receipts) != []


def test_what_took_place_is_read_from_the_servers_counters():
    """vLLM's own as well as ours: a counter that is never found would always be zero."""
    counters = {"vllm:num_preemptions_total": 3.0, "vllm:kvmarket_load_failures_total": 2.0}
    catalogue = SimpleNamespace(listings=list)
    market = SimpleNamespace(catalogue=catalogue)
    server = SimpleNamespace(metrics=lambda: counters, market=market)
    found = settling.evidence(server, Story())
    assert (found["preemptions"], found["load_failures"]) == (3, 2)


def test_what_goes_on_growing_is_told_from_what_levels_off():
    """A line that rises to the end grows; one that flattens, and noise, do not."""

    def grows(values):
        return growth.halves(growth.Series(list(range(len(values))), values), 24.0).grows

    assert grows([500 + at * 0.5 for at in range(400)])
    assert not grows([500 + 100 * (1 - 0.99**at) for at in range(400)])
    assert not grows([500 + 10 * (at % 7) for at in range(400)])


def test_a_wrong_token_is_told_from_a_tie():
    """A token that full prefill would not give fails; one that rounding decides is counted."""

    class Right:
        def __init__(self, gap):
            self.gap = gap

        def answers(self, pairs):
            return [[5] * count for _, count in pairs]

        def log_probabilities(self, prompt):
            assert prompt[-1] == 5
            return {5: -1.0, 6: -1.0 - self.gap}

    for gap, wrong in ((0.5, 1), (1e-5, 0)):
        story = Story(asked=[a_request(tokens=[5, 6, 5]), a_request(tokens=[5, 5])])
        found = oracle.compare(Right(gap), story, 1, 10)
        assert (found["wrong"], len(found["ties"])) == (wrong, 1 - wrong)
        assert len(story.problems) == wrong
        assert found["compared"] == 2
