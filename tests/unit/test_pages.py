"""The pages on a real market, in a plain FastAPI app."""

from __future__ import annotations

import pytest
from catalogue_documents import publish, tokens
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_kvmarket import Market
from vllm_kvmarket.api.pages import PAGE_ROWS, pages
from vllm_kvmarket.catalogue import Use


@pytest.fixture
def market(tmp_path):
    with Market.open(tmp_path) as market:
        yield market


@pytest.fixture
def browser(market):
    app = FastAPI()
    app.include_router(pages(market))
    with TestClient(app) as client:
        yield client


def test_the_catalogue_is_searched(market, browser):
    """Titles that fit are shown, others not."""
    publish(market.catalogue, tokens(300, 1), title="Whales")
    publish(market.catalogue, tokens(300, 2), title="Birds")
    assert "Whales" in browser.get("/kvmarket").text
    found = browser.get("/kvmarket", params={"search": "Bird"}).text
    assert "Birds" in found and "Whales" not in found
    assert "No document" in browser.get("/kvmarket", params={"search": "zzz"}).text


def test_what_publishers_write_is_never_markup(market, browser):
    """A title and a search are escaped, and the policy allows no script at all."""
    listing = publish(market.catalogue, tokens(300), title="<script>alert(1)</script>")
    for path in ("/kvmarket?search=<script>", f"/kvmarket/documents/{listing.document_id}"):
        answer = browser.get(path)
        assert answer.status_code == 200 and "<script" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_document_shows_its_use(market, browser):
    """Reuse and tokens saved come from the catalogue."""
    listing = publish(market.catalogue, tokens(300))
    market.catalogue.note_uses([Use(listing.document_id, 271, 5, 1.0)])
    page = browser.get(f"/kvmarket/documents/{listing.document_id}").text
    assert "<td>271</td>" in page and "<td>300</td>" in page and "<svg" in page


def test_what_is_not_on_offer_is_not_shown(market, browser):
    """A delisted, an ended and an unknown document are missing alike."""
    gone = publish(market.catalogue, tokens(300, 1), title="gone")
    market.catalogue.delist(gone.document_id)
    over = publish(market.catalogue, tokens(300, 2), title="over", expires_at_s=1.0)
    for name in (gone.document_id, over.document_id, "kvd_unknown"):
        assert browser.get(f"/kvmarket/documents/{name}").status_code == 404
    assert "/kvmarket/documents/" not in browser.get("/kvmarket").text


def test_a_long_catalogue_has_pages(market, browser):
    """Each page links to the next, the last to none."""
    for seed in range(PAGE_ROWS + 1):
        publish(market.catalogue, tokens(20, seed))
    first, last = (browser.get("/kvmarket", params={"page": page}).text for page in (1, 2))
    assert first.count("/kvmarket/documents/") == PAGE_ROWS and "Next page" in first
    assert last.count("/kvmarket/documents/") == 1 and "Next page" not in last


def test_the_style_is_served_from_here(browser):
    """Nothing comes from another host."""
    answer = browser.get("/kvmarket/static/market.css")
    assert answer.headers["content-type"].startswith("text/css")
    assert "://" not in browser.get("/kvmarket").text + answer.text
