"""The pages that everybody sees: catalogue, documents, and what all pages have."""

from __future__ import annotations

import re

import pytest

from tests.support.api_server import publish, running, text_of
from tests.support.page_visitor import Visitor, sell
from vllm_kvmarket.api.models import Document, Prices, Reuse
from vllm_kvmarket.api.pages import public_pages
from vllm_kvmarket.api.pages.charts import break_even
from vllm_kvmarket.catalogue import Use


@pytest.fixture
def browser(server):
    return Visitor(server.app)


def test_the_catalogue_is_searched(server, browser):
    """Titles that fit are shown, others not."""
    publish(server, title="Whales", text=text_of(60, "a"))
    publish(server, title="Birds", text=text_of(60, "b"))
    assert "Whales" in browser.get().text
    found = browser.get(search="bird").text
    assert "Birds" in found and "Whales" not in found
    assert "No document" in browser.get(search="zzz").text


def test_what_people_write_is_never_markup(server, browser):
    """A title, a search and an account's name are escaped, wherever they stand."""
    nasty = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    made = publish(server, title=nasty, text=text_of(60))
    visitor = Visitor(server.app)
    visitor.sign_in(server.keys["pat"])
    offers = f"/offers/{made['id']}"
    for path, query in (
        ("", {"search": nasty}),
        ("", {}),
        (f"/documents/{made['id']}", {}),
        ("/publish", {}),
        (offers, {}),
    ):
        answer = visitor.get(path, **query)
        assert answer.status_code == 200 and "&lt;script" in answer.text
        assert "<script" not in answer.text and "<img" not in answer.text


def test_every_page_has_its_headers_and_landmarks(server, browser):
    """A policy without scripts, no framing, one heading, a language, a way past the navigation."""
    made = publish(server, title="Whales", text=text_of(60))
    for path, status in (
        ("", 200),
        (f"/documents/{made['id']}", 200),
        ("/signin", 200),
        ("/documents/kvd_unknown", 404),
        ("/nowhere/at/all", 404),
        ("/static/nothing", 404),
    ):
        answer = browser.get(path)
        assert answer.status_code == status, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "script-src" not in policy
        assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        page = answer.text
        assert page.count("<h1") == 1 and '<html lang="en">' in page and "<main" in page
        assert page.index('class="skip"') < page.index("<nav")
        assert " style=" not in page and "javascript:" not in page and "<script" not in page


def test_nothing_comes_from_another_host(server, browser):
    """Style and icon are packaged; no page and no style names another server."""
    style, icon = browser.get("/static/market.css"), browser.get("/static/icon.svg")
    assert style.headers["content-type"].startswith("text/css")
    assert icon.headers["content-type"].startswith("image/svg")
    assert "prefers-color-scheme: dark" in style.text and "url(" not in style.text
    made = publish(server, title="Whales", text=text_of(60))
    for path in ("", f"/documents/{made['id']}", "/signin"):
        for link in re.findall(r'(?:href|src|action)="([^"]*)"', browser.get(path).text):
            assert link.startswith(("/kvmarket", "#")), link


def test_a_document_shows_its_use_and_how_to_use_it(server, browser):
    """Reuse and tokens saved come from the catalogue, the chart from receipts; code has the id."""
    made = publish(server, title="Whales", text=text_of(1500))
    server.market.catalogue.note_uses([Use(made["id"], 1271, 5, 1.0)])
    sell(server, text_of(1500))
    page = browser.get(f"/documents/{made['id']}").text
    assert "1,271" in page and "1,500" in page
    assert page.count(f'"kvmarket": {{"document": "{made["id"]}"}}') == 2
    assert page.count("<svg") == 2 and page.count("<desc") == 2 and page.count("<details") == 2
    assert "1,499 tokens in 1 reuses" in page


@pytest.mark.parametrize(
    ("form", "shown", "other"),
    [
        ("text", ("completions.create", "/v1/completions"), "chat"),
        ("chat", ("chat.completions.create", "/v1/chat/completions"), "prompt="),
    ],
)
def test_the_code_fits_the_form_of_the_document(server, browser, form, shown, other):
    """A document of plain text goes in front of a completion, one of chat in front of a chat."""
    made = publish(server, title="Whales", text=text_of(700), **{"as": form})
    page = browser.get(f"/documents/{made['id']}").text
    code = "".join(re.findall(r"<pre.*?</pre>", page, re.DOTALL))
    assert all(each in code for each in shown) and other not in code


def test_what_is_not_on_offer_is_not_shown(server, browser):
    """A delisted and an unknown document are missing alike."""
    made = publish(server, title="Whales", text=text_of(60))
    server.market.delist(made["id"])
    pages = [browser.get(f"/documents/{name}") for name in (made["id"], "kvd_unknown")]
    assert [page.status_code for page in pages] == [404, 404]
    assert pages[0].text.replace(made["id"], "") == pages[1].text.replace("kvd_unknown", "")
    assert made["id"] not in browser.get().text


def test_a_long_catalogue_has_pages(server, browser, monkeypatch):
    """Each page links to the next and the one before, and has its own rows."""
    monkeypatch.setattr(public_pages, "PAGE_ROWS", 2)
    for name in "abcde":
        publish(server, title=f"Book {name}", text=text_of(40, name))
    pages = [browser.get(page=number).text for number in (1, 2, 3)]
    titles = [re.findall(r"Book \w", page) for page in pages]
    assert [len(found) for found in titles] == [2, 2, 1]
    assert len({title for found in titles for title in found}) == 5
    assert "Next page" in pages[1] and "Previous page" in pages[1]
    assert "Next page" not in pages[2] and "Previous page" not in pages[0]


def test_who_is_not_signed_in_reads_nothing_where_the_configuration_says_so(tmp_path):
    """With anonymous: refuse, the catalogue asks for a key; with one it is shown."""
    with running(tmp_path, anonymous="refuse") as server:
        visitor = Visitor(server.app)
        answer = visitor.get()
        assert answer.status_code == 303
        assert answer.headers["location"] == "/kvmarket/signin?next=/kvmarket"
        visitor.sign_in(server.keys["bea"])
        assert visitor.get().status_code == 200


def test_a_server_behind_a_path_links_within_it(server):
    """A proxy's path stands before every link, and cookies stay below it."""
    visitor = Visitor(server.app)
    visitor.client = type(visitor.client)(server.app, root_path="/market", follow_redirects=False)
    page = visitor.client.get("/market/kvmarket/signin")
    links = re.findall(r'(?:href|action)="([^"#]+)"', page.text)
    assert links and all(link.startswith("/market/kvmarket") for link in links)
    assert "Path=/market/kvmarket" in page.headers["set-cookie"]


def test_a_server_without_a_market_says_so(server, browser):
    """Started without the connector, the pages are not there."""
    server.app.state.kvmarket_service, kept = None, server.app.state.kvmarket_service
    answer = browser.get()
    server.app.state.kvmarket_service = kept
    assert answer.status_code == 404 and "--kv-connector" in answer.text


def shown(charge_nano, recompute_nano, even):
    """A document at these prices."""
    return Document(
        id="kvd_x", title="", publisher="pat", state="live", reason="", rendered_as="text",
        created_at=1.0, expires_at=None, pinned=False, tokens=600, chunks=1,
        stored_bytes=1, namespace="", prices=Prices(
            currency="USD", input_nano_per_mtok=1, cache_read_nano_per_mtok=1, royalty_ppm=0
        ),
        charge_nano=charge_nano, recompute_nano=recompute_nano, write_nano=0,
        reuse=Reuse(count=0, tokens_saved=0, earned_nano=0, last_used_at=None),
        break_even_reuses=even, paid_back_after_reuses=0, audit=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("charge", "recompute", "even"),
    [(500, 5000, 2), (4900, 5000, 50), (5000, 5000, None), (0, 0, 0)],
)
def test_the_break_even_chart_crosses_where_it_says(charge, recompute, even):
    """At its mark computing has cost at least what reuse has; its table says the same amounts."""
    figure = break_even(shown(charge, recompute, even))
    rows = {int(row[0]): [round(float(cell) * 1e9) for cell in row[1:]] for row in figure.rows}
    for reads, (computed, reused) in rows.items():
        assert computed == reads * recompute and reused == recompute + reads * charge
    if even:
        assert rows[even][0] >= rows[even][1] and f"read {even}" in figure.title
    elif even is None:
        assert "never" in figure.title
