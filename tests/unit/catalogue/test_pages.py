"""The catalogue page by page: the same as the whole list, cut."""

from __future__ import annotations

import time

import pytest

from tests.support.catalogue_documents import publish, tokens
from vllm_kvmarket import Market
from vllm_kvmarket.catalogue import ListingFilter, Use


@pytest.fixture
def catalogue(tmp_path):
    with Market.open(tmp_path) as market:
        yield market.catalogue


EVERYTHING = ListingFilter()


def listed(catalogue, wanted):
    return [listing for listing, _ in catalogue.page(wanted, 100)]


def test_pages_are_the_list_in_parts(catalogue):
    """In its order, each listing once; a page beyond the end is empty, and the count stays."""
    for seed in range(7):
        publish(catalogue, tokens(300, seed), title=f"Book {seed}", created_at_s=float(seed % 3))
    whole = catalogue.listings()
    parts = [catalogue.page(EVERYTHING, 3, offset=offset) for offset in (0, 3, 6, 9)]
    assert [listing for part in parts for listing, _ in part] == whole
    assert catalogue.count(EVERYTHING) == 7 and parts[3] == []


@pytest.mark.parametrize("order", ["age", "reuse", "price"])
def test_every_order_goes_on_behind_the_last_one(catalogue, order):
    """By number and id, also where many have the same number, while others come and go."""
    made = [
        publish(
            catalogue,
            tokens(300, seed),
            created_at_s=float(seed % 3),
            cache_read_nano_per_mtok=(None, 5, 900)[seed % 3],
        )
        for seed in range(12)
    ]
    catalogue.note_uses([Use(each.document_id, 300, 1, 1.0) for each in made[:5] + made[:2]])
    wanted = ListingFilter(order=order, default_price=500)
    whole = catalogue.page(wanted, 100)
    numbers = [(number, listing.document_id) for listing, number in whole]
    assert numbers == sorted(numbers) and len({number for number, _ in numbers}) == 3
    seen, last = [], None
    while part := catalogue.page(wanted, 5, after=last):
        seen += [listing.document_id for listing, _ in part]
        last = (part[-1][1], part[-1][0].document_id)
        catalogue.delist(seen[-1])
    assert seen == [name for _, name in numbers]


@pytest.mark.parametrize("search", ["ÄPFEL", "äpfel", "pub", "kvd_", "%", "_", "nothing", ""])
def test_a_search_finds_what_the_list_does(catalogue, search):
    """In upper or lower case, in title, publisher and id; signs of SQL mean themselves."""
    publish(catalogue, tokens(300, 1), title="Äpfel und Birnen", publisher="pub")
    publish(catalogue, tokens(300, 2), title="100% wool", publisher="other")
    wanted = ListingFilter(search=search)
    expected = [
        each
        for each in catalogue.listings()
        for terms in [each.terms]
        if search.casefold() in f"{terms.title}\n{terms.publisher}\n{each.document_id}".casefold()
    ]
    assert listed(catalogue, wanted) == expected and catalogue.count(wanted) == len(expected)


def test_what_is_not_on_offer_is_a_publishers_alone(catalogue):
    """Ended and delisted ones are on no page but their publisher's own, and an admin's."""
    publish(catalogue, tokens(300, 1), publisher="pat")
    gone = publish(catalogue, tokens(300, 2), publisher="pat")
    catalogue.delist(gone.document_id)
    publish(catalogue, tokens(300, 3), publisher="pat", expires_at_s=time.time() - 1)
    publish(catalogue, tokens(300, 4), publisher="patricia")
    assert catalogue.count(EVERYTHING) == 2
    own = ListingFilter(publisher="pat", any_state=True, seen_by="pat")
    assert {each.terms.publisher for each in listed(catalogue, own)} == {"pat"}
    assert len(listed(catalogue, own)) == catalogue.count(own) == 3
    assert catalogue.ids(own) == [each.document_id for each in listed(catalogue, own)]
    for who, sees_all, found in (("pat", False, 1), ("eve", False, 0), (None, True, 1)):
        wanted = ListingFilter(state="delisted", seen_by=who, sees_all=sees_all)
        assert len(listed(catalogue, wanted)) == found
    stranger = ListingFilter(publisher="pat", any_state=True, seen_by="eve")
    assert len(listed(catalogue, stranger)) == 1
