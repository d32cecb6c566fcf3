"""The catalogue page by page: the same as the whole list, cut."""

from __future__ import annotations

import time

import pytest

from tests.support.catalogue_documents import publish, tokens
from vllm_kvmarket import Market


@pytest.fixture
def catalogue(tmp_path):
    with Market.open(tmp_path) as market:
        yield market.catalogue


def test_pages_are_the_list_in_parts(catalogue):
    """In its order, each listing once; a page beyond the end is empty, and the total stays."""
    for seed in range(7):
        publish(catalogue, tokens(300, seed), title=f"Book {seed}", created_at_s=float(seed % 3))
    whole = catalogue.listings()
    parts = [catalogue.page(3, offset) for offset in (0, 3, 6, 9)]
    assert [listing for part, _ in parts for listing in part] == whole
    assert [total for _, total in parts] == [7] * 4 and parts[3][0] == []


@pytest.mark.parametrize("search", ["ÄPFEL", "äpfel", "pub", "kvd_", "%", "_", "nothing", ""])
def test_a_search_finds_what_the_list_does(catalogue, search):
    """In upper or lower case, in title, publisher and id; signs of SQL mean themselves."""
    publish(catalogue, tokens(300, 1), title="Äpfel und Birnen", publisher="pub")
    publish(catalogue, tokens(300, 2), title="100% wool", publisher="other")
    found, total = catalogue.page(10, search=search)
    assert found == catalogue.listings(search=search) and total == len(found)


def test_what_is_not_on_offer_is_a_publishers_alone(catalogue):
    """Ended and delisted ones are on no page but their publisher's own."""
    publish(catalogue, tokens(300, 1), publisher="pat")
    gone = publish(catalogue, tokens(300, 2), publisher="pat")
    catalogue.delist(gone.document_id)
    publish(catalogue, tokens(300, 3), publisher="pat", expires_at_s=time.time() - 1)
    publish(catalogue, tokens(300, 4), publisher="patricia")
    assert catalogue.page(10)[1] == 2
    own, total = catalogue.page(10, publisher="pat", on_offer=False)
    assert total == len(own) == 3 and {each.terms.publisher for each in own} == {"pat"}
