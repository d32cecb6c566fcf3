"""The publishers paid for a match: each range of tokens pays the one that offered it first."""

from __future__ import annotations

import dataclasses
import time
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.catalogue_documents import NAMESPACE, changed, listing_of, publish, tokens
from vllm_kvmarket.catalogue import Listing, Match, MatchedChunk, Segment
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import TOKEN_BYTES, marked
from vllm_kvmarket.core.pricing import Tariff
from vllm_kvmarket.ledger import PROVIDER
from vllm_kvmarket.ledger.statements import statement
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import PurchaseState, ReuseItem, Usage
from vllm_kvmarket.market.quote import NO_LIMIT, Budget, Quote, affordable_part, quote_of, sold_part

CHUNK = 4
MIN_TOKENS = 3
INPUT = 1_000_000
# A token costs as many nano-units as its price is above 0: amounts are easy to read.
TARIFF = Tariff(input_nano_per_mtok=20 * INPUT, cache_read_nano_per_mtok=10 * INPUT)
PRICES = (None, 0, 7 * INPUT + 1, 20 * INPUT, 21 * INPUT)

DOCUMENT = st.builds(
    lambda stem, rest: (7,) * stem + tuple(rest), st.integers(1, 9), st.lists(st.integers(0, 1))
)
BUDGET = st.builds(Budget, st.sampled_from(PRICES), st.none() | st.integers(0, 300))
OFFER = st.tuples(DOCUMENT, st.sampled_from("abc"), st.sampled_from(PRICES))


@pytest.mark.parametrize(("between", "sold"), [(0, None), (1, 4)])
def test_where_the_model_keeps_a_state_a_part_of_a_match_is_sold_to_the_last_one(between, sold):
    """Nobody could go on behind another place."""
    document = DocumentChunks.of(marked(NAMESPACE, between), range(9), CHUNK)
    chunks = tuple(
        MatchedChunk(key, parent, count := len(tokens) // TOKEN_BYTES, count)
        for key, parent, tokens in zip(
            document.keys, document.parents, document.tokens, strict=True
        )
    )
    offered = [
        dataclasses.replace(
            Listing.of(document, ListingTerms(cache_read_nano_per_mtok=price)), document_id=name
        )
        for name, price in (("cheap", 0), ("dear", 21 * INPUT))
    ]
    segments = (Segment(offered[0], 0, 6), Segment(offered[1], 6, 9))
    match = Match(segments, 9, chunks)
    for part in (
        sold_part(match, TARIFF, MIN_TOKENS),
        affordable_part(match, TARIFF, Budget(INPUT)),
    ):
        assert (part and part.token_count) == sold
        assert (part and quote_of(part, TARIFF).tokens) == sold
    plain = Match(
        tuple(
            Segment(dataclasses.replace(each.listing, namespace=NAMESPACE), each.start, each.end)
            for each in segments
        ),
        9,
        (),
    )
    assert sold_part(plain, TARIFF, MIN_TOKENS).token_count == 6
    assert affordable_part(plain, TARIFF, Budget(INPUT)).token_count == 6


class Shop:
    """Listings in the order of their first offers: the catalogue's tests say that it matches so."""

    def __init__(self) -> None:
        self.listings = []

    def offer(self, document, publisher, price) -> None:
        listing = changed(
            listing_of(document, CHUNK), publisher=publisher, cache_read_nano_per_mtok=price
        )
        if listing.document_id not in [each.document_id for _, each in self.listings]:
            self.listings.append((tuple(document), listing))

    def match(self, prompt) -> Match | None:
        segments: list[Segment] = []
        for document, listing in self.listings:
            start = segments[-1].end if segments else 0
            same = (a == b for a, b in zip(document, prompt, strict=False))
            end = sum(takewhile(bool, same))
            if end > start:
                segments.append(Segment(listing, start, end))
        return Match(tuple(segments), segments[-1].end, ()) if segments else None

    def quote(self, prompt, budget=NO_LIMIT) -> Quote:
        match = self.match(prompt)
        sold = sold_part(match, TARIFF, MIN_TOKENS) if match else None
        most = len(prompt) - 1
        return quote_of(sold and affordable_part(sold, TARIFF, budget, most), TARIFF, most)

    def expected(self, prompt) -> list[tuple[str, int, int]]:
        """Go through the listings in the order of their offers; who reaches further, adds."""
        sold: list[tuple[str, int, int]] = []
        reached = covered = 0
        for document, listing in self.listings:
            pairs = list(zip(document, prompt, strict=False))
            end = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
            if end <= reached:
                continue
            reached = end
            terms = TARIFF.terms(listing.terms)
            if end - covered >= MIN_TOKENS and terms.cache_read_nano_per_mtok <= 20 * INPUT:
                sold.append((listing.document_id, covered, end))
                covered = end
        return sold


@given(st.lists(OFFER, max_size=10), st.lists(DOCUMENT, min_size=1, max_size=4), BUDGET)
@settings(max_examples=300, deadline=None)
def test_nobody_loses_by_what_is_published_later_and_no_buyer_pays_more_than_the_terms(
    offers, prompts, budget
):
    """Random overlapping documents in random order; after each, every prompt is quoted again, for
    buyers with and without limits.
    """
    shop = Shop()
    income: dict[tuple[int, str], int] = {}
    for offer in offers:
        shop.offer(*offer)
        for number, prompt in enumerate(prompts):
            asked = (*prompt, 99)
            quote = shop.quote(asked, budget)
            expected = shop.expected(asked)
            assert [
                (line.listing.document_id, line.start, line.end) for line in quote.lines
            ] == expected[: len(quote.lines)]
            assert len(quote.lines) == len(expected) or budget != Budget()
            assert budget.max_price_nano is None or quote.charge_nano <= budget.max_price_nano
            for publisher in "abc":
                earned = sum(
                    line.royalty_nano
                    for line in quote.lines
                    if line.listing.terms.publisher == publisher
                )
                assert earned >= income.get((number, publisher), 0)
                income[number, publisher] = earned
            named = sum(line.terms.charge_nano(line.end - line.start) for line in quote.lines)
            assert quote.charge_nano == named <= quote.recompute_nano
            assert quote.royalty_nano <= quote.charge_nano
            assert quote.tokens == (quote.lines[-1].end if quote.lines else 0)


def test_a_copy_with_a_separator_takes_nothing():
    """The attack: a document and what buyers type next, ten times dearer, published later."""
    shop = Shop()
    document = tuple(range(1, 601))
    shop.offer(document, "acme", INPUT)
    before = shop.quote((*document, 9, 9, 9))
    shop.offer((*document, 9), "mallory", 20 * INPUT)
    after = shop.quote((*document, 9, 9, 9))
    assert after.lines == before.lines and after.charge_nano == 600
    assert [line.listing.terms.publisher for line in after.lines] == ["acme"]


def test_a_longer_edition_earns_what_it_adds():
    """Each line is rounded down for itself, at its own terms, and trimmed to the prompt."""
    shop = Shop()
    shop.offer(range(1, 101), "acme", 7 * INPUT + 1)
    shop.offer(range(1, 151), "edith", 20 * INPUT)
    quote = shop.quote(range(1, 141))
    assert [(line.start, line.end) for line in quote.lines] == [(0, 100), (100, 139)]
    assert [line.charge_nano for line in quote.lines] == [700, 39 * 20]
    assert [line.royalty_nano for line in quote.lines] == [350, 390]
    assert (quote.tokens, quote.charge_nano) == (139, 700 + 39 * 20)


def test_the_providers_own_documents_pay_no_royalty():
    """The whole charge is the provider's already."""
    match = Match((Segment(changed(listing_of([1] * 10), publisher=PROVIDER), 0, 10),), 10, ())
    assert quote_of(match, TARIFF).royalty_nano == 0
    assert quote_of(None, TARIFF) == Quote(None, 0, (), 0, 0, 0)


def test_the_market_quotes_what_it_sells(tmp_path):
    """Short additions and dear listings are not sold."""
    document = tokens(700)
    with Market.open(tmp_path, {"min_reuse_tokens": 64}) as market:
        publish(market.catalogue, document, publisher="acme")
        publish(market.catalogue, [*document, 5], publisher="mallory")
        dear = market.config.tariff.input_nano_per_mtok + 1
        publish(market.catalogue, tokens(300, 1), cache_read_nano_per_mtok=dear)
        market.catalogue.refresh()
        quote = market.quote(NAMESPACE, [*document, 5, 6], most=701)
        assert [line.listing.terms.publisher for line in quote.lines] == ["acme"]
        assert quote.tokens == 700
        assert market.quote(NAMESPACE, tokens(300, 1)).match is None
        # Under a price cap, what the engine would buy under it.
        first, cheap = market.config.tariff.terms().cache_read_nano_per_mtok, tokens(300, 4)
        publish(market.catalogue, cheap)
        publish(market.catalogue, [*cheap, *tokens(300, 5)], cache_read_nano_per_mtok=first + 1)
        market.catalogue.refresh()
        longer = [*cheap, *tokens(300, 5)]
        assert market.quote(NAMESPACE, longer).tokens == 600
        assert market.quote(NAMESPACE, longer, budget=Budget(first)).tokens == 300
        assert market.quote(NAMESPACE, longer, budget=Budget(first), named=True).tokens == 600
        assert market.quote(NAMESPACE, document[:63]).match is None
        assert market.quote(NAMESPACE, document[:64]).tokens == 64


def test_a_price_cap_buys_what_lies_before_the_first_dearer_segment():
    """A dear addition, published later, takes no sale away from what was there before."""
    shop = Shop()
    shop.offer(range(1, 101), "acme", 7 * INPUT)
    before = shop.quote(range(1, 301))
    shop.offer(range(1, 201), "mallory", 20 * INPUT)
    shop.offer(range(1, 251), "edith", 5 * INPUT)
    match = shop.match(range(1, 301))
    sold = sold_part(match, TARIFF, MIN_TOKENS)
    assert [segment.end for segment in sold.segments] == [100, 200, 250]
    bought = affordable_part(sold, TARIFF, Budget(10 * INPUT))
    assert quote_of(bought, TARIFF).lines == before.lines
    assert affordable_part(sold, TARIFF, Budget(6 * INPUT)) is None
    assert affordable_part(sold, TARIFF, Budget(20 * INPUT)) is sold
    assert affordable_part(sold, TARIFF, Budget()) is sold


def test_a_limit_buys_what_lies_before_the_segment_that_exceeds_it():
    """Of the tokens that can be reused; with a limit of nothing, what is free."""
    shop = Shop()
    shop.offer(range(1, 101), "acme", 0)
    shop.offer(range(1, 201), "mallory", 7 * INPUT)
    shop.offer(range(1, 301), "edith", 20 * INPUT)
    assert shop.quote(range(1, 301), Budget(max_price_nano=0)).tokens == 100
    assert shop.quote(range(1, 301), Budget(max_price_nano=699)).tokens == 100
    assert shop.quote(range(1, 301), Budget(max_price_nano=700)).tokens == 200
    assert shop.quote(range(1, 204), Budget(max_price_nano=740)).tokens == 202
    assert shop.quote(range(1, 301), Budget(max_price_nano=2700)).tokens == 299


def test_a_named_document_is_sold_whole_however_short_its_own_part(tmp_path):
    """A named document is wanted; a request that only matches is not sold a few tokens."""
    document = tokens(700)
    edition = [*document, 5, 6, 7]
    with Market.open(tmp_path) as market:
        publish(market.catalogue, document, publisher="acme")
        publish(market.catalogue, edition, publisher="edith")
        publish(market.catalogue, tokens(20, 3), publisher="shorty")
        assert market.quote(NAMESPACE, edition).tokens == 700
        quote = market.quote(NAMESPACE, edition, named=True)
        assert [(line.start, line.end) for line in quote.lines] == [(0, 700), (700, 703)]
        assert market.quote(NAMESPACE, tokens(20, 3)).match is None
        assert market.quote(NAMESPACE, tokens(20, 3), named=True).tokens == 20


def test_quote_receipt_and_statements_agree_to_the_nano_unit(tmp_path):
    """Odd prices, two publishers: each amount is the same wherever it is shown."""
    document = tokens(333)
    edition = [*document, *tokens(222, 1)]
    with Market.open(tmp_path) as market:
        for name, text, price in (("acme", document, 333_333_333), ("edith", edition, 7_777_777)):
            market.create_account(name, "publisher")
            publish(market.catalogue, text, publisher=name, cache_read_nano_per_mtok=price)
        market.create_account("alice")
        market.deposit("alice", 10**9, "d1")
        quote = market.quote(NAMESPACE, [*edition, 9], most=555)
        item = ReuseItem(quote.match, market.config.tariff, "m", "r")
        assert item.most_nano == quote.charge_nano
        purchase = market.reserve(item, key="k", account="alice")
        while purchase.state() is PurchaseState.RESERVING:
            time.sleep(0.001)
        receipt = purchase.settle(Usage(555, 555, 555, 0, 0, 1, 1))
        purchase.settled.result()
        assert receipt.charge_nano == quote.charge_nano == 110_999 + 1_726
        assert receipt.royalty_nano == quote.royalty_nano == 55_499 + 863
        assert [(line.charge_nano, line.royalty_nano) for line in receipt.lines] == [
            (line.charge_nano, line.royalty_nano) for line in quote.lines
        ]
        bought = statement(market.ledger, "alice").lines[-1]
        assert -bought.amount_nano == quote.charge_nano
        for line in quote.lines:
            sold = statement(market.ledger, line.listing.terms.publisher).lines[-1]
            assert (sold.amount_nano, sold.sale_nano) == (line.royalty_nano, line.charge_nano)
            assert sold.tokens_reused == line.end - line.start
        assert market.ledger.check_integrity() == []


def test_a_listing_that_is_never_sold_does_not_stand_before_others(tmp_path):
    """Listed first, longer and dearer than computing: later documents inside it sell as they are;
    once its price is fair, it has its place back.
    """
    document = tokens(700)
    with Market.open(tmp_path) as market:
        dear = market.config.tariff.input_nano_per_mtok + 1
        first = publish(
            market.catalogue, tokens(900), publisher="mallory", cache_read_nano_per_mtok=dear
        )
        publish(market.catalogue, document, publisher="acme")
        for named in (False, True):
            quote = market.quote(NAMESPACE, [*document, 1], named=named)
            assert [(line.listing.terms.publisher, line.end) for line in quote.lines] == [
                ("acme", 700)
            ]
        assert market.catalogue.check_integrity() == []
        market.catalogue.set_price(first.document_id, dear - 1)
        quote = market.quote(NAMESPACE, [*document, 1])
        assert [line.listing.terms.publisher for line in quote.lines] == ["mallory"]
