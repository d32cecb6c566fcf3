"""Publishing on the pages: the form, a document on its way, and changes to it."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from tests.support.api_server import CONTEXT, publish, running, text_of
from tests.support.page_visitor import Visitor, text_in


@pytest.fixture
def pat(server):
    visitor = Visitor(server.app)
    visitor.sign_in(server.keys["pat"])
    return visitor


def place_of(answer):
    assert answer.status_code == 303, answer.text
    return answer.headers["location"].removeprefix("/kvmarket")


def watched(visitor, place):
    """The page of a document, when it says that it is no longer on its way."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        page = visitor.get(place)
        if text_in(page, "state") != "publishing":
            break
        assert page.headers["refresh"] == "2"
        time.sleep(0.02)
    return page


def test_a_document_is_published_and_goes_live(server, pat):
    """The form's terms are the listing's; it is in the catalogue when its page says live."""
    sent = pat.send(
        "/publish", "publish", title="Whales & co", text=text_of(60), rendered_as="chat",
        price="0.25", ttl="48",
    )  # fmt: skip
    page = watched(pat, place_of(sent))
    assert text_in(page, "state") == "live" and "refresh" not in page.headers
    (listing,) = server.market.catalogue.listings()
    assert (listing.terms.title, listing.terms.publisher, listing.terms.rendered_as) == (
        "Whales & co",
        "pat",
        "chat",
    )
    assert listing.terms.cache_read_nano_per_mtok == 250_000_000
    assert 47 * 3600 < listing.terms.expires_at_s - time.time() <= 48 * 3600
    assert "Whales &amp; co" in Visitor(server.app).get().text
    assert "Whales &amp; co" in pat.get("/publish").text


def test_a_failure_is_shown_with_its_reason(server, pat):
    """A document that the engine declined has failed, and the page shows why, escaped."""
    server.engine.declines = "the store is <full>"
    sent = pat.send("/publish", "publish", title="Whales", text=text_of(60))
    page = watched(pat, place_of(sent))
    assert text_in(page, "state") == "failed"
    assert "the store is &lt;full&gt;" in page.text


def test_watching_can_be_left_to_the_reader(server, pat):
    """The page that looks again by itself has a way to stop that."""
    server.engine.operate = never
    place = place_of(pat.send("/publish", "publish", title="Whales", text=text_of(60)))
    page = pat.get(place)
    assert text_in(page, "state") == "publishing" and page.headers["refresh"] == "2"
    still = re.search(r'href="/kvmarket([^"]*wait=false)"', page.text)[1]
    assert "refresh" not in pat.get(still).headers


async def never(tokens, wish):
    """An engine that is still at it when the server stops."""
    await asyncio.sleep(3600)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"title": " "}, "title:"),
        ({"text": " \r\n"}, "text:"),
        ({"text": "too short"}, "fewer than one block"),
        ({"text": text_of(CONTEXT + 1)}, "context"),
        ({"price": "cheap"}, "price: expected an amount"),
        ({"price": "-1"}, "price: expected an amount"),
        ({"price": "6"}, "price: computing costs"),
        ({"ttl": "0"}, "ttl:"),
        ({"ttl": "nan"}, "ttl:"),
        ({"ttl": "1e12"}, "ttl:"),
        ({"title": "x" * 513}, "title:"),
        ({"title": "a\nb"}, "title:"),
        ({"rendered_as": "pdf"}, "rendered_as:"),
    ],
)
def test_what_cannot_be_published_comes_back_with_the_reason(server, pat, fields, said):
    """The form keeps what was written, and nothing is published."""
    wish = {"title": "Whales", "text": text_of(60), "rendered_as": "text"} | fields
    answer = pat.send("/publish", "publish", **wish)
    assert answer.status_code in (400, 413)
    assert said in text_in(answer, "problem")
    assert 'name="title"' in answer.text and server.market.catalogue.listings() == []
    if "text" not in fields:
        assert "w59</textarea>" in answer.text


def test_a_body_beyond_the_limit_is_refused(tmp_path):
    """As the API does, before it is read."""
    with running(tmp_path, max_body_bytes=4096) as server:
        visitor = Visitor(server.app)
        visitor.sign_in(server.keys["pat"])
        answer = visitor.send("/publish", "publish", title="T", text="w" * 20_000)
        assert answer.status_code == 413 and "<h1>" in answer.text


def test_what_was_written_is_what_is_published(server, pat):
    """A browser's line ends become the text's own; nothing else changes."""
    text = "Zeile eins ä\r\n  zwei & <drei>\r\n" + text_of(60)
    place_of(pat.send("/publish", "publish", title="T", text=text))
    expected = server.engine.document(text.replace("\r\n", "\n"), None, "text")
    (listing,) = server.market.catalogue.listings()
    assert server.market.catalogue.tokens_of(listing.document_id) == expected


def test_terms_are_changed_and_a_document_is_taken_off(server, pat):
    """Price and time to live as written; delisted, it is in no catalogue."""
    made = publish(server, title="Whales", text=text_of(60))
    place = f"/offers/{made['id']}"
    assert place_of(pat.send(place, "terms", price="0.125", ttl="2")) == place
    listing = server.market.catalogue.get(made["id"])
    assert listing.terms.cache_read_nano_per_mtok == 125_000_000
    assert 0 < listing.terms.expires_at_s - time.time() <= 7200
    place_of(pat.send(place, "terms", price=""))
    again = server.market.catalogue.get(made["id"])
    assert (
        again.terms.cache_read_nano_per_mtok is None
        and again.terms.expires_at_s == listing.terms.expires_at_s
    )
    refused = pat.send(place, "terms", price="900")
    assert refused.status_code == 400 and "price: computing costs" in text_in(refused, "problem")
    assert place_of(pat.send(place, "delist")) == place
    assert text_in(pat.get(place), "state") == "delisted"
    assert "Whales" not in Visitor(server.app).get().text


def test_others_documents_are_not_touched(server, pat):
    """Another publisher finds no page, and its own token does not help; buyers may not publish."""
    made = publish(server, title="Whales", text=text_of(60))
    place = f"/kvmarket/offers/{made['id']}"
    eve = Visitor(server.app)
    eve.sign_in(server.keys["eve"])
    csrf = re.search(r'name="csrf" value="([^"]+)"', eve.get("/publish").text)[1]
    for path in ("", "/terms", "/delist"):
        method = eve.client.post if path else eve.client.get
        data = {"data": {"csrf": csrf, "price": "1"}} if path else {}
        assert method(place + path, **data).status_code == 404
    assert server.market.catalogue.get(made["id"]).state == "live"
    bea = Visitor(server.app)
    bea.sign_in(server.keys["bea"])
    assert bea.get("/publish").status_code == 403
    assert "Publish</a>" not in bea.get("/money").text


def test_an_engine_is_needed_to_publish(tmp_path):
    """A server without one says so."""
    with running(tmp_path, engine=False) as server:
        visitor = Visitor(server.app)
        visitor.sign_in(server.keys["pat"])
        assert "no engine" in visitor.get("/publish").text
        answer = visitor.send("/publish", "publish", title="T", text=text_of(60))
        assert answer.status_code == 503 and "no engine" in text_in(answer, "problem")
